//! One run: so many requests, so many at once, with or without an adapter being loaded meanwhile.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use futures::future::join_all;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::Progress;
use super::client::{Client, Timeline, completion, milliseconds};
use super::plan::Distribution;
use super::report::{Errors, LoadWhile, RunReport};
use super::stats::{Summary, Zipf};
use super::target::Target;
use super::workload::Prompts;

/// Name of the adapter that is loaded while requests run.
const LOADED_NAME: &str = "bench-load-while";

/// One run.
pub(super) struct Drive<'a> {
    pub(super) client: &'a Client,
    pub(super) target: &'a Target,
    pub(super) distribution: &'a Distribution,
    pub(super) concurrency: usize,
    pub(super) requests: usize,
    pub(super) warm_up: usize,
    pub(super) prompt_tokens: usize,
    pub(super) output_tokens: usize,
    pub(super) seed: u64,
}

/// An adapter that is loaded and unloaded all the time.
pub(super) struct Load {
    pub(super) archive: Bytes,
}

/// What `model` each request names.
enum Models {
    /// By the number of the request.
    ByRequest(Vec<String>),
    /// Each of the concurrent workers has names of its own, which it uses in turn.
    ByWorker { names: Vec<String>, workers: usize },
}

/// What came of the requests.
#[derive(Default)]
struct Tally {
    timelines: Vec<Timeline>,
    errors: Errors,
}

impl Drive<'_> {
    /// Warms up, then measures.
    pub(super) async fn run(&self, prompts: &mut Prompts, load: Option<&Load>) -> Result<RunReport> {
        let name = load.map(|_| self.target.free_name(LOADED_NAME)).transpose()?;
        let what = format!("{} x {}", self.distribution, self.concurrency);
        let (_, warm) =
            self.requests(&self.models(self.warm_up, true).await?, prompts.take(self.warm_up)?, "warm-up").await;
        if let Some(message) = warm.errors.first.filter(|_| warm.timelines.is_empty()) {
            bail!("no request of the warm-up was answered: {message}");
        }
        let models = self.models(self.requests, false).await?;
        let prompts = prompts.take(self.requests)?;
        let is_over = Cell::new(false);
        let requests = async {
            let done = self.requests(&models, prompts, &what).await;
            is_over.set(true);
            done
        };
        let loading = async {
            match (load, &name) {
                (Some(load), Some(name)) => self.keep_loading(name, load, &is_over).await.map(Some),
                _ => Ok(None),
            }
        };
        let ((duration, tally), loads) = tokio::join!(requests, loading);
        Ok(self.report(duration, tally, loads.context("loading an adapter while requests run")?))
    }

    /// Keeps `concurrency` requests in flight until all prompts are answered; how long that took.
    async fn requests(&self, models: &Models, prompts: Vec<String>, what: &str) -> (Duration, Tally) {
        let progress = Progress::new(what, prompts.len());
        let (queue, tally) = (RefCell::new(prompts.into_iter().enumerate()), RefCell::new(Tally::default()));
        let start = Instant::now();
        let worker = |worker: usize| {
            let (queue, tally, progress) = (&queue, &tally, &progress);
            async move {
                for turn in 0.. {
                    let next = queue.borrow_mut().next();
                    let Some((number, prompt)) = next else { return };
                    let body = completion(models.of(number, worker, turn), &prompt, self.output_tokens);
                    match self.client.complete(body).await {
                        Ok(timeline) => tally.borrow_mut().timelines.push(timeline),
                        Err(error) => tally.borrow_mut().errors.add(&error),
                    }
                    progress.step();
                }
            }
        };
        join_all((0..self.concurrency).map(worker)).await;
        (start.elapsed(), tally.into_inner())
    }

    /// Loads and unloads until the requests are over; the adapter is gone afterwards.
    async fn keep_loading(&self, name: &str, load: &Load, is_over: &Cell<bool>) -> Result<LoadWhile> {
        let (mut load_ms, mut unload_ms) = (Vec::new(), Vec::new());
        while !is_over.get() {
            let start = Instant::now();
            self.client.upload(name, load.archive.clone()).await?;
            load_ms.push(milliseconds(start.elapsed()));
            let start = Instant::now();
            self.client.remove(name).await?;
            unload_ms.push(milliseconds(start.elapsed()));
        }
        Ok(LoadWhile { load_ms: Summary::of(&mut load_ms), unload_ms: Summary::of(&mut unload_ms) })
    }

    /// What the requests of the run, or of its warm-up, ask for.
    async fn models(&self, requests: usize, is_warm_up: bool) -> Result<Models> {
        let adapters = &self.target.adapters;
        let by_number = |of: &mut dyn FnMut(usize) -> String| Models::ByRequest((0..requests).map(of).collect());
        Ok(match self.distribution {
            Distribution::Base => by_number(&mut |_| self.target.base.clone()),
            Distribution::One => by_number(&mut |_| adapters[0].clone()),
            Distribution::RoundRobin => by_number(&mut |i| adapters[i % adapters.len()].clone()),
            Distribution::Zipf(s) => {
                let (zipf, mut random) = (Zipf::new(adapters.len(), *s), ChaCha8Rng::seed_from_u64(self.seed));
                by_number(&mut |_| adapters[zipf.at(random.random())].clone())
            }
            Distribution::Distinct => Models::ByWorker { names: adapters.clone(), workers: self.concurrency },
            // The warm-up must not use an adapter up.
            Distribution::Cold if is_warm_up => by_number(&mut |_| self.target.base.clone()),
            Distribution::Cold => Models::ByRequest(self.target.cold(self.client, requests).await?),
        })
    }

    fn report(&self, duration: Duration, tally: Tally, load_while: Option<LoadWhile>) -> RunReport {
        let Tally { timelines, errors } = tally;
        let seconds = duration.as_secs_f64();
        let output_tokens: usize = timelines.iter().map(Timeline::tokens).sum();
        let short_answers = timelines.iter().filter(|timeline| timeline.tokens() < self.output_tokens).count();
        let prompt_tokens = timelines.len() * self.prompt_tokens;
        let mut ttft_ms: Vec<f64> = timelines.iter().filter_map(Timeline::ttft_ms).collect();
        let mut request_ms: Vec<f64> = timelines.iter().filter_map(Timeline::last_ms).collect();
        let mut per_token_ms: Vec<f64> = timelines.iter().filter_map(Timeline::per_token_ms).collect();
        let mut gap_ms: Vec<f64> = timelines.iter().flat_map(Timeline::gaps_ms).collect();
        RunReport {
            distribution: *self.distribution,
            concurrency: self.concurrency,
            round: 1,
            requests: self.requests,
            completed: timelines.len(),
            errors,
            short_answers,
            duration_s: seconds,
            prompt_tokens,
            output_tokens,
            requests_per_s: timelines.len() as f64 / seconds,
            output_tokens_per_s: output_tokens as f64 / seconds,
            total_tokens_per_s: (prompt_tokens + output_tokens) as f64 / seconds,
            ttft_ms: Summary::of(&mut ttft_ms),
            time_per_output_token_ms: Summary::of(&mut per_token_ms),
            inter_token_gap_ms: Summary::of(&mut gap_ms),
            request_ms: Summary::of(&mut request_ms),
            read_gb_per_s: None,
            against_base: None,
            load_while,
        }
    }
}

impl Models {
    /// What request `number` asks for, the `turn`-th of this worker.
    fn of(&self, number: usize, worker: usize, turn: usize) -> &str {
        match self {
            Self::ByRequest(names) => &names[number],
            Self::ByWorker { names, workers } => {
                // This worker has every `workers`-th name.
                let own = (names.len() - worker).div_ceil(*workers);
                &names[worker + turn % own * workers]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn workers_never_share_an_adapter() {
        let names: Vec<String> = (0..7).map(|i| i.to_string()).collect();
        let models = Models::ByWorker { names: names.clone(), workers: 3 };
        let used = |worker| (0..20).map(|turn| models.of(0, worker, turn)).collect::<HashSet<_>>();
        assert_eq!(used(0), HashSet::from(["0", "3", "6"]));
        assert_eq!(used(1), HashSet::from(["1", "4"]));
        assert_eq!(used(2), HashSet::from(["2", "5"]));
    }
}
