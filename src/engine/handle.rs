//! The rest of the server's view of the engine thread.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::admission::{Admission, Submission};
use super::step::Engine;
use super::{EngineConfig, Forward, ForwardLimits, GenerationEvent, GenerationRequest, SubmitError};
use crate::metrics::{AdapterActivity, Metrics};

/// How often an idle engine looks whether adapters in its slots have left the host's memory.
const TIDY_INTERVAL: Duration = Duration::from_secs(1);

/// Everything that can wake the engine thread.
enum Event {
    /// A request was admitted.
    Submit(Submission),
    /// End everything.
    ShutDown,
}

/// A handle to the engine thread; clones share it. When the last one is gone, the thread finishes what it has and ends.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
}

struct Shared {
    admission: Arc<Admission>,
    /// Has room for every waiting request and one shutdown, so sending never blocks.
    events: SyncSender<Event>,
    shutdown_sent: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl EngineHandle {
    /// Starts the engine thread.
    ///
    /// # Panics
    /// When the config was not checked ([`EngineConfig::check`]), or the system starts no thread.
    pub fn start(forward: Box<dyn Forward>, config: EngineConfig, metrics: Arc<Metrics>) -> Self {
        let (events, receiver) = mpsc::sync_channel(config.queue_max + 1);
        let engine = Engine::new(forward, config, metrics);
        let admission = engine.admission();
        let thread = thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || run(engine, &receiver))
            .expect("a starting process can start a thread");
        let thread = Mutex::new(Some(thread));
        Self { shared: Arc::new(Shared { admission, events, shutdown_sent: AtomicBool::new(false), thread }) }
    }

    /// Queues a sequence. Dropping the receiver cancels it.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing is queued then.
    ///
    /// # Panics
    /// When the prompt is empty or has a token beyond `limits().vocab_size`.
    pub fn submit(
        &self,
        request: GenerationRequest,
    ) -> Result<tokio::sync::mpsc::Receiver<GenerationEvent>, SubmitError> {
        let (submission, receiver) = self.shared.admission.admit(request)?;
        match self.shared.events.try_send(Event::Submit(submission)) {
            Ok(()) => Ok(receiver),
            // Full cannot be: admission bounds what waits. So the thread is gone.
            Err(_) => {
                self.shared.admission.stop();
                self.shared.admission.status().waiting_changed(1, 0);
                Err(SubmitError::ShuttingDown)
            }
        }
    }

    /// Sizes of the model that the engine runs; the context is also bounded by what the KV cache holds.
    pub fn limits(&self) -> ForwardLimits {
        self.shared.admission.limits()
    }

    /// Adapters on the device, and waited for.
    pub fn adapter_activity(&self) -> AdapterActivity {
        self.shared.admission.status().activity()
    }

    /// Sequences running and waiting.
    pub fn in_flight(&self) -> usize {
        self.shared.admission.status().in_flight()
    }

    /// Whether the engine thread lives; `false` after [`Self::shut_down`], and after a broken invariant stopped it.
    pub fn is_alive(&self) -> bool {
        let thread = self.shared.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Refuses new requests from now on; running ones go on.
    pub fn stop_accepting(&self) {
        self.shared.admission.stop();
    }

    /// Cancels what still runs and joins the thread (blocks until its current step ends).
    pub fn shut_down(&self) {
        self.stop_accepting();
        if !self.shared.shutdown_sent.swap(true, Ordering::AcqRel) {
            // Fails only when the thread has ended already.
            let _ = self.shared.events.try_send(Event::ShutDown);
        }
        let thread = self.shared.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Err(_)) = thread.map(JoinHandle::join) {
            tracing::error!("the engine thread had panicked");
        }
    }
}

/// The engine thread: steps while there is work, sleeps on its channel while there is none.
fn run(mut engine: Engine, events: &Receiver<Event>) {
    loop {
        let first = if engine.is_idle() {
            match wait(&mut engine, events) {
                Some(event) => Some(event),
                // The last handle is gone.
                None => return,
            }
        } else {
            None
        };
        let mut is_shutting_down = false;
        for event in first.into_iter().chain(events.try_iter()) {
            match event {
                Event::Submit(submission) => engine.accept(submission),
                Event::ShutDown => is_shutting_down = true,
            }
        }
        if is_shutting_down {
            engine.shut_down();
            return;
        }
        engine.step();
    }
}

/// The next event of an idle engine; `None` when there will be none.
fn wait(engine: &mut Engine, events: &Receiver<Event>) -> Option<Event> {
    while engine.tidy() {
        match events.recv_timeout(TIDY_INTERVAL) {
            Ok(event) => return Some(event),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    }
    events.recv().ok()
}
