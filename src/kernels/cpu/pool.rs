//! Threads that share the work of one kernel.
//!
//! A step of a model is some hundred short kernels, each a few microseconds to a few milliseconds long. The threads
//! therefore wait for the next one awake for a moment before they sleep, and take tasks from a common counter, so that a
//! thread that the system holds up delays nobody for longer than its own task. Starting a kernel allocates nothing.

#![expect(unsafe_code, reason = "a job is borrowed by threads that outlive it")]

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, TryLockError};
use std::thread::{self, Thread};

/// Looks at the job's state before a thread goes to sleep; about 50 microseconds.
const SPINS: usize = 2_000;
/// Looks at the job's state before the caller lets others run.
const SPINS_BEFORE_YIELD: usize = 10_000;

/// The job is open to threads that want to join.
const OPEN: u64 = 1 << 16;
/// Jobs are numbered from here on up; the lowest 16 bits count the threads inside.
const JOB: u64 = 1 << 17;

/// The threads of the process.
struct Pool {
    /// Job number, whether it is open, and how many threads are inside.
    state: AtomicU64,
    /// The job: written while nobody is inside and it is closed, read by threads inside.
    job: UnsafeCell<Option<Job>>,
    next_task: AtomicUsize,
    panicked: AtomicBool,
    /// Threads asleep, or about to be.
    sleeping: AtomicUsize,
    /// One job at a time.
    busy: Mutex<()>,
    threads: OnceLock<Vec<Thread>>,
}

/// What threads do: `task(i)` for every `i` below `tasks`.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

// SAFETY: `job` is written only by the holder of `busy` while `state` is closed and nobody is inside; a thread reads it
// only while inside, which it entered by a successful exchange on the open state.
unsafe impl Sync for Pool {}

/// Threads that share a kernel's work, the caller included.
pub(super) fn num_threads() -> usize {
    rayon::current_num_threads()
}

/// Calls `task(i)` for every `i` below `tasks`, on the caller's thread and those of the pool; returns when all are done.
/// A caller that finds the pool taken does everything itself.
///
/// # Panics
/// When a task does, after all threads have left.
pub(super) fn for_each(tasks: usize, task: impl Fn(usize) + Sync) {
    if tasks == 0 {
        return;
    }
    if tasks > 1 && num_threads() > 1 {
        let pool = pool();
        match pool.busy.try_lock() {
            Ok(_busy) => return pool.run(tasks, &task),
            // A panic in a task is passed on with the lock held; the pool is closed and empty then.
            Err(TryLockError::Poisoned(poisoned)) => {
                let _busy = poisoned.into_inner();
                return pool.run(tasks, &task);
            }
            Err(TryLockError::WouldBlock) => {}
        }
    }
    (0..tasks).for_each(task);
}

/// Like [`for_each`] over parts of `0..len` of `grain` elements (the last may be shorter).
pub(super) fn for_ranges(len: usize, grain: usize, task: impl Fn(std::ops::Range<usize>) + Sync) {
    let grain = grain.max(1);
    for_each(len.div_ceil(grain), |i| task(i * grain..len.min((i + 1) * grain)));
}

fn pool() -> &'static Pool {
    static POOL: Pool = Pool {
        state: AtomicU64::new(0),
        job: UnsafeCell::new(None),
        next_task: AtomicUsize::new(0),
        panicked: AtomicBool::new(false),
        sleeping: AtomicUsize::new(0),
        busy: Mutex::new(()),
        threads: OnceLock::new(),
    };
    POOL.threads.get_or_init(|| {
        let start = |i| {
            let thread = thread::Builder::new().name(format!("kernel-{i}")).spawn(|| POOL.work());
            thread.expect("a starting process can start a thread").thread().clone()
        };
        (1..num_threads()).map(start).collect()
    });
    &POOL
}

impl Pool {
    /// Runs a job; the caller holds `busy`.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime changes. Nobody uses the task after `close`, which runs before this frame ends.
        let task: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        // SAFETY: the last job was closed and left by all, and the lock keeps other callers out.
        unsafe { *self.job.get() = Some(Job { task, tasks }) };
        self.next_task.store(0, Ordering::Relaxed);
        self.panicked.store(false, Ordering::Relaxed);
        // Sequentially consistent with the sleepers' announcement: either they see the job or we see them.
        self.state.fetch_add(JOB | OPEN, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) > 0 {
            self.threads.get().into_iter().flatten().for_each(Thread::unpark);
        }
        let mine = catch_unwind(AssertUnwindSafe(|| self.take_tasks(Job { task, tasks })));
        self.close();
        if let Err(cause) = mine {
            resume_unwind(cause);
        }
        assert!(!self.panicked.load(Ordering::Relaxed), "a kernel's task panicked on another thread");
    }

    /// Lets nobody in any more and waits until all are out.
    fn close(&self) {
        // Whatever is left after a panic is not done.
        self.next_task.store(usize::MAX / 2, Ordering::Relaxed);
        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0_usize;
        while self.state.load(Ordering::Acquire) & (OPEN - 1) != 0 {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD { std::hint::spin_loop() } else { thread::yield_now() }
        }
    }

    fn take_tasks(&self, job: Job) {
        loop {
            let i = self.next_task.fetch_add(1, Ordering::Relaxed);
            if i >= job.tasks {
                return;
            }
            // SAFETY: the caller of `run` keeps the task alive until everybody has left.
            unsafe { (*job.task)(i) };
        }
    }

    /// A thread of the pool: waits for jobs for ever.
    fn work(&self) {
        let mut last = 0;
        loop {
            let entered = self.wait(last);
            last = entered / JOB;
            // SAFETY: this thread is inside, so the job is not replaced.
            let job = unsafe { *self.job.get() }.expect("an open job is there");
            if catch_unwind(AssertUnwindSafe(|| self.take_tasks(job))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for an open job other than number `last` and enters it; returns the state it found.
    fn wait(&self, last: u64) -> u64 {
        let mut spins = 0_usize;
        loop {
            let state = self.state.load(Ordering::Acquire);
            if state & OPEN != 0 && state / JOB != last {
                if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    return state;
                }
                continue;
            }
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
                continue;
            }
            self.sleeping.fetch_add(1, Ordering::SeqCst);
            let state = self.state.load(Ordering::SeqCst);
            if state & OPEN == 0 || state / JOB == last {
                thread::park();
            }
            self.sleeping.fetch_sub(1, Ordering::SeqCst);
            spins = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whoever_calls() {
        thread::scope(|scope| {
            for caller in 0..4 {
                scope.spawn(move || {
                    for round in 0..500 {
                        let counts: Vec<AtomicUsize> =
                            (0..(round + caller) % 37).map(|_| AtomicUsize::new(0)).collect();
                        for_each(counts.len(), |i| {
                            counts[i].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
                    }
                });
            }
        });
    }

    #[test]
    fn ranges_tile_the_length() {
        let seen = Mutex::new(vec![0; 103]);
        for_ranges(103, 10, |range| range.for_each(|i| seen.lock().expect("no panic")[i] += 1));
        assert!(seen.into_inner().expect("no panic").iter().all(|count| *count == 1));
    }

    #[test]
    fn a_panic_reaches_the_caller_and_leaves_a_pool_that_works() {
        for _ in 0..20 {
            let result = catch_unwind(|| for_each(64, |i| assert!(i != 40, "task 40")));
            assert!(result.is_err());
            let done = AtomicUsize::new(0);
            for_each(64, |_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 64);
        }
    }
}
