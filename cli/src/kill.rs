//! A run that kills itself at a named point, for tests of resume.

// Sending a signal to oneself is a system call.
#![allow(unsafe_code, reason = "kill(2) on the own process")]

use crate::env;
use temper_controller::{Phase, PhaseObserver};

/// Dies when the phase of the step begins.
pub struct KillAt {
    step: u64,
    phase: Phase,
}

impl KillAt {
    /// The point that the environment names.
    ///
    /// # Errors
    /// A value that names no phase.
    pub fn from_environment() -> anyhow::Result<Option<Self>> {
        let Some(text) = env::read(env::KILL_AT) else { return Ok(None) };
        let expected = || anyhow::anyhow!("{} = {text}: expected STEP:PHASE, such as 12:update", env::KILL_AT);
        let (step, name) = text.split_once(':').ok_or_else(expected)?;
        let phase = Phase::ALL.into_iter().find(|p| p.name() == name).ok_or_else(expected)?;
        Ok(Some(KillAt { step: step.parse().map_err(|_| expected())?, phase }))
    }
}

impl PhaseObserver for KillAt {
    fn enter(&self, step: u64, phase: Phase) {
        if (step, phase) == (self.step, self.phase) {
            // SAFETY: kill and getpid have no preconditions; the process ends here.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
    }
}
