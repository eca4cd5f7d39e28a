//! Request bodies: tolerant JSON objects, read field by field.
//!
//! A body is split into its top-level fields once, without building a tree; each field is then parsed into the type
//! its handler wants. That gives every route the same manners: `null` means absent, an error names the field, and what
//! nobody asked for is known by name.

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};
use serde_json::Value as Json;
use serde_json::value::RawValue;

use super::{ApiError, AppState};

/// Longest message about a malformed field that is sent back, in characters.
const MESSAGE_CHARS_MAX: usize = 300;
/// Longer paths into a field are left out of the message.
const PATH_BYTES_MAX: usize = 100;

/// A request's body within the limit, as bytes.
pub(super) struct Body(pub Bytes);

impl FromRequest<AppState> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let limit = state.config.body_bytes_max;
        let too_large = || {
            ApiError::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("the request body is larger than {limit} bytes (server.body_bytes_max)"),
            )
        };
        let announced = request.headers().get(header::CONTENT_LENGTH);
        let announced = announced.and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|bytes| bytes > limit as u64) {
            return Err(too_large());
        }
        match Bytes::from_request(request, state).await {
            Ok(bytes) => Ok(Self(bytes)),
            Err(e) if e.status() == StatusCode::PAYLOAD_TOO_LARGE => Err(too_large()),
            Err(e) => Err(ApiError::new(e.into_response().status(), "the request body could not be read".to_owned())),
        }
    }
}

/// The top-level fields of a JSON object.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    fields: Vec<Field<'a>>,
}

#[derive(Debug)]
struct Field<'a> {
    name: String,
    raw: &'a RawValue,
    used: bool,
}

impl<'a> Fields<'a> {
    /// Splits a body.
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(body).map_err(|e| {
            let message = match e.classify() {
                serde_json::error::Category::Data => format!("the request body is not usable: {}", clean(&e)),
                _ => format!("the request body is not valid JSON: {}", cut(&e.to_string())),
            };
            ApiError::new(StatusCode::BAD_REQUEST, message)
        })
    }

    /// The value of a field; `None` if it is absent or null.
    pub(super) fn take<T: Deserialize<'a>>(&mut self, name: &str) -> Result<Option<T>, ApiError> {
        let Some(field) = self.fields.iter_mut().find(|field| field.name == name) else { return Ok(None) };
        field.used = true;
        if is_null(field.raw) { Ok(None) } else { parse_value(name, field.raw).map(Some) }
    }

    /// The value of a boolean field; `default` if it is absent or null.
    pub(super) fn flag(&mut self, name: &str, default: bool) -> Result<bool, ApiError> {
        Ok(self.take(name)?.unwrap_or(default))
    }

    /// A number in a range; `default` if it is absent or null.
    pub(super) fn number(
        &mut self,
        name: &str,
        range: std::ops::RangeInclusive<f32>,
        default: f32,
    ) -> Result<f32, ApiError> {
        let value: Option<f32> = self.take(name)?;
        let value = value.unwrap_or(default);
        if range.contains(&value) {
            return Ok(value);
        }
        let (low, high) = (range.start(), range.end());
        Err(ApiError::bad_request(name, format!("`{name}` must be from {low} to {high}, found {value}")))
    }

    /// Refuses a field that is there with an effect we do not have. `neutral` are the values without effect.
    pub(super) fn refuse(&mut self, name: &str, neutral: &[Json]) -> Result<(), ApiError> {
        match self.take::<Json>(name)? {
            Some(value) if !neutral.contains(&value) => {
                Err(ApiError::bad_request(name, format!("`{name}` is not supported by this server")))
            }
            _ => Ok(()),
        }
    }

    /// Names of fields that nobody took and that are not null.
    pub(super) fn ignored(&self) -> Vec<String> {
        let unused = self.fields.iter().filter(|field| !field.used && !is_null(field.raw));
        unused.map(|field| field.name.clone()).collect()
    }
}

/// Parses one value; an error names the path to what is wrong, starting with `name`.
pub(super) fn parse_value<'a, T: Deserialize<'a>>(name: &str, raw: &'a RawValue) -> Result<T, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_str(raw.get());
    serde_path_to_error::deserialize(&mut deserializer).map_err(|e| {
        let path = match e.path().to_string() {
            path if path == "." || path.len() > PATH_BYTES_MAX => name.to_owned(),
            path if path.starts_with('[') => format!("{name}{path}"),
            path => format!("{name}.{path}"),
        };
        ApiError::bad_request(&path, format!("`{path}`: {}", clean(e.inner())))
    })
}

fn is_null(raw: &RawValue) -> bool {
    raw.get() == "null"
}

/// A parser's message without the position, which is relative to the field.
fn clean(error: &serde_json::Error) -> String {
    let text = error.to_string();
    cut(text.rsplit_once(" at line ").map_or(text.as_str(), |(message, _)| message))
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MESSAGE_CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Split;
        impl<'de> Visitor<'de> for Split {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields: Vec<Field<'de>> = Vec::new();
                while let Some((name, raw)) = map.next_entry::<String, &'de RawValue>()? {
                    // A linear search is enough for real bodies; this bound keeps absurd ones from being slow.
                    if fields.len() >= FIELDS_MAX {
                        return Err(A::Error::custom(format!("more than {FIELDS_MAX} fields")));
                    }
                    if fields.iter().any(|field| field.name == name) {
                        return Err(A::Error::custom(format!("the field `{}` occurs twice", cut(&name))));
                    }
                    fields.push(Field { name, raw, used: false });
                }
                Ok(Fields { fields })
            }
        }
        deserializer.deserialize_map(Split)
    }
}

/// Most top-level fields of a body.
const FIELDS_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Part {
        #[expect(dead_code, reason = "only parsed")]
        text: String,
    }

    fn error<T: std::fmt::Debug>(result: Result<T, ApiError>) -> (Option<String>, String) {
        let error = result.expect_err("refused");
        (error.param, error.message)
    }

    #[test]
    fn null_is_absent_and_leftovers_are_known() {
        let body = br#"{"a": null, "b": 1, "c": {"deep": [1]}, "d": null}"#;
        let mut fields = Fields::parse(body).unwrap();
        assert_eq!(fields.take::<String>("a").unwrap(), None);
        assert_eq!(fields.take::<u32>("b").unwrap(), Some(1));
        assert_eq!(fields.take::<u32>("z").unwrap(), None);
        assert_eq!(fields.ignored(), ["c"]);
    }

    #[test]
    fn errors_name_the_path() {
        let body = br#"{"n": "x", "parts": [{"text": "a"}, {"text": 5}], "t": 7, "u": 1e999}"#;
        let mut fields = Fields::parse(body).unwrap();
        let (param, message) = error(fields.take::<u32>("n"));
        assert_eq!(param.as_deref(), Some("n"));
        assert_eq!(message, "`n`: invalid type: string \"x\", expected u32");
        let (param, _) = error(fields.take::<Vec<Part>>("parts"));
        assert_eq!(param.as_deref(), Some("parts[1].text"));
        let (_, message) = error(fields.number("t", 0.0..=2.0, 1.0));
        assert_eq!(message, "`t` must be from 0 to 2, found 7");
        assert_eq!(error(fields.number("u", 0.0..=2.0, 1.0)).0.as_deref(), Some("u"));
    }

    #[test]
    fn bodies_that_are_no_objects_are_refused() {
        for body in ["", "[]", "nul", "{\"a\":1", "{\"a\":1,\"a\":2}", "\"x\"", "{\"a\":\"\u{1}\"}"] {
            assert_eq!(Fields::parse(body.as_bytes()).unwrap_err().status, StatusCode::BAD_REQUEST, "{body}");
        }
        assert_eq!(Fields::parse(b"\xff\xfe").unwrap_err().status, StatusCode::BAD_REQUEST);
    }

    #[test]
    fn nesting_bombs_are_refused_or_skipped() {
        let bomb = format!("{{\"bomb\": {}{}}}", "[".repeat(1_000_000), "]".repeat(1_000_000));
        let mut fields = Fields::parse(bomb.as_bytes()).unwrap();
        assert_eq!(fields.ignored(), ["bomb"]);
        assert_eq!(error(fields.take::<Json>("bomb")).1, "`bomb`: recursion limit exceeded");
        let open = "{\"a\":".repeat(500_000);
        assert_eq!(Fields::parse(open.as_bytes()).unwrap_err().status, StatusCode::BAD_REQUEST);
    }

    #[test]
    fn fields_with_an_effect_we_lack_are_refused() {
        let mut fields = Fields::parse(br#"{"suffix": "", "best": 3}"#).unwrap();
        assert!(fields.refuse("suffix", &[json!("")]).is_ok());
        assert_eq!(error(fields.refuse("best", &[json!(1)])).0.as_deref(), Some("best"));
    }
}
