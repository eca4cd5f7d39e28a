//! Settings through the real program: precedence, where a value came from, messages and exit codes.

use std::path::Path;
use std::process::{Command, Output};

fn patchbay(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_patchbay"))
        .args(arguments)
        .env_clear()
        .envs(environment.iter().copied())
        .output()
        .expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

#[track_caller]
fn refused(output: &Output, code: i32, message: &str) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(stderr.contains(message), "{stderr}");
    assert_eq!(text(&output.stdout), "");
}

fn write(dir: &Path, content: &str) -> String {
    let path = dir.join("patchbay.toml");
    std::fs::write(&path, content).expect("a temporary file");
    path.to_str().expect("UTF-8").to_owned()
}

#[test]
fn config_prints_each_value_with_its_origin_and_no_secret() {
    let dir = tempfile::tempdir().expect("a directory");
    let file =
        write(dir.path(), "[engine]\nblock_tokens = 32\nqueue_max = 7\n[server]\nport = 1\napi_key = \"s3cret\"\n");
    let environment = [("PATCHBAY_SERVER_PORT", "2"), ("PATCHBAY_ENGINE_QUEUE_MAX", "8")];
    let output = patchbay(&["config", "--config", &file, "--port", "3", "--set", "log.level=warn"], &environment);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let printed = text(&output.stdout);
    for line in [
        format!("block_tokens = 32  # file {file}"),
        "queue_max = 8  # environment variable PATCHBAY_ENGINE_QUEUE_MAX".to_owned(),
        "port = 3  # flag --port".to_owned(),
        "level = \"warn\"  # flag --set".to_owned(),
        "sequences_max = 64  # default".to_owned(),
        format!("api_key = \"(secret)\"  # file {file}"),
        "# admin_key is not set".to_owned(),
    ] {
        assert!(printed.lines().any(|l| l == line), "no line {line:?} in\n{printed}");
    }
    assert!(!printed.contains("s3cret"));
}

#[test]
fn the_file_can_be_named_by_a_variable() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = write(dir.path(), "[server]\nport = 77\n");
    let printed = text(&patchbay(&["config"], &[("PATCHBAY_CONFIG", &file)]).stdout);
    assert!(printed.contains("port = 77  # file "), "{printed}");
}

#[test]
fn settings_that_cannot_be_used_are_wrong_usage() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = write(dir.path(), "[engine]\nkv_cache_size = 1\n");
    let message = format!("file {file}: unknown key `engine.kv_cache_size`; did you mean `engine.kv_cache_bytes`?");
    refused(&patchbay(&["serve", "--config", &file], &[]), 2, &message);
    refused(&patchbay(&["config", "--config", "absent.toml"], &[]), 2, "configuration file absent.toml: No such file");
    refused(&patchbay(&["serve"], &[("PATCHBAY_SERVER_HSOT", "x")]), 2, "did you mean `PATCHBAY_SERVER_HOST`?");
    refused(&patchbay(&["serve", "--set", "server.port=70000"], &[]), 2, "flag --set: `server.port`: ");
    refused(&patchbay(&["serve", "--prot", "1"], &[]), 2, "--port");
    refused(&patchbay(&["serve", "--api-key", ""], &[]), 2, "flag --api-key: `server.api_key`: ");
}

#[test]
fn what_fails_later_is_a_failure_told_in_one_line() {
    let output = patchbay(&["serve", "--port", "0", "--model", "no/such/model", "--log-level", "off"], &[]);
    refused(&output, 1, "patchbay: loading the model no/such/model (model.path): ");
    assert_eq!(text(&output.stderr).lines().count(), 1, "{}", text(&output.stderr));
}

#[test]
fn version_and_help_are_no_errors() {
    let version = patchbay(&["--version"], &[]);
    assert_eq!(
        (version.status.code(), text(&version.stdout)),
        (Some(0), format!("patchbay {}\n", env!("CARGO_PKG_VERSION")))
    );
    assert_eq!(patchbay(&["serve", "--help"], &[]).status.code(), Some(0));
    assert_eq!(patchbay(&[], &[]).status.code(), Some(2));
}
