//! A server in this process, asked over loopback like any other.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::app::App;
use crate::config::Config;

/// The address that it listens on.
const HOST: &str = "127.0.0.1";

/// A running server.
pub(super) struct Local {
    /// Its address.
    pub(super) url: String,
    /// Rows of the model's vocabulary.
    pub(super) vocab_size: usize,
    /// Seconds it took to get ready.
    pub(super) start_s: f64,
    runtime: Runtime,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<()>>,
    /// Its store, which goes away with it.
    _root: TempDir,
}

impl Local {
    /// Starts a server over a scratch store that shows the adapter directories of the configured root under `copies` names
    /// each. Directories to be loaded by path are added to the roots.
    pub(super) fn start<'a>(
        config: &Config,
        copies: usize,
        readable: impl Iterator<Item = &'a PathBuf>,
    ) -> Result<Self> {
        let root = tempfile::tempdir().context("making a scratch store")?;
        let mut config = config.clone();
        link_adapters(&config.adapters.root, root.path(), copies)?;
        config.server.host = HOST.to_owned();
        let shown = std::mem::replace(&mut config.adapters.root, root.path().to_owned());
        config.adapters.extra_roots.push(shown);
        config.adapters.extra_roots.extend(readable.cloned());
        let started = Instant::now();
        let runtime = Runtime::new().context("starting the server's runtime")?;
        let (stop, stopped) = oneshot::channel::<()>();
        let (listener, app) = runtime.block_on(async {
            let listener = TcpListener::bind((HOST, 0)).await.context("opening a port")?;
            anyhow::Ok((listener, App::build(config).await?))
        })?;
        let url = format!("http://{}", listener.local_addr().context("reading the port")?);
        let vocab_size = app.state.engine.limits().vocab_size;
        let task = runtime.spawn(app.serve(listener, async { drop(stopped.await) }));
        let start_s = started.elapsed().as_secs_f64();
        Ok(Self { url, vocab_size, start_s, runtime, stop, task, _root: root })
    }

    /// Drains it and waits for its end.
    pub(super) fn stop(self) -> Result<()> {
        drop(self.stop);
        let ended = self.runtime.block_on(self.task).context("the server panicked")?;
        self.runtime.shutdown_background();
        ended
    }
}

/// Links every adapter directory of `from` into `to`, under its name and, for further copies, `<name>.<number>`.
fn link_adapters(from: &Path, to: &Path, copies: usize) -> Result<()> {
    let what = || format!("{} (adapters.root)", from.display());
    if !from.is_dir() {
        return Ok(());
    }
    let from = from.canonicalize().with_context(what)?;
    for entry in from.read_dir().with_context(what)? {
        let dir = entry.with_context(what)?;
        if !dir.path().join("adapter_config.json").is_file() {
            continue;
        }
        let name = dir.file_name();
        for copy in 0..copies {
            let mut name = name.clone();
            if copy > 0 {
                name.push(format!(".{copy}"));
            }
            symlink(dir.path(), to.join(name)).with_context(what)?;
        }
    }
    Ok(())
}
