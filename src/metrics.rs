//! Every metric the server exports: name, type, labels and help in one place.
//!
//! Names that start with `vllm:` keep the names, labels and buckets that dashboards and gateway pickers already read;
//! our own start with `patchbay_`. The number of adapters with a label of their own is bounded; the rest share the
//! label value `other`. A request that several adapters work for counts under each of them, so sums over the label
//! `adapter` can exceed the totals without it.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::Collector;
use prometheus::{
    Encoder, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};
use serde::{Deserialize, Serialize};

/// The `[metrics]` section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsConfig {
    /// Adapters with a label of their own; further ones are counted under `other`. More costs series in Prometheus.
    pub labelled_adapters_max: usize,
}

impl Default for MetricsConfig {
    fn default() -> Self {
        Self { labelled_adapters_max: 200 }
    }
}

/// Seconds; as vLLM's dashboards assume.
const TIME_TO_FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
/// Seconds; vLLM's from 10 ms on, finer ones below for small models.
const TOKEN_TIME: &[f64] = &[
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
];
/// Seconds; phases of a request.
const REQUEST_TIME: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
/// Seconds; loading an adapter.
const LOAD_TIME: &[f64] = &[0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];
/// Tokens per request.
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0, 100_000.0,
];
/// Tokens per step.
const STEP_TOKENS: &[f64] = &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
/// Answers per request.
const ANSWERS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

/// Label value of adapters beyond the bound.
const OTHER: &str = "other";
/// Label value of requests that use no adapter.
const BASE: &str = "base";

/// Which adapters the engine runs, keeps and waits for; published as one live series.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterActivity {
    /// Most adapters on the device at once.
    pub slots_max: usize,
    /// Names of adapters on the device, ready to run.
    pub resident: Vec<String>,
    /// Names of adapters that waiting requests need and that are not on the device.
    pub waiting: Vec<String>,
}

/// Declares [`Metrics`]: one line per metric with its field, type, name, labels or buckets, and help.
macro_rules! metrics {
    ($( $field:ident : $kind:ident ( $name:literal $(, $arg:expr)* ) = $help:literal; )*) => {
        /// Every metric, as fields; use sites touch a field, so a misspelt metric does not compile.
        ///
        /// Fields whose name ends in `_vllm`-style vectors take `model_name` (and `engine`, always `0`) first; the
        /// helper methods fill those in.
        pub struct Metrics {
            registry: Registry,
            labelled: Mutex<HashSet<String>>,
            labelled_max: usize,
            activity: Mutex<Option<(AdapterActivity, [String; 3])>>,
            $( #[doc = $help] pub $field: $kind, )*
        }

        impl Metrics {
            /// Registers every metric in a registry of its own, with the constant labels vLLM's dashboards select by.
            pub fn new(model_name: &str, config: &MetricsConfig) -> Self {
                let registry = Registry::new();
                $( let $field = make::$kind(model_name, $name, $help $(, $arg)*); register(&registry, &$field); )*
                Self {
                    registry,
                    labelled: Mutex::default(),
                    labelled_max: config.labelled_adapters_max,
                    activity: Mutex::default(),
                    $( $field, )*
                }
            }
        }
    };
}

metrics! {
    requests_running: IntGauge("vllm:num_requests_running") = "Requests in the running batch.";
    requests_waiting: IntGauge("vllm:num_requests_waiting") = "Requests waiting to be scheduled.";
    requests_waiting_by_reason: IntGaugeVec("vllm:num_requests_waiting_by_reason", &["reason"]) = "Waiting requests by reason: capacity, or deferred for an adapter slot.";
    kv_cache_usage: GaugeVec("vllm:kv_cache_usage_perc", &[]) = "Share of KV blocks in use, 0 to 1.";
    cache_config_info: IntGaugeVec("vllm:cache_config_info", &["block_size", "num_gpu_blocks", "enable_prefix_caching"]) = "KV cache configuration; always 1.";
    lora_requests_info: GaugeVec("vllm:lora_requests_info", &["max_lora", "running_lora_adapters", "waiting_lora_adapters"]) = "Adapters on the device and waited for; the value is the unix time of the last update.";
    prompt_tokens: IntCounter("vllm:prompt_tokens_total") = "Prompt tokens processed.";
    generation_tokens: IntCounter("vllm:generation_tokens_total") = "Tokens generated.";
    request_success: IntCounterVec("vllm:request_success_total", &["finished_reason"]) = "Finished requests by reason.";
    preemptions: IntCounter("vllm:num_preemptions_total") = "Sequences preempted for lack of KV blocks.";
    prefix_cache_queries: IntCounter("vllm:prefix_cache_queries_total") = "Prompt tokens looked up in the prefix cache.";
    prefix_cache_hits: IntCounter("vllm:prefix_cache_hits_total") = "Prompt tokens found in the prefix cache.";
    prompt_tokens_cached: IntCounter("vllm:prompt_tokens_cached_total") = "Prompt tokens whose KV was reused.";
    admission_rejections: IntCounterVec("vllm:admission_rejections_total", &["reason"]) = "Requests refused at admission.";
    time_to_first_token: Histogram("vllm:time_to_first_token_seconds", TIME_TO_FIRST_TOKEN) = "Time from arrival to the first token.";
    inter_token_latency: Histogram("vllm:inter_token_latency_seconds", TOKEN_TIME) = "Time between consecutive tokens of a request.";
    time_per_output_token: Histogram("vllm:request_time_per_output_token_seconds", TOKEN_TIME) = "Mean time per output token of a request, the first excluded.";
    e2e_request_latency: Histogram("vllm:e2e_request_latency_seconds", REQUEST_TIME) = "Time from arrival to the last token.";
    request_queue_time: Histogram("vllm:request_queue_time_seconds", REQUEST_TIME) = "Time a request waited before it was first scheduled.";
    request_inference_time: Histogram("vllm:request_inference_time_seconds", REQUEST_TIME) = "Time a request spent running.";
    request_prefill_time: Histogram("vllm:request_prefill_time_seconds", REQUEST_TIME) = "Time from first scheduling to the first token.";
    request_decode_time: Histogram("vllm:request_decode_time_seconds", REQUEST_TIME) = "Time from the first token to the last.";
    request_prompt_tokens: Histogram("vllm:request_prompt_tokens", TOKENS) = "Prompt tokens per request.";
    request_generation_tokens: Histogram("vllm:request_generation_tokens", TOKENS) = "Generated tokens per request.";
    request_params_n: Histogram("vllm:request_params_n", ANSWERS) = "The n parameter of requests.";
    request_params_max_tokens: Histogram("vllm:request_params_max_tokens", TOKENS) = "The max_tokens parameter of requests.";
    iteration_tokens: Histogram("vllm:iteration_tokens_total", STEP_TOKENS) = "Tokens computed per step.";
    adapter_requests: IntCounterVec("patchbay_adapter_requests_total", &["adapter"]) = "Requests accepted, by adapter.";
    adapter_prompt_tokens: IntCounterVec("patchbay_adapter_prompt_tokens_total", &["adapter"]) = "Prompt tokens, by adapter.";
    adapter_generation_tokens: IntCounterVec("patchbay_adapter_generation_tokens_total", &["adapter"]) = "Generated tokens, by adapter.";
    adapter_errors: IntCounterVec("patchbay_adapter_errors_total", &["adapter"]) = "Loads and generations that failed, by adapter; a load counts once however many requests wait for it.";
    adapter_time_to_first_token: HistogramVec("patchbay_adapter_time_to_first_token_seconds", TIME_TO_FIRST_TOKEN, &["adapter"]) = "Time from arrival to the first token, by adapter.";
    adapter_load_seconds: HistogramVec("patchbay_adapter_load_seconds", LOAD_TIME, &["adapter"]) = "Time to read, check and lower an adapter.";
    adapter_bytes: IntGaugeVec("patchbay_adapter_bytes", &["adapter"]) = "Host memory a loaded adapter takes.";
    adapter_resident: IntGaugeVec("patchbay_adapter_resident", &["adapter"]) = "1 while an adapter is on the device.";
    adapters_loaded: IntGauge("patchbay_adapters_loaded") = "Adapters in host memory.";
    adapters_loaded_bytes: IntGauge("patchbay_adapters_loaded_bytes") = "Host memory of all loaded adapters.";
    adapter_slot_copies: IntCounter("patchbay_adapter_slot_copies_total") = "Adapters copied to the device.";
    step_seconds: Histogram("patchbay_step_seconds", TOKEN_TIME) = "Duration of an engine step.";
    http_requests: IntCounterVec("patchbay_http_requests_total", &["route", "status"]) = "HTTP requests by route and status.";
}

impl Metrics {
    /// Gives an adapter that is there a label of its own while fewer than the bound have one; the label value as
    /// [`Metrics::adapter_label`] answers it from then on.
    pub fn claim_adapter_label<'a>(&self, name: &'a str) -> &'a str {
        let mut labelled = self.labelled.lock().unwrap_or_else(PoisonError::into_inner);
        if !labelled.contains(name) {
            if labelled.len() >= self.labelled_max {
                return OTHER;
            }
            labelled.insert(name.to_owned());
        }
        name
    }

    /// The label value for an adapter: its name if it has claimed a label and was not forgotten, else `other`; `base` for
    /// none.
    pub fn adapter_label<'a>(&self, adapter: Option<&'a str>) -> &'a str {
        let Some(name) = adapter else { return BASE };
        let labelled = self.labelled.lock().unwrap_or_else(PoisonError::into_inner);
        if labelled.contains(name) { name } else { OTHER }
    }

    /// Counts something under the label of each adapter, or under the base's where there is none. Of a request that
    /// several adapters work for, each counts all.
    pub fn for_adapter_labels<'a>(&self, adapters: impl Iterator<Item = &'a str>, mut count: impl FnMut(&str)) {
        let mut adapters = adapters.peekable();
        if adapters.peek().is_none() {
            count(self.adapter_label(None));
        }
        adapters.for_each(|name| count(self.adapter_label(Some(name))));
    }

    /// Forgets an adapter that was removed: its gauges go, and its label becomes free for another.
    pub fn forget_adapter(&self, name: &str) {
        if self.labelled.lock().unwrap_or_else(PoisonError::into_inner).remove(name) {
            // A vector that never saw the label answers with an error, which is what we want here.
            for vec in [&self.adapter_bytes, &self.adapter_resident] {
                let _ = vec.remove_label_values(&[name]);
            }
            for vec in [
                &self.adapter_requests,
                &self.adapter_prompt_tokens,
                &self.adapter_generation_tokens,
                &self.adapter_errors,
            ] {
                let _ = vec.remove_label_values(&[name]);
            }
            for vec in [&self.adapter_time_to_first_token, &self.adapter_load_seconds] {
                let _ = vec.remove_label_values(&[name]);
            }
        }
    }

    /// Publishes which adapters are on the device; replaces the previous series, so exactly one is ever live.
    pub fn set_adapter_activity(&self, activity: &AdapterActivity) {
        let mut current = self.activity.lock().unwrap_or_else(PoisonError::into_inner);
        let unchanged = current.as_ref().is_some_and(|(previous, _)| previous == activity);
        let labels = [activity.slots_max.to_string(), activity.resident.join(","), activity.waiting.join(",")];
        if let (false, Some((previous, old))) = (unchanged, current.as_ref()) {
            let _ = self.lora_requests_info.remove_label_values(&old.each_ref().map(String::as_str));
            let left = previous.resident.iter().filter(|name| !activity.resident.contains(name));
            // One that was forgotten has no series to end.
            for name in left.filter(|name| self.adapter_label(Some(name)) == *name) {
                self.adapter_resident.with_label_values(&[name]).set(0);
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        self.lora_requests_info.with_label_values(&labels.each_ref().map(String::as_str)).set(now);
        if !unchanged {
            for name in &activity.resident {
                self.adapter_resident.with_label_values(&[self.adapter_label(Some(name))]).set(1);
            }
            *current = Some((activity.clone(), labels));
        }
    }

    /// The text exposition of every metric.
    pub fn render(&self) -> String {
        let mut buffer = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut buffer).expect("writing to a Vec cannot fail");
        String::from_utf8(buffer).expect("the text encoder writes UTF-8")
    }
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: &C) {
    registry.register(Box::new(collector.clone())).expect("metric names are distinct and well formed");
}

/// One constructor per metric type. Every `vllm:` metric carries the constant labels `model_name` and `engine`.
#[expect(non_snake_case, reason = "the functions are named after the types they make")]
mod make {
    use super::{
        GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    };

    const VALID: &str = "metric names, labels and buckets are literals of this file";

    fn opts(model: &str, name: &str, help: &str) -> Opts {
        let opts = Opts::new(name, help);
        if name.starts_with("vllm:") { opts.const_label("model_name", model).const_label("engine", "0") } else { opts }
    }

    pub(super) fn IntGauge(model: &str, name: &str, help: &str) -> IntGauge {
        IntGauge::with_opts(opts(model, name, help)).expect(VALID)
    }

    pub(super) fn IntCounter(model: &str, name: &str, help: &str) -> IntCounter {
        IntCounter::with_opts(opts(model, name, help)).expect(VALID)
    }

    pub(super) fn GaugeVec(model: &str, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        GaugeVec::new(opts(model, name, help), labels).expect(VALID)
    }

    pub(super) fn IntGaugeVec(model: &str, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        IntGaugeVec::new(opts(model, name, help), labels).expect(VALID)
    }

    pub(super) fn IntCounterVec(model: &str, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        IntCounterVec::new(opts(model, name, help), labels).expect(VALID)
    }

    pub(super) fn Histogram(model: &str, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts { common_opts: opts(model, name, help), buckets: buckets.to_vec() };
        Histogram::with_opts(opts).expect(VALID)
    }

    pub(super) fn HistogramVec(model: &str, name: &str, help: &str, buckets: &[f64], labels: &[&str]) -> HistogramVec {
        let opts = HistogramOpts { common_opts: opts(model, name, help), buckets: buckets.to_vec() };
        HistogramVec::new(opts, labels).expect(VALID)
    }
}
