//! What was measured, in the form of its JSON. `docs/performance.md` describes the fields; a change of meaning or a
//! field that goes away changes [`SCHEMA`].

use serde::Serialize;

use super::bound::AgainstBase;
use super::machine::Machine;
use super::plan::Distribution;
use super::stats::Summary;

/// Names the form of the JSON.
pub(super) const SCHEMA: &str = "patchbay-bench/1";

/// Everything that was measured, and on what.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Form of this document.
    pub schema: &'static str,
    /// The command line; keys are replaced.
    pub command: Vec<String>,
    /// When it was made, Unix seconds.
    pub time: u64,
    /// Where the client ran.
    pub machine: Machine,
    /// What was measured.
    pub server: ServerReport,
    /// What all runs have in common.
    pub workload: Workload,
    /// The runs in the order they were made.
    pub runs: Vec<RunReport>,
    /// An adapter's way to its first token, where that was measured instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hot_load: Option<HotLoad>,
}

/// The server that was measured.
#[derive(Clone, Debug, Serialize)]
pub struct ServerReport {
    /// Its address.
    pub url: String,
    /// Whether it ran in the client's process.
    pub in_process: bool,
    /// Its version, where it tells.
    pub version: Option<String>,
    /// Name of the base model.
    pub model: String,
    /// Seconds from the start of an in-process server until it was ready.
    pub start_s: Option<f64>,
    /// The adapters that requests used.
    pub adapters: Vec<AdapterReport>,
}

/// An adapter that requests used.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterReport {
    /// Its name.
    pub name: String,
    /// Its kind as the server found it; null while it was never loaded.
    pub kind: Option<String>,
    /// Bytes it takes on the server; null while it was never loaded.
    pub bytes: Option<u64>,
}

/// What all runs have in common.
#[derive(Clone, Debug, Serialize)]
pub struct Workload {
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Tokens asked for in each answer.
    pub output_tokens: usize,
    /// Prompts are made of ids below this.
    pub vocab_size: usize,
    /// Adapters that requests spread over.
    pub num_adapters: usize,
    /// Seed of everything that is drawn.
    pub seed: u64,
}

/// One run. Summaries are null where there are no samples.
#[derive(Clone, Debug, Serialize)]
pub struct RunReport {
    /// How requests spread over the adapters.
    pub distribution: Distribution,
    /// Requests at once.
    pub concurrency: usize,
    /// Which repetition, from 1.
    pub round: usize,
    /// Requests sent.
    pub requests: usize,
    /// Requests answered in full.
    pub completed: usize,
    /// The others.
    pub errors: Errors,
    /// Answers with fewer tokens than asked for.
    pub short_answers: usize,
    /// Seconds from the first request to the last answer's end.
    pub duration_s: f64,
    /// Tokens of the answered prompts.
    pub prompt_tokens: usize,
    /// Tokens of the answers.
    pub output_tokens: usize,
    /// Answers per second.
    pub requests_per_s: f64,
    /// Answers' tokens per second.
    pub output_tokens_per_s: f64,
    /// Prompts' and answers' tokens per second.
    pub total_tokens_per_s: f64,
    /// From sending a request to its first token.
    pub ttft_ms: Option<Summary>,
    /// Per request, from its first token to its last, by the tokens behind the first.
    pub time_per_output_token_ms: Option<Summary>,
    /// Between each two neighbouring tokens, all requests together.
    pub inter_token_gap_ms: Option<Summary>,
    /// From sending a request to its last token.
    pub request_ms: Option<Summary>,
    /// Reading memory forward, 10^9 bytes per second: the mean of right before the run and right after; null unless the machine's
    /// limits are measured.
    pub read_gb_per_s: Option<f64>,
    /// Beside the base's run at the same concurrency in the same round; null where there is none.
    pub against_base: Option<AgainstBase>,
    /// What was loaded meanwhile; null in a run without.
    pub load_while: Option<LoadWhile>,
}

/// Requests that failed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Errors {
    /// How many.
    pub count: usize,
    /// What the first one was told.
    pub first: Option<String>,
}

impl Errors {
    pub(super) fn add(&mut self, error: &anyhow::Error) {
        self.count += 1;
        self.first.get_or_insert_with(|| format!("{error:#}"));
    }
}

/// An adapter that was loaded and unloaded all the time; summaries over each time.
#[derive(Clone, Debug, Serialize)]
pub struct LoadWhile {
    /// An upload, to its answer.
    pub load_ms: Option<Summary>,
    /// A removal, to its answer.
    pub unload_ms: Option<Summary>,
}

/// An adapter's way to its first token, on an otherwise idle server.
#[derive(Clone, Debug, Serialize)]
pub struct HotLoad {
    /// Size of the adapter's two files.
    pub bytes: usize,
    /// First token of the base model for a prompt of the same length.
    pub base_ttft_ms: Option<Summary>,
    /// The ways the server was given the adapter.
    pub ways: Vec<HotLoadWay>,
}

/// One way of giving a server an adapter.
#[derive(Clone, Debug, Serialize)]
pub struct HotLoadWay {
    /// `upload` of the files, or `load` of a directory on the server's disk.
    pub way: &'static str,
    /// From sending the upload or load to its answer.
    pub answered_ms: Option<Summary>,
    /// From sending the upload or load to the first token of a request that was sent at its answer.
    pub first_token_ms: Option<Summary>,
    /// First token of a second request, with the adapter in place.
    pub ttft_in_place_ms: Option<Summary>,
    /// `first_token_ms` less `ttft_in_place_ms`, each time: what the loading costs beyond the prefill.
    pub beyond_prefill_ms: Option<Summary>,
}
