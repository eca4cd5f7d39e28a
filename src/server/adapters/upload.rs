//! Receiving what adapter routes are sent, into memory once and within a bound.

use std::collections::BTreeMap;

use axum::RequestExt;
use axum::body::{Body, Bytes};
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{DefaultBodyLimit, Multipart, Request};
use axum::http::{StatusCode, header};
use futures::StreamExt;

use super::super::ApiError;
use crate::adapter::{self, AdapterFiles};
use crate::store::{StoreError, WEIGHTS_FILES};

/// What multipart framing or archive headers may add to the files' own bytes.
const OVERHEAD_BYTES_MAX: usize = 4 << 20;
/// Parts of a multipart body at most.
const PARTS_MAX: usize = 200;
const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = WEIGHTS_FILES[0];

/// An upload's body.
pub(super) enum Upload {
    /// The files, from a multipart body.
    Files(AdapterFiles),
    /// An archive, still packed.
    Archive(Bytes),
}

/// Receives an upload of at most `bytes_max` bytes in the form that its content type announces.
pub(super) async fn receive(request: Request, bytes_max: usize) -> Result<Upload, ApiError> {
    let content_type = content_type(&request);
    match content_type.as_str() {
        "multipart/form-data" => receive_multipart(request, bytes_max).await.map(Upload::Files),
        // Without a type the content speaks for itself: an archive shows in its first bytes.
        ""
        | "application/x-tar"
        | "application/tar"
        | "application/gzip"
        | "application/x-gzip"
        | "application/x-compressed-tar"
        | "application/octet-stream" => {
            let too_large = || ApiError::from(StoreError::TooLarge { limit: bytes_max });
            let limit = bytes_max.saturating_add(OVERHEAD_BYTES_MAX);
            receive_bytes(request, limit, too_large).await.map(Upload::Archive)
        }
        _ => {
            let found: String = content_type.chars().take(100).collect();
            let message = format!(
                "content type `{found}` is not accepted; send multipart/form-data with {CONFIG_FILE} and \
                 {WEIGHTS_FILE}, or application/x-tar or application/gzip"
            );
            Err(ApiError { param: None, ..ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message) })
        }
    }
}

/// Receives a JSON body of at most `bytes_max` bytes.
pub(super) async fn receive_json(request: Request, bytes_max: usize) -> Result<Bytes, ApiError> {
    if content_type(&request) != "application/json" {
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "the body must be JSON, sent as application/json"));
    }
    let too_large = || {
        let message = format!("the request body is larger than {bytes_max} bytes (server.body_bytes_max)");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    receive_bytes(request, bytes_max, too_large).await
}

/// The media type, lower case, without parameters; empty where there is none.
fn content_type(request: &Request) -> String {
    let value = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

async fn receive_bytes(
    request: Request,
    bytes_max: usize,
    too_large: impl Fn() -> ApiError,
) -> Result<Bytes, ApiError> {
    let announced = request.headers().get(header::CONTENT_LENGTH);
    let announced = announced.and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|announced| announced > bytes_max) {
        return Err(too_large());
    }
    // What a client announces it need not send, so memory follows what arrives.
    let mut bytes = Vec::new();
    let mut chunks = request.into_body().into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk
            .map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, "the request body ended before it was complete"))?;
        if chunk.len() > bytes_max - bytes.len() {
            return Err(too_large());
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.into())
}

async fn receive_multipart(mut request: Request<Body>, bytes_max: usize) -> Result<AdapterFiles, ApiError> {
    // Bounds what the multipart parser itself may buffer.
    DefaultBodyLimit::max(bytes_max.saturating_add(OVERHEAD_BYTES_MAX)).apply(&mut request);
    let mut multipart: Multipart =
        request.extract().await.map_err(|e| ApiError::new(StatusCode::BAD_REQUEST, multipart_message(&e)))?;
    let mut received: BTreeMap<Option<usize>, Received> = BTreeMap::new();
    let mut left = bytes_max;
    for idx in 0.. {
        let Some(mut field) = multipart.next_field().await.map_err(|e| part_error(&e, bytes_max))? else { break };
        if idx >= PARTS_MAX {
            return Err(bad_upload(format!("the upload has more than {PARTS_MAX} parts")));
        }
        let Some((dir, file)) = part_file(&field) else {
            // Further files of the directory are harmless and not kept.
            continue;
        };
        let of_dir = received.entry(dir).or_default();
        let wanted = match WEIGHTS_FILES.iter().position(|name| *name == file) {
            Some(idx) => &mut of_dir.weights[idx],
            None => &mut of_dir.config,
        };
        if wanted.is_some() {
            return Err(bad_upload(format!("the upload has {file} twice")));
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = field.chunk().await.map_err(|e| part_error(&e, bytes_max))? {
            left = left.checked_sub(chunk.len()).ok_or(StoreError::TooLarge { limit: bytes_max })?;
            bytes.extend_from_slice(&chunk);
        }
        *wanted = Some(bytes);
    }
    let mut files = received.remove(&None).unwrap_or_default().complete("")?;
    for number in 0..adapter::num_parts(&files.config) {
        let part = received.remove(&Some(number)).unwrap_or_default();
        files.parts.push(part.complete(&format!("{number}/"))?);
    }
    Ok(files)
}

/// What was received of one directory.
#[derive(Default)]
struct Received {
    config: Option<Vec<u8>>,
    /// By the names of [`WEIGHTS_FILES`].
    weights: [Option<Vec<u8>>; 2],
}

impl Received {
    /// The two files; `dir` is for the message.
    fn complete(self, dir: &str) -> Result<AdapterFiles, ApiError> {
        let missing = |file: &str| bad_upload(format!("the upload has no part {dir}{file}"));
        let config = self.config.ok_or_else(|| missing(CONFIG_FILE))?;
        let weights = self.weights.into_iter().flatten().next().ok_or_else(|| missing(WEIGHTS_FILE))?;
        Ok(AdapterFiles::new(config, weights))
    }
}

/// Which of an adapter's files a part is, by its own name or by its file name, and in which numbered sub-directory.
fn part_file(field: &Field<'_>) -> Option<(Option<usize>, &'static str)> {
    let named = |text: &str| {
        let (dir, name) = match text.split_once('/') {
            Some((dir, name)) => (Some(dir.parse().ok().filter(|number: &usize| number.to_string() == dir)?), name),
            None => (None, text),
        };
        let file = [CONFIG_FILE].into_iter().chain(WEIGHTS_FILES).find(|file| *file == name)?;
        Some((dir, file))
    };
    field.name().and_then(named).or_else(|| field.file_name().and_then(named))
}

fn part_error(error: &MultipartError, bytes_max: usize) -> ApiError {
    if error.status() == StatusCode::PAYLOAD_TOO_LARGE {
        return StoreError::TooLarge { limit: bytes_max }.into();
    }
    bad_upload(format!("the multipart body cannot be read: {}", error.body_text()))
}

fn multipart_message(error: &axum::extract::multipart::MultipartRejection) -> String {
    format!("the multipart body cannot be read: {}", error.body_text())
}

fn bad_upload(message: String) -> ApiError {
    StoreError::BadUpload(message).into()
}
