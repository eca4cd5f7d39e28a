//! The `[server]` section: where to listen, who may do what, and how large and long a request may be.

use serde::{Deserialize, Serialize};

/// Listening, keys and request bounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Address to listen on.
    pub host: String,
    /// TCP port; 0 takes a free one.
    pub port: u16,
    /// Bearer key for everything under /v1; none leaves it open.
    pub api_key: Option<String>,
    /// Bearer key for whatever changes adapters. None leaves those routes open on loopback and off elsewhere.
    pub admin_key: Option<String>,
    /// Largest request body in bytes, uploads excepted.
    pub body_bytes_max: usize,
    /// Longest time a request may take, in seconds.
    pub request_timeout_s: u64,
    /// Longest time running requests may take to finish after a stop signal, in seconds.
    pub drain_timeout_s: u64,
    /// Answers per prompt (`n`) and prompts per request at most, multiplied.
    pub sequences_per_request_max: usize,
    /// Alternatives per token that `logprobs` may ask for.
    pub logprobs_max: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: 8000,
            api_key: None,
            admin_key: None,
            body_bytes_max: 8 << 20,
            request_timeout_s: 600,
            drain_timeout_s: 30,
            sequences_per_request_max: 128,
            logprobs_max: 20,
        }
    }
}
