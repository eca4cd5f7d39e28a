//! Loaded adapters in host memory, and the exact account of the bytes they take.
//!
//! Two budgets: all bytes (`host_bytes_max`), and those of dense weight copies (`merged_bytes_max`). Bytes are reserved
//! before an adapter becomes visible and counted until the last lease on it ends, also when its name has moved on.
//! Idle adapters make room, least recently used first; leased ones stay.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::StoreError;
use super::record::ContentDigest;
use crate::adapter::{AdapterError, LoadedAdapter};
use crate::metrics::Metrics;

/// One generation of a name with everything that decides what it does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Generation {
    pub(super) name: String,
    pub(super) number: u64,
    pub(super) digest: ContentDigest,
    pub(super) merge: bool,
}

/// Bytes of both budgets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bytes {
    /// All tensors.
    pub(super) host: usize,
    /// Dense weight copies among them.
    pub(super) own: usize,
}

impl std::ops::Add for Bytes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { host: self.host + other.host, own: self.own + other.own }
    }
}

impl std::ops::Sub for Bytes {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self { host: self.host - other.host, own: self.own - other.own }
    }
}

impl std::iter::Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(bytes: I) -> Self {
        bytes.fold(Self::default(), std::ops::Add::add)
    }
}

impl Bytes {
    fn within(self, limit: Self) -> bool {
        self.host <= limit.host && self.own <= limit.own
    }
}

/// The loaded adapters; clones share them.
#[derive(Clone)]
pub(super) struct Memory {
    held: Arc<Mutex<Held>>,
    limit: Bytes,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Held {
    entries: HashMap<Generation, Entry>,
    /// Generations whose name has moved on, for as long as requests hold them.
    outgoing: Vec<Outgoing>,
    reserved: Bytes,
    /// Counts uses; orders entries by recency.
    clock: u64,
}

struct Entry {
    adapter: Arc<LoadedAdapter>,
    bytes: Bytes,
    last_used: u64,
}

impl Entry {
    /// Requests that hold it: every reference but the entry's own.
    fn leases(&self) -> usize {
        Arc::strong_count(&self.adapter) - 1
    }
}

struct Outgoing {
    generation: Generation,
    adapter: Weak<LoadedAdapter>,
    bytes: Bytes,
}

/// Bytes taken from the budgets for an adapter that is not visible yet; dropping it gives them back.
pub(super) struct Reservation {
    memory: Memory,
    bytes: Bytes,
}

impl Memory {
    pub(super) fn new(limit: Bytes, metrics: Arc<Metrics>) -> Self {
        Self { held: Arc::default(), limit, metrics }
    }

    /// The adapter if it is loaded; counts as a use.
    pub(super) fn get(&self, generation: &Generation) -> Option<Arc<LoadedAdapter>> {
        let mut held = self.lock();
        held.clock += 1;
        let now = held.clock;
        if let Some(entry) = held.entries.get_mut(generation) {
            entry.last_used = now;
            return Some(entry.adapter.clone());
        }
        held.outgoing.iter().find(|outgoing| outgoing.generation == *generation)?.adapter.upgrade()
    }

    /// Requests that hold the adapter; `None` when it is not loaded.
    pub(super) fn leases(&self, generation: &Generation) -> Option<usize> {
        self.lock().entries.get(generation).map(Entry::leases)
    }

    /// A reservation of nothing yet.
    pub(super) fn reservation(&self) -> Reservation {
        Reservation { memory: self.clone(), bytes: Bytes::default() }
    }

    /// Takes a name's generations out, except this one; those in use stay accounted until their last lease ends.
    pub(super) fn supersede(&self, name: &str, keep: Option<&Generation>) {
        let mut held = self.lock();
        let old: Vec<Generation> =
            held.entries.keys().filter(|key| key.name == name && Some(*key) != keep).cloned().collect();
        for generation in &old {
            held.release(generation);
        }
        held.used();
        self.show(&held, name);
    }

    /// Takes one generation out; if it is in use it stays accounted until its last lease ends.
    pub(super) fn release(&self, generation: &Generation) {
        let mut held = self.lock();
        held.release(generation);
        held.used();
        self.show(&held, &generation.name);
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // Every change under the lock is complete before anything that could panic.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes the gauges after a change that concerns `name`.
    fn show(&self, held: &Held, name: &str) {
        let loaded: Bytes = held.entries.values().map(|entry| entry.bytes).sum();
        let outgoing: Bytes = held.outgoing.iter().map(|outgoing| outgoing.bytes).sum();
        self.metrics.adapters_loaded.set(gauge(held.entries.len() + held.outgoing.len()));
        self.metrics.adapters_loaded_bytes.set(gauge((loaded + outgoing).host));
        if self.metrics.adapter_label(Some(name)) == name {
            let bytes =
                held.entries.iter().filter(|(key, _)| key.name == name).map(|(_, entry)| entry.bytes.host).sum();
            self.metrics.adapter_bytes.with_label_values(&[name]).set(gauge(bytes));
        }
    }
}

impl Held {
    fn release(&mut self, generation: &Generation) {
        let Some(entry) = self.entries.remove(generation) else { return };
        if entry.leases() > 0 {
            let (generation, adapter) = (generation.clone(), Arc::downgrade(&entry.adapter));
            self.outgoing.push(Outgoing { generation, adapter, bytes: entry.bytes });
        }
    }

    /// Forgets outgoing generations that nobody holds any more, and sums up the rest.
    fn used(&mut self) -> Bytes {
        self.outgoing.retain(|outgoing| outgoing.adapter.strong_count() > 0);
        let entries: Bytes = self.entries.values().map(|entry| entry.bytes).sum();
        let outgoing: Bytes = self.outgoing.iter().map(|outgoing| outgoing.bytes).sum();
        entries + outgoing + self.reserved
    }

    /// Idle adapters to drop so that `more` bytes fit, least recently used first; `None` when they cannot fit now.
    fn plan_eviction(&mut self, more: Bytes, limit: Bytes) -> Option<Vec<Generation>> {
        let mut used = self.used() + more;
        let mut idle: Vec<_> = self.entries.iter().filter(|(_, entry)| entry.leases() == 0).collect();
        idle.sort_by_key(|(_, entry)| entry.last_used);
        let mut plan = Vec::new();
        for (generation, entry) in idle {
            if used.within(limit) {
                break;
            }
            // Where only dense copies are short, dropping an adapter without any would not help.
            if used.host <= limit.host && entry.bytes.own == 0 {
                continue;
            }
            used = used - entry.bytes;
            plan.push(generation.clone());
        }
        used.within(limit).then_some(plan)
    }
}

impl Reservation {
    /// Bytes reserved so far.
    pub(super) fn bytes(&self) -> Bytes {
        self.bytes
    }

    /// Changes the reservation to `bytes`, dropping idle adapters where that makes them fit.
    ///
    /// # Errors
    /// What is over a budget for good is refused; what leases stand in the way of is `Busy`. Nothing changes then.
    pub(super) fn resize(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        let limit = self.memory.limit;
        if bytes.host > limit.host {
            return Err(StoreError::OverHostMemory { needed: bytes.host, limit: limit.host });
        }
        if bytes.own > limit.own {
            return Err(AdapterError::OverBudget { needed: bytes.own, limit: limit.own }.into());
        }
        let mut held = self.memory.lock();
        held.reserved = held.reserved - self.bytes;
        let Some(plan) = held.plan_eviction(bytes, limit) else {
            held.reserved = held.reserved + self.bytes;
            return Err(StoreError::Busy);
        };
        held.reserved = held.reserved + bytes;
        self.bytes = bytes;
        for generation in plan {
            held.entries.remove(&generation);
            self.memory.show(&held, &generation.name);
        }
        Ok(())
    }

    /// Makes the adapter visible under its generation; the reserved bytes become its own. Where that generation was
    /// loaded meanwhile, the one already there is kept and returned.
    pub(super) fn commit(mut self, generation: &Generation, adapter: Arc<LoadedAdapter>) -> Arc<LoadedAdapter> {
        let memory = self.memory.clone();
        let mut held = memory.lock();
        held.clock += 1;
        let last_used = held.clock;
        let bytes = std::mem::take(&mut self.bytes);
        held.reserved = held.reserved - bytes;
        let entry = held.entries.entry(generation.clone()).or_insert(Entry { adapter, bytes, last_used });
        let adapter = entry.adapter.clone();
        memory.show(&held, &generation.name);
        drop(held);
        adapter
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut held = self.memory.lock();
        held.reserved = held.reserved - self.bytes;
    }
}

fn gauge(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
