//! `patchbay adapter`: checking, converting and combining adapters offline, and listing, adding and removing those of a
//! running server.

use std::fs::File;
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::{Args, Subcommand};
use serde::Deserialize;
use serde_json::Value;

use super::combine::{self, CombineArgs};
use super::settings::SettingsArgs;
use crate::adapter::{AdapterError, AdapterFiles, LowerOptions, LowerReport, lower};
use crate::config::Config;
use crate::model::{self, DeviceChoice, Model, ModelConfig};
use crate::store::AdapterDirectory;

/// A config is some kilobytes.
const CONFIG_BYTES_MAX: usize = 16 << 20;
/// Longest time to wait for a server to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Subcommand)]
pub(super) enum AdapterCommand {
    /// Say what a directory holds and what is wrong with it, as far as that shows without a base model.
    Inspect {
        /// Directory with adapter_config.json and adapter_model.safetensors (or adapter.safetensors).
        dir: PathBuf,
    },
    /// Check a directory against the base model, without a server: what it is, what it changes, what it takes.
    Check {
        /// Directory with adapter_config.json and adapter_model.safetensors (or adapter.safetensors).
        dir: PathBuf,
        /// Check it as it would be served merged into dense weights.
        #[arg(long)]
        merge: bool,
        #[command(flatten)]
        settings: Box<SettingsArgs>,
    },
    /// Write an adapter in another form with the same effect, or a model with the adapter merged into it.
    Convert(super::convert::ConvertArgs),
    /// Make one adapter of several, without a server or a base model, and write it as PEFT does.
    Combine(CombineArgs),
    /// List the adapters of a running server.
    List(ServerArgs),
    /// Upload a directory to a running server; a name that exists gets a new generation.
    Add {
        /// Name to serve it under.
        name: String,
        /// Directory with adapter_config.json and adapter_model.safetensors (or adapter.safetensors).
        dir: PathBuf,
        /// Serve it merged into dense weights.
        #[arg(long)]
        merge: bool,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Remove an adapter from a running server.
    Remove {
        /// Its name.
        name: String,
        #[command(flatten)]
        server: ServerArgs,
    },
}

/// Which server, and the key to it.
#[derive(Args)]
pub(super) struct ServerArgs {
    /// Address of the server.
    #[arg(long, value_name = "URL", env = "PATCHBAY_URL", default_value = "http://127.0.0.1:8000")]
    server: String,
    /// The server's admin key; for `list` its API key will do.
    #[arg(long, value_name = "KEY", env = "PATCHBAY_SERVER_ADMIN_KEY", hide_env_values = true)]
    key: Option<String>,
}

impl std::fmt::Debug for ServerArgs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerArgs").field("server", &self.server).finish_non_exhaustive()
    }
}

/// Runs the command; `out` is where its answer goes.
pub(super) fn run(command: AdapterCommand, out: &mut dyn Write) -> Result<()> {
    match command {
        AdapterCommand::Inspect { dir } => super::inspect::run(&dir, out),
        AdapterCommand::Check { dir, merge, settings } => check(&dir, merge, &settings.resolve()?.config, out),
        AdapterCommand::Convert(arguments) => super::convert::run(arguments, out),
        AdapterCommand::Combine(arguments) => combine::run(&arguments, out),
        AdapterCommand::List(server) => list(&server.connect()?, out),
        AdapterCommand::Add { name, dir, merge, server } => {
            add(&server.connect()?, &name, &AdapterDirectory::open(&dir)?, merge, out)
        }
        AdapterCommand::Remove { name, server } => remove(&server.connect()?, &name, out),
    }
}

/// The directory's two files; a fault names the directory.
pub(super) fn read(dir: &Path, bytes_max: usize) -> Result<AdapterFiles> {
    let files = AdapterDirectory::open(dir).and_then(|found| found.read(bytes_max));
    files.with_context(|| dir.display().to_string())
}

/// Lowers the adapter for the configured base model, on the CPU, and says what came out.
fn check(dir: &Path, merge: bool, config: &Config, out: &mut dyn Write) -> Result<()> {
    let files = read(dir, config.adapters.upload_bytes_max)?;
    let model_config = ModelConfig { device: DeviceChoice::Cpu, ..config.model.clone() };
    let what = || format!("loading the model {} (model.path)", config.model.path);
    let model_dir = model::locate(&model_config).with_context(what)?;
    let model = Model::load(&model_dir, &model_config).with_context(what)?;
    let formats = model.info().adapter_formats;
    let options = LowerOptions { merge, formats, own_bytes_max: config.adapters.merged_bytes_max };
    let started = Instant::now();
    let (_, report) = lower(&files, &model, &options).map_err(|refusal| match refusal {
        AdapterError::Compute(_) => anyhow!(refusal),
        _ => anyhow!("{} cannot be served on {}: {refusal}", dir.display(), config.model.path),
    })?;
    let milliseconds = started.elapsed().as_secs_f64() * 1e3;
    describe(&report, out)?;
    writeln!(out, "format    {formats}")?;
    writeln!(out, "lowered   in {milliseconds:.1} ms")?;
    if report.bytes > config.adapters.host_bytes_max {
        bail!("{} bytes exceed the {} of adapters.host_bytes_max", report.bytes, config.adapters.host_bytes_max);
    }
    Ok(())
}

fn describe(report: &LowerReport, out: &mut dyn Write) -> Result<()> {
    let ranks: Vec<String> = report.ranks.iter().map(ToString::to_string).collect();
    writeln!(out, "kind      {}{}", report.kind, if report.merged { ", merged" } else { "" })?;
    writeln!(out, "modules   {}", report.modules)?;
    if !ranks.is_empty() {
        writeln!(out, "ranks     {}", ranks.join(", "))?;
    }
    if report.leading_tokens > 0 {
        writeln!(out, "context   {} positions before every prompt", report.leading_tokens)?;
    }
    let dense = report.own_weight_bytes;
    writeln!(out, "memory    {} bytes, {dense} of them dense weights", report.bytes)?;
    for own in &report.own_weights {
        writeln!(out, "dense     {} modules, because {}", own.modules, own.reason)?;
    }
    for warning in &report.warnings {
        writeln!(out, "warning   {warning}")?;
    }
    Ok(())
}

/// A running server.
struct Server {
    agent: ureq::Agent,
    url: String,
    key: Option<String>,
}

/// What `GET /v1/adapters` says of one adapter, as far as it is shown.
#[derive(Debug, Deserialize)]
struct Listed {
    name: String,
    generation: u64,
    loaded: bool,
    leases: usize,
    digest: String,
    report: Option<ListedReport>,
}

#[derive(Debug, Deserialize)]
struct ListedReport {
    kind: String,
    merged: bool,
    modules: usize,
    bytes: usize,
    warnings: Vec<String>,
}

#[derive(Deserialize)]
struct List {
    data: Vec<Listed>,
}

impl ServerArgs {
    fn connect(self) -> Result<Server> {
        let url = self.server.trim_end_matches('/').to_owned();
        if !url.starts_with("http://") && !url.starts_with("https://") {
            bail!("--server {url}: expected an address such as http://127.0.0.1:8000");
        }
        let agent = ureq::AgentBuilder::new().timeout_connect(CONNECT_TIMEOUT).redirects(0).build();
        Ok(Server { agent, url, key: self.key })
    }
}

impl Server {
    fn request(&self, method: &str, path: &str) -> ureq::Request {
        let request = self.agent.request(method, &format!("{}{path}", self.url));
        match &self.key {
            Some(key) => request.set("Authorization", &format!("Bearer {key}")),
            None => request,
        }
    }

    /// The answer, or the server's own words about why there is none.
    fn answer(&self, sent: Result<ureq::Response, ureq::Error>) -> Result<ureq::Response> {
        match sent {
            Ok(response) => Ok(response),
            Err(ureq::Error::Status(status, response)) => {
                let envelope: Option<Value> = response.into_json().ok();
                let message = envelope.as_ref().and_then(|envelope| envelope["error"]["message"].as_str());
                Err(anyhow!("{} ({status})", message.unwrap_or("the server refused")))
            }
            Err(ureq::Error::Transport(error)) => Err(anyhow!(error).context(format!("asking {}", self.url))),
        }
    }
}

/// One line per adapter.
fn list(server: &Server, out: &mut dyn Write) -> Result<()> {
    let answer = server.answer(server.request("GET", "/v1/adapters").call())?;
    let list: List = answer.into_json().context("reading the list of adapters")?;
    let width = list.data.iter().map(|adapter| adapter.name.len()).max().unwrap_or(0).max("name".len());
    writeln!(out, "{:width$}  generation  loaded  leases  {:12}  kind", "name", "digest")?;
    for adapter in &list.data {
        let loaded = if adapter.loaded { "yes" } else { "no" };
        let digest: String = adapter.digest.chars().take(12).collect();
        let kind = adapter.report.as_ref().map_or_else(|| "-".to_owned(), ListedReport::kind);
        writeln!(
            out,
            "{:width$}  {:>10}  {loaded:>6}  {:>6}  {digest:12}  {kind}",
            adapter.name, adapter.generation, adapter.leases
        )?;
    }
    Ok(())
}

impl ListedReport {
    fn kind(&self) -> String {
        format!("{}{}", self.kind, if self.merged { ", merged" } else { "" })
    }
}

/// Uploads the directory's files as a tar archive, without holding them in memory.
fn add(server: &Server, name: &str, dir: &AdapterDirectory, merge: bool, out: &mut dyn Write) -> Result<()> {
    let parts = dir.parts(CONFIG_BYTES_MAX)?;
    let dirs = [(String::new(), dir)].into_iter();
    let dirs = dirs.chain(parts.iter().enumerate().map(|(number, part)| (format!("{number}/"), part)));
    let mut archive: Box<dyn Read> = Box::new(std::io::empty());
    let mut length = 0;
    for (prefix, dir) in dirs {
        for (name, path) in [("adapter_config.json", &dir.config), ("adapter_model.safetensors", &dir.weights)] {
            let (member, bytes) = tar_member(&format!("{prefix}{name}"), path)?;
            archive = Box::new(archive.chain(member));
            length += bytes;
        }
    }
    let end = [0; 1024];
    length += end.len() as u64;
    let mut request = server.request("PUT", &format!("/v1/adapters/{}", segment(name)?));
    if merge {
        request = request.query("merge", "true");
    }
    let request = request.set("Content-Type", "application/x-tar").set("Content-Length", &length.to_string());
    let answer = server.answer(request.send(archive.chain(Cursor::new(end))))?;
    let added: Listed = answer.into_json().context("reading the server's answer")?;
    writeln!(out, "{}@{} {}", added.name, added.generation, added.digest)?;
    if let Some(report) = &added.report {
        writeln!(out, "{}: {} modules, {} bytes", report.kind(), report.modules, report.bytes)?;
        for warning in &report.warnings {
            writeln!(out, "warning: {warning}")?;
        }
    }
    Ok(())
}

fn remove(server: &Server, name: &str, out: &mut dyn Write) -> Result<()> {
    server.answer(server.request("DELETE", &format!("/v1/adapters/{}", segment(name)?)).call())?;
    writeln!(out, "removed {name}")?;
    Ok(())
}

/// The name as a path segment; what would need escaping is no adapter's name.
fn segment(name: &str) -> Result<&str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        bail!("`{name}` is not an adapter name: A-Z a-z 0-9 . _ - are allowed, not starting with a dot");
    }
    Ok(name)
}

/// A tar member that reads as header, content and padding, and its length. The content is as long as it was when the
/// header was made, whatever happens to the file meanwhile.
fn tar_member(name: &str, path: &Path) -> Result<(impl Read + use<>, u64)> {
    let what = || path.display().to_string();
    let file = File::open(path).with_context(what)?;
    let size = file.metadata().with_context(what)?.len();
    let mut header = tar::Header::new_gnu();
    header.set_path(name)?;
    header.set_size(size);
    header.set_mode(0o644);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    let header = header.as_bytes().to_vec();
    let padding = vec![0; usize::try_from(size.next_multiple_of(512) - size)?];
    let length = (header.len() + padding.len()) as u64 + size;
    Ok((Cursor::new(header).chain(file.take(size)).chain(Cursor::new(padding)), length))
}
