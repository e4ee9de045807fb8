//! Whether the processes below this one are within their limits. What one process may do at most is kept by the
//! kernel; what they do together, and for one sample, is measured here.
//!
//! The kernel's own limit of CPU time counts over the life of a process, and a worker lives for many samples: it would
//! kill healthy ones. So CPU time is measured, against what was used when the sample began.

use super::config::ProcessLimits;
use super::proc_tree::{self, Usage};
use std::time::{Duration, Instant};

/// So many new threads in the system make the next look come at once.
const SUSPICIOUS_TASKS: u64 = 16;

/// Measures from one sample's begin on.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Longest time between two looks at the process table.
    interval: Duration,
    last_look: Instant,
    last_num_tasks: u64,
    /// CPU time at the first look: a sample that ends before it costs no look at all.
    first_ticks: Option<u64>,
}

impl Watch {
    pub(crate) fn new(interval: Duration) -> Self {
        Watch { interval, last_look: Instant::now(), last_num_tasks: proc_tree::num_tasks(), first_ticks: None }
    }

    /// The limit that is passed, in words. Cheap unless it is time for a look.
    pub(crate) fn check(&mut self, limits: &ProcessLimits) -> Result<(), String> {
        let num_tasks = proc_tree::num_tasks();
        let suspicious = num_tasks > self.last_num_tasks + SUSPICIOUS_TASKS;
        if self.first_ticks.is_some() && !suspicious && self.last_look.elapsed() < self.interval {
            return Ok(());
        }
        (self.last_look, self.last_num_tasks) = (Instant::now(), num_tasks);
        let usage = proc_tree::usage_below_me();
        let first = *self.first_ticks.get_or_insert(usage.cpu_ticks);
        judge(limits, &usage, usage.cpu_ticks.saturating_sub(first))
    }
}

fn judge(limits: &ProcessLimits, usage: &Usage, ticks: u64) -> Result<(), String> {
    let num = usage.num_processes;
    if num > u64::from(limits.max_processes) {
        return Err(format!("had {num} processes: more than max_processes = {}", limits.max_processes));
    }
    let megabytes = usage.resident_pages * rustix::param::page_size() as u64 / (1 << 20);
    if megabytes > limits.memory_mb {
        return Err(format!("held {megabytes} MB in {num} processes: more than memory_mb = {}", limits.memory_mb));
    }
    let seconds = ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
    if seconds > limits.cpu_seconds {
        return Err(format!("took {seconds:.2} s of CPU time: more than cpu_seconds = {}", limits.cpu_seconds));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_is_kept_and_named() {
        let limits = ProcessLimits { cpu_seconds: 2.0, memory_mb: 16, max_processes: 3, ..ProcessLimits::default() };
        let ticks = rustix::param::clock_ticks_per_second();
        let page = rustix::param::page_size() as u64;
        let usage = |num_processes, megabytes: u64| Usage {
            num_processes,
            cpu_ticks: 0,
            resident_pages: megabytes * (1 << 20) / page,
        };
        assert_eq!(judge(&limits, &usage(3, 16), 2 * ticks), Ok(()));
        for (usage, ticks, part) in [
            (usage(4, 0), 0, "max_processes = 3"),
            (usage(1, 17), 0, "17 MB in 1 processes: more than memory_mb = 16"),
            (usage(1, 0), 2 * ticks + 1, "cpu_seconds = 2"),
        ] {
            let error = judge(&limits, &usage, ticks).expect_err(part);
            assert!(error.contains(part), "{error}");
        }
    }
}
