//! The engine on its thread, behind its handle.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};

use candle_core::{Result, Tensor};
use patchbay::adapter::LoweredAdapter;
use patchbay::engine::{EngineHandle, FinishReason, Forward, ForwardLimits, GenerationEvent, SubmitError};
use patchbay::model::{Batch, DeviceAdapter};
use tokio::sync::mpsc::Receiver;

use super::fake::{Probe, request, with_adapter};
use super::world::{Outcome, ROOMY, World, finish, metrics, prompt, run_alone};

/// A fake that reports when a step begins and waits to be let through.
struct Gated {
    model: Box<dyn Forward>,
    entered: SyncSender<()>,
    gate: std::sync::mpsc::Receiver<()>,
}

impl Forward for Gated {
    fn limits(&self) -> ForwardLimits {
        self.model.limits()
    }

    fn forward(&mut self, batch: &Batch) -> Result<Tensor> {
        // Both fail when the test is over; then every step passes.
        let _ = self.entered.send(());
        let _ = self.gate.recv();
        self.model.forward(batch)
    }

    fn adapter_to_device(&self, adapter: &LoweredAdapter) -> Result<DeviceAdapter> {
        self.model.adapter_to_device(adapter)
    }
}

fn start(world: &World) -> EngineHandle {
    EngineHandle::start(world.model(&Arc::new(Probe::default())), world.config(), metrics())
}

/// A handle whose every step waits for the gate, the gate, and the signal that a step began.
fn start_gated(world: &World) -> (EngineHandle, SyncSender<()>, std::sync::mpsc::Receiver<()>) {
    let (entered, has_entered) = sync_channel(1);
    let (open, gate) = sync_channel(1);
    let model = Gated { model: world.model(&Arc::new(Probe::default())), entered, gate };
    (EngineHandle::start(Box::new(model), world.config(), metrics()), open, has_entered)
}

fn collect(mut events: Receiver<GenerationEvent>) -> Outcome {
    let mut outcome = Outcome::default();
    while let Some(event) = events.blocking_recv() {
        outcome.take(event);
    }
    outcome
}

#[test]
fn threads_share_one_engine() {
    let handle = start(&World { sequences_max: 3, step_tokens_max: 8, prefix_cache: true, ..ROOMY });
    let clients: Vec<_> = (0..6)
        .map(|id| {
            let handle = handle.clone();
            std::thread::spawn(move || {
                let request = with_adapter(prompt(6 + id as u32), 10, id);
                (request.clone(), collect(handle.submit(request).unwrap()))
            })
        })
        .collect();
    for client in clients {
        let (request, outcome) = client.join().unwrap();
        assert_eq!(outcome.apart_from_cache(), run_alone(&request));
    }
    handle.shut_down();
    assert_eq!(handle.in_flight(), 0);
    assert!(!handle.adapter_activity().resident.is_empty());
}

#[test]
fn the_queue_counts_waiting_requests_only() {
    let world = World { sequences_max: 1, step_tokens_max: 8, queue_max: 2, ..ROOMY };
    let (handle, open, entered) = start_gated(&world);
    let running = handle.submit(request(prompt(4), 2)).unwrap();
    entered.recv().unwrap();
    let waiting = [handle.submit(request(prompt(4), 2)).unwrap(), handle.submit(request(prompt(4), 2)).unwrap()];
    assert_eq!(handle.submit(request(prompt(4), 2)).unwrap_err(), SubmitError::QueueFull { limit: 2 });
    assert_eq!(handle.in_flight(), 3);
    drop((open, entered));
    for events in std::iter::once(running).chain(waiting) {
        assert_eq!(finish(&collect(events)), (FinishReason::Length, 2));
    }
}

#[test]
fn stopped_engine_finishes_what_it_has() {
    let (handle, open, entered) = start_gated(&ROOMY);
    let running = handle.submit(request(prompt(4), 3)).unwrap();
    entered.recv().unwrap();
    handle.stop_accepting();
    assert_eq!(handle.submit(request(prompt(4), 3)).unwrap_err(), SubmitError::ShuttingDown);
    drop((open, entered));
    assert_eq!(finish(&collect(running)), (FinishReason::Length, 3));
    assert!(handle.is_alive());
}

#[test]
fn shutdown_ends_what_runs_and_joins() {
    let (handle, open, entered) = start_gated(&ROOMY);
    let running = handle.submit(request(prompt(4), 100)).unwrap();
    entered.recv().unwrap();
    let closer = {
        let handle = handle.clone();
        std::thread::spawn(move || handle.shut_down())
    };
    drop((open, entered));
    closer.join().unwrap();
    handle.shut_down();
    assert!(!handle.is_alive());
    assert_eq!(handle.in_flight(), 0);
    let outcome = collect(running);
    let expected = Some("shut down");
    assert!(outcome.failed.as_deref() == expected || outcome.finish.is_some(), "{outcome:?}");
    assert_eq!(handle.submit(request(prompt(4), 1)).unwrap_err(), SubmitError::ShuttingDown);
}

#[test]
fn without_handles_the_engine_finishes_what_it_has() {
    let handle = start(&ROOMY);
    let events = handle.submit(request(prompt(4), 20)).unwrap();
    drop(handle);
    assert_eq!(finish(&collect(events)), (FinishReason::Length, 20));
}
