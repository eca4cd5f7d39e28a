//! The program as a process of its own.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, ChildStderr, Command, Stdio};

use serde_json::{Value, json};

/// `patchbay serve` on a free port, with a small KV cache and a log in JSON.
pub(crate) fn command(arguments: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_patchbay"));
    command
        .args(["serve", "--port", "0", "--set", "log.format=json", "--set", "engine.kv_cache_bytes=16MiB"])
        .args(arguments)
        .env_clear()
        .envs(variables.iter().copied())
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

/// A server on a free port, over the sample model and adapters. Dropping it ends the process.
pub(crate) struct Server {
    child: Child,
    log: BufReader<ChildStderr>,
    /// Everything logged until the server listened.
    pub(crate) start: String,
    pub(crate) url: String,
}

impl Server {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_with(arguments, &[])
    }

    /// The same with variables, the only ones that the program sees.
    pub(crate) fn start_with(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut child = command(arguments, variables).stderr(Stdio::piped()).spawn().expect("the program starts");
        let mut log = BufReader::new(child.stderr.take().expect("piped"));
        let mut start = String::new();
        let url = loop {
            let at = start.len();
            assert!(log.read_line(&mut start).expect("UTF-8") > 0, "the server ended:\n{start}");
            let message = &serde_json::from_str::<Value>(&start[at..]).expect("a JSON line")["message"];
            if let Some((_, url)) = message.as_str().and_then(|m| m.split_once("listening on ")) {
                break url.to_owned();
            }
        };
        Self { child, log, start, url }
    }

    pub(crate) fn chat(&self, model: &str, text: &str) -> String {
        let body = json!({"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0});
        let answer: Value = ureq::post(&format!("{}/v1/chat/completions", self.url))
            .send_json(body)
            .expect("an answer")
            .into_json()
            .expect("JSON");
        answer["choices"][0]["message"]["content"].as_str().expect("text").to_owned()
    }

    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args([name, &self.child.id().to_string()]).status().expect("kill");
        assert!(status.success());
    }

    /// Waits for the end; returns the exit code and the rest of the log.
    pub(crate) fn end(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).expect("UTF-8");
        (self.child.wait().expect("it ends").code(), rest)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fails when the process has ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
