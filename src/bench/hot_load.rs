//! An adapter's way to its first token on an idle server.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use bytes::Bytes;

use super::Progress;
use super::client::{Client, completion, milliseconds};
use super::plan::Plan;
use super::report::{HotLoad, HotLoadWay};
use super::stats::Summary;
use super::target::Target;
use super::workload::Prompts;

/// Name that the adapter gets.
const NAME: &str = "bench-hot-load";
/// Times each way is measured where the plan does not say.
const TIMES_DEFAULT: usize = 8;

/// Samples of one way, in milliseconds.
#[derive(Default)]
struct Samples {
    answered: Vec<f64>,
    first_token: Vec<f64>,
    in_place: Vec<f64>,
    beyond: Vec<f64>,
}

/// Gives the adapter to the server, asks it for a token, asks again, and removes it; as an upload and, where `path` names
/// a directory that the server may read, also from there. The first time is not counted.
pub(super) async fn measure(
    client: &Client,
    target: &Target,
    plan: &Plan,
    archive: &Bytes,
    path: Option<&Path>,
) -> Result<HotLoad> {
    let name = target.free_name(NAME)?;
    let mut prompts = Prompts::new(plan.seed, target.vocab_size, plan.prompt_tokens);
    let times = plan.requests.unwrap_or(TIMES_DEFAULT);
    let ways: Vec<Option<&Path>> = std::iter::once(None).chain(path.map(Some)).collect();
    let mut samples: Vec<Samples> = ways.iter().map(|_| Samples::default()).collect();
    let mut base_ttft = Vec::new();
    let progress = Progress::new("hot load", times + 1);
    for time in 0..=times {
        let base = ask(client, &target.base, &mut prompts).await.context("asking the base model")?;
        if time > 0 {
            base_ttft.push(base);
        }
        for (way, samples) in ways.iter().zip(&mut samples) {
            let start = Instant::now();
            match way {
                None => client.upload(&name, archive.clone()).await,
                Some(path) => client.load(&name, path).await,
            }
            .context("giving the server the adapter")?;
            let answered = milliseconds(start.elapsed());
            let first_token = answered + ask(client, &name, &mut prompts).await.context("asking the adapter")?;
            let in_place = ask(client, &name, &mut prompts).await.context("asking the adapter again")?;
            client.remove(&name).await.context("removing the adapter")?;
            if time > 0 {
                samples.answered.push(answered);
                samples.first_token.push(first_token);
                samples.in_place.push(in_place);
                samples.beyond.push(first_token - in_place);
            }
        }
        progress.step();
    }
    let way = |(path, mut samples): (&Option<&Path>, Samples)| HotLoadWay {
        way: if path.is_some() { "load" } else { "upload" },
        answered_ms: Summary::of(&mut samples.answered),
        first_token_ms: Summary::of(&mut samples.first_token),
        ttft_in_place_ms: Summary::of(&mut samples.in_place),
        beyond_prefill_ms: Summary::of(&mut samples.beyond),
    };
    Ok(HotLoad {
        bytes: archive.len(),
        base_ttft_ms: Summary::of(&mut base_ttft),
        ways: ways.iter().zip(samples).map(way).collect(),
    })
}

/// Milliseconds to the first token of an answer of one.
async fn ask(client: &Client, model: &str, prompts: &mut Prompts) -> Result<f64> {
    let timeline = client.complete(completion(model, &prompts.next()?, 1)).await?;
    timeline.ttft_ms().context("the answer has no tokens")
}
