//! Threads for the work of loading, which give way to the engine's.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rayon::{ThreadPool, ThreadPoolBuilder};
use tokio::sync::oneshot;

use super::StoreError;

/// How much nicer than the rest of the process the threads are, in the system's steps: where they compete for a core with a
/// step of the engine they get next to nothing of it, and on a free core they run as fast as any. A step waits for the slowest
/// of its threads, so that with a tenth of a core for loads (10) it took half as long again.
#[cfg(target_os = "linux")]
const NICENESS: i32 = 19;

/// The threads. What a piece of work runs in parallel runs on them too.
pub(super) struct Workers {
    pool: ThreadPool,
}

impl Workers {
    /// Threads for `count` pieces of work at once; at least as many as the machine has cores.
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub(super) fn new(count: usize) -> Result<Self, StoreError> {
        let pool = ThreadPoolBuilder::new()
            .num_threads(count.max(rayon::current_num_threads()))
            .thread_name(|idx| format!("loader-{idx}"))
            .start_handler(|_| give_way())
            .build();
        Ok(Self { pool: pool.map_err(StoreError::storage)? })
    }

    /// Runs `work`, also when nobody waits for it any more.
    ///
    /// # Errors
    /// Those of the work, and when it panics.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (sender, receiver) = oneshot::channel();
        self.pool.spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(work));
            let result = result.unwrap_or_else(|_| Err(StoreError::storage("loading panicked")));
            // Whoever went away meanwhile does not matter.
            let _ = sender.send(result);
        });
        receiver.await.map_err(StoreError::storage)?
    }
}

/// Lowers the thread's priority. Only Linux has one for each thread.
fn give_way() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::nice(NICENESS) {
        tracing::warn!(%error, "threads that load adapters do not give way to the engine");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_error_and_leaves_the_threads() {
        let workers = Workers::new(1).unwrap();
        let fails = |run: bool| {
            assert!(run, "the work fails");
            Ok(())
        };
        let error = workers.run(move || fails(false)).await.unwrap_err();
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        assert_eq!(cause.as_deref(), Some("loading panicked"), "{error}");
        assert_eq!(workers.run(|| Ok(7)).await.unwrap(), 7);
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn the_threads_are_nicer_than_the_rest() {
        let niceness = || Ok(rustix::process::getpriority_process(None).expect("of this thread"));
        let before = niceness().unwrap();
        let found = Workers::new(1).unwrap().run(niceness).await.unwrap();
        assert_eq!(found, (before + NICENESS).min(19));
    }
}
