//! Loaded adapters in host memory, and the exact account of the bytes they take.
//!
//! Two budgets: all bytes (`host_bytes_max`), and those of dense weight copies (`merged_bytes_max`). Bytes are reserved
//! before an adapter becomes visible and counted until the last lease on it ends, also when its name has moved on.
//! Idle adapters make room, least recently used first; leased ones stay. Compositions count with what they do not share
//! with their parts, and hold these; idle ones are the first to make room.

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

/// What a composition is made of, in order.
pub(super) type Recipe = Vec<RecipePart>;

/// An adapter with its strength. A name's number may mean other content in another process, and so its digest counts too.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct RecipePart {
    name: String,
    number: u64,
    digest: [u8; 32],
    strength_bits: u32,
}

impl RecipePart {
    pub(super) fn new(adapter: &LoadedAdapter, strength: f32) -> Self {
        let (name, number) = (adapter.name.clone(), adapter.generation);
        Self { name, number, digest: adapter.digest, strength_bits: strength.to_bits() }
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
    compositions: HashMap<Recipe, Entry>,
    /// Generations whose name has moved on and compositions that left, for as long as requests hold them.
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

    fn outgoing(&self, generation: Option<Generation>) -> Outgoing {
        Outgoing { generation, adapter: Arc::downgrade(&self.adapter), bytes: self.bytes }
    }
}

struct Outgoing {
    /// `None` for a composition.
    generation: Option<Generation>,
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
        held.outgoing.iter().find(|outgoing| outgoing.generation.as_ref() == Some(generation))?.adapter.upgrade()
    }

    /// Requests that hold the adapter, alone or in a composition; `None` when it is not loaded.
    pub(super) fn leases(&self, generation: &Generation) -> Option<usize> {
        let held = self.lock();
        let entry = held.entries.get(generation)?;
        let idle = held.compositions.values().filter(|composition| composition.leases() == 0);
        let idle = idle.flat_map(|composition| &composition.adapter.parts);
        Some(entry.leases().saturating_sub(idle.filter(|part| Arc::ptr_eq(part, &entry.adapter)).count()))
    }

    /// The composition if it is there; counts as a use.
    pub(super) fn composition(&self, recipe: &Recipe) -> Option<Arc<LoadedAdapter>> {
        let mut held = self.lock();
        held.clock += 1;
        let now = held.clock;
        let entry = held.compositions.get_mut(recipe)?;
        entry.last_used = now;
        Some(entry.adapter.clone())
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
        // What is not loaded is part of nothing: compositions hold their parts.
        let kept = keep.and_then(|generation| held.entries.get(generation)).map(|entry| &entry.adapter);
        let kept = kept.map(|adapter| (adapter.generation, adapter.digest));
        let outdated = |part: &RecipePart| part.name == name && Some((part.number, part.digest)) != kept;
        held.drop_compositions(|recipe, _| recipe.iter().any(outdated));
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
        let adapters = held.outgoing.iter().filter(|outgoing| outgoing.generation.is_some()).count();
        self.metrics.adapters_loaded.set(gauge(held.entries.len() + adapters));
        self.metrics.adapters_loaded_bytes.set(gauge(held.visible().host));
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
            self.outgoing.push(entry.outgoing(Some(generation.clone())));
        }
    }

    /// Takes compositions out; those in use stay accounted until their last lease ends. Answers whether there were any.
    fn drop_compositions(&mut self, which: impl Fn(&Recipe, &Entry) -> bool) -> bool {
        let outgoing = &mut self.outgoing;
        let before = self.compositions.len();
        self.compositions.retain(|recipe, entry| {
            let goes = which(recipe, entry);
            if goes && entry.leases() > 0 {
                outgoing.push(entry.outgoing(None));
            }
            !goes
        });
        self.compositions.len() < before
    }

    /// Bytes of everything that requests can find or hold.
    fn visible(&self) -> Bytes {
        let entries = self.entries.values().chain(self.compositions.values()).map(|entry| entry.bytes);
        entries.chain(self.outgoing.iter().map(|outgoing| outgoing.bytes)).sum()
    }

    /// Forgets outgoing generations that nobody holds any more, and sums up the rest.
    fn used(&mut self) -> Bytes {
        self.outgoing.retain(|outgoing| outgoing.adapter.strong_count() > 0);
        self.visible() + self.reserved
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
        let mut plan = held.plan_eviction(bytes, limit);
        // Idle compositions are cheap to make again, and hold their parts.
        let needs_room = plan.as_ref().is_none_or(|plan| !plan.is_empty());
        if needs_room && held.drop_compositions(|_, composition| composition.leases() == 0) {
            plan = held.plan_eviction(bytes, limit);
        }
        let Some(plan) = plan else {
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

    /// The same for a composition, of which at most `count_max` are kept: the least recently used idle one makes room,
    /// and when all are in use the new one is not kept.
    pub(super) fn commit_composition(
        mut self,
        recipe: Recipe,
        adapter: Arc<LoadedAdapter>,
        count_max: usize,
    ) -> Arc<LoadedAdapter> {
        let memory = self.memory.clone();
        let mut held = memory.lock();
        held.clock += 1;
        let bytes = std::mem::take(&mut self.bytes);
        held.reserved = held.reserved - bytes;
        if let Some(entry) = held.compositions.get(&recipe) {
            return entry.adapter.clone();
        }
        while held.compositions.len() >= count_max {
            let idle = held.compositions.iter().filter(|(_, entry)| entry.leases() == 0);
            let Some(oldest) = idle.min_by_key(|(_, entry)| entry.last_used).map(|(recipe, _)| recipe.clone()) else {
                break;
            };
            held.compositions.remove(&oldest);
        }
        let entry = Entry { adapter: adapter.clone(), bytes, last_used: held.clock };
        if held.compositions.len() < count_max {
            held.compositions.insert(recipe, entry);
        } else {
            held.outgoing.push(entry.outgoing(None));
        }
        memory.metrics.adapters_loaded_bytes.set(gauge(held.visible().host));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::LoweredAdapter;
    use crate::metrics::MetricsConfig;

    const LIMIT: Bytes = Bytes { host: 100, own: 40 };

    fn memory() -> Memory {
        Memory::new(LIMIT, Arc::new(Metrics::new("base", &MetricsConfig::default())))
    }

    fn generation(name: &str, number: u64) -> Generation {
        Generation { name: name.to_owned(), number, digest: ContentDigest([0; 32]), merge: false }
    }

    fn load(memory: &Memory, generation: &Generation, bytes: Bytes) -> Result<Arc<LoadedAdapter>, StoreError> {
        let mut reservation = memory.reservation();
        reservation.resize(bytes)?;
        let adapter = LoadedAdapter {
            name: generation.name.clone(),
            generation: generation.number,
            digest: generation.digest.0,
            lowered: LoweredAdapter::default(),
            bytes: bytes.host,
            parts: Vec::new(),
        };
        Ok(reservation.commit(generation, Arc::new(adapter)))
    }

    fn used(memory: &Memory) -> Bytes {
        memory.lock().used()
    }

    fn host(host: usize) -> Bytes {
        Bytes { host, own: 0 }
    }

    #[test]
    fn the_least_recently_used_idle_adapter_makes_room() {
        let memory = memory();
        let [a, b, c] = ["a", "b", "c"].map(|name| generation(name, 1));
        drop(load(&memory, &a, host(50)).unwrap());
        drop(load(&memory, &b, host(50)).unwrap());
        drop(memory.get(&a).expect("loaded"));
        drop(load(&memory, &c, host(50)).unwrap());
        assert!(memory.get(&b).is_none() && memory.get(&a).is_some() && memory.get(&c).is_some());
        assert_eq!(used(&memory), host(100));
        assert_eq!(memory.metrics.adapters_loaded.get(), 2);
        assert_eq!(memory.metrics.adapters_loaded_bytes.get(), 100);
        assert_eq!(memory.metrics.adapter_bytes.with_label_values(&["b"]).get(), 0);
    }

    #[test]
    fn leased_adapters_stay_and_what_does_not_fit_beside_them_changes_nothing() {
        let memory = memory();
        let (a, b, c) = (generation("a", 1), generation("b", 1), generation("c", 1));
        let lease = load(&memory, &a, host(60)).unwrap();
        drop(load(&memory, &b, host(40)).unwrap());
        assert!(matches!(load(&memory, &c, host(50)), Err(StoreError::Busy)));
        assert!(memory.get(&b).is_some(), "nothing is dropped for what cannot fit");
        assert_eq!((used(&memory), memory.leases(&a)), (host(100), Some(1)));
        drop(lease);
        load(&memory, &c, host(50)).unwrap();
    }

    #[test]
    fn what_exceeds_a_budget_alone_is_refused() {
        let memory = memory();
        let a = generation("a", 1);
        assert!(matches!(load(&memory, &a, host(101)), Err(StoreError::OverHostMemory { needed: 101, limit: 100 })));
        let refused = load(&memory, &a, Bytes { host: 41, own: 41 }).unwrap_err();
        assert!(refused.to_string().contains("41 bytes exceed the 40"), "{refused}");
        assert_eq!(used(&memory), Bytes::default());
    }

    #[test]
    fn dense_copies_make_room_among_themselves_only() {
        let memory = memory();
        let (plain, old, new) = (generation("plain", 1), generation("old", 1), generation("new", 1));
        drop(load(&memory, &plain, host(20)).unwrap());
        drop(load(&memory, &old, Bytes { host: 30, own: 30 }).unwrap());
        drop(load(&memory, &new, Bytes { host: 20, own: 20 }).unwrap());
        assert!(memory.get(&plain).is_some() && memory.get(&old).is_none() && memory.get(&new).is_some());
        assert_eq!(used(&memory), Bytes { host: 40, own: 20 });
    }

    #[test]
    fn a_superseded_adapter_counts_until_its_last_lease_ends() {
        let memory = memory();
        let (old, new) = (generation("a", 1), generation("a", 2));
        let lease = load(&memory, &old, Bytes { host: 30, own: 30 }).unwrap();
        memory.supersede("a", Some(&new));
        assert_eq!(memory.leases(&old), None);
        assert!(Arc::ptr_eq(&memory.get(&old).expect("still held"), &lease));
        assert!(matches!(load(&memory, &new, Bytes { host: 30, own: 30 }), Err(StoreError::Busy)));
        drop(lease);
        load(&memory, &new, Bytes { host: 30, own: 30 }).unwrap();
        assert_eq!(used(&memory), Bytes { host: 30, own: 30 });
    }

    #[test]
    fn a_reservation_that_is_dropped_gives_its_bytes_back() {
        let memory = memory();
        let mut reservation = memory.reservation();
        reservation.resize(host(70)).unwrap();
        reservation.resize(host(90)).unwrap();
        assert!(matches!(reservation.resize(host(101)), Err(StoreError::OverHostMemory { .. })));
        assert_eq!(used(&memory), host(90));
        drop(reservation);
        assert_eq!(used(&memory), Bytes::default());
    }

    fn compose(memory: &Memory, name: &str, parts: &[&Arc<LoadedAdapter>], bytes: Bytes) -> Arc<LoadedAdapter> {
        let mut reservation = memory.reservation();
        reservation.resize(bytes).unwrap();
        let adapter = Arc::new(LoadedAdapter {
            name: name.to_owned(),
            generation: 0,
            digest: [0; 32],
            lowered: LoweredAdapter::default(),
            bytes: bytes.host,
            parts: parts.iter().map(|part| Arc::clone(part)).collect(),
        });
        reservation.commit_composition(recipe(parts), adapter, 2)
    }

    fn recipe(parts: &[&Arc<LoadedAdapter>]) -> Recipe {
        parts.iter().map(|part| RecipePart::new(part, 1.0)).collect()
    }

    #[test]
    fn a_composition_leases_its_parts_while_it_is_in_use() {
        let memory = memory();
        let (a, b) = (generation("a", 1), generation("b", 1));
        let parts = [load(&memory, &a, host(40)).unwrap(), load(&memory, &b, host(40)).unwrap()];
        let both = compose(&memory, "both", &[&parts[0], &parts[1]], host(10));
        let recipe = recipe(&[&parts[0], &parts[1]]);
        drop(parts);
        assert_eq!((memory.leases(&a), memory.leases(&b), used(&memory)), (Some(1), Some(1), host(90)));
        assert!(matches!(load(&memory, &generation("c", 1), host(20)), Err(StoreError::Busy)));
        drop(both);
        assert_eq!((memory.leases(&a), memory.leases(&b)), (Some(0), Some(0)));
        assert!(memory.composition(&recipe).is_some(), "idle ones are kept");
        drop(load(&memory, &generation("c", 1), host(20)).unwrap());
        assert!(memory.composition(&recipe).is_none() && memory.get(&a).is_some(), "they make room before adapters do");
        drop(load(&memory, &generation("d", 1), host(60)).unwrap());
        assert!(memory.get(&b).is_none());
    }

    #[test]
    fn compositions_of_an_earlier_generation_leave() {
        let memory = memory();
        let (old, new, b) = (generation("a", 1), generation("a", 2), generation("b", 1));
        let parts = [load(&memory, &old, host(20)).unwrap(), load(&memory, &b, host(20)).unwrap()];
        let both = compose(&memory, "both", &[&parts[0], &parts[1]], host(10));
        let recipes = [recipe(&[&parts[0], &parts[1]]), recipe(&[&parts[1]])];
        drop(compose(&memory, "b", &[&parts[1]], host(5)));
        drop(parts);
        memory.supersede("a", Some(&new));
        assert!(memory.composition(&recipes[0]).is_none() && memory.composition(&recipes[1]).is_some());
        assert_eq!(used(&memory), host(55), "what a request holds still counts");
        drop(both);
        assert_eq!(used(&memory), host(25));
    }

    #[test]
    fn a_composition_is_held_once() {
        let memory = memory();
        let part = load(&memory, &generation("a", 1), host(20)).unwrap();
        let (first, second) = (compose(&memory, "a", &[&part], host(5)), compose(&memory, "a", &[&part], host(5)));
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!(used(&memory), host(25));
    }

    #[test]
    fn compositions_of_other_content_under_the_same_number_are_others_and_leave() {
        let memory = memory();
        let old = generation("a", 2);
        let new = Generation { digest: ContentDigest([1; 32]), ..old.clone() };
        let (part, changed) = (load(&memory, &old, host(20)).unwrap(), load(&memory, &new, host(20)).unwrap());
        drop(compose(&memory, "old", &[&part], host(5)));
        assert!(memory.composition(&recipe(&[&changed])).is_none(), "the weights are not those");
        drop(compose(&memory, "new", &[&changed], host(5)));
        let recipes = [recipe(&[&part]), recipe(&[&changed])];
        drop((part, changed));
        memory.supersede("a", Some(&new));
        assert!(memory.composition(&recipes[0]).is_none() && memory.composition(&recipes[1]).is_some());
        assert_eq!(used(&memory), host(25));
    }

    #[test]
    fn the_number_of_compositions_is_bounded() {
        let memory = memory();
        let parts = ["a", "b", "c"].map(|name| load(&memory, &generation(name, 1), host(10)).unwrap());
        let [a, b, c] = parts.each_ref().map(|part| compose(&memory, &part.name, &[part], host(5)));
        let has = |part| memory.composition(&recipe(&[part])).is_some();
        assert_eq!(parts.each_ref().map(has), [true, true, false], "all kept ones are in use");
        assert_eq!(used(&memory), host(45));
        drop((b, c));
        drop(compose(&memory, "c", &[&parts[2]], host(5)));
        assert_eq!(parts.each_ref().map(has), [true, false, true]);
        drop(a);
        assert_eq!(used(&memory), host(40));
    }

    #[test]
    fn a_generation_is_held_once() {
        let memory = memory();
        let a = generation("a", 1);
        let first = load(&memory, &a, host(30)).unwrap();
        let second = load(&memory, &a, host(30)).unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!(used(&memory), host(30));
    }
}
