//! A run that kills itself, or kills or stops one of its workers, at named points, for tests of resume and recovery.

// Sending a signal to oneself is a system call.
#![allow(unsafe_code, reason = "kill(2) on the own process and its children")]

use crate::env;
use crate::workers::Killer;
use std::sync::{Arc, Mutex, PoisonError};
use temper_controller::{Phase, PhaseObserver};

/// Who is to be disturbed.
enum Whom {
    /// The process itself is killed.
    Itself,
    /// This worker is killed.
    Worker(String),
    /// This worker is stopped.
    Stopped(String),
}

/// When somebody is disturbed.
struct Point {
    step: u64,
    phase: Phase,
    whom: Whom,
}

/// Kills or stops when the phase of a step begins, once at every point.
#[derive(Clone)]
pub struct KillAt {
    points: Arc<Mutex<Vec<Point>>>,
    killer: Option<Killer>,
}

impl KillAt {
    /// The points that the environment names; `killer` reaches the workers.
    ///
    /// # Errors
    /// A value that names no phase, or a worker where there are none.
    pub fn from_environment(killer: Option<Killer>) -> anyhow::Result<Option<Self>> {
        let Some(text) = env::read(env::KILL_AT) else { return Ok(None) };
        let expected = || {
            let what = "expected STEP:PHASE, such as 12:update, or STEP:PHASE:WORKER[:stop] of a run with workers";
            anyhow::anyhow!("{} = {text}: {what}", env::KILL_AT)
        };
        let point = |text: &str| {
            let fields: Vec<&str> = text.split(':').collect();
            let (step, phase, rest) = (fields.first()?, fields.get(1)?, fields.get(2..)?);
            let whom = match rest {
                [] => Whom::Itself,
                [worker] if killer.is_some() => Whom::Worker((*worker).to_owned()),
                [worker, "stop"] if killer.is_some() => Whom::Stopped((*worker).to_owned()),
                _ => return None,
            };
            let phase = Phase::ALL.into_iter().find(|known| known.name() == *phase)?;
            Some(Point { step: step.parse().ok()?, phase, whom })
        };
        let points: Option<Vec<Point>> = text.split(',').map(point).collect();
        Ok(Some(KillAt { points: Arc::new(Mutex::new(points.ok_or_else(expected)?)), killer }))
    }
}

impl PhaseObserver for KillAt {
    fn enter(&self, step: u64, phase: Phase) {
        let mut points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
        let (due, rest) = std::mem::take(&mut *points).into_iter().partition(|p| (p.step, p.phase) == (step, phase));
        *points = rest;
        for Point { whom, .. } in due {
            match (whom, &self.killer) {
                (Whom::Worker(worker), Some(killer)) => killer.kill(&worker),
                (Whom::Stopped(worker), Some(killer)) => killer.with_process(&worker, stop),
                // SAFETY: kill and getpid have no preconditions; the process ends here.
                _ => unsafe {
                    libc::kill(libc::getpid(), libc::SIGKILL);
                },
            }
        }
    }
}

fn stop(process_id: u32) {
    let Ok(process_id) = libc::pid_t::try_from(process_id) else { return };
    // SAFETY: kill has no preconditions; the process is a child that nobody has waited for, so that the number is its.
    let stopped = unsafe { libc::kill(process_id, libc::SIGSTOP) };
    assert_eq!(stopped, 0, "process {process_id} cannot be stopped");
}
