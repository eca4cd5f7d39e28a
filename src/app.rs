//! Building the parts in order; start, drain, shutdown. The command line and the tests build the server the same way.
//!
//! Owns the order of things and nothing else: what a part does is that part's business. While the parts are built the
//! port is open already: `/health` answers 200 and everything else, `/ready` included, 503.

use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::serve::ListenerExt as _;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, spawn_blocking};
use tower::ServiceExt as _;

use crate::adapter::BaseWeights;
use crate::config::Config;
use crate::engine::{EngineConfig, EngineHandle, ModelRunner};
use crate::metrics::Metrics;
use crate::model::{self, Model, ModelConfig, ModelInfo};
use crate::server::{self, ApiError, AppState, ServedModel, ServerConfig};
use crate::store::{Admission, Store, StoreConfig};
use crate::text::Text;

/// How often a draining server looks whether its requests are finished.
const DRAIN_TICK: Duration = Duration::from_millis(20);

/// How long requests that were cut off may take to tell their clients so.
const FLUSH_MAX: Duration = Duration::from_secs(2);

/// A server with all its parts, not yet listening.
pub struct App {
    /// The parts, as the handlers see them.
    pub state: AppState,
}

/// Listens, builds the parts, serves until `stop` ends, drains.
///
/// # Errors
/// When a part cannot be built. A stop while the parts are being built is no error.
pub async fn run(config: Config, listener: TcpListener, stop: impl Future<Output = ()>) -> Result<()> {
    let mut stop = pin!(stop);
    let front = Front::start(listener)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), address = %front.address, "starting");
    let app = tokio::select! {
        app = App::build(config) => app?,
        () = &mut stop => return Ok(()),
    };
    app.serve_behind(front, stop).await
}

impl App {
    /// Builds the parts in order: model and tokenizer, metrics, engine, store, preloaded adapters.
    ///
    /// # Errors
    /// When a part cannot be built; the message says which.
    pub async fn build(config: Config) -> Result<Self> {
        let loading = config.model.clone();
        let engine_config = config.engine.clone();
        let (model, text, runner) =
            spawn_blocking(move || load(&loading, &engine_config)).await.context("loading the model panicked")??;
        let info = model.info().clone();
        let served = served_model(&config.model, &info)?;
        log_model(&served.name, &info);
        let metrics = Arc::new(Metrics::new(&served.name, &config.metrics));
        // Encoding takes a core each; whoever waits for it waits for the engine next.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let encodings = Arc::new(Admission::new(cores, config.engine.queue_max));
        let engine = EngineHandle::start(Box::new(runner), config.engine.clone(), metrics.clone());
        let base: Arc<dyn BaseWeights> = model;
        let store = Store::open(config.adapters.clone(), base, info.adapter_formats, metrics.clone())
            .await
            .with_context(|| format!("opening the adapter store {}", config.adapters.root.display()))?;
        for name in &config.adapters.preload {
            store.resolve(name).await.with_context(|| format!("preloading adapter {name} (adapters.preload)"))?;
        }
        log_adapter_bounds(&config.adapters);
        let state = AppState {
            engine,
            store,
            text: Arc::new(text),
            encodings,
            metrics,
            config: Arc::new(config.server),
            model: Arc::new(served),
            ready: Arc::new(AtomicBool::new(true)),
            draining: Arc::default(),
        };
        Ok(Self { state })
    }

    /// The HTTP service.
    pub fn router(&self) -> Router {
        server::router(self.state.clone())
    }

    /// Serves on `listener` until `stop` ends, then drains.
    ///
    /// # Errors
    /// When the listener has no address.
    pub async fn serve(self, listener: TcpListener, stop: impl Future<Output = ()>) -> Result<()> {
        let front = Front::start(listener)?;
        self.serve_behind(front, stop).await
    }

    async fn serve_behind(self, front: Front, stop: impl Future<Output = ()>) -> Result<()> {
        front.open(self.router());
        log_address(&self.state.config, &front.address);
        stop.await;
        self.drain(front).await;
        Ok(())
    }

    /// Refuses new requests, lets running ones finish up to `server.drain_timeout_s`, then stops the engine. What still runs
    /// by then is answered 503.
    async fn drain(self, front: Front) {
        let AppState { engine, config, draining, .. } = self.state;
        draining.store(true, Ordering::Release);
        tracing::info!(sequences = engine.in_flight(), timeout_s = config.drain_timeout_s, "draining");
        let mut close = pin!(front.close());
        let finished = tokio::time::timeout(Duration::from_secs(config.drain_timeout_s), async {
            // The port stays open meanwhile, so that new requests are told 503 rather than refused a connection.
            let mut tick = tokio::time::interval(DRAIN_TICK);
            while engine.in_flight() > 0 {
                tick.tick().await;
            }
            close.as_mut().await;
        });
        let is_finished = finished.await.is_ok();
        if !is_finished {
            tracing::warn!(sequences = engine.in_flight(), "drain timeout; what still runs is cut off");
        }
        engine.stop_accepting();
        if spawn_blocking(move || engine.shut_down()).await.is_err() {
            tracing::error!("the engine panicked while it was shut down");
        }
        if !is_finished && tokio::time::timeout(FLUSH_MAX, close).await.is_err() {
            tracing::warn!("closing connections that are still in use");
        }
        tracing::info!("stopped");
    }
}

/// The open port. Until the router is there it answers for itself.
struct Front {
    address: String,
    router: Arc<OnceLock<Router>>,
    /// Dropped or sent to: the port closes and running requests finish.
    close: oneshot::Sender<()>,
    task: JoinHandle<std::io::Result<()>>,
}

impl Front {
    fn start(listener: TcpListener) -> Result<Self> {
        let address = listener.local_addr().context("reading the listening address")?.to_string();
        let router = Arc::new(OnceLock::<Router>::new());
        let behind = router.clone();
        let service = Router::new().fallback(move |request: Request| {
            let router = behind.get().cloned();
            async move {
                match router {
                    Some(router) => router.oneshot(request).await.into_response(),
                    None => starting(&request),
                }
            }
        });
        // Small chunks of a stream must leave at once.
        let listener = listener.tap_io(|stream| {
            if let Err(e) = stream.set_nodelay(true) {
                tracing::debug!(error = %e, "TCP_NODELAY");
            }
        });
        let (close, closed) = oneshot::channel::<()>();
        let serving = axum::serve(listener, service).with_graceful_shutdown(async { drop(closed.await) });
        Ok(Self { address, router, close, task: tokio::spawn(async { serving.await }) })
    }

    /// Answers with `router` from now on.
    fn open(&self, router: Router) {
        assert!(self.router.set(router).is_ok(), "the front is opened once");
    }

    /// Closes the port and waits until running requests are answered.
    async fn close(self) {
        drop(self.close);
        // The task ends without an error, or was cancelled with the runtime.
        let _ = self.task.await;
    }
}

/// The answer of a server whose parts are still being built: alive, not ready.
fn starting(request: &Request) -> Response {
    if request.uri().path() == "/health" {
        return StatusCode::OK.into_response();
    }
    ApiError { retry_after_s: Some(1), ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "The model is being loaded.") }
        .into_response()
}

/// What blocks: finding, reading and placing the model, and taking the engine's memory.
fn load(config: &ModelConfig, engine: &EngineConfig) -> Result<(Arc<Model>, Text, ModelRunner)> {
    let what = || format!("loading the model {} (model.path)", config.path);
    let dir = model::locate(config).with_context(what)?;
    // The tokenizer takes a core for a while, and the weights wait for memory meanwhile.
    let (text, model) = rayon::join(|| Text::load(&dir), || Model::load(&dir, config));
    let (text, model) = (text.with_context(what)?, Arc::new(model.with_context(what)?));
    let runner = ModelRunner::new(model.clone(), engine).context("taking the engine's memory")?;
    Ok((model, text, runner))
}

fn served_model(config: &ModelConfig, info: &ModelInfo) -> Result<ServedModel> {
    let created = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs();
    Ok(ServedModel {
        name: served_name(config),
        created,
        context_tokens_max: info.context_tokens_max,
        generation: info.generation.clone(),
    })
}

/// The configured name, or the last component of the model's path.
fn served_name(config: &ModelConfig) -> String {
    if let Some(name) = &config.served_name {
        return name.clone();
    }
    let path = Path::new(&config.path);
    let last = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    last(path).or_else(|| last(&path.canonicalize().ok()?)).unwrap_or_else(|| "model".to_owned())
}

/// The model as it was loaded.
fn log_model(name: &str, info: &ModelInfo) {
    tracing::info!(
        name,
        architecture = info.architecture,
        dtype = info.dtype.as_str(),
        device = ?info.device.location(),
        weights = size(info.weight_bytes),
        context_tokens_max = info.context_tokens_max,
        "model"
    );
}

/// The bounds on what adapters take beside the engine's slots, which the engine logs.
fn log_adapter_bounds(config: &StoreConfig) {
    tracing::info!(
        preloaded = config.preload.len(),
        host = size(config.host_bytes_max),
        merged = size(config.merged_bytes_max),
        upload = size(config.upload_bytes_max),
        loads_max = config.loads_max,
        load_queue_max = config.load_queue_max,
        "adapter bounds"
    );
}

/// Where the server listens and what it does not offer there.
fn log_address(config: &ServerConfig, address: &str) {
    if config.admin_key.is_none() && !server::is_loopback(&config.host) {
        tracing::warn!(
            host = config.host,
            "routes that change adapters are off: the address is not loopback and there is no server.admin_key"
        );
    }
    if config.api_key.is_none() && !server::is_loopback(&config.host) {
        tracing::warn!(host = config.host, "anyone who reaches this address can use /v1: there is no server.api_key");
    }
    tracing::info!("listening on http://{address}");
}

/// Bytes for a reader: `268 435 456` is `256.0 MiB`.
fn size(bytes: usize) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return format!("{value:.1} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_is_named_after_its_directory() {
        let name = |path: &str| served_name(&ModelConfig { path: path.to_owned(), ..ModelConfig::default() });
        assert_eq!((name("a/b/"), name("org/tiny")), ("b".to_owned(), "tiny".to_owned()));
        assert!(!name(".").is_empty() && name(".") != ".");
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!((size(12), size(256 << 20), size(3 << 40)), ("12.0 B".into(), "256.0 MiB".into(), "3.0 TiB".into()));
    }

    #[tokio::test]
    async fn a_port_answers_before_the_parts_are_built() {
        let get = |path: &str| starting(&Request::get(path).body(axum::body::Body::empty()).expect("a request"));
        assert_eq!(get("/health").status(), StatusCode::OK);
        assert_eq!(get("/ready").status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(get("/v1/models").status(), StatusCode::SERVICE_UNAVAILABLE);
    }
}
