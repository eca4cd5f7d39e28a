//! Bearer keys. Keys are compared as digests in constant time and never logged.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::{ApiError, ServerConfig};

/// Who may do what.
#[derive(Clone)]
pub(super) struct Keys {
    api: Option<Arc<[u8; 32]>>,
    admin: Option<Arc<[u8; 32]>>,
    /// Adapters may be changed without an admin key: only this machine can ask.
    admin_open: bool,
}

impl Keys {
    /// The keys of a config.
    pub(super) fn new(config: &ServerConfig) -> Self {
        let digest = |key: &String| Arc::new(Sha256::digest(key.as_bytes()).into());
        Self {
            api: config.api_key.as_ref().map(digest),
            admin: config.admin_key.as_ref().map(digest),
            admin_open: config.admin_key.is_none() && is_loopback(&config.host),
        }
    }

    fn matches(key: Option<&Arc<[u8; 32]>>, given: &[u8; 32]) -> bool {
        key.is_some_and(|key| bool::from(key.ct_eq(given)))
    }
}

/// Whether only this machine can connect to `host`.
pub fn is_loopback(host: &str) -> bool {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    match bare.parse::<IpAddr>() {
        Ok(ip) => ip.to_canonical().is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    }
}

/// Lets requests with the API key or the admin key pass; all, where no API key is set.
pub(super) async fn api(State(keys): State<Keys>, request: Request, next: Next) -> Response {
    if keys.api.is_none() {
        return next.run(request).await;
    }
    match bearer(&request) {
        Some(given) if Keys::matches(keys.api.as_ref(), &given) | Keys::matches(keys.admin.as_ref(), &given) => {
            next.run(request).await
        }
        _ => unauthorized("a valid API key is needed: `Authorization: Bearer <key>`"),
    }
}

/// Lets requests that change adapters pass.
pub(super) async fn admin(State(keys): State<Keys>, request: Request, next: Next) -> Response {
    if keys.admin_open {
        return api(State(keys), request, next).await;
    }
    if keys.admin.is_none() {
        let message = "changing adapters is off: the server listens on more than the loopback address and has no admin \
                       key (server.admin_key)";
        return ApiError::new(StatusCode::FORBIDDEN, message).into_response();
    }
    match bearer(&request) {
        Some(given) if Keys::matches(keys.admin.as_ref(), &given) => next.run(request).await,
        Some(given) if Keys::matches(keys.api.as_ref(), &given) => {
            ApiError::new(StatusCode::FORBIDDEN, "changing adapters needs the admin key").into_response()
        }
        _ => unauthorized("changing adapters needs the admin key: `Authorization: Bearer <key>`"),
    }
}

/// Digest of the key that a request carries.
fn bearer(request: &Request) -> Option<[u8; 32]> {
    let value = request.headers().get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(b"bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| Sha256::digest(key.trim_ascii()).into())
}

fn unauthorized(message: &str) -> Response {
    let mut response = ApiError::new(StatusCode::UNAUTHORIZED, message).into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_recognised() {
        for host in ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost", "LOCALHOST", "::ffff:127.0.0.1"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.example.org"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
