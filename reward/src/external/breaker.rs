//! Stopping a run whose reward is broken: too many failed samples among the last ones.

use super::config::BreakerConfig;
use std::collections::VecDeque;

/// Causes that a message repeats.
const KEPT_CAUSES: usize = 3;

/// Looks back on the last samples, in the order of the requests.
#[derive(Debug)]
pub(crate) struct Breaker {
    config: BreakerConfig,
    failed: VecDeque<bool>,
    causes: VecDeque<String>,
}

impl Breaker {
    pub(crate) fn new(config: BreakerConfig) -> Self {
        Breaker { config, failed: VecDeque::new(), causes: VecDeque::new() }
    }

    /// Take in one sample: the cause where it failed. Gives the words to stop with once more samples of the window
    /// have failed than may.
    pub(crate) fn record(&mut self, cause: Option<&str>) -> Result<(), String> {
        if self.failed.len() == self.config.error_window {
            self.failed.pop_front();
        }
        self.failed.push_back(cause.is_some());
        let Some(cause) = cause else { return Ok(()) };
        if !self.causes.iter().any(|known| known == cause) {
            if self.causes.len() == KEPT_CAUSES {
                self.causes.pop_front();
            }
            self.causes.push_back(cause.to_owned());
        }
        let BreakerConfig { max_error_rate, error_window } = self.config;
        let num_failed = self.failed.iter().filter(|failed| **failed).count();
        if num_failed as f64 <= max_error_rate * error_window as f64 {
            return Ok(());
        }
        let (seen, percent) = (self.failed.len(), 100.0 * num_failed as f64 / self.failed.len() as f64);
        let causes = self.causes.iter().map(String::as_str).collect::<Vec<_>>().join("; ");
        Err(format!(
            "{num_failed} of the last {seen} samples failed ({percent:.0} %): more than max_error_rate = \
             {max_error_rate} of error_window = {error_window} allows; last causes: {causes}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn breaker(max_error_rate: f64, error_window: usize) -> Breaker {
        Breaker::new(BreakerConfig { max_error_rate, error_window })
    }

    #[test]
    fn it_trips_at_the_first_failure_too_many() {
        let mut breaker = breaker(0.5, 4);
        let outcomes = [None, Some("a"), Some("b")].map(|cause| breaker.record(cause));
        assert!(outcomes.iter().all(Result::is_ok));
        let error = breaker.record(Some("a")).expect_err("3 of 4");
        assert!(
            error.contains("3 of the last 4") && error.contains("75 %") && error.ends_with("causes: a; b"),
            "{error}"
        );
    }

    #[test]
    fn old_samples_are_forgotten() {
        let mut breaker = breaker(0.5, 4);
        for round in 0..100 {
            let outcome = breaker.record((round % 2 == 0).then_some("even"));
            assert_eq!(outcome, Ok(()), "half of the samples may fail");
        }
    }

    #[test]
    fn zero_stops_at_once_and_one_never() {
        assert!(breaker(0.0, 8).record(Some("x")).is_err());
        let mut never = breaker(1.0, 8);
        assert!((0..100).all(|_| never.record(Some("x")).is_ok()));
    }
}
