//! The compute pool: one per device, shared by everything that computes in the process.
//!
//! `run` splits a job into numbered tasks that threads claim one by one. Which thread takes which task never reaches
//! a number, because a task's result depends on its number alone. Threads spin for about 50 microseconds after a job
//! and then park, so that an idle pool costs nothing and a busy one starts a job in about a microsecond.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

const SPIN: Duration = Duration::from_micros(50);
/// Iterations between two looks at the clock while spinning.
const SPINS_PER_CLOCK_READ: u32 = 64;

type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Number of the current job; odd values of `stop` end the workers.
    generation: AtomicUsize,
    job: Mutex<Option<JobSlot>>,
    next_task: AtomicUsize,
    num_tasks: AtomicUsize,
    workers_done: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
}

#[derive(Clone, Copy)]
struct JobSlot(Job);
// SAFETY: the pointee is `Sync`, and `Pool::run` keeps it alive until every worker has finished with it.
unsafe impl Send for JobSlot {}

/// Worker threads beside the calling thread.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<(JoinHandle<()>, Arc<AtomicBool>)>,
    /// Held during a job, so that two callers take turns.
    turn: Mutex<()>,
}

impl Pool {
    /// A pool of `num_threads` threads, the caller of [`Pool::run`] being one of them.
    pub(crate) fn new(num_threads: usize) -> Self {
        let shared = Arc::new(Shared {
            generation: AtomicUsize::new(0),
            job: Mutex::new(None),
            next_task: AtomicUsize::new(0),
            num_tasks: AtomicUsize::new(0),
            workers_done: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let workers = (1..num_threads.max(1))
            .map(|index| {
                let (shared, parked) = (Arc::clone(&shared), Arc::new(AtomicBool::new(false)));
                let own_parked = Arc::clone(&parked);
                let handle = std::thread::Builder::new()
                    .name(format!("compute-{index}"))
                    .spawn(move || work(&shared, &own_parked))
                    .expect("the system can start a thread");
                (handle, parked)
            })
            .collect();
        Pool { shared, workers, turn: Mutex::new(()) }
    }

    /// Number of threads that take part in a job.
    pub(crate) fn num_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Call `task(0)`, ..., `task(num_tasks - 1)`, each once, and return when all are done. Not reentrant.
    ///
    /// # Panics
    /// If a task panics.
    pub(crate) fn run(&self, num_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if num_tasks <= 1 || self.workers.is_empty() {
            (0..num_tasks).for_each(task);
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime is erased; this function waits for every worker before it returns.
        let job = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(task) };
        *shared.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(JobSlot(job));
        shared.next_task.store(0, Ordering::Relaxed);
        shared.num_tasks.store(num_tasks, Ordering::Relaxed);
        shared.workers_done.store(0, Ordering::Relaxed);
        shared.generation.fetch_add(1, Ordering::SeqCst);
        for (handle, parked) in &self.workers {
            wake(handle.thread(), parked);
        }
        let own = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| claim(shared, task)));
        let mut spins = 0u32;
        while shared.workers_done.load(Ordering::Acquire) < self.workers.len() {
            std::hint::spin_loop();
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(4096) {
                std::thread::yield_now();
            }
        }
        if let Err(cause) = own {
            std::panic::resume_unwind(cause);
        }
        assert!(!shared.panicked.swap(false, Ordering::AcqRel), "a compute task panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.generation.fetch_add(1, Ordering::SeqCst);
        for (handle, parked) in &self.workers {
            wake(handle.thread(), parked);
        }
        for (handle, _) in self.workers.drain(..) {
            // A worker catches every panic, so joining cannot fail.
            let _ended = handle.join();
        }
    }
}

fn wake(thread: &Thread, parked: &AtomicBool) {
    if parked.load(Ordering::SeqCst) {
        thread.unpark();
    }
}

fn claim(shared: &Shared, task: &(dyn Fn(usize) + Sync)) {
    let num_tasks = shared.num_tasks.load(Ordering::Relaxed);
    loop {
        let index = shared.next_task.fetch_add(1, Ordering::Relaxed);
        if index >= num_tasks {
            return;
        }
        task(index);
    }
}

fn work(shared: &Shared, parked: &AtomicBool) {
    let mut seen = 0;
    loop {
        seen = wait_for_next(shared, parked, seen);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        let slot = *shared.job.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(JobSlot(job)) = slot {
            // SAFETY: `run` published the job before the generation and waits for `workers_done`.
            let task = unsafe { &*job };
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| claim(shared, task)));
            if result.is_err() {
                shared.panicked.store(true, Ordering::Release);
            }
        }
        shared.workers_done.fetch_add(1, Ordering::AcqRel);
    }
}

/// Wait until the generation differs from `seen`; spin first, then park.
fn wait_for_next(shared: &Shared, parked: &AtomicBool, seen: usize) -> usize {
    let start = Instant::now();
    loop {
        for _ in 0..SPINS_PER_CLOCK_READ {
            let now = shared.generation.load(Ordering::SeqCst);
            if now != seen {
                return now;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            break;
        }
    }
    parked.store(true, Ordering::SeqCst);
    while shared.generation.load(Ordering::SeqCst) == seen {
        std::thread::park();
    }
    parked.store(false, Ordering::SeqCst);
    shared.generation.load(Ordering::SeqCst)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_every_job() {
        let pool = Pool::new(3);
        for num_tasks in [0, 1, 2, 7, 1000] {
            let counts: Vec<AtomicUsize> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(num_tasks, &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(2);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(8, &|_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 4 * 200 * 8);
    }

    #[test]
    fn a_panicking_task_panics_the_caller_and_leaves_the_pool_usable() {
        let pool = Pool::new(2);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(64, &|i| assert!(i != 63, "task 63"));
        }));
        assert!(result.is_err());
        let total = AtomicUsize::new(0);
        pool.run(8, &|_| {
            total.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(total.load(Ordering::Relaxed), 8);
    }
}
