//! What is to be measured.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Serialize;
use thiserror::Error;

use super::client::Keys;
use super::report::Workload;
use super::target::Target;
use crate::config::Config;

/// Most requests that run at once.
const CONCURRENCY_MAX: usize = 10_000;

/// What is to be measured, and where.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server.
    pub server: Server,
    /// Keys to it.
    pub keys: Keys,
    /// Numbers of requests that run at once; each is a run.
    pub concurrency: Vec<usize>,
    /// How requests spread over the adapters; each is measured at every concurrency.
    pub distributions: Vec<Distribution>,
    /// Times that all runs are repeated, one after the other.
    pub rounds: usize,
    /// Names or patterns (`*`, `?`) of the adapters to use, taken in turn; empty is every adapter.
    pub patterns: Vec<String>,
    /// Number of adapters to use; `None` is every one that matches.
    pub num_adapters: Option<usize>,
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Tokens of each answer.
    pub output_tokens: usize,
    /// Requests per run; `None` is four times the concurrency, at least 8.
    pub requests: Option<usize>,
    /// Requests before each run that are not counted; `None` is the concurrency.
    pub warm_up: Option<usize>,
    /// Prompts are made of token ids below this; `None` is the model's vocabulary where it is known, else 256.
    pub vocab_size: Option<usize>,
    /// Seed of prompts and of what is drawn.
    pub seed: u64,
    /// Directory of an adapter to load and unload all the time while requests run.
    pub load_while: Option<PathBuf>,
    /// Directory of an adapter whose way to its first token is measured, instead of any run.
    pub hot_load: Option<PathBuf>,
    /// Seconds without an answer after which a request has failed.
    pub silence_s_max: u64,
    /// Whether to measure the machine's limits first.
    pub measure_machine: bool,
    /// The command line, for the report.
    pub command: Vec<String>,
}

/// Which server is measured.
#[derive(Clone, Debug)]
pub enum Server {
    /// One that runs.
    Url(String),
    /// One that is started in this process for as long as the measurement takes, over a scratch store that shows the
    /// adapter directories of the configured root.
    Start {
        /// Its settings; the address is replaced by a free loopback port.
        config: Box<Config>,
        /// Names under which each adapter is registered: its own, then `<name>.1` and so on.
        copies: usize,
    },
}

/// How requests spread over the adapters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Distribution {
    /// The base model only.
    Base,
    /// Every request uses the first adapter.
    One,
    /// Each request uses the next adapter.
    RoundRobin,
    /// Adapter i (from 1) is drawn with a weight of `i^-s`.
    Zipf(f64),
    /// No two requests that run at once use one adapter.
    Distinct,
    /// Every request uses an adapter that is not in the server's memory.
    Cold,
}

/// Why a plan cannot be followed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlanError {
    /// An argument makes no sense.
    #[error("{argument}: {reason}")]
    Argument {
        /// The flag.
        argument: &'static str,
        /// What is wrong, expected then found.
        reason: String,
    },
    /// The server lacks what the plan needs.
    #[error("{0}")]
    Server(String),
}

impl Plan {
    /// Refuses what cannot be measured on any server.
    ///
    /// # Errors
    /// [`PlanError::Argument`], naming the flag.
    pub fn check(&self) -> Result<(), PlanError> {
        let refuse = |argument, reason: String| Err(PlanError::Argument { argument, reason });
        if let Server::Url(url) = &self.server
            && !url.starts_with("http://")
            && !url.starts_with("https://")
        {
            return refuse("--url", format!("expected an address such as http://127.0.0.1:8000, found `{url}`"));
        }
        if let Some(found) = self.concurrency.iter().find(|c| !(1..=CONCURRENCY_MAX).contains(*c)) {
            return refuse("--concurrency", format!("expected 1 to {CONCURRENCY_MAX}, found {found}"));
        }
        for (argument, found) in [
            ("--concurrency", self.concurrency.len()),
            ("--dist", self.distributions.len()),
            ("--repeat", self.rounds),
            ("--prompt-tokens", self.prompt_tokens),
            ("--output-tokens", self.output_tokens),
            ("--requests", self.requests.unwrap_or(1)),
            ("--num-adapters", self.num_adapters.unwrap_or(1)),
            ("--vocab-size", self.vocab_size.unwrap_or(1)),
        ] {
            if found == 0 {
                return refuse(argument, "expected at least 1, found 0".to_owned());
            }
        }
        if let Server::Start { copies: 0, .. } = self.server {
            return refuse("--copies", "expected at least 1, found 0".to_owned());
        }
        if self.hot_load.is_some() && self.load_while.is_some() {
            return refuse("--hot-load", "cannot be combined with --load-while: it needs an idle server".to_owned());
        }
        Ok(())
    }

    /// Requests of a run at this concurrency.
    pub(super) fn requests_at(&self, concurrency: usize) -> usize {
        self.requests.unwrap_or((4 * concurrency).max(8))
    }

    /// Directories that are uploaded.
    pub(super) fn uploads(&self) -> impl Iterator<Item = &PathBuf> {
        self.load_while.iter().chain(&self.hot_load)
    }

    /// What every run has in common.
    pub(super) fn workload(&self, target: &Target) -> Workload {
        Workload {
            prompt_tokens: self.prompt_tokens,
            output_tokens: self.output_tokens,
            vocab_size: target.vocab_size,
            num_adapters: target.adapters.len(),
            seed: self.seed,
        }
    }
}

impl Distribution {
    /// Whether requests name adapters.
    pub(super) fn uses_adapters(&self) -> bool {
        *self != Self::Base
    }

    /// Whether the adapters are to be in the server's memory before the run.
    pub(super) fn wants_warm_adapters(&self) -> bool {
        !matches!(self, Self::Base | Self::Cold)
    }
}

impl FromStr for Distribution {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let zipf = |s: f64| {
            if s.is_finite() && s >= 0.0 {
                Ok(Self::Zipf(s))
            } else {
                Err(format!("the exponent of zipf must be a number from 0, found {s}"))
            }
        };
        match text.split_once(':') {
            Some(("zipf", s)) => zipf(s.parse().map_err(|_| format!("`{s}` is not a number"))?),
            None if text == "zipf" => zipf(1.0),
            None if text == "base" => Ok(Self::Base),
            None if text == "one" => Ok(Self::One),
            None if text == "round-robin" => Ok(Self::RoundRobin),
            None if text == "distinct" => Ok(Self::Distinct),
            None if text == "cold" => Ok(Self::Cold),
            _ => Err("expected base, one, round-robin, zipf, zipf:<exponent>, distinct or cold".to_owned()),
        }
    }
}

impl fmt::Display for Distribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base => f.write_str("base"),
            Self::One => f.write_str("one"),
            Self::RoundRobin => f.write_str("round-robin"),
            Self::Zipf(s) => write!(f, "zipf:{s}"),
            Self::Distinct => f.write_str("distinct"),
            Self::Cold => f.write_str("cold"),
        }
    }
}

impl Serialize for Distribution {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions_read_as_they_are_written() {
        for text in ["base", "one", "round-robin", "zipf:1.2", "zipf:0", "distinct", "cold"] {
            assert_eq!(text.parse::<Distribution>().unwrap().to_string(), text);
        }
        assert_eq!("zipf".parse(), Ok(Distribution::Zipf(1.0)));
    }

    #[test]
    fn what_is_no_distribution_is_refused() {
        for text in ["", "Base", "zipf:", "zipf:-1", "zipf:inf", "zipf:nan", "one:1", "random"] {
            assert!(text.parse::<Distribution>().is_err(), "{text}");
        }
    }
}
