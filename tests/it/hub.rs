//! A base model from a hub, which a small server of this machine stands for.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::json;
use tempfile::TempDir;

use crate::process::{self, Server};

const REPOSITORY: &str = "maker/sample";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Files of the repository that a server has no use for.
const OTHERS: &[&str] = &["README.md", "pytorch_model.bin", "onnx/model.onnx", "consolidated.safetensors"];

/// The hub's routes that a download uses, over the sample model.
struct Hub {
    url: String,
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
}

struct Shared {
    /// Path and token of each request.
    requests: Mutex<Vec<(String, Option<String>)>>,
    /// Bytes of a file's body after which the connection breaks.
    breaks_after: AtomicUsize,
    stopped: AtomicBool,
}

impl Hub {
    fn start() -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", socket.local_addr().unwrap());
        let shared = Arc::new(Shared {
            requests: Mutex::default(),
            breaks_after: AtomicUsize::new(usize::MAX),
            stopped: AtomicBool::new(false),
        });
        let for_thread = Arc::clone(&shared);
        let listener = std::thread::spawn(move || {
            for stream in socket.incoming() {
                if for_thread.stopped.load(Ordering::SeqCst) {
                    return;
                }
                // A client that went away is its own business.
                let _ = answer(&for_thread, stream.unwrap());
            }
        });
        Self { url, shared, listener: Some(listener) }
    }

    fn paths(&self) -> Vec<String> {
        self.shared.requests.lock().unwrap().iter().map(|(path, _)| path.clone()).collect()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        // Wakes the listener.
        drop(TcpStream::connect(self.url.trim_start_matches("http://")));
        if let Some(listener) = self.listener.take() {
            let ended = listener.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the hub panicked");
        }
    }
}

fn sample_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("sample-model")
}

/// Answers one request and closes the connection.
fn answer(shared: &Shared, mut stream: TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut line, mut path, mut range, mut token) = (String::new(), String::new(), None, None);
    while reader.read_line(&mut line)? > 2 {
        if path.is_empty() {
            path = line.split(' ').nth(1).unwrap().to_owned();
        } else if let Some((name, value)) = line.split_once(": ") {
            match name.to_ascii_lowercase().as_str() {
                "range" => range = Some(value.trim().trim_start_matches("bytes=").to_owned()),
                "authorization" => token = Some(value.trim().to_owned()),
                _ => {}
            }
        }
        line.clear();
    }
    shared.requests.lock().unwrap().push((path.clone(), token));
    if path == format!("/api/models/{REPOSITORY}/revision/main")
        || path == format!("/api/models/{REPOSITORY}/revision/v2")
    {
        let own = fs::read_dir(sample_model())?.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let files = own.chain(OTHERS.iter().map(|&name| name.to_owned()));
        let siblings: Vec<_> = files.map(|name| json!({"rfilename": name})).collect();
        let body = json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
    }
    let file = path.strip_prefix(&format!("/{REPOSITORY}/resolve/")).and_then(|rest| rest.split_once('/'));
    let Some(content) = file.and_then(|(_, name)| fs::read(sample_model().join(name)).ok()) else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    };
    let range = range.expect("a download asks for a range");
    let (start, end) = range.split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(content.len(), |last: usize| content.len().min(last + 1));
    let tag = content.iter().fold(content.len(), |tag, byte| tag.wrapping_mul(31).wrapping_add(usize::from(*byte)));
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\ncontent-length: {}\r\ncontent-range: bytes {start}-{}/{}\r\n\
         etag: \"{tag:016x}\"\r\nx-repo-commit: {COMMIT}\r\nconnection: close\r\n\r\n",
        end - start,
        end.max(1) - 1,
        content.len()
    )?;
    stream.write_all(&content[start..end.min(start.saturating_add(shared.breaks_after.load(Ordering::SeqCst)))])
}

fn variables<'a>(hub: &'a str, home: &'a TempDir) -> [(&'a str, &'a str); 2] {
    [("HF_ENDPOINT", hub), ("HF_HOME", home.path().to_str().unwrap())]
}

const SERVE: &[&str] = &["--model", REPOSITORY];

#[test]
fn a_hub_id_is_downloaded_served_and_served_again_without_the_hub() {
    let home = TempDir::new().unwrap();
    let hub = Hub::start();
    let url = hub.url.clone();
    let server = Server::start_with(SERVE, &variables(&url, &home));
    let sentence = "the cat is under the table";
    assert_eq!(server.chat("sample", sentence), sentence);
    assert_eq!(server.chat("reverse", sentence), "table the under is cat the");
    drop(server);
    let paths = hub.paths();
    for file in fs::read_dir(sample_model()).unwrap() {
        let path = format!("/{REPOSITORY}/resolve/main/{}", file.unwrap().file_name().to_str().unwrap());
        assert!(paths.contains(&path), "{path} is not among {paths:?}");
    }
    let needless: Vec<_> = OTHERS.iter().filter(|name| paths.iter().any(|path| path.ends_with(*name))).collect();
    assert!(needless.is_empty(), "downloaded {needless:?}");

    // A second start asks what there is, and downloads nothing.
    drop(Server::start_with(SERVE, &variables(&url, &home)));
    assert_eq!(hub.paths().len(), paths.len() + 1);
    drop(hub);
    let server = Server::start_with(SERVE, &variables(&url, &home));
    assert!(server.start.contains("using the copy downloaded earlier"), "{}", server.start);
    assert_eq!(server.chat("sample", sentence), sentence);
}

#[test]
fn revision_and_token_go_to_the_hub() {
    let home = TempDir::new().unwrap();
    let hub = Hub::start();
    let [endpoint, directory] = variables(&hub.url, &home);
    let arguments = ["--model", REPOSITORY, "--set", "model.revision=v2"];
    let server = Server::start_with(&arguments, &[endpoint, directory, ("HF_TOKEN", "hf_secret")]);
    assert!(!server.start.contains("hf_secret"), "{}", server.start);
    drop(server);
    for (path, token) in hub.shared.requests.lock().unwrap().iter() {
        assert!(path.contains("/v2"), "{path}");
        assert_eq!(token.as_deref(), Some("Bearer hf_secret"), "{path}");
    }
}

/// The log of a server that must not come up.
fn failed_start(arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let output = process::command(arguments, variables).output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{log}");
    log
}

#[test]
fn a_broken_download_is_told_and_taken_up_again() {
    let home = TempDir::new().unwrap();
    let hub = Hub::start();
    hub.shared.breaks_after.store(100_000, Ordering::SeqCst);
    let log = failed_start(SERVE, &variables(&hub.url, &home));
    assert!(log.contains(REPOSITORY), "{log}");
    hub.shared.breaks_after.store(usize::MAX, Ordering::SeqCst);
    let server = Server::start_with(SERVE, &variables(&hub.url, &home));
    let sentence = "seven sheep walk to the river";
    assert_eq!(server.chat("sample", sentence), sentence);
}

#[test]
fn what_the_hub_lacks_and_a_hub_that_is_away_are_told() {
    let home = TempDir::new().unwrap();
    let hub = Hub::start();
    let url = hub.url.clone();
    let log = failed_start(&["--model", "maker/nothing"], &variables(&url, &home));
    assert!(log.contains("maker/nothing") && log.contains("404"), "{log}");
    drop(hub);
    let log = failed_start(SERVE, &variables(&url, &home));
    assert!(log.contains(REPOSITORY) && log.contains("there is no local directory of that name either"), "{log}");
}
