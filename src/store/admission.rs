//! How much of something may run and wait at once.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::StoreError;

/// Bounds how many run at once and how many more wait for their turn.
pub struct Admission {
    /// One permit for each that runs or waits.
    admitted: Arc<Semaphore>,
    /// One permit for each that runs; waiting is first come, first served.
    running: Arc<Semaphore>,
}

/// Leave to run, until dropped.
#[must_use]
pub struct Permit {
    _running: OwnedSemaphorePermit,
    _admitted: OwnedSemaphorePermit,
}

impl Admission {
    /// At least one runs at once, whatever the config says.
    pub fn new(running_max: usize, waiting_max: usize) -> Self {
        let running = running_max.clamp(1, Semaphore::MAX_PERMITS);
        let admitted = running.saturating_add(waiting_max).min(Semaphore::MAX_PERMITS);
        Self { admitted: Arc::new(Semaphore::new(admitted)), running: Arc::new(Semaphore::new(running)) }
    }

    /// Waits for its turn.
    ///
    /// # Errors
    /// `Busy` when too many wait already.
    pub async fn admit(&self) -> Result<Permit, StoreError> {
        let admitted = self.admitted.clone().try_acquire_owned().map_err(|_| StoreError::Busy)?;
        let running = self.running.clone().acquire_owned().await.map_err(StoreError::storage)?;
        Ok(Permit { _running: running, _admitted: admitted })
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn beyond_running_and_waiting_is_busy() {
        let admission = Admission::new(1, 1);
        let Ok(first) = admission.admit().now_or_never().expect("does not wait") else { panic!("admitted") };
        let mut second = Box::pin(admission.admit());
        assert!((&mut second).now_or_never().is_none(), "waits");
        assert!(matches!(admission.admit().now_or_never(), Some(Err(StoreError::Busy))));
        drop(first);
        assert!(second.now_or_never().is_some_and(|permit| permit.is_ok()));
    }
}
