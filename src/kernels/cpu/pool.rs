//! Threads that share the work of one kernel.
//!
//! A step of a model is some hundred short kernels, each a few microseconds to a few milliseconds long. The threads
//! therefore wait for the next one awake for a moment before they sleep. Each has a part of the work of its own, in order,
//! so that what it asks the memory for ahead is its own; once that is done it takes from the ends of others' parts, so that
//! a thread that the system holds up delays nobody for longer than its own piece. Starting a kernel allocates nothing.

#![expect(unsafe_code, reason = "a job is borrowed by threads that outlive it")]

use std::cell::UnsafeCell;
use std::ops::Range;
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
    panicked: AtomicBool,
    /// Threads asleep, or about to be.
    sleeping: AtomicUsize,
    /// One job at a time.
    busy: Mutex<()>,
    /// What is left of every thread's part, the caller's first.
    parts: OnceLock<Vec<Part>>,
    threads: OnceLock<Vec<Thread>>,
}

/// What threads do: `task` for all pieces of the parts, of up to `most` elements.
#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(Range<usize>) + Sync),
    most: usize,
}

/// What is left of a part: its begin in the lower half of the word, its end in the upper one.
#[repr(align(128))]
#[derive(Default)]
struct Part(AtomicU64);

impl Part {
    fn set(&self, from: usize, to: usize) {
        self.0.store(from as u64 | (to as u64) << 32, Ordering::Relaxed);
    }

    /// Takes from the front, or else the end: up to `most` elements and half of what is left, rounded up, so that pieces
    /// become short before the work ends.
    fn take(&self, most: usize, is_front: bool) -> Option<Range<usize>> {
        let mut left = self.0.load(Ordering::Relaxed);
        loop {
            let (from, to) = ((left & u64::from(u32::MAX)) as usize, (left >> 32) as usize);
            if from >= to {
                return None;
            }
            let count = most.min((to - from).div_ceil(2));
            let (taken, rest) =
                if is_front { (from..from + count, (from + count, to)) } else { (to - count..to, (from, to - count)) };
            let rest = rest.0 as u64 | (rest.1 as u64) << 32;
            match self.0.compare_exchange_weak(left, rest, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(taken),
                Err(now) => left = now,
            }
        }
    }
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
    for_ranges(tasks, 1, |range| range.for_each(&task));
}

/// Like [`for_each`] over pieces of `0..len` of up to `most` elements. Neighbouring pieces go to one thread, mostly one
/// after the other.
pub(super) fn for_ranges(len: usize, most: usize, task: impl Fn(Range<usize>) + Sync) {
    let most = most.max(1);
    if len > most && num_threads() > 1 {
        let pool = pool();
        match pool.busy.try_lock() {
            Ok(_busy) => return pool.run(len, most, &task),
            // A panic in a task is passed on with the lock held; the pool is closed and empty then.
            Err(TryLockError::Poisoned(poisoned)) => {
                let _busy = poisoned.into_inner();
                return pool.run(len, most, &task);
            }
            Err(TryLockError::WouldBlock) => {}
        }
    }
    (0..len).step_by(most).for_each(|from| task(from..len.min(from + most)));
}

fn pool() -> &'static Pool {
    static POOL: Pool = Pool {
        state: AtomicU64::new(0),
        job: UnsafeCell::new(None),
        panicked: AtomicBool::new(false),
        sleeping: AtomicUsize::new(0),
        busy: Mutex::new(()),
        parts: OnceLock::new(),
        threads: OnceLock::new(),
    };
    POOL.threads.get_or_init(|| {
        POOL.parts.get_or_init(|| (0..num_threads()).map(|_| Part::default()).collect());
        let start = |i| {
            let thread = thread::Builder::new().name(format!("kernel-{i}")).spawn(move || POOL.work(i));
            thread.expect("a starting process can start a thread").thread().clone()
        };
        (1..num_threads()).map(start).collect()
    });
    &POOL
}

impl Pool {
    /// Runs a job; the caller holds `busy`.
    fn run(&self, len: usize, most: usize, task: &(dyn Fn(Range<usize>) + Sync)) {
        assert!(u32::try_from(len).is_ok(), "a kernel has fewer than 2^32 tasks");
        // SAFETY: only the lifetime changes. Nobody uses the task after `close`, which runs before this frame ends.
        let task: *const (dyn Fn(Range<usize>) + Sync) = unsafe { std::mem::transmute(task) };
        let job = Job { task, most };
        // SAFETY: the last job was closed and left by all, and the lock keeps other callers out.
        unsafe { *self.job.get() = Some(job) };
        let parts = self.parts();
        for (idx, part) in parts.iter().enumerate() {
            part.set(len * idx / parts.len(), len * (idx + 1) / parts.len());
        }
        self.panicked.store(false, Ordering::Relaxed);
        // Sequentially consistent with the sleepers' announcement: either they see the job or we see them.
        self.state.fetch_add(JOB | OPEN, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) > 0 {
            self.threads.get().into_iter().flatten().for_each(Thread::unpark);
        }
        let mine = catch_unwind(AssertUnwindSafe(|| self.take_pieces(job, 0)));
        if mine.is_err() {
            // What is left is not done.
            parts.iter().for_each(|part| part.set(0, 0));
        }
        self.close();
        if let Err(cause) = mine {
            resume_unwind(cause);
        }
        assert!(!self.panicked.load(Ordering::Relaxed), "a kernel's task panicked on another thread");
    }

    /// Lets nobody in any more and waits until all are out.
    fn close(&self) {
        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0_usize;
        while self.state.load(Ordering::Acquire) & (OPEN - 1) != 0 {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD { std::hint::spin_loop() } else { thread::yield_now() }
        }
    }

    fn parts(&self) -> &[Part] {
        self.parts.get().expect("the pool has started")
    }

    /// The pieces of the thread's own part from its front, then those of the others from their ends.
    fn take_pieces(&self, job: Job, own: usize) {
        let parts = self.parts();
        let (before, after) = parts.split_at(own);
        for (idx, part) in after.iter().chain(before).enumerate() {
            while let Some(piece) = part.take(job.most, idx == 0) {
                // SAFETY: the caller of `run` keeps the task alive until everybody has left.
                unsafe { (*job.task)(piece) };
            }
        }
    }

    /// A thread of the pool: waits for jobs for ever. `own` is the index of its part.
    fn work(&self, own: usize) {
        let mut last = 0;
        loop {
            let entered = self.wait(last);
            last = entered / JOB;
            // SAFETY: this thread is inside, so the job is not replaced.
            let job = unsafe { *self.job.get() }.expect("an open job is there");
            if catch_unwind(AssertUnwindSafe(|| self.take_pieces(job, own))).is_err() {
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
        for (len, most) in [(0, 3), (1, 1), (3, 7), (103, 10), (103, 1), (64, 64)] {
            let seen = Mutex::new(vec![0; len]);
            for_ranges(len, most, |range| {
                assert!((1..=most).contains(&range.len()), "a piece has 1 to {most} elements");
                range.for_each(|i| seen.lock().expect("no panic")[i] += 1);
            });
            assert!(seen.into_inner().expect("no panic").iter().all(|count| *count == 1));
        }
    }

    #[test]
    fn pieces_of_a_part_are_taken_once_from_both_ends_and_become_short() {
        let part = Part::default();
        assert_eq!(part.take(4, true), None);
        part.set(10, 29);
        let taken: Vec<_> = std::iter::repeat_n([true, true, false], 9)
            .flatten()
            .map_while(|is_front| part.take(4, is_front))
            .collect();
        assert_eq!(taken, [10..14, 14..18, 25..29, 18..22, 22..24, 24..25]);
        assert_eq!(part.take(4, false), None);
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
