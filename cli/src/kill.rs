//! A run that kills itself or one of its workers at named points, for tests of resume and recovery.

// Sending a signal to oneself is a system call.
#![allow(unsafe_code, reason = "kill(2) on the own process")]

use crate::env;
use crate::workers::Killer;
use std::sync::{Arc, Mutex, PoisonError};
use temper_controller::{Phase, PhaseObserver};

/// When somebody dies.
struct Point {
    step: u64,
    phase: Phase,
    /// A worker, or the process itself.
    worker: Option<String>,
}

/// Kills when the phase of a step begins, once at every point.
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
            let what = "expected STEP:PHASE, such as 12:update, or STEP:PHASE:WORKER of a run with workers";
            anyhow::anyhow!("{} = {text}: {what}", env::KILL_AT)
        };
        let point = |text: &str| {
            let mut fields = text.splitn(3, ':');
            let step = fields.next()?.parse().ok()?;
            let name = fields.next()?;
            let phase = Phase::ALL.into_iter().find(|phase| phase.name() == name)?;
            let worker = fields.next().map(str::to_owned);
            (worker.is_none() || killer.is_some()).then_some(Point { step, phase, worker })
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
        for Point { worker, .. } in due {
            match (worker, &self.killer) {
                (Some(worker), Some(killer)) => killer.kill(&worker),
                // SAFETY: kill and getpid have no preconditions; the process ends here.
                _ => unsafe {
                    libc::kill(libc::getpid(), libc::SIGKILL);
                },
            }
        }
    }
}
