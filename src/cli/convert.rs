//! `patchbay adapter convert`: an adapter's directory in another form, or a model directory with it merged in.

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::Args;

use super::adapter;
use super::settings::SettingsArgs;
use crate::adapter::{AdapterError, Converted, Form, convert};
use crate::model::{self, DeviceChoice, DtypeChoice, KernelChoice, Model, ModelConfig};
use crate::store::AdapterDirectory;

#[derive(Debug, Args)]
pub(super) struct ConvertArgs {
    /// Directory with adapter_config.json and adapter_model.safetensors.
    dir: PathBuf,
    /// What to convert it to.
    #[arg(long, value_name = "FORM")]
    to: Form,
    /// Directory to write; it must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    settings: Box<SettingsArgs>,
}

/// Converts, and says what was written; `out` is where that goes.
pub(super) fn run(arguments: ConvertArgs, out: &mut dyn Write) -> Result<()> {
    let ConvertArgs { dir, to, out: target, settings } = arguments;
    check_absent(&target)?;
    let config = settings.resolve()?.config;
    let files = adapter::read(&dir, config.adapters.upload_bytes_max)?;
    // The checkpoint's own weights, as they are: neither quantised nor packed for speed.
    let model_config = ModelConfig {
        device: DeviceChoice::Cpu,
        dtype: DtypeChoice::Auto,
        quant: None,
        kernels: KernelChoice::Plain,
        ..config.model
    };
    let what = || format!("loading the model {} (model.path)", model_config.path);
    let model_dir = model::locate(&model_config).with_context(what)?;
    let model = Model::load(&model_dir, &model_config).with_context(what)?;
    let dtype = model::stored_dtype(&model_dir).with_context(what)?;
    let converted = convert(&files, &model, to, dtype).map_err(|refusal| match refusal {
        AdapterError::Compute(_) => anyhow!(refusal),
        _ => anyhow!("{}: {refusal}", dir.display()),
    })?;
    drop(model);
    let (kind, warnings) = match converted {
        Converted::Adapter(files, warnings) => {
            write_new(&target, |temp| Ok(AdapterDirectory::write(temp, &files)?))?;
            ("adapter", warnings)
        }
        Converted::Model(merged, warnings) => {
            write_new(&target, |temp| Ok(model::write_merged(&model_dir, &merged, temp)?))?;
            ("model", warnings)
        }
    };
    writeln!(out, "wrote the {kind} {}", target.display())?;
    for warning in warnings {
        writeln!(out, "warning   {warning}")?;
    }
    Ok(())
}

/// Refuses a target that exists.
pub(super) fn check_absent(target: &Path) -> Result<()> {
    match fs::symlink_metadata(target) {
        Ok(_) => bail!("{} exists; nothing is overwritten", target.display()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| target.display().to_string()),
    }
}

/// Makes the directory `target`, and those above it, with what `fill` puts into it: all of it, or nothing.
pub(super) fn write_new(target: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let what = || format!("writing {}", target.display());
    fs::create_dir_all(parent).with_context(what)?;
    // Made beside the target, so that the last step is a rename; with the permissions of any new directory.
    let temp = tempfile::Builder::new()
        .prefix(".patchbay-")
        .permissions(fs::Permissions::from_mode(0o777))
        .tempdir_in(parent)
        .with_context(what)?;
    fill(temp.path()).with_context(what)?;
    for entry in fs::read_dir(temp.path()).with_context(what)? {
        fs::File::open(entry.with_context(what)?.path()).and_then(|file| file.sync_all()).with_context(what)?;
    }
    check_absent(target)?;
    fs::rename(temp.path(), target).with_context(what)?;
    // The directory has another name now; there is nothing left to remove.
    let _ = temp.keep();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_appears_whole_or_not_at_all() {
        let temp = tempfile::tempdir().unwrap();
        let target = temp.path().join("new");
        let failed = write_new(&target, |dir| {
            fs::write(dir.join("half"), "x")?;
            bail!("no more")
        });
        assert!(format!("{:#}", failed.unwrap_err()).contains("no more"));
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
        write_new(&target, |dir| Ok(fs::write(dir.join("whole"), "x")?)).unwrap();
        assert_eq!(fs::read_to_string(target.join("whole")).unwrap(), "x");
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
        let error = write_new(&target, |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("nothing is overwritten"), "{error}");
        assert_eq!(fs::read_to_string(target.join("whole")).unwrap(), "x");
    }
}
