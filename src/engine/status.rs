//! What the engine thread publishes for handles to read.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::metrics::AdapterActivity;

/// Counts and residency, read by handles while the engine thread runs.
#[derive(Debug, Default)]
pub(super) struct Status {
    waiting: AtomicUsize,
    in_flight: AtomicUsize,
    activity: Mutex<AdapterActivity>,
}

/// Counts one sequence as in flight for as long as it lives.
#[derive(Debug)]
pub(super) struct InFlight(Arc<Status>);

impl Status {
    /// Takes a place in the waiting queue unless `queue_max` are taken.
    pub(super) fn try_wait(&self, queue_max: usize) -> bool {
        let more = |waiting| (waiting < queue_max).then_some(waiting + 1);
        self.waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
    }

    /// The number of waiting sequences changed from `before` to `after`.
    pub(super) fn waiting_changed(&self, before: usize, after: usize) {
        if after >= before {
            self.waiting.fetch_add(after - before, Ordering::AcqRel);
        } else {
            let previous = self.waiting.fetch_sub(before - after, Ordering::AcqRel);
            assert!(previous >= before - after, "more sequences left the queue than entered it");
        }
    }

    /// Sequences waiting: on the way to the engine, not yet admitted, or preempted.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Acquire)
    }

    /// Sequences that live.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Adapters on the device, and waited for.
    pub(super) fn activity(&self) -> AdapterActivity {
        self.activity.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the activity.
    pub(super) fn set_activity(&self, activity: AdapterActivity) {
        *self.activity.lock().unwrap_or_else(PoisonError::into_inner) = activity;
    }
}

impl InFlight {
    /// Counts one more.
    pub(super) fn new(status: &Arc<Status>) -> Self {
        status.in_flight.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(status))
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}
