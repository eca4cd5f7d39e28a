//! `patchbay adapter inspect`: what an adapter's files hold, without a base model.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use super::adapter;
use crate::adapter::inspect;
use crate::config::Config;

/// Says what the directory holds; fails when something speaks against loading it.
pub(super) fn run(dir: &Path, out: &mut dyn Write) -> Result<()> {
    let files = adapter::read(dir, Config::default().adapters.upload_bytes_max)?;
    let found = inspect(&files).with_context(|| dir.display().to_string())?;
    writeln!(out, "kind      {}", found.kind)?;
    writeln!(out, "tensors   {}, {} bytes", found.tensors, found.bytes)?;
    if !found.ranks.is_empty() {
        let ranks: Vec<String> = found.ranks.iter().map(ToString::to_string).collect();
        writeln!(out, "ranks     {}", ranks.join(", "))?;
    }
    writeln!(out, "modules   {}", found.modules.len())?;
    for (path, layers) in by_layer(&found.modules) {
        let layers = match layers.len() {
            0 => String::new(),
            1 => format!(" (layer {})", ranges(&layers)),
            _ => format!(" (layers {})", ranges(&layers)),
        };
        writeln!(out, "          {path}{layers}")?;
    }
    for problem in &found.problems {
        writeln!(out, "problem   {problem}")?;
    }
    match found.problems.len() {
        0 => Ok(()),
        1 => bail!("{} cannot be served: 1 problem", dir.display()),
        count => bail!("{} cannot be served: {count} problems", dir.display()),
    }
}

/// Paths with `*` for the layer's number, each with the numbers.
fn by_layer(modules: &[String]) -> BTreeMap<String, BTreeSet<usize>> {
    let mut paths = BTreeMap::<String, BTreeSet<usize>>::new();
    for module in modules {
        let mut components: Vec<&str> = module.split('.').collect();
        let number = components.iter().enumerate().find_map(|(at, part)| Some((at, part.parse::<usize>().ok()?)));
        if let Some((at, _)) = number {
            components[at] = "*";
        }
        paths.entry(components.join(".")).or_default().extend(number.map(|(_, layer)| layer));
    }
    paths
}

/// `0-3, 7` for 0, 1, 2, 3, 7.
fn ranges(numbers: &BTreeSet<usize>) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => runs.push((*number, *number)),
        }
    }
    let run =
        |(first, last): &(usize, usize)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    runs.iter().map(run).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_modules_of_layers_are_one_line() {
        let modules = ["lm_head", "m.layers.0.q", "m.layers.1.q", "m.layers.10.q", "m.layers.2.q", "m.layers.2.v"];
        let found = by_layer(&modules.map(str::to_owned));
        let found: Vec<String> = found.iter().map(|(path, layers)| format!("{path} {}", ranges(layers))).collect();
        assert_eq!(found, ["lm_head ", "m.layers.*.q 0-2, 10", "m.layers.*.v 2"]);
    }
}
