//! Loading: read, check, lower, account, make visible; one load per generation however many ask for it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::oneshot;

use super::StoreError;
use super::admission::Permit;
use super::catalog::{KnownDirectory, LoadFacts, Shared, Target};
use super::memory::{Bytes, Generation, Memory, Reservation};
use super::objects::DirectoryContent;
use super::record::{ContentDigest, Current};
use crate::adapter::{
    AdapterError, AdapterFiles, BaseWeights, Demand, Formats, LoadedAdapter, LowerOptions, LowerReport, LoweredAdapter,
    Need, digest, lower_within,
};

/// Times a load is started over because the one joined ended without an answer.
const LOAD_TRIES: usize = 3;

pub(super) type Answer = Result<Arc<LoadedAdapter>, StoreError>;

/// Loads under way, and who waits for each; clones share them.
#[derive(Clone, Default)]
pub(super) struct Flights {
    waiting: Arc<Mutex<HashMap<Target, Vec<oneshot::Sender<Answer>>>>>,
}

impl Flights {
    /// Joins the load of `target`; with a `Flight` when the caller must run it.
    fn join(&self, target: &Target) -> (oneshot::Receiver<Answer>, Option<Flight>) {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let flight = (!waiting.contains_key(target)).then(|| self.flight(target));
        waiting.entry(target.clone()).or_default().push(sender);
        (receiver, flight)
    }

    /// Starts a load of `target` unless one is under way.
    pub(super) fn claim(&self, target: &Target) -> Option<Flight> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.contains_key(target) {
            return None;
        }
        waiting.insert(target.clone(), Vec::new());
        Some(self.flight(target))
    }

    fn flight(&self, target: &Target) -> Flight {
        Flight { flights: self.clone(), target: target.clone(), landed: false }
    }
}

/// A load under way. Dropping it without an answer lets whoever waits start over.
pub(super) struct Flight {
    flights: Flights,
    target: Target,
    landed: bool,
}

impl Flight {
    /// Answers whoever waits; later requests start another load.
    pub(super) fn land(mut self, answer: &Answer) {
        self.landed = true;
        for waiting in self.take() {
            // Whoever went away meanwhile does not matter.
            let _ = waiting.send(answer.clone());
        }
    }

    fn take(&self) -> Vec<oneshot::Sender<Answer>> {
        let mut waiting = self.flights.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.remove(&self.target).unwrap_or_default()
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if !self.landed {
            drop(self.take());
        }
    }
}

/// What lowering needs beside the files.
#[derive(Clone)]
pub(super) struct Loader {
    pub(super) base: Arc<dyn BaseWeights>,
    pub(super) formats: Formats,
    pub(super) memory: Memory,
}

/// A lowered adapter that is accounted for and not yet visible.
pub(super) struct Prepared {
    /// Names the files' blob.
    pub(super) content: ContentDigest,
    lowered: LoweredAdapter,
    report: LowerReport,
    digest: [u8; 32],
    load_seconds: f64,
    reservation: Reservation,
}

impl Loader {
    /// Lowers the files, whose reading began at `started`, within the budgets. `content` gives the digest
    /// that names them, or refuses them; it runs meanwhile. Blocks.
    pub(super) fn prepare(
        &self,
        files: &AdapterFiles,
        merge: bool,
        content: impl FnOnce() -> Result<ContentDigest, StoreError> + Send,
        started: Instant,
    ) -> Result<Prepared, StoreError> {
        let reservation = RefCell::new(self.memory.reservation());
        let options = LowerOptions { merge, formats: self.formats, own_bytes_max: 0 };
        // What dense copies and factors an adapter needs is only known once it is understood, so memory is reserved before each
        // is made.
        let dispensable = Cell::new(false);
        let lower = |cheaper: bool| {
            let refusal = RefCell::new(None);
            let ask = |Demand { own_bytes: own, term_bytes }: Demand, need: Need| {
                if need == Need::Cheaper && !cheaper {
                    return false;
                }
                let granted = reservation.borrow_mut().resize(Bytes { host: own.saturating_add(term_bytes), own });
                dispensable.set(dispensable.get() || need == Need::Cheaper && granted.is_ok());
                granted.map_err(|error| *refusal.borrow_mut() = Some(error).filter(|_| need != Need::Cheaper)).is_ok()
            };
            let lowered = lower_within(files, self.base.as_ref(), &options, &ask);
            lowered.map_err(|error| refusal.into_inner().unwrap_or(error.into()))
        };
        // Hashing does not wait for lowering.
        let (lowered, content) = std::thread::scope(|scope| {
            let content = scope.spawn(content);
            let mut lowered = lower(true);
            if lowered.as_ref().is_err_and(lacks_room) && dispensable.get() {
                // Copies that only make it cheaper have taken the room of those that are needed.
                lowered = lower(false);
            }
            (lowered, content.join().expect("hashing bytes does not panic"))
        });
        let content = content?;
        let digest = digest(&content.0, &options);
        let (lowered, report) = lowered?;
        let mut reservation = reservation.into_inner();
        reservation.resize(Bytes { host: lowered.bytes(), own: report.own_weight_bytes })?;
        let load_seconds = started.elapsed().as_secs_f64();
        Ok(Prepared { content, lowered, report, digest, load_seconds, reservation })
    }
}

/// Whether more memory would have helped.
fn lacks_room(error: &StoreError) -> bool {
    match error {
        StoreError::Busy | StoreError::OverHostMemory { .. } => true,
        StoreError::Refused(error) => matches!(**error, AdapterError::OverBudget { .. }),
        _ => false,
    }
}

impl Prepared {
    /// Makes the adapter visible in memory.
    fn commit(self, generation: &Generation) -> (Arc<LoadedAdapter>, LowerReport) {
        let adapter = Arc::new(LoadedAdapter {
            name: generation.name.clone(),
            generation: generation.number,
            digest: self.digest,
            bytes: self.reservation.bytes().host,
            lowered: self.lowered,
            parts: Vec::new(),
        });
        (self.reservation.commit(generation, adapter), self.report)
    }
}

impl Shared {
    /// Loads the target, or waits for the load of it that is under way.
    pub(super) async fn load_once(self: &Arc<Self>, target: &Target) -> Answer {
        for _ in 0..LOAD_TRIES {
            let (receiver, flight) = self.flights.join(target);
            if let Some(flight) = flight {
                // A task of its own: the load goes on for the others when the request that started it goes away.
                let (shared, target) = (self.clone(), target.clone());
                tokio::spawn(async move { flight.land(&shared.load(&target).await) });
            }
            if let Ok(answer) = receiver.await {
                return answer;
            }
        }
        Err(StoreError::storage("loads of the adapter end without an answer"))
    }

    async fn load(self: &Arc<Self>, target: &Target) -> Answer {
        let (Target::Published(Generation { name, .. }) | Target::Directory { name, .. }) = target;
        // What the name means may change while this waits or works.
        let meant = self.known().current(name);
        let permit = self.loads.admit().await?;
        let started = Instant::now();
        let loaded = match target {
            Target::Published(generation) => {
                let prepared = self.prepare_published(generation, permit, started).await;
                prepared.map(|prepared| self.install(generation, prepared, meant).0)
            }
            Target::Directory { name, .. } => self.load_directory(name, permit, started).await,
        };
        loaded.inspect_err(|error| {
            self.count_error(name);
            tracing::warn!(adapter = name, error = error as &dyn std::error::Error, "adapter not loaded");
        })
    }

    async fn prepare_published(
        &self,
        generation: &Generation,
        permit: Permit,
        started: Instant,
    ) -> Result<Prepared, StoreError> {
        let files = self.objects.blob(&generation.digest).await?;
        let (loader, expected) = (self.loader.clone(), generation.digest);
        let merge = generation.merge;
        let work = move || {
            let check = || match ContentDigest::of(&files) {
                found if found == expected => Ok(found),
                found => Err(StoreError::storage(format!("blob {expected} holds content {found}"))),
            };
            loader.prepare(&files, merge, check, started)
        };
        self.work(permit, work).await
    }

    async fn load_directory(self: &Arc<Self>, name: &str, permit: Permit, started: Instant) -> Answer {
        let DirectoryContent { files, version, settled } = self.objects.read_directory(name).await?;
        let (shared, owner) = (self.clone(), name.to_owned());
        let loaded = self.work(permit, move || {
            let digest = ContentDigest::of(&files);
            // A file that was touched and not changed is still the same generation.
            let generation = shared.known().directory_generation(&owner, digest);
            match shared.memory.get(&generation) {
                Some(adapter) => Ok((digest, Ok(adapter))),
                None => Ok((digest, Err(shared.loader.prepare(&files, false, || Ok(digest), started)?))),
            }
        });
        let (digest, loaded) = loaded.await?;
        let generation = {
            // Under one lock: of two loads that found different content each gets a number of its own.
            let mut known = self.known();
            let generation = known.directory_generation(name, digest);
            let directory = KnownDirectory { version, settled, generation: generation.clone() };
            known.directories.insert(name.to_owned(), directory);
            generation
        };
        match loaded {
            Ok(adapter) => Ok(adapter),
            Err(prepared) => Ok(self.install(&generation, prepared, Current::Directory).0),
        }
    }

    /// Runs the work of a load; the permit is held until it ends, even when nobody waits for it any more.
    pub(super) async fn work<T: Send + 'static>(
        &self,
        permit: Permit,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let work = move || {
            let _permit = permit;
            work()
        };
        self.workers.run(work).await
    }

    /// Makes a prepared adapter visible and keeps what its load found. Where the name does not mean what was `meant` any
    /// more, only those who hold the adapter keep it.
    pub(super) fn install(
        &self,
        generation: &Generation,
        prepared: Prepared,
        meant: Current,
    ) -> (Arc<LoadedAdapter>, LoadFacts) {
        let seconds = prepared.load_seconds;
        let name = &generation.name;
        // Counted before it can be seen, so that whoever uses the adapter finds its load counted.
        let label = self.metrics.claim_adapter_label(name);
        self.metrics.adapter_load_seconds.with_label_values(&[label]).observe(seconds);
        let (adapter, report) = prepared.commit(generation);
        let facts = LoadFacts { generation: generation.clone(), report, load_ms: seconds * 1e3 };
        tracing::info!(adapter = name, generation = generation.number, load_ms = facts.load_ms, "adapter loaded");
        // Under one lock to the end: what a record says from now on comes after this, and supersedes it.
        let mut known = self.known();
        let current = known.current(name);
        if current == Current::Retired || current != meant {
            self.memory.release(generation);
            if current == Current::Retired {
                self.metrics.forget_adapter(name);
            }
            return (adapter, facts);
        }
        known.facts.insert(name.clone(), facts.clone());
        if current == Current::Directory {
            self.memory.supersede(name, Some(generation));
        }
        (adapter, facts)
    }
}
