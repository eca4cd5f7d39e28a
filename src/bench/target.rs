//! What of a server is measured: its base model and the chosen adapters.

use std::collections::HashSet;

use anyhow::{Context as _, Result};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use serde_json::Value;

use super::client::{Client, completion};
use super::plan::{Distribution, Plan, PlanError};
use super::progress::Progress;
use super::report::AdapterReport;
use super::workload::{Prompts, choose};

/// Ids below this are in any vocabulary.
const VOCAB_SIZE_MIN: usize = 256;
/// Requests that bring adapters into memory, at once.
const WARM_AT_ONCE: usize = 4;

/// What is measured.
pub(super) struct Target {
    /// Name of the base model.
    pub(super) base: String,
    /// Names of the chosen adapters; empty where no distribution uses one.
    pub(super) adapters: Vec<String>,
    /// Prompts are made of ids below this.
    pub(super) vocab_size: usize,
    /// Every name that the server has.
    names: HashSet<String>,
}

impl Target {
    /// Asks the server what it has and chooses; `vocab_size` is the model's where it is known.
    pub(super) async fn find(client: &Client, plan: &Plan, vocab_size: Option<usize>) -> Result<Self> {
        let (base, names) = client.models().await?;
        let uses_adapters = plan.hot_load.is_none() && plan.distributions.iter().any(Distribution::uses_adapters);
        let adapters = if uses_adapters { choose(&names, &plan.patterns, plan.num_adapters)? } else { Vec::new() };
        if uses_adapters && adapters.is_empty() {
            return Err(PlanError::Server("the server has no adapters; measure --dist base".to_owned()).into());
        }
        for concurrency in plan.concurrency.iter().filter(|_| plan.distributions.contains(&Distribution::Distinct)) {
            if adapters.len() < *concurrency {
                let message = format!(
                    "distinct: {concurrency} requests at a time need as many adapters, {} are chosen",
                    adapters.len()
                );
                return Err(PlanError::Server(message).into());
            }
        }
        let vocab_size = plan.vocab_size.or(vocab_size).unwrap_or(VOCAB_SIZE_MIN);
        Ok(Self { base, adapters, vocab_size, names: names.into_iter().collect() })
    }

    /// Brings every chosen adapter into the server's memory with a request of one token each.
    pub(super) async fn warm(&self, client: &Client, prompts: &mut Prompts) -> Result<()> {
        let progress = Progress::new("loading adapters", self.adapters.len());
        let prompts = prompts.take(self.adapters.len())?;
        let requests = self.adapters.iter().zip(&prompts).map(|(name, prompt)| {
            let progress = &progress;
            async move {
                client
                    .complete(completion(name, prompt, 1))
                    .await
                    .with_context(|| format!("loading adapter {name}"))?;
                progress.step();
                anyhow::Ok(())
            }
        });
        // Boxed, as the type of a stream of borrowing futures is not general enough otherwise.
        let requests: Vec<_> = requests.map(Box::pin).collect();
        stream::iter(requests).buffer_unordered(WARM_AT_ONCE).try_collect::<()>().await
    }

    /// The chosen adapters that are not in the server's memory, at least `needed`.
    pub(super) async fn cold(&self, client: &Client, needed: usize) -> Result<Vec<String>> {
        let list = client.adapters().await.context("cold: whether adapters are in memory, only Patchbay tells")?;
        let is_loaded = |entry: &&Value| entry["loaded"] == true;
        let loaded: HashSet<&str> = list.iter().filter(is_loaded).filter_map(|entry| entry["name"].as_str()).collect();
        let cold = self.adapters.iter().filter(|name| !loaded.contains(name.as_str()));
        let cold: Vec<String> = cold.cloned().collect();
        if cold.len() < needed {
            let message = format!(
                "cold: {needed} requests need as many adapters that are not in memory, {} of the {} chosen are not",
                cold.len(),
                self.adapters.len()
            );
            return Err(PlanError::Server(message).into());
        }
        Ok(cold)
    }

    /// A name for uploads that takes no other adapter's place.
    pub(super) fn free_name(&self, name: &str) -> Result<String, PlanError> {
        if self.names.contains(name) {
            return Err(PlanError::Server(format!("the server has an adapter `{name}`, which this would replace")));
        }
        Ok(name.to_owned())
    }

    /// The chosen adapters with what the server found in them, where it tells.
    pub(super) async fn described(&self, client: &Client) -> Vec<AdapterReport> {
        let list = if self.adapters.is_empty() { Vec::new() } else { client.adapters().await.unwrap_or_default() };
        let described = self.adapters.iter().map(|name| {
            let report = list.iter().find(|entry| entry["name"] == name.as_str()).map(|entry| &entry["report"]);
            AdapterReport {
                name: name.clone(),
                kind: report.and_then(|report| report["kind"].as_str()).map(str::to_owned),
                bytes: report.and_then(|report| report["bytes"].as_u64()),
            }
        });
        described.collect()
    }
}
