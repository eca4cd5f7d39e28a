//! What happens around every handler: request id, log line, metric, time limit, panics.

use std::any::Any;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::{Instrument, debug, error, info, info_span};

use super::{ApiError, AppState};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longer ids from clients are replaced by our own.
const REQUEST_ID_BYTES_MAX: usize = 128;
/// Metric label of requests to no route.
const UNMATCHED: &str = "unmatched";

/// The request's id: from `x-request-id`, or made here.
#[derive(Clone, Debug)]
pub(super) struct RequestId(pub String);

/// Gives the request an id, a tracing span, a log line and a count.
pub(super) async fn observe(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(|id| is_plain(id));
    let id = given.map_or_else(fresh_id, str::to_owned);
    let route = request.extensions().get::<MatchedPath>().map_or(UNMATCHED, MatchedPath::as_str).to_owned();
    request.extensions_mut().insert(RequestId(id.clone()));
    let span = info_span!("request", id, method = %request.method(), route);
    let started = Instant::now();
    let mut response = next.run(request).instrument(span.clone()).await;
    let status = response.status().as_u16();
    let ms = started.elapsed().as_secs_f64() * 1e3;
    // Probes and scrapes come every few seconds and say nothing.
    span.in_scope(|| {
        if route.starts_with("/v1") { info!(status, ms, "answered") } else { debug!(status, ms, "answered") }
    });
    state.metrics.http_requests.with_label_values(&[route.as_str(), &status.to_string()]).inc();
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

fn is_plain(id: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-:".contains(&b);
    (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(plain)
}

/// 128 bits that do not repeat: the standard library's hash keys are the system's random numbers.
fn fresh_id() -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let half = || RandomState::new().hash_one(count);
    format!("{:016x}{:016x}", half(), half())
}

/// Ends requests that take too long. A stream that has begun has its own limit.
pub(super) async fn time_limit(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let limit = Duration::from_secs(state.config.request_timeout_s);
    match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let message = format!("the request took longer than {} s (server.request_timeout_s)", limit.as_secs());
            ApiError::new(StatusCode::REQUEST_TIMEOUT, message).into_response()
        }
    }
}

/// The answer to a request whose handler panicked. Others are not affected.
#[expect(clippy::needless_pass_by_value, reason = "the panic layer hands over the box")]
pub(super) fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response<Body> {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    error!(panic = text.unwrap_or("without a message"), "a request handler panicked");
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal error").into_response()
}

/// The answer to a path that does not exist.
pub(super) async fn not_found(method: Method, uri: Uri) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("there is no route {method} {}", uri.path()))
}

/// The answer to a path that exists, asked with a method that it does not have.
pub(super) async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{} does not take {method}", uri.path()))
}
