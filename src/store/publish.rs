//! Changing what a name means: check everything while the weights are staged, then blob, then record, then visible.
//!
//! What was begun is done, also when the request for it ended meanwhile: its work cannot be taken back half-way.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::admission::Permit;
use super::catalog::{AdapterStatus, PublishOptions, Shared, Target};
use super::load::Flight;
use super::memory::Generation;
use super::name::check_name;
use super::objects::unix_now;
use super::record::{ContentDigest, Current, Record, RecordedOptions, Source};
use super::{StoreError, unpack};
use crate::adapter::AdapterFiles;

/// Times a record is written again because another process took its number.
const RECORD_TRIES: usize = 1000;

/// Leave to receive an upload; the memory of all uploads is bounded by their number (`adapters.loads_max`).
#[must_use]
pub struct UploadSlot {
    shared: Arc<Shared>,
    permit: Permit,
}

impl UploadSlot {
    pub(super) fn new(shared: Arc<Shared>, permit: Permit) -> Self {
        Self { shared, permit }
    }

    /// Checks, lowers and stores uploaded files as a new generation of `name`. This goes on when nobody waits for it any
    /// more, and the slot is held until it ends.
    ///
    /// # Errors
    /// See [`StoreError`]; the name's state is unchanged then.
    pub async fn publish(
        self,
        name: &str,
        files: AdapterFiles,
        options: &PublishOptions,
    ) -> Result<AdapterStatus, StoreError> {
        check_name(name)?;
        let (shared, name, options) = (self.shared.clone(), name.to_owned(), options.clone());
        self.run(async move { shared.publish(&name, files, &options, Source::Upload).await }).await
    }

    /// Unpacks a tar archive, plain or gzip, of a PEFT directory and publishes it in the same way.
    ///
    /// # Errors
    /// See [`StoreError`]; the name's state is unchanged then.
    pub async fn publish_archive(
        self,
        name: &str,
        archive: Bytes,
        options: &PublishOptions,
    ) -> Result<AdapterStatus, StoreError> {
        check_name(name)?;
        let (shared, name, options) = (self.shared.clone(), name.to_owned(), options.clone());
        self.run(async move {
            let limit = shared.config.upload_bytes_max;
            let files = shared.workers.run(move || unpack::unpack_tar(&archive, limit));
            let files = files.await.inspect_err(|_| shared.count_error(&name))?;
            shared.publish(&name, files, &options, Source::Upload).await
        })
        .await
    }

    /// Runs the work to its end, also when nobody waits for it any more, and holds the slot until then.
    pub(super) async fn run<T: Send + 'static>(
        self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, StoreError> {
        let task = tokio::spawn(async move {
            let _permit = self.permit;
            work.await
        });
        task.await.map_err(StoreError::storage)?
    }
}

/// The state of a name that a change starts from.
struct Found {
    /// Number of the last record.
    last: u64,
    current: Current,
    /// Current generation; 0 where the name is not in use.
    generation: u64,
}

impl Shared {
    /// Publishes files as the next generation of `name`.
    pub(super) async fn publish(
        &self,
        name: &str,
        files: AdapterFiles,
        options: &PublishOptions,
        source: Source,
    ) -> Result<AdapterStatus, StoreError> {
        let limit = self.config.upload_bytes_max;
        if files.num_bytes() > limit {
            return Err(StoreError::TooLarge { limit });
        }
        // Checked again when the record is written; here it spares the work.
        check_expectations(name, &self.found(name).await?, options)?;
        let permit = self.loads.admit().await?;
        let started = Instant::now();
        let (loader, merge) = (self.loader.clone(), options.merge);
        let staged = self.objects.stage(&self.workers, &files);
        let checked = files.clone();
        let prepared =
            self.work(permit, move || loader.prepare(&checked, merge, || Ok(ContentDigest::of(&checked)), started));
        // Storage takes its time while the processor checks.
        let (prepared, staged) = tokio::join!(prepared, staged);
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                self.count_error(name);
                self.objects.discard(staged.unwrap_or_default()).await;
                return Err(error);
            }
        };
        let digest = prepared.content;
        self.objects.put_blob(&digest, staged?).await?;
        let created = unix_now();
        let record = Record::Publish { digest, options: RecordedOptions { merge }, created, source };
        let (number, flight) = self.append(name, &record, |found| check_expectations(name, found, options)).await?;
        let generation = Generation { name: name.to_owned(), number, digest, merge };
        let (adapter, facts) = self.install(&generation, prepared, Current::Published(number));
        match flight {
            Some(flight) => flight.land(&Ok(adapter)),
            None => drop(adapter),
        }
        let status = self.status_of(&generation, created);
        Ok(AdapterStatus { report: Some(facts.report), load_ms: Some(facts.load_ms), ..status })
    }

    /// Retires `name`.
    pub(super) async fn retire(&self, name: &str) -> Result<(), StoreError> {
        let record = Record::Retire { created: unix_now() };
        let in_use = |found: &Found| match found.generation {
            0 => Err(StoreError::NotFound(name.to_owned())),
            _ => Ok(()),
        };
        let (number, _) = self.append(name, &record, in_use).await?;
        tracing::info!(adapter = name, record = number, "adapter removed");
        Ok(())
    }

    /// Writes the name's next record and folds it in, if `check` allows it in the state that the record follows.
    /// Answers the record's number and, for a publication, the flight that requests for it wait on: whoever sees the
    /// record before the adapter is in memory waits for it instead of loading it a second time.
    async fn append(
        &self,
        name: &str,
        record: &Record,
        check: impl Fn(&Found) -> Result<(), StoreError>,
    ) -> Result<(u64, Option<Flight>), StoreError> {
        for _ in 0..RECORD_TRIES {
            let found = self.found(name).await?;
            check(&found)?;
            let number = found.last + 1;
            if found.current == Current::Directory && number <= found.generation {
                // The generations of a directory count too.
                let marker = Record::Directory { created: unix_now() };
                if self.objects.create_record(name, number, &marker).await? {
                    self.fold(name, number, &marker);
                }
                continue;
            }
            let target = record.generation(name, number).map(Target::Published);
            let flight = target.and_then(|target| self.flights.claim(&target));
            // Create-if-absent decides between processes; the loser looks again.
            if self.objects.create_record(name, number, record).await? {
                self.fold(name, number, record);
                return Ok((number, flight));
            }
        }
        Err(StoreError::Busy)
    }

    async fn found(&self, name: &str) -> Result<Found, StoreError> {
        let (last, current) = self.refresh(name).await?;
        let generation = match current {
            Current::Published(number) => number,
            Current::Retired => 0,
            Current::Directory => match self.objects.directory_exists(name).await? {
                false => 0,
                true => {
                    let known = self.known().directories.get(name).map(|directory| directory.generation.number);
                    known.unwrap_or(1).max(last)
                }
            },
        };
        Ok(Found { last, current, generation })
    }
}

fn check_expectations(name: &str, found: &Found, options: &PublishOptions) -> Result<(), StoreError> {
    if options.must_be_new && matches!(found.current, Current::Published(_)) {
        return Err(StoreError::AlreadyExists(name.to_owned()));
    }
    match options.expected_generation {
        Some(expected) if expected != found.generation => {
            Err(StoreError::Conflict { name: name.to_owned(), expected, found: found.generation })
        }
        _ => Ok(()),
    }
}

impl Record {
    /// The generation that the record publishes as number `number` of `name`.
    fn generation(&self, name: &str, number: u64) -> Option<Generation> {
        match self {
            Self::Publish { digest, options, .. } => {
                Some(Generation { name: name.to_owned(), number, digest: *digest, merge: options.merge })
            }
            Self::Directory { .. } | Self::Retire { .. } => None,
        }
    }
}
