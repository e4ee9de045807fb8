//! `control.jsonl`: settings that were changed while the run goes on, each with the step before which it takes effect.
//!
//! Owns: the file. A line is durable before whoever asked is answered, so that a run that is killed and resumed from an
//! earlier checkpoint changes the same settings before the same steps, and equals the one that was not killed.

use crate::{Clock, Error};
use serde::Deserialize;
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use temper_telemetry::EventLog;

/// A changed setting.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Change {
    /// The step before which it takes effect.
    pub(crate) step: u64,
    pub(crate) key: String,
    pub(crate) value: f64,
}

/// A line of the file; numbers as text, in the shortest decimals that give the same bits back.
#[derive(Deserialize)]
struct Line {
    step: u64,
    key: String,
    value: String,
}

impl Line {
    fn change(self) -> Option<Change> {
        let value = self.value.parse().ok()?;
        Some(Change { step: self.step, key: self.key, value })
    }
}

/// The open file.
#[derive(Debug)]
pub(crate) struct ControlJournal(EventLog);

impl ControlJournal {
    /// Open `path` for appending, and read the changes that it holds, in the order of their steps. A last line that a
    /// crash left without its end was never answered: it is cut.
    ///
    /// # Errors
    /// A file that cannot be read or written, or a whole line that holds no change: names file and line.
    pub(crate) fn open(path: &Path, clock: &Arc<dyn Clock>) -> Result<(Self, Vec<Change>), Error> {
        let log = EventLog::open(path, Arc::new(crate::record::EventClock(Arc::clone(clock))))?;
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let change = |(index, line): (usize, &str)| {
            let read = serde_json::from_str::<Line>(line).ok().and_then(Line::change);
            read.ok_or_else(|| Error::RunDir {
                path: path.to_path_buf(),
                problem: format!("line {}: expected a changed setting (step, key, value), got `{line}`", index + 1),
            })
        };
        let mut changes = text.lines().enumerate().map(change).collect::<Result<Vec<_>, _>>()?;
        // A run that went back may have been changed again before a step for which a change stands already.
        changes.sort_by_key(|change| change.step);
        Ok((ControlJournal(log), changes))
    }

    /// Make a change durable.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub(crate) fn append(&self, change: &Change) -> Result<(), Error> {
        let fields =
            [("step", json!(change.step)), ("key", json!(change.key)), ("value", json!(change.value.to_string()))];
        self.0.record("set", &fields)?;
        Ok(self.0.sync()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SystemClock;

    fn change(step: u64, value: f64) -> Change {
        Change { step, key: "learning_rate".to_owned(), value }
    }

    #[test]
    fn what_was_answered_comes_back_to_the_bit_and_a_torn_line_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.jsonl");
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
        let (journal, before) = ControlJournal::open(&path, &clock).unwrap();
        assert_eq!(before, []);
        let all = [change(3, 0.1 + 0.2), change(7, f64::MIN_POSITIVE)];
        all.iter().for_each(|c| journal.append(c).unwrap());
        let whole = std::fs::read(&path).unwrap();
        for torn in [&b"{\"step\": 9, \"key\""[..], b"{\"step\":9,\"key\":\"temperature\",\"value\":\"1\"}"] {
            std::fs::write(&path, [&whole, torn].concat()).unwrap();
            let (journal, read) = ControlJournal::open(&path, &clock).unwrap();
            assert_eq!(read, all);
            drop(journal);
            assert_eq!(std::fs::read(&path).unwrap(), whole, "the torn line is cut");
        }
        std::fs::write(&path, [&whole[..], b"{\"step\": 9}\n"].concat()).unwrap();
        let error = ControlJournal::open(&path, &clock).unwrap_err().to_string();
        assert!(error.contains("control.jsonl") && error.contains("line 3"), "{error}");
    }
}
