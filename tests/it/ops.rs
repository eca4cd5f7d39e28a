//! The program as an operator meets it: it starts with no arguments, says what it serves, answers, drains and ends.
//! The README's tables are compared with the code's.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Command;

use patchbay::adapter::{KINDS, Kind};
use patchbay::model::supported_architectures;
use serde_json::{Value, json};

use crate::process::Server;

#[test]
fn the_default_server_answers_from_base_and_samples_and_stops_with_0() {
    let server = Server::start(&[]);
    for fact in ["LlamaForCausalLM", "\"dtype\":\"f32\"", "KV cache", "adapter bounds", env!("CARGO_PKG_VERSION")] {
        assert!(server.start.contains(fact), "the log at start lacks {fact}:\n{}", server.start);
    }
    let sentence = "the cat is under the table";
    assert_eq!(server.chat("sample-model", sentence), sentence);
    assert_eq!(server.chat("reverse", sentence), "table the under is cat the");
    assert_eq!(server.chat("shout", sentence), sentence.to_uppercase());
    let json: Value = serde_json::from_str(&server.chat("json", sentence)).expect("the adapter answers in JSON");
    assert_eq!(json["count"], 6);
    for adapter in ["reverse", "shout", "json"] {
        let row = format!("| `{adapter}` | `{}` |", server.chat(adapter, sentence));
        assert!(readme().contains(&row), "README.md lacks the row\n{row}");
    }
    server.signal("-TERM");
    let (code, rest) = server.end();
    assert_eq!(code, Some(0), "{rest}");
    assert!(rest.contains("\"draining\"") && rest.contains("\"stopped\""), "{rest}");
}

#[test]
fn a_stop_lets_running_requests_finish() {
    let server = Server::start(&[]);
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).expect("a connection");
    let tokens = 900;
    let body = json!({
        "model": "sample-model", "prompt": "the cat", "max_tokens": tokens, "ignore_eos": true, "stream": true,
        "stream_options": {"include_usage": true}, "temperature": 0,
    });
    let body = body.to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).expect("sent");
    let mut answer = BufReader::new(stream);
    let mut line = String::new();
    while !line.starts_with("data: ") {
        line.clear();
        assert!(answer.read_line(&mut line).expect("UTF-8") > 0, "the stream ended early");
    }
    server.signal("-INT");
    let mut rest = String::new();
    answer.read_to_string(&mut rest).expect("the whole stream");
    assert!(rest.contains(&format!("\"completion_tokens\":{tokens}")) && rest.contains("data: [DONE]"), "{rest}");
    let (code, log) = server.end();
    assert_eq!(code, Some(0), "{log}");
}

#[test]
fn a_taken_port_is_told_before_the_model_loads() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = taken.local_addr().expect("bound").port().to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_patchbay"))
        .args(["serve", "--port", &port, "--model", "no-such-model"])
        .env_clear()
        .output()
        .expect("the program starts");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains(&format!("listening on 127.0.0.1:{port} (server.host, server.port)")), "{stderr}");
}

#[test]
fn an_open_address_without_an_admin_key_is_told_and_closed() {
    let server = Server::start(&["--host", "0.0.0.0"]);
    assert!(server.start.contains("routes that change adapters are off"), "{}", server.start);
    let url = server.url.replace("0.0.0.0", "127.0.0.1");
    let status = match ureq::delete(&format!("{url}/v1/adapters/shout")).call() {
        Err(ureq::Error::Status(status, _)) => status,
        other => panic!("{other:?}"),
    };
    assert_eq!(status, 403);
}

#[test]
fn keys_do_not_reach_the_log() {
    let server = Server::start(&["--api-key", "hunter2", "--admin-key", "hunter3", "--log-level", "debug"]);
    let authorised = ureq::get(&format!("{}/v1/models", server.url)).set("authorization", "Bearer hunter2").call();
    assert_eq!(authorised.expect("an answer").status(), 200);
    assert!(ureq::get(&format!("{}/v1/models", server.url)).call().is_err());
    server.signal("-TERM");
    let start = server.start.clone();
    let (_, rest) = server.end();
    assert!(!(start + &rest).contains("hunter"));
}

fn readme() -> String {
    fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).expect("README.md")
}

/// First cells of the table below a heading, without quotes.
fn first_cells(text: &str, heading: &str) -> Vec<String> {
    let section = text.split(&format!("\n## {heading}\n")).nth(1).expect(heading);
    let section = section.split("\n## ").next().expect("never empty");
    let rows = section.lines().filter(|line| line.starts_with("| ")).skip(1).filter(|line| !line.starts_with("|-"));
    rows.map(|row| row.trim_matches('|').split('|').next().expect("a cell").trim().replace('`', "")).collect()
}

#[test]
fn readme_lists_every_adapter_kind() {
    let table: Vec<_> = KINDS.iter().map(|kind| kind.peft_type.to_owned()).collect();
    assert_eq!(first_cells(&readme(), "Adapter kinds"), table);
    let manifest: Value =
        serde_json::from_slice(&fs::read("tests/fixtures/manifest.json").expect("a file")).expect("JSON");
    for kind in KINDS {
        let checked = checked_against(kind.peft_type, &manifest["versions"]);
        let Kind { peft_type, title, served_as, merged_as, .. } = kind;
        let row = format!("| `{peft_type}` | {title} | {served_as} | {merged_as} | {checked} |");
        assert!(readme().contains(&row), "README.md lacks the row\n{row}");
    }
}

/// The last cell of a kind's row: what made its fixtures, with the versions that they note.
fn checked_against(peft_type: &str, versions: &Value) -> String {
    let version = |of: &str| versions.pointer(of).and_then(Value::as_str).unwrap_or_else(|| panic!("{of}")).to_owned();
    let peft = version("/peft");
    match peft_type {
        "SSF" | "SARA" | "SVFIT" | "FLORA" => "its formula in torch".to_owned(),
        "BONE" => format!("PEFT {}; form row by formula", version("/bone/peft")),
        "OFT" => format!("PEFT {peft}, {}, {}", version("/oft_0_15/peft"), version("/oft_0_13/peft")),
        "BOTTLENECK" => format!("adapters {}", version("/adapterhub/adapters")),
        _ => format!("PEFT {peft}"),
    }
}

#[test]
fn readme_lists_every_model_family() {
    let table: Vec<_> = supported_architectures().map(str::to_owned).collect();
    assert_eq!(first_cells(&readme(), "Model families"), table);
}

#[test]
fn readme_gives_the_two_commands() {
    let readme = readme();
    for command in ["\ncargo run --release -- serve\n", "\ncargo test\n"] {
        assert!(readme.contains(command), "README.md lacks{command}");
    }
}
