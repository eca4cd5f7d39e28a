//! What the engine tells the metrics.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::block_manager::BlockManager;
use super::scheduler::Scheduler;
use super::sequence::{End, Sequence};
use super::status::Status;
use super::{EngineConfig, FinishReason, ForwardLimits};
use crate::metrics::{AdapterActivity, Metrics};

/// Turns the engine's events into metrics.
pub(super) struct Observer {
    metrics: Arc<Metrics>,
    activity: AdapterActivity,
}

impl Observer {
    /// Publishes what never changes.
    pub(super) fn new(metrics: Arc<Metrics>, config: &EngineConfig, limits: &ForwardLimits, status: &Status) -> Self {
        let labels = [config.block_tokens.to_string(), limits.num_blocks.to_string(), config.prefix_cache.to_string()];
        metrics.cache_config_info.with_label_values(&labels.each_ref().map(String::as_str)).set(1);
        let activity = AdapterActivity { slots_max: config.adapter_slots, ..AdapterActivity::default() };
        metrics.set_adapter_activity(&activity);
        status.set_activity(activity.clone());
        Self { metrics, activity }
    }

    /// A sequence is scheduled for the first time; `queried` prompt tokens were looked up in the prefix cache.
    pub(super) fn scheduled(&self, sequence: &Sequence, queried: usize) {
        let cached = sequence.cached_tokens.unwrap_or(0) as u64;
        self.metrics.request_queue_time.observe(sequence.times.arrived.elapsed().as_secs_f64());
        self.metrics.prefix_cache_queries.inc_by(queried as u64);
        self.metrics.prefix_cache_hits.inc_by(cached);
        self.metrics.prompt_tokens_cached.inc_by(cached);
    }

    /// A sequence's prompt is computed.
    pub(super) fn prompt_computed(&self, sequence: &Sequence) {
        self.metrics.prompt_tokens.inc_by(sequence.prompt_len as u64);
        self.metrics.for_adapter_labels(sequence.adapter_names(), |label| {
            self.metrics.adapter_prompt_tokens.with_label_values(&[label]).inc_by(sequence.prompt_len as u64);
        });
    }

    /// A sequence got a token.
    pub(super) fn token(&self, sequence: &mut Sequence, now: Instant) {
        let metrics = &self.metrics;
        if let Some(last_token) = sequence.times.last_token {
            metrics.inter_token_latency.observe(seconds(last_token, now));
        } else {
            let time = seconds(sequence.times.arrived, now);
            metrics.time_to_first_token.observe(time);
            metrics.for_adapter_labels(sequence.adapter_names(), |label| {
                metrics.adapter_time_to_first_token.with_label_values(&[label]).observe(time);
            });
            sequence.times.first_token = Some(now);
        }
        sequence.times.last_token = Some(now);
        metrics.generation_tokens.inc();
        metrics.for_adapter_labels(sequence.adapter_names(), |label| {
            metrics.adapter_generation_tokens.with_label_values(&[label]).inc();
        });
    }

    /// A sequence ended.
    pub(super) fn ended(&self, sequence: &Sequence, end: End) {
        let reason = match end {
            End::Finished(FinishReason::Stop) => "stop",
            End::Finished(FinishReason::Length) => "length",
            End::Failed(_) => "error",
            End::Cancelled | End::ShutDown => "abort",
        };
        self.metrics.request_success.with_label_values(&[reason]).inc();
        match end {
            End::Finished(_) => self.finished(sequence),
            End::Failed(_) => self.metrics.for_adapter_labels(sequence.adapter_names(), |label| {
                self.metrics.adapter_errors.with_label_values(&[label]).inc();
            }),
            End::Cancelled | End::ShutDown => {}
        }
    }

    fn finished(&self, sequence: &Sequence) {
        let metrics = &self.metrics;
        let times = &sequence.times;
        let now = Instant::now();
        metrics.request_prompt_tokens.observe(sequence.prompt_len as f64);
        metrics.request_generation_tokens.observe(sequence.generated() as f64);
        metrics.e2e_request_latency.observe(seconds(times.arrived, now));
        if let Some(scheduled) = times.scheduled {
            metrics.request_inference_time.observe(seconds(scheduled, now));
            metrics.request_prefill_time.observe(seconds(scheduled, times.first_token.unwrap_or(now)));
        }
        if let (Some(first), Some(last)) = (times.first_token, times.last_token) {
            metrics.request_decode_time.observe(seconds(first, last));
            if sequence.generated() > 1 {
                let intervals = (sequence.generated() - 1) as f64;
                metrics.time_per_output_token.observe(seconds(first, last) / intervals);
            }
        }
    }

    /// A step computed `num_tokens`.
    pub(super) fn stepped(&self, num_tokens: usize, duration: Duration) {
        self.metrics.iteration_tokens.observe(num_tokens as f64);
        self.metrics.step_seconds.observe(duration.as_secs_f64());
    }

    /// Sequences were preempted.
    pub(super) fn preempted(&self, num_preempted: usize) {
        self.metrics.preemptions.inc_by(num_preempted as u64);
    }

    /// An adapter was copied to its slot.
    pub(super) fn adapter_copied(&self) {
        self.metrics.adapter_slot_copies.inc();
    }

    /// Publishes the state after a step or an arrival.
    pub(super) fn publish<'a>(
        &mut self,
        scheduler: &Scheduler,
        blocks: &BlockManager,
        resident: impl Iterator<Item = &'a str>,
        status: &Status,
    ) {
        let metrics = &self.metrics;
        let deferred = scheduler.waiting.iter().filter(|sequence| sequence.deferred).count();
        // Submissions still in the channel wait too.
        let waiting = status.waiting();
        metrics.requests_running.set(scheduler.running.len() as i64);
        metrics.requests_waiting.set(waiting as i64);
        let by_reason = &metrics.requests_waiting_by_reason;
        by_reason.with_label_values(&["deferred"]).set(deferred as i64);
        by_reason.with_label_values(&["capacity"]).set(waiting.saturating_sub(deferred) as i64);
        metrics.kv_cache_usage.with_label_values::<&str>(&[]).set(blocks.in_use() as f64 / blocks.total() as f64);

        let resident: BTreeSet<&str> = resident.collect();
        let waiting = scheduler.waiting.iter().filter_map(|sequence| sequence.own_adapter_name());
        let waiting: BTreeSet<&str> = waiting.filter(|name| !resident.contains(name)).collect();
        if !resident.iter().eq(&self.activity.resident) || !waiting.iter().eq(&self.activity.waiting) {
            self.activity.resident = resident.into_iter().map(str::to_owned).collect();
            self.activity.waiting = waiting.into_iter().map(str::to_owned).collect();
            metrics.set_adapter_activity(&self.activity);
            status.set_activity(self.activity.clone());
        }
    }
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}
