//! Changes of weights as an engine sees them: between two steps the version is another one.

use std::time::Duration;
use temper_types::PolicyVersion;

/// Counts changes of weights and the time that open samples waited for them.
#[derive(Debug, Default)]
pub(super) struct RefitClock {
    /// The version that the last step ran.
    pub version: Option<PolicyVersion>,
    /// Changes after the first version.
    pub num_refits: u64,
    /// Time between the last step under old weights and the first under new ones, while samples were open.
    pub pause_micros: u64,
    /// End of the last step, where it left samples open.
    waiting_since: Option<Duration>,
}

impl RefitClock {
    /// A step with these weights begins.
    pub fn begin_step(&mut self, version: PolicyVersion, now: Duration) {
        let old = self.version.replace(version);
        if old.is_some_and(|old| old != version) {
            self.num_refits += 1;
            let waited = self.waiting_since.map_or(Duration::ZERO, |since| now.saturating_sub(since));
            self.pause_micros += waited.as_micros() as u64;
        }
    }

    /// A step ended, with or without samples left open.
    pub fn end_step(&mut self, now: Duration, has_open: bool) {
        self.waiting_since = has_open.then_some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use temper_types::ContentHash;

    #[test]
    fn a_pause_is_what_open_samples_waited_for_new_weights() {
        let version = |number| PolicyVersion { number, hash: ContentHash([number as u8; 16]) };
        let at = Duration::from_micros;
        let mut clock = RefitClock::default();
        clock.begin_step(version(1), at(100));
        clock.end_step(at(110), true);
        clock.begin_step(version(1), at(150));
        assert_eq!((clock.num_refits, clock.pause_micros), (0, 0), "the same weights are no refit");
        clock.end_step(at(160), true);
        clock.begin_step(version(2), at(190));
        assert_eq!((clock.num_refits, clock.pause_micros), (1, 30));
        clock.end_step(at(200), false);
        clock.begin_step(version(3), at(900));
        assert_eq!((clock.num_refits, clock.pause_micros), (2, 30), "nobody waited");
    }
}
