//! The one error that handlers return, as the OpenAI error envelope.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// An answer other than success: `{"error": {"message", "type", "param", "code"}}`.
#[derive(Debug)]
pub struct ApiError {
    /// HTTP status, also the envelope's `code`.
    pub status: StatusCode,
    /// The envelope's `type`.
    pub kind: &'static str,
    /// The request field at fault.
    pub param: Option<String>,
    /// What went wrong, for the client: no internals, no paths.
    pub message: String,
    /// Seconds after which to try again.
    pub retry_after_s: Option<u64>,
}

impl ApiError {
    /// An error with the envelope's usual `type` for `status`.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let kind = match status {
            StatusCode::NOT_FOUND => "NotFoundError",
            StatusCode::UNAUTHORIZED => "AuthenticationError",
            StatusCode::FORBIDDEN => "PermissionDeniedError",
            StatusCode::CONFLICT => "ConflictError",
            StatusCode::METHOD_NOT_ALLOWED => "MethodNotAllowedError",
            StatusCode::REQUEST_TIMEOUT => "TimeoutError",
            StatusCode::PAYLOAD_TOO_LARGE => "PayloadTooLargeError",
            StatusCode::TOO_MANY_REQUESTS => "RateLimitError",
            StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailableError",
            status if status.is_server_error() => "InternalServerError",
            _ => "BadRequestError",
        };
        Self { status, kind, param: None, message: message.into(), retry_after_s: None }
    }

    /// 400 that names the field at fault.
    pub fn bad_request(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// 404 for a `model` that is neither the base nor an adapter.
    pub fn model_not_found(name: &str) -> Self {
        Self {
            param: Some("model".to_owned()),
            ..Self::new(StatusCode::NOT_FOUND, format!("The model `{name}` does not exist."))
        }
    }

    /// 429 with `Retry-After`.
    pub fn too_many(message: impl Into<String>) -> Self {
        Self { retry_after_s: Some(1), ..Self::new(StatusCode::TOO_MANY_REQUESTS, message) }
    }

    /// The same error with another `type`.
    pub fn with_kind(self, kind: &'static str) -> Self {
        Self { kind, ..self }
    }
}

impl ApiError {
    /// The envelope.
    pub(super) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.status.as_u16(),
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
