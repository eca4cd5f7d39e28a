//! `patchbay adapter` as an operator types it: offline against a fixture, and against a server on a socket.

use std::path::Path;
use std::process::{Command, Output};

use patchbay::server::ServerConfig;

use crate::fixtures;
use crate::http_support::Service;
use crate::store_support::{adapter, mixture, write_directory};

const KEY: &str = "the-admin-key";

fn patchbay(arguments: &[&str]) -> Output {
    patchbay_with(arguments, &[])
}

/// The same with variables, the only ones that the program sees.
fn patchbay_with(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_patchbay"));
    command.arg("adapter").args(arguments).env_clear().envs(variables.iter().copied());
    command.current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("the program runs")
}

#[track_caller]
fn check_succeeds(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn check_fails(output: &Output, words: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(words), "{said}");
}

fn check(dir: &Path, more: &[&str]) -> Output {
    let model = fixtures::dir().join("models/llama");
    let arguments = ["check", dir.to_str().unwrap(), "--model", model.to_str().unwrap()];
    patchbay(&[&arguments[..], more].concat())
}

#[test]
fn check_tells_what_an_adapter_is() {
    let said = check_succeeds(&check(&fixtures::dir().join("adapters/llama/lora_r8"), &[]));
    let lines: Vec<(&str, &str)> = said.lines().filter_map(|line| line.split_once(' ')).collect();
    let value = |key: &str| lines.iter().find(|(k, _)| *k == key).map(|(_, value)| value.trim());
    assert_eq!((value("kind"), value("ranks"), value("format")), (Some("LORA"), Some("8"), Some("f32")), "{said}");
    assert!(value("modules").unwrap().parse::<usize>().unwrap() > 0, "{said}");
    assert!(value("memory").unwrap().ends_with(" bytes, 0 of them dense weights"), "{said}");
    let said = check_succeeds(&check(&fixtures::dir().join("adapters/llama/lora_r8"), &["--merge"]));
    assert!(said.contains("LORA, merged") && !said.contains(" 0 of them"), "{said}");
}

#[test]
fn check_reads_a_directory_of_adapterhub() {
    let source = fixtures::dir().join("adapters/llama/bottleneck_pfeiffer");
    let said = check_succeeds(&check(&source, &[]));
    assert!(said.contains("kind      BOTTLENECK\nmodules   2\n"), "{said}");
    let temp = tempfile::tempdir().unwrap();
    std::fs::copy(source.join("adapter_config.json"), temp.path().join("adapter_config.json")).unwrap();
    std::fs::write(temp.path().join("pytorch_adapter.bin"), "x").unwrap();
    check_fails(&check(temp.path(), &[]), "pytorch_adapter.bin: is a pickle file");
}

#[test]
fn inspect_tells_what_files_hold_without_a_model() {
    let inspect = |case: &str| patchbay(&["inspect", fixtures::dir().join(case).to_str().unwrap()]);
    let said = check_succeeds(&inspect("adapters/llama/lora_qv"));
    assert!(said.starts_with("kind      LORA\ntensors   8, "), "{said}");
    assert!(said.contains("modules   4\n          model.layers.*.self_attn.q_proj (layers 0-1)\n"), "{said}");
    let said = check_succeeds(&inspect("adapters/llama/bottleneck_houlsby"));
    assert!(said.contains("model.layers.*.attention_adapters (layers 0-1)"), "{said}");
    let said = check_succeeds(&inspect("adapters/llama/prefix_tuning"));
    assert!(said.contains("modules   0"), "{said}");
    check_fails(&inspect("refused/missing_b"), "missing_b cannot be served: 1 problem");
}

#[test]
fn check_says_why_an_adapter_cannot_be_served() {
    let temp = tempfile::tempdir().unwrap();
    check_fails(&check(&temp.path().join("absent"), &[]), "is not a directory");
    check_fails(&check(temp.path(), &[]), "has no adapter_config.json");
    let mut files = adapter(1.0);
    write_directory(temp.path(), &files);
    check_fails(&check(temp.path(), &[]), "cannot be served on");
    files.config = br#"{"peft_type": "UNHEARD_OF"}"#[..].into();
    write_directory(temp.path(), &files);
    check_fails(&check(temp.path(), &[]), "UNHEARD_OF");
    std::fs::rename(temp.path().join("adapter_model.safetensors"), temp.path().join("adapter_model.bin")).unwrap();
    check_fails(&check(temp.path(), &[]), "convert it to adapter_model.safetensors");
    let lora = fixtures::dir().join("adapters/llama/lora_r8");
    check_fails(&check(&lora, &["--merge", "--set", "adapters.merged_bytes_max=100"]), "adapters.merged_bytes_max");
}

fn convert(dir: &Path, to: &str, out: &Path) -> Output {
    let model = fixtures::dir().join("models/llama");
    let [dir, out, model] = [dir, out, &model].map(|path| path.to_str().unwrap());
    patchbay(&["convert", dir, "--to", to, "--out", out, "--model", model])
}

#[test]
fn convert_writes_a_directory_that_check_accepts() {
    let temp = tempfile::tempdir().unwrap();
    for (case, form) in [("hra_chain", "lora"), ("bone_native_oldest", "miss")] {
        let out = temp.path().join(form);
        let said = check_succeeds(&convert(&fixtures::dir().join("adapters/llama").join(case), form, &out));
        assert!(said.starts_with(&format!("wrote the adapter {}", out.display())), "{said}");
        let said = check_succeeds(&check(&out, &[]));
        assert!(said.to_lowercase().contains(&format!("kind      {form}")), "{said}");
    }
    let model = temp.path().join("merged");
    let lora = fixtures::dir().join("adapters/llama/lora_r8");
    check_succeeds(&convert(&lora, "merged", &model));
    let arguments = ["check", lora.to_str().unwrap(), "--model", model.to_str().unwrap()];
    check_succeeds(&patchbay(&arguments));
}

#[test]
fn convert_overwrites_nothing_and_leaves_nothing_behind_when_it_fails() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("out");
    let adapters = fixtures::dir().join("adapters/llama");
    check_fails(&convert(&adapters.join("lora_dora"), "lora", &out), "its output is scaled or rotated");
    check_fails(&convert(&adapters.join("hra_chain"), "oft", &out), "expected OFT, found `HRA`");
    check_fails(&convert(&adapters.join("ssf_shift"), "merged", &out), "cannot be converted");
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
    std::fs::create_dir(&out).unwrap();
    check_fails(&convert(&adapters.join("hra_chain"), "lora", &out), "nothing is overwritten");
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0);
}

#[test]
fn adapters_are_combined_into_a_directory_that_passes_the_check() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("both");
    let fixture = |name: &str| fixtures::dir().join("adapters/llama").join(name).to_str().unwrap().to_owned();
    let [all, qv, eight, dora] = ["lora_all", "lora_qv", "lora_r8", "lora_dora"].map(fixture);
    let combine = |arguments: &[&str]| {
        let to = ["combine", "--out", out.to_str().unwrap()];
        patchbay(&[&to[..], arguments].concat())
    };
    check_fails(&combine(&["--mode", "mean", &all, &eight]), "only `stack`");
    let refused = combine(&["--mode", "stack", &all, &dora]);
    check_fails(&refused, "use_dora");
    assert_eq!(String::from_utf8_lossy(&refused.stderr).matches("use_dora").count(), 1, "said once: {refused:?}");
    check_fails(&combine(&["--mode", "stack", temp.path().to_str().unwrap()]), temp.path().to_str().unwrap());
    check_fails(&combine(&["--mode", "ties", &all, &qv]), "`density`");
    assert!(!out.exists(), "a refusal writes nothing");
    let said = check_succeeds(&combine(&["--mode", "stack", &format!("{all}=0.7"), &format!("{eight}=-0.3")]));
    assert!(said.contains("LORA: 14 modules, ranks 12, "), "{said}");
    check_fails(&combine(&["--mode", "fair", &all, &qv]), "nothing is overwritten");
    let said = check_succeeds(&check(&out, &[]));
    assert!(said.contains("ranks     12\n"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adapters_of_a_running_server_are_added_listed_and_removed() {
    let config = ServerConfig { admin_key: Some(KEY.to_owned()), ..ServerConfig::default() };
    let service = Service::with_config(config).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let server = tokio::spawn(axum::serve(listener, service.router.clone()).into_future());
    let temp = tempfile::tempdir().unwrap();
    write_directory(temp.path(), &adapter(1.0));
    let dir = temp.path().to_str().unwrap().to_owned();
    let several = tempfile::tempdir().unwrap();
    write_directory(several.path(), &mixture(2.0));
    let several_dir = several.path().to_str().unwrap().to_owned();

    tokio::task::spawn_blocking(move || {
        let ask = |arguments: &[&str]| patchbay(&[arguments, &["--server", &url, "--key", KEY]].concat());
        let said = check_succeeds(&ask(&["add", "mine", &dir]));
        assert!(said.starts_with("mine@1 ") && said.ends_with("LORA: 1 modules, 32 bytes\n"), "{said}");
        let said = check_succeeds(&ask(&["add", "mine", &dir, "--merge"]));
        assert!(said.starts_with("mine@2 ") && said.contains("LORA, merged"), "{said}");
        let said = check_succeeds(&ask(&["list"]));
        let lines: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["name", "generation", "loaded", "leases", "digest", "kind"]);
        assert_eq!((&lines[2][..4], &lines[2][5..]), (&["mine", "2", "yes", "0"][..], &["LORA,", "merged"][..]));
        assert_eq!(check_succeeds(&ask(&["remove", "mine"])), "removed mine\n");
        let said = check_succeeds(&ask(&["add", "several", &several_dir]));
        assert!(said.contains("XLORA: 1 modules"), "{said}");
        assert_eq!(check_succeeds(&ask(&["remove", "several"])), "removed several\n");
        check_fails(&ask(&["remove", "mine"]), "adapter `mine` does not exist (404)");
        check_fails(&ask(&["add", "a/b", &dir]), "is not an adapter name");
        check_fails(&patchbay(&["remove", "skip", "--server", &url]), "needs the admin key");
        check_fails(&patchbay(&["list", "--server", "localhost:8000"]), "expected an address");
    })
    .await
    .unwrap();
    server.abort();
}

#[test]
fn a_server_that_is_not_there_is_named() {
    // A port that was just free and that nobody listens on.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}");
    check_fails(&patchbay(&["list", "--server", &url]), &format!("asking {url}"));
    check_fails(&patchbay_with(&["list"], &[("PATCHBAY_URL", &url)]), &format!("asking {url}"));
}
