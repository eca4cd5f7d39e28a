//! Metrics: the dashboard, the alerts and the scrape config refer only to what `/metrics` exposes; series are bounded.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use patchbay::metrics::{AdapterActivity, Metrics, MetricsConfig};

fn metrics(labelled_adapters_max: usize) -> Metrics {
    Metrics::new("tiny", &MetricsConfig { labelled_adapters_max })
}

/// Metrics in which every vector has at least one series, so that all of them are exposed.
fn touched() -> Metrics {
    let m = metrics(10);
    m.requests_waiting_by_reason.with_label_values(&["capacity"]).set(0);
    m.kv_cache_usage.with_label_values(&[] as &[&str]).set(0.0);
    m.cache_config_info.with_label_values(&["16", "8", "True"]).set(1);
    m.request_success.with_label_values(&["stop"]).inc();
    m.admission_rejections.with_label_values(&["queue_full"]).inc();
    m.http_requests.with_label_values(&["/health", "200"]).inc();
    let adapter = [m.claim_adapter_label("a")];
    for counter in [&m.adapter_requests, &m.adapter_prompt_tokens, &m.adapter_generation_tokens, &m.adapter_errors] {
        counter.with_label_values(&adapter).inc();
    }
    m.adapter_time_to_first_token.with_label_values(&adapter).observe(0.1);
    m.adapter_load_seconds.with_label_values(&adapter).observe(0.1);
    m.adapter_bytes.with_label_values(&adapter).set(1);
    m.set_adapter_activity(&AdapterActivity { slots_max: 4, resident: vec!["a".to_owned()], waiting: Vec::new() });
    m
}

/// Names of all exposed series, and of all their labels.
fn exposed(text: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut names, mut labels) = (BTreeSet::new(), BTreeSet::new());
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, rest) = line.split_once(['{', ' ']).expect("a series has a value");
        names.insert(name.to_owned());
        labels.extend(rest.split([',', '}']).filter_map(|pair| Some(pair.split_once("=\"")?.0.to_owned())));
    }
    (names, labels)
}

fn docker_files() -> Vec<(String, String)> {
    let docker = Path::new(env!("CARGO_MANIFEST_DIR")).join("docker");
    ["prometheus.yml", "alerts.yml", "compose.yaml", "grafana/dashboards/patchbay.json"]
        .into_iter()
        .map(|file| (file.to_owned(), fs::read_to_string(docker.join(file)).expect(file)))
        .collect()
}

/// Words of `text` that look like our metrics.
fn metric_words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':')
        .filter(|word| word.starts_with("vllm:") || word.starts_with("patchbay_"))
}

/// Labels that queries group by or select on.
fn label_words(text: &str) -> BTreeSet<String> {
    let mut labels = BTreeSet::new();
    for (at, by) in text.match_indices(" by (") {
        let list = &text[at + by.len()..];
        labels.extend(list[..list.find(')').unwrap_or(0)].split(", ").map(str::to_owned));
    }
    // Selectors: `{label="`, `{label=~"`, escaped or not.
    for (at, _) in text.match_indices('{') {
        let word: String = text[at + 1..].chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
        let after = &text[at + 1 + word.len()..];
        if ["=\"", "=\\\"", "=~\"", "=~\\\""].iter().any(|op| after.starts_with(op)) {
            labels.insert(word);
        }
    }
    labels
}

#[test]
fn dashboard_and_alerts_use_only_metrics_that_exist() {
    let (names, labels) = exposed(&touched().render());
    let mut used = 0;
    for (file, text) in docker_files() {
        for word in metric_words(&text) {
            used += 1;
            assert!(names.contains(word), "docker/{file} names the metric {word}, which does not exist");
        }
        for label in label_words(&text) {
            let known = labels.contains(&label) || ["job", "instance"].contains(&label.as_str());
            assert!(known, "docker/{file} uses the label {label}, which no metric has");
        }
    }
    assert!(used > 30, "the dashboard was not read");
}

#[test]
fn dashboard_shows_what_an_operator_asks_for() {
    let dashboard = docker_files().into_iter().find(|(file, _)| file.ends_with("patchbay.json")).expect("listed").1;
    let used: BTreeSet<_> = metric_words(&dashboard).collect();
    for metric in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:generation_tokens_total",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_hits_total",
        "patchbay_adapter_resident",
        "patchbay_adapters_loaded",
        "patchbay_adapter_requests_total",
        "patchbay_adapter_generation_tokens_total",
        "patchbay_adapter_time_to_first_token_seconds_bucket",
        "patchbay_adapter_load_seconds_bucket",
        "patchbay_adapter_errors_total",
        "patchbay_http_requests_total",
    ] {
        assert!(used.contains(metric), "the dashboard lacks {metric}");
    }
    serde_json::from_str::<serde_json::Value>(&dashboard).expect("the dashboard is JSON");
}

#[test]
fn what_gateway_pickers_read_is_there() {
    let text = touched().render();
    for line in [
        "vllm:num_requests_running{engine=\"0\",model_name=\"tiny\"} 0",
        "vllm:num_requests_waiting{engine=\"0\",model_name=\"tiny\"} 0",
        "vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"tiny\"} 0",
        "# TYPE vllm:lora_requests_info gauge",
        "# TYPE vllm:time_to_first_token_seconds histogram",
    ] {
        assert!(text.lines().any(|l| l == line), "no line {line} in\n{text}");
    }
}

#[test]
fn adapters_beyond_the_bound_share_one_label() {
    let m = metrics(2);
    for idx in 0..1000 {
        let name = format!("a{idx}");
        m.adapter_requests.with_label_values(&[m.claim_adapter_label(&name)]).inc();
    }
    m.adapter_requests.with_label_values(&[m.adapter_label(None)]).inc();
    let text = m.render();
    let series: Vec<_> = text.lines().filter(|l| l.starts_with("patchbay_adapter_requests_total{")).collect();
    let ends: Vec<_> = series.iter().map(|l| l.split_once("adapter=\"").expect("labelled").1).collect();
    assert_eq!(ends, ["a0\"} 1", "a1\"} 1", "base\"} 1", "other\"} 998"]);
}

#[test]
fn a_removed_adapter_gives_its_label_back() {
    let m = metrics(1);
    let activity = |resident: &[&str]| AdapterActivity {
        slots_max: 4,
        resident: resident.iter().map(|name| (*name).to_owned()).collect(),
        waiting: Vec::new(),
    };
    m.adapter_bytes.with_label_values(&[m.claim_adapter_label("old")]).set(7);
    m.set_adapter_activity(&activity(&["old"]));
    assert_eq!(m.claim_adapter_label("new"), "other");
    m.forget_adapter("old");
    // Its last tokens and its leaving the device count for nobody by name.
    m.for_adapter_labels(["old"].into_iter(), |label| m.adapter_generation_tokens.with_label_values(&[label]).inc());
    m.set_adapter_activity(&activity(&[]));
    assert_eq!(m.claim_adapter_label("new"), "new");
    assert_eq!(m.adapter_label(Some("old")), "other");
    assert!(!m.render().contains("\"old\"") && !m.render().contains("patchbay_adapter_resident{"));
}

#[test]
fn one_series_tells_which_adapters_run_however_often_they_change() {
    let m = metrics(10);
    for idx in 0..500 {
        let resident = vec![format!("a{}", idx % 7), format!("b{}", idx % 5)];
        let waiting = vec![format!("c{}", idx % 3)];
        m.set_adapter_activity(&AdapterActivity { slots_max: 4, resident, waiting });
    }
    let text = m.render();
    let series: Vec<_> = text.lines().filter(|l| l.starts_with("vllm:lora_requests_info{")).collect();
    assert_eq!(series.len(), 1, "{series:?}");
    for label in ["max_lora=\"4\"", "running_lora_adapters=\"a2,b4\"", "waiting_lora_adapters=\"c1\""] {
        assert!(series[0].contains(label), "{}", series[0]);
    }
}
