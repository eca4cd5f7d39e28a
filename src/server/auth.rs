//! Bearer keys. Keys are compared as digests in constant time and never logged.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderValue, StatusCode, Uri, header};
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
        // A key is nothing that a web page has; without one the browser's own word must do.
        if keys.api.is_none()
            && let Err(message) = check_local(&request)
        {
            return ApiError::new(StatusCode::FORBIDDEN, message).into_response();
        }
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

/// Refuses what a web page in a browser on this machine could have sent: a request to a name that only resolves to this
/// machine, or one from a page that came from elsewhere. A browser sets both headers itself.
fn check_local(request: &Request) -> Result<(), &'static str> {
    let host = |value: &HeaderValue| Some(Authority::try_from(value.as_bytes()).ok()?.host().to_owned());
    let origin = |value: &HeaderValue| Some(Uri::try_from(value.as_bytes()).ok()?.host()?.to_owned());
    let is_local = |host: Option<String>| host.is_some_and(|host| is_loopback(&host));
    let mut hosts: Vec<_> = request.headers().get_all(header::HOST).iter().map(host).collect();
    hosts.extend(request.uri().host().map(|host| Some(host.to_owned())));
    if hosts.is_empty() || !hosts.into_iter().all(is_local) {
        return Err(
            "without server.admin_key adapters are changed from this machine only: the request's Host is neither \
                    localhost nor a loopback address",
        );
    }
    if !request.headers().get_all(header::ORIGIN).iter().map(origin).all(is_local) {
        return Err(
            "without server.admin_key adapters are changed from this machine only: the request's Origin is a page \
                    from elsewhere",
        );
    }
    Ok(())
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
    fn only_what_no_page_from_elsewhere_can_send_is_local() {
        let check = |uri: &str, headers: &[(&str, &str)]| {
            let mut request = Request::post(uri);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            check_local(&request.body(axum::body::Body::empty()).unwrap())
        };
        for host in ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.0.0.2", "[::1]", "[::1]:8000"] {
            assert_eq!(check("/a", &[("host", host)]), Ok(()), "{host}");
            assert_eq!(check(&format!("http://{host}/a"), &[]), Ok(()), "{host}");
        }
        for host in ["example.org", "localhost.example.org:8000", "10.0.0.1", "0.0.0.0", "", "a b", "127.0.0.1.nip.io"]
        {
            let error = check("/a", &[("host", host)]).unwrap_err();
            assert!(error.contains("Host") && error.contains("server.admin_key"), "{host}: {error}");
        }
        assert!(check("/a", &[]).is_err());
        assert!(check("http://example.org/a", &[("host", "localhost")]).is_err());
        assert!(check("http://localhost/a", &[("host", "example.org")]).is_err());
        assert!(check("/a", &[("host", "localhost"), ("host", "example.org")]).is_err());
        let from = |origin: &str| check("/a", &[("host", "localhost:8000"), ("origin", origin)]);
        for origin in ["http://localhost:8000", "https://127.0.0.1", "http://[::1]:3000"] {
            assert_eq!(from(origin), Ok(()), "{origin}");
        }
        for origin in
            ["null", "", "https://example.org", "http://localhost.example.org", "http://10.0.0.1:8000", "file://"]
        {
            assert!(from(origin).unwrap_err().contains("Origin"), "{origin}");
        }
    }

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
