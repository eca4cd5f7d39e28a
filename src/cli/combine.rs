//! `patchbay adapter combine`: several adapter directories to one.

use std::io::Write;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Result;
use clap::Args;
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::{Error as ValueError, StrDeserializer};

use super::adapter;
use super::convert::{check_absent, write_new};
use crate::adapter::{AdapterFiles, CombineInput, CombineMode, CombineOptions, combine, inspect};
use crate::config::Config;
use crate::store::AdapterDirectory;

/// What to combine, how, and where to.
#[derive(Debug, Args)]
pub(super) struct CombineArgs {
    /// How: mean, stack (the exact weighted sum), fair (means, corrected), ties, dare.
    #[arg(long, value_name = "MODE", value_parser = mode)]
    mode: CombineMode,
    /// Directory to write; it must not exist yet.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// With stack: the rank to cut the result down to.
    #[arg(long)]
    rank: Option<usize>,
    /// With ties and dare: the share of values that are kept, up to 1.
    #[arg(long)]
    density: Option<f64>,
    /// With dare: seed of the random choice [default: 0].
    #[arg(long)]
    seed: Option<u64>,
    /// With fair: how much a large correction costs [default: 0.01].
    #[arg(long)]
    lambda: Option<f64>,
    /// Adapter directories, each with a weight behind `=` where that is not 1.
    #[arg(required = true, value_name = "DIR[=WEIGHT]")]
    adapters: Vec<Weighted>,
}

/// An adapter directory with its weight.
#[derive(Clone, Debug, PartialEq)]
struct Weighted {
    dir: PathBuf,
    weight: f32,
}

impl FromStr for Weighted {
    type Err = std::convert::Infallible;

    /// What is behind the last `=` is a weight if it is a number; else all of it is a path.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let weighted = text.rsplit_once('=').and_then(|(dir, weight)| Some((dir, weight.parse().ok()?)));
        let (dir, weight) = weighted.unwrap_or((text, 1.0));
        Ok(Self { dir: PathBuf::from(dir), weight })
    }
}

fn mode(text: &str) -> Result<CombineMode, ValueError> {
    let text: StrDeserializer<'_, ValueError> = text.into_deserializer();
    CombineMode::deserialize(text)
}

/// Combines the directories and says what came out.
pub(super) fn run(arguments: &CombineArgs, out: &mut dyn Write) -> Result<()> {
    let CombineArgs { mode, rank, density, seed, lambda, .. } = *arguments;
    let options = CombineOptions { mode, rank, density, seed, lambda };
    check_absent(&arguments.out)?;
    let bytes_max = Config::default().adapters.upload_bytes_max;
    let read = |weighted: &Weighted| -> Result<(String, AdapterFiles)> {
        Ok((weighted.dir.display().to_string(), adapter::read(&weighted.dir, bytes_max)?))
    };
    let files: Vec<(String, AdapterFiles)> = arguments.adapters.iter().map(read).collect::<Result<_>>()?;
    let inputs = arguments.adapters.iter().zip(&files);
    let inputs: Vec<CombineInput<'_>> =
        inputs.map(|(weighted, (name, files))| CombineInput { name, files, weight: weighted.weight }).collect();
    let combined = combine(&inputs, &options)?;
    let found = inspect(&combined)?;
    write_new(&arguments.out, |temp| Ok(AdapterDirectory::write(temp, &combined)?))?;
    let ranks: Vec<String> = found.ranks.iter().map(ToString::to_string).collect();
    writeln!(out, "wrote the adapter {}", arguments.out.display())?;
    writeln!(
        out,
        "{}: {} modules, ranks {}, {} bytes",
        found.kind,
        found.modules.len(),
        ranks.join(", "),
        found.bytes
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_stands_behind_the_last_equals_sign() {
        let check = |text: &str, dir: &str, weight: f32| {
            assert_eq!(text.parse(), Ok(Weighted { dir: PathBuf::from(dir), weight }), "{text}");
        };
        check("a/b", "a/b", 1.0);
        check("a/b=0.5", "a/b", 0.5);
        check("a=b=-2", "a=b", -2.0);
        check("lr=1e-4", "lr", 1e-4);
        check("a=b", "a=b", 1.0);
    }

    #[test]
    fn modes_are_known_by_name() {
        assert_eq!(mode("fair").unwrap(), CombineMode::Fair);
        assert!(mode("svd").unwrap_err().to_string().contains("stack"));
    }
}
