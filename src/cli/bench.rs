//! `patchbay bench`: the plan from the command line, the table and the JSON.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;

use super::serve::init_logging;
use super::settings::SettingsArgs;
use crate::bench::{self, Distribution, Keys, Plan, PlanError, Server};
use crate::config::{LogConfig, is_secret};

/// Least severe level that the log of a server in this process shows, unless told otherwise.
const LOG_LEVEL: &str = "warn";

/// Measure a server: one that runs (--url), or one started here from the settings for as long as it takes.
///
/// Without --url the model and the adapters are those that `patchbay serve` would serve with the same settings; uploads
/// go to a scratch store. The client shares the cores with the server.
#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// Address of a running server; without it one is started.
    #[arg(long)]
    url: Option<String>,
    /// Requests at a time; each number is a run.
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', default_value = "1,16")]
    concurrency: Vec<usize>,
    /// How requests spread over adapters: base, one, round-robin, zipf[:exponent], distinct (no two at a time share one)
    /// or cold (none is in memory); each is measured at every concurrency.
    #[arg(short, long, value_name = "NAME,...", value_delimiter = ',', default_value = "base")]
    dist: Vec<Distribution>,
    /// Number of adapters to use; default: all that match.
    #[arg(short = 'a', long, value_name = "N")]
    num_adapters: Option<usize>,
    /// Names or patterns (* and ?) of the adapters to use, one of each in turn: `low-*,high-*` mixes the two evenly.
    #[arg(long, value_name = "PATTERN,...", value_delimiter = ',')]
    names: Vec<String>,
    /// Register each adapter under so many names; only for a server started here.
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "url")]
    copies: usize,
    /// Tokens of each prompt.
    #[arg(short, long, value_name = "N", default_value_t = 128)]
    prompt_tokens: usize,
    /// Tokens of each answer.
    #[arg(short, long, value_name = "N", default_value_t = 64)]
    output_tokens: usize,
    /// Requests per run, or times a hot load is measured; default: 4 times the concurrency, at least 8.
    #[arg(short = 'n', long, value_name = "N")]
    requests: Option<usize>,
    /// Requests before each run that do not count; default: the concurrency.
    #[arg(short, long, value_name = "N")]
    warm_up: Option<usize>,
    /// Times all runs are repeated in turn.
    #[arg(long, value_name = "N", default_value_t = 1)]
    repeat: usize,
    /// Prompts are made of token ids below this; default: the model's vocabulary, or 256 with --url.
    #[arg(long, value_name = "N")]
    vocab_size: Option<usize>,
    /// Seed of prompts and draws.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Make every run twice: alone, and while this adapter is uploaded and removed all the time.
    #[arg(long, value_name = "DIR")]
    load_while: Option<PathBuf>,
    /// Measure, on an idle server and instead of runs, this adapter's way from its upload to its first token.
    #[arg(long, value_name = "DIR")]
    hot_load: Option<PathBuf>,
    /// Seconds without a byte after which a request has failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    silence_s_max: u64,
    /// First measure memory bandwidth and arithmetic of this machine.
    #[arg(long)]
    measure_machine: bool,
    /// Write everything as JSON to this file, or with `-` to standard output, the table then to standard error.
    #[arg(long, value_name = "FILE|-")]
    json: Option<PathBuf>,
    #[command(flatten)]
    settings: Box<SettingsArgs>,
}

/// Measures and prints; `command` is the whole command line.
pub(super) fn run(args: BenchArgs, command: Vec<String>) -> Result<()> {
    if let (Some(_), Some(flag)) = (&args.url, args.settings.server_flag()) {
        let reason = "describes a server to start, but --url measures one that runs".to_owned();
        return Err(PlanError::Argument { argument: flag, reason }.into());
    }
    let is_json_printed = args.json.as_deref().is_some_and(|path| path.as_os_str() == "-");
    let json = args.json.clone();
    // Opened first: a file that cannot be written is found before the work is done.
    let file = match &json {
        Some(path) if !is_json_printed => Some(File::create(path).with_context(|| path.display().to_string())?),
        _ => None,
    };
    let plan = args.plan(command)?;
    plan.check()?;
    let report =
        if is_json_printed { bench::run(&plan, &mut io::stderr()) } else { bench::run(&plan, &mut io::stdout()) }?;
    if is_json_printed {
        write_json(&report, io::stdout())?;
    }
    if let Some(file) = file {
        write_json(&report, BufWriter::new(file))?;
    }
    Ok(())
}

fn write_json(report: &bench::Report, mut out: impl Write) -> Result<()> {
    serde_json::to_writer_pretty(&mut out, report)?;
    writeln!(out)?;
    Ok(out.flush()?)
}

impl BenchArgs {
    fn plan(self, command: Vec<String>) -> Result<Plan> {
        let mut config = self.settings.resolve()?.config;
        let keys = Keys { api: config.server.api_key.clone(), admin: config.server.admin_key.clone() };
        let server = match self.url {
            Some(url) => Server::Url(url),
            None => {
                if config.log.level == LogConfig::default().level {
                    config.log.level = LOG_LEVEL.to_owned();
                }
                init_logging(&config.log)?;
                Server::Start { config: Box::new(config), copies: self.copies }
            }
        };
        Ok(Plan {
            server,
            keys,
            concurrency: self.concurrency,
            distributions: self.dist,
            rounds: self.repeat,
            patterns: self.names,
            num_adapters: self.num_adapters,
            prompt_tokens: self.prompt_tokens,
            output_tokens: self.output_tokens,
            requests: self.requests,
            warm_up: self.warm_up,
            vocab_size: self.vocab_size,
            seed: self.seed,
            load_while: self.load_while,
            hot_load: self.hot_load,
            silence_s_max: self.silence_s_max,
            measure_machine: self.measure_machine,
            command,
        })
    }
}

/// The command line for the report, secrets replaced: what follows a secret's name and `=`, or its flag.
pub(super) fn shown(arguments: impl Iterator<Item = String>) -> Vec<String> {
    const SECRET: &str = "(secret)";
    let mut follows_flag = false;
    let arguments = arguments.map(|argument| {
        let names_secret = |text: &str| is_secret(&text.trim_end().replace('-', "_"));
        let is_flag = argument.starts_with('-') && !argument.contains('=');
        if std::mem::replace(&mut follows_flag, is_flag && names_secret(&argument)) {
            return SECRET.to_owned();
        }
        match argument.match_indices('=').find(|(at, _)| names_secret(&argument[..*at])) {
            Some((at, _)) => format!("{}={SECRET}", &argument[..at]),
            None => argument,
        }
    });
    arguments.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_shown_without_keys() {
        let check = |line: &str, expected: &str| {
            let found = shown(format!("patchbay bench {line}").split(' ').map(str::to_owned)).join(" ");
            assert_eq!(found, format!("patchbay bench {expected}"));
        };
        check(
            "--api-key s1 --admin-key=s2 --set server.api_key=s3 --seed 1",
            "--api-key (secret) --admin-key=(secret) --set server.api_key=(secret) --seed 1",
        );
        check("--set model.hub_token=hf_x -n 2", "--set model.hub_token=(secret) -n 2");
        check("--set=model.hub_token=hf_x=y= -n 2", "--set=model.hub_token=(secret) -n 2");
        check("--set=server.admin_key=a --set server.port=1", "--set=server.admin_key=(secret) --set server.port=1");
        check("--set server.api_key=a_token --seed 1", "--set server.api_key=(secret) --seed 1");
        check("--prompt-tokens 9 --set=engine.queue_max=3", "--prompt-tokens 9 --set=engine.queue_max=3");
    }
}
