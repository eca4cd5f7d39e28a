//! `patchbay serve`: logging, the runtime, the signals.

use std::io::{self, IsTerminal as _};
use std::process;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::app;
use crate::config::{Config, LogConfig, LogFormat};

/// Serves until a signal, then drains.
pub(super) fn serve(config: Config) -> anyhow::Result<()> {
    init_logging(&config.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    let outcome = runtime.block_on(async {
        let stop = stop_signal()?;
        let address = (config.server.host.clone(), config.server.port);
        let listener = TcpListener::bind(&address)
            .await
            .with_context(|| format!("listening on {}:{} (server.host, server.port)", address.0, address.1))?;
        app::run(config, listener, stop).await
    });
    // A model that is still loading must not hold up the exit.
    runtime.shutdown_background();
    outcome
}

/// Ends with the first SIGINT or SIGTERM; the second ends the process.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()> + Send> {
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    Ok(async move {
        either(&mut interrupt, &mut terminate).await;
        tokio::spawn(async move {
            either(&mut interrupt, &mut terminate).await;
            tracing::warn!("stopped by a second signal");
            process::exit(1);
        });
    })
}

async fn either(a: &mut Signal, b: &mut Signal) {
    tokio::select! {
        _ = a.recv() => {}
        _ = b.recv() => {}
    }
}

/// Starts the log.
pub(super) fn init_logging(config: &LogConfig) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.level).context("log.level")?;
    let json = match config.format {
        LogFormat::Auto => !io::stderr().is_terminal(),
        LogFormat::Human => false,
        LogFormat::Json => true,
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let installed = if json {
        builder.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init()
    } else {
        builder.with_target(false).with_ansi(io::stderr().is_terminal()).try_init()
    };
    installed.map_err(|e| anyhow::anyhow!("starting the log: {e}"))
}
