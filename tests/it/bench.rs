//! `patchbay bench`: against a server in this process on the sample model, against one on a socket, and as typed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use patchbay::bench::{self, Distribution, Keys, Plan, PlanError, Report, RunReport, Server};
use patchbay::server::ServerConfig;
use serde_json::Value as Json;

use crate::http_support::Service;
use crate::store_support::{adapter, files_below, write_directory};

const PROMPT_TOKENS: usize = 5;
const OUTPUT_TOKENS: usize = 4;

/// Two requests at a time, five in all, on the base of `server`.
fn plan(server: Server) -> Plan {
    Plan {
        server,
        keys: Keys::default(),
        concurrency: vec![2],
        distributions: vec![Distribution::Base],
        rounds: 1,
        patterns: Vec::new(),
        num_adapters: None,
        prompt_tokens: PROMPT_TOKENS,
        output_tokens: OUTPUT_TOKENS,
        requests: Some(5),
        warm_up: Some(1),
        vocab_size: None,
        seed: 1,
        load_while: None,
        hot_load: None,
        silence_s_max: 600,
        measure_machine: false,
        command: vec!["patchbay".to_owned(), "bench".to_owned()],
    }
}

/// The sample model and its adapters, each under so many names.
fn sample(copies: usize) -> Server {
    Server::Start { config: Box::default(), copies }
}

fn run(plan: &Plan) -> (Report, String) {
    let mut table = Vec::new();
    let report = bench::run(plan, &mut table).unwrap();
    (report, String::from_utf8(table).unwrap())
}

#[track_caller]
fn refusal(plan: &Plan) -> String {
    let error = bench::run(plan, &mut Vec::new()).unwrap_err();
    assert!(error.is::<PlanError>(), "{error:#}");
    error.to_string()
}

/// Every request was answered in full, and every token of every answer was timed.
#[track_caller]
fn check_complete(run: &RunReport, requests: usize) {
    assert_eq!((run.requests, run.completed, run.errors.count, run.short_answers), (requests, requests, 0, 0));
    assert_eq!((run.prompt_tokens, run.output_tokens), (requests * PROMPT_TOKENS, requests * OUTPUT_TOKENS));
    let (ttft, token) = (run.ttft_ms.unwrap(), run.time_per_output_token_ms.unwrap());
    let (gap, request) = (run.inter_token_gap_ms.unwrap(), run.request_ms.unwrap());
    assert_eq!((ttft.count, token.count, request.count), (requests, requests, requests));
    assert_eq!(gap.count, requests * (OUTPUT_TOKENS - 1));
    assert!(0.0 < ttft.p50 && ttft.p50 <= ttft.p90 && ttft.p90 <= ttft.p99 && ttft.p99 <= ttft.max);
    assert!(ttft.max <= request.max && request.max <= run.duration_s * 1e3 && token.max <= gap.max + 1e-9);
    let rate = run.output_tokens as f64 / run.duration_s;
    assert!((run.output_tokens_per_s - rate).abs() < 1e-9 * rate);
}

#[test]
fn every_distribution_is_measured_at_every_concurrency() {
    let distributions: Vec<Distribution> =
        ["base", "one", "round-robin", "zipf:1.1", "distinct"].iter().map(|text| text.parse().unwrap()).collect();
    let plan = Plan { concurrency: vec![1, 3], distributions: distributions.clone(), rounds: 2, ..plan(sample(2)) };
    let (report, table) = run(&plan);
    let expected = (1..=2).flat_map(|round| distributions.iter().flat_map(move |d| [(round, *d, 1), (round, *d, 3)]));
    let found = report.runs.iter().map(|run| (run.round, run.distribution, run.concurrency));
    assert!(found.eq(expected), "{table}");
    report.runs.iter().for_each(|run| check_complete(run, 5));
    let mut adapters: Vec<(&str, &str)> =
        report.server.adapters.iter().map(|a| (a.name.as_str(), a.kind.as_deref().unwrap())).collect();
    adapters.sort_unstable();
    let kinds = [("json", "MISS"), ("json.1", "MISS"), ("reverse", "LORA"), ("reverse.1", "LORA")];
    assert_eq!(adapters[..4], kinds);
    assert_eq!(adapters[4..], [("shout", "SSF"), ("shout.1", "SSF")]);
    assert!(report.server.adapters.iter().all(|a| a.bytes.unwrap() > 0));
    assert!(report.server.in_process && report.server.start_s.unwrap() > 0.0);
    assert_eq!(report.server.version.as_deref(), Some(env!("CARGO_PKG_VERSION")));
    assert_eq!((report.workload.num_adapters, report.workload.vocab_size), (6, 1536));
    // One line per run and one median over the rounds.
    assert_eq!(table.lines().filter(|line| line.starts_with("zipf:1.1 ")).count(), 6, "{table}");
    let base = |run: &RunReport| {
        let is_base = |other: &&RunReport| {
            other.distribution == Distribution::Base && (other.round, other.concurrency) == (run.round, run.concurrency)
        };
        report.runs.iter().find(is_base).unwrap().output_tokens_per_s
    };
    for run in report.runs.iter().filter(|run| run.distribution != Distribution::Base) {
        let beside = run.against_base.unwrap();
        assert!((beside.output_rate * base(run) - run.output_tokens_per_s).abs() < 1e-6 * run.output_tokens_per_s);
        assert!(beside.token_speed > 0.0 && beside.bound.is_none());
    }
}

#[test]
fn adapters_are_chosen_by_patterns_in_turn() {
    let patterns = ["s*", "*e*"].map(str::to_owned).to_vec();
    let mut plan = Plan { distributions: vec![Distribution::RoundRobin], patterns, ..plan(sample(1)) };
    let names = |report: &Report| report.server.adapters.iter().map(|a| a.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&run(&plan).0), ["shout", "reverse"]);
    plan.num_adapters = Some(1);
    assert_eq!(names(&run(&plan).0), ["shout"]);
    plan.num_adapters = Some(3);
    assert_eq!(refusal(&plan), "--num-adapters: asked for 3 adapters, the server has 2 that match");
    plan.patterns = vec!["nobody".to_owned()];
    assert_eq!(refusal(&plan), "--names: no adapter matches `nobody`");
}

#[test]
fn cold_requests_find_their_adapter_on_disk() {
    let mut plan = Plan { distributions: vec![Distribution::Cold], ..plan(sample(2)) };
    check_complete(&run(&plan).0.runs[0], 5);
    // Of six adapters the first round takes five.
    plan.rounds = 2;
    let expected = "cold: 5 requests need as many adapters that are not in memory, 1 of the 6 chosen are not";
    assert_eq!(refusal(&plan), expected);
}

#[test]
fn runs_are_made_without_and_with_loading() {
    let before = files_below(Path::new("adapters"));
    let plan = Plan { load_while: Some(PathBuf::from("adapters/reverse")), rounds: 2, ..plan(sample(1)) };
    let (report, table) = run(&plan);
    let loads: Vec<usize> = report
        .runs
        .iter()
        .map(|run| {
            check_complete(run, 5);
            let load = run.load_while.as_ref();
            assert!(load.is_none_or(|load| load.unload_ms.unwrap().count == load.load_ms.unwrap().count));
            load.map_or(0, |load| load.load_ms.unwrap().count)
        })
        .collect();
    assert!(loads.len() == 4 && loads[0] == 0 && loads[1] > 0 && loads[2] == 0 && loads[3] > 0, "{loads:?}");
    assert_eq!(table.lines().filter(|line| line.starts_with("base, loading ")).count(), 3, "{table}");
    assert_eq!(files_below(Path::new("adapters")), before, "uploads go to a scratch store");
}

#[test]
fn a_hot_load_is_measured_both_ways() {
    let plan = Plan { hot_load: Some(PathBuf::from("adapters/reverse")), requests: Some(3), ..plan(sample(1)) };
    let (report, table) = run(&plan);
    let hot_load = report.hot_load.unwrap();
    assert!(report.runs.is_empty() && hot_load.base_ttft_ms.unwrap().count == 3);
    assert_eq!(hot_load.ways.iter().map(|way| way.way).collect::<Vec<_>>(), ["upload", "load"]);
    for way in &hot_load.ways {
        let (answered, first) = (way.answered_ms.unwrap(), way.first_token_ms.unwrap());
        let (in_place, beyond) = (way.ttft_in_place_ms.unwrap(), way.beyond_prefill_ms.unwrap());
        assert!([answered, first, in_place, beyond].iter().all(|summary| summary.count == 3));
        assert!(0.0 < answered.p50 && answered.max < first.max);
        assert!((beyond.mean - (first.mean - in_place.mean)).abs() < 1e-6);
    }
    assert!(table.contains("\nupload: difference of the two "), "{table}");
}

/// Serves on a socket while `client` runs.
async fn with_service<T: Send + 'static>(config: ServerConfig, client: impl FnOnce(String) -> T + Send + 'static) -> T {
    let service = Service::with_config(config).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let server = tokio::spawn(axum::serve(listener, service.router.clone()).into_future());
    let result = tokio::task::spawn_blocking(move || client(url)).await.unwrap();
    server.abort();
    result
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_server_is_measured_with_its_keys() {
    let key = |text: &str| Some(text.to_owned());
    let config = ServerConfig { api_key: key("k"), admin_key: key("a"), ..ServerConfig::default() };
    with_service(config, |url| {
        let temp = tempfile::tempdir().unwrap();
        write_directory(temp.path(), &adapter(1.0));
        let keys = Keys { api: Some("k".to_owned()), admin: Some("a".to_owned()) };
        let mut plan = Plan { load_while: Some(temp.path().to_owned()), keys, ..plan(Server::Url(url)) };
        plan.patterns = vec!["skip".to_owned()];
        plan.distributions = vec![Distribution::Base, Distribution::One];
        let (report, _) = run(&plan);
        assert_eq!(report.runs.len(), 4);
        report.runs.iter().for_each(|run| check_complete(run, 5));
        assert!(report.runs[3].load_while.as_ref().unwrap().load_ms.unwrap().count > 0);
        assert!(!report.server.in_process && report.server.model == "base");

        plan.keys = Keys::default();
        let error = format!("{:#}", bench::run(&plan, &mut Vec::new()).unwrap_err());
        assert!(error.starts_with("401: "), "{error}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_are_counted_and_the_first_is_told() {
    with_service(ServerConfig::default(), |url| {
        let mut plan = Plan { prompt_tokens: 64, warm_up: Some(0), ..plan(Server::Url(url)) };
        let (report, table) = run(&plan);
        let run = &report.runs[0];
        assert_eq!((run.requests, run.completed, run.errors.count, run.output_tokens), (5, 0, 5, 0));
        let first = run.errors.first.as_deref().unwrap();
        assert_eq!(first, "400: the prompt has 64 tokens, the limit is 63");
        assert!(run.ttft_ms.is_none() && table.contains(&format!("5 errors, the first: {first}")), "{table}");

        plan.warm_up = Some(1);
        let error = bench::run(&plan, &mut Vec::new()).unwrap_err().to_string();
        assert_eq!(error, format!("no request of the warm-up was answered: {first}"));

        plan.prompt_tokens = PROMPT_TOKENS;
        plan.distributions = vec![Distribution::One];
        plan.patterns = vec!["broken".to_owned()];
        let error = format!("{:#}", bench::run(&plan, &mut Vec::new()).unwrap_err());
        assert!(error.starts_with("loading adapter broken: 4"), "{error}");

        plan.distributions = vec![Distribution::Distinct];
        plan.concurrency = vec![3];
        plan.patterns = Vec::new();
        let expected = "distinct: 3 requests at a time need as many adapters, 2 are chosen";
        assert_eq!(refusal(&plan), expected);
    })
    .await;
}

/// The fields of the JSON, but for summaries.
const FIELDS: &str = "
    schema command time
    machine machine.cpu machine.cores machine.instruction_set machine.memory_bytes
    machine.limits machine.limits.read_gb_per_s machine.limits.bf16_gflop_per_s machine.limits.f32_gflop_per_s
    server server.url server.in_process server.version server.model server.start_s
    server.adapters server.adapters[].name server.adapters[].kind server.adapters[].bytes
    workload workload.prompt_tokens workload.output_tokens workload.vocab_size workload.num_adapters workload.seed
    runs runs[].distribution runs[].concurrency runs[].round runs[].requests runs[].completed
    runs[].errors runs[].errors.count runs[].errors.first runs[].short_answers
    runs[].duration_s runs[].prompt_tokens runs[].output_tokens
    runs[].requests_per_s runs[].output_tokens_per_s runs[].total_tokens_per_s runs[].read_gb_per_s
    runs[].load_while
    runs[].against_base runs[].against_base.output_rate runs[].against_base.token_speed runs[].against_base.bound
    hot_load hot_load.bytes hot_load.ways hot_load.ways[].way";
/// The summaries.
const SUMMARIES: &str = "
    runs[].ttft_ms runs[].time_per_output_token_ms runs[].inter_token_gap_ms runs[].request_ms
    runs[].load_while.load_ms runs[].load_while.unload_ms
    hot_load.base_ttft_ms hot_load.ways[].answered_ms hot_load.ways[].first_token_ms
    hot_load.ways[].ttft_in_place_ms hot_load.ways[].beyond_prefill_ms";
/// The fields of a summary.
const SUMMARY: [&str; 7] = ["", ".count", ".max", ".mean", ".p50", ".p90", ".p99"];

/// Every key of the document, with the path to it; lists as `[]`.
fn keys(value: &Json, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Json::Object(fields) => {
            for (name, value) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                found.insert(path.clone());
                keys(value, &path, found);
            }
        }
        Json::Array(entries) => entries.iter().for_each(|entry| keys(entry, &format!("{path}[]"), found)),
        _ => {}
    }
}

#[test]
fn the_json_keeps_its_shape_and_the_docs_name_every_field() {
    let loading = Plan {
        load_while: Some(PathBuf::from("adapters/shout")),
        distributions: vec![Distribution::Base, Distribution::One],
        ..plan(sample(1))
    };
    let hot = Plan { hot_load: Some(PathBuf::from("adapters/shout")), requests: Some(1), ..plan(sample(1)) };
    let mut found = BTreeSet::new();
    for plan in [loading, hot] {
        keys(&serde_json::to_value(run(&plan).0).unwrap(), "", &mut found);
    }
    // A measured limit has no other way in here than to be measured, which takes seconds.
    for name in ["read_gb_per_s", "bf16_gflop_per_s", "f32_gflop_per_s"] {
        found.insert(format!("machine.limits.{name}"));
    }
    let whole = FIELDS.split_whitespace().map(str::to_owned);
    let summaries = SUMMARIES.split_whitespace().flat_map(|path| SUMMARY.map(|end| format!("{path}{end}")));
    let expected: BTreeSet<String> = whole.chain(summaries).collect();
    assert_eq!(found, expected);
    let docs = std::fs::read_to_string("docs/performance.md").unwrap();
    for path in &expected {
        let name = path.rsplit('.').next().unwrap();
        assert!(docs.contains(&format!("`{name}`")), "docs/performance.md does not name `{name}` of {path}");
    }
}

fn patchbay(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_patchbay"));
    command.arg("bench").args(arguments).env_clear().current_dir(env!("CARGO_MANIFEST_DIR"));
    command.output().expect("the program runs")
}

#[track_caller]
fn check_refused(arguments: &[&str], code: i32, words: &str) {
    let output = patchbay(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.contains(words) && output.stdout.is_empty(), "{said}");
}

#[test]
fn arguments_that_make_no_sense_are_wrong_usage() {
    check_refused(&["--dist", "some"], 2, "expected base, one, round-robin, zipf, zipf:<exponent>, distinct or cold");
    check_refused(&["--dist", "zipf:-1"], 2, "the exponent of zipf must be a number from 0, found -1");
    check_refused(&["-c", "1,0"], 2, "--concurrency: expected 1 to 10000, found 0");
    check_refused(&["-c", "1,,2"], 2, "--concurrency");
    check_refused(&["-p", "0"], 2, "--prompt-tokens: expected at least 1, found 0");
    check_refused(&["-o", "0"], 2, "--output-tokens: expected at least 1, found 0");
    check_refused(&["-n", "0"], 2, "--requests: expected at least 1, found 0");
    check_refused(&["-a", "0"], 2, "--num-adapters: expected at least 1, found 0");
    check_refused(&["--copies", "0"], 2, "--copies: expected at least 1, found 0");
    check_refused(&["--repeat", "0"], 2, "--repeat: expected at least 1, found 0");
    check_refused(&["--url", "localhost:8000"], 2, "--url: expected an address such as http://127.0.0.1:8000");
    check_refused(&["--url", "http://127.0.0.1:1", "--model", "m"], 2, "--model: describes a server to start");
    check_refused(&["--url", "http://127.0.0.1:1", "--copies", "2"], 2, "--copies");
    let both = ["--hot-load", "adapters/shout", "--load-while", "adapters/shout"];
    check_refused(&both, 2, "--hot-load: cannot be combined with --load-while");
}

#[test]
fn what_is_not_there_is_named() {
    check_refused(&["--json", "absent/report.json"], 1, "absent/report.json: No such file");
    check_refused(&["--model", "no/such/model"], 1, "loading the model no/such/model (model.path)");
    // A port that was just free and that nobody listens on.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}");
    let output = patchbay(&["--url", &url]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains(&format!("asking {url}: Connection refused")), "{said}");
}

#[test]
fn the_report_goes_to_standard_output_or_to_a_file() {
    let load = ["-c", "2", "-n", "2", "-p", "3", "-o", "2", "--admin-key", "s3cret"];
    let output = patchbay(&[&load[..], &["--json", "-"]].concat());
    let (said, table) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{table}");
    let report: Json = serde_json::from_str(&said).unwrap();
    assert_eq!((&report["schema"], &report["runs"][0]["output_tokens"]), (&"patchbay-bench/1".into(), &4.into()));
    let command: Vec<&str> = report["command"].as_array().unwrap()[1..].iter().map(|a| a.as_str().unwrap()).collect();
    assert_eq!(command[..9], ["bench", "-c", "2", "-n", "2", "-p", "3", "-o", "2"]);
    assert!(table.contains("\nbase "), "{table}");
    assert!(!said.contains("s3cret") && !table.contains("s3cret"));

    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("report.json");
    let output = patchbay(&[&load[..], &["--json", file.to_str().unwrap()]].concat());
    assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains("\nbase "), "{output:?}");
    let report: Json = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(report["runs"].as_array().unwrap().len(), 1);
}
