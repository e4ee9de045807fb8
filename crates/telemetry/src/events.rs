//! `events.jsonl`: what happened, when.

use crate::lines::LineFile;
use crate::{Clock, Error, rfc3339};
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::Arc;

/// The log of a run's events. Shared by reference: a line is one write.
pub struct EventLog {
    lines: LineFile,
    clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for EventLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLog").field("path", &self.lines.path()).finish_non_exhaustive()
    }
}

impl EventLog {
    /// Open the log at `path` for appending, creating it where it is missing.
    ///
    /// # Errors
    /// Names the file.
    pub fn open(path: &Path, clock: Arc<dyn Clock>) -> Result<Self, Error> {
        Ok(EventLog { lines: LineFile::open(path)?, clock })
    }

    /// Append `{"time": ..., "event": event, fields...}` with the fields in the given order.
    ///
    /// # Errors
    /// Names the file.
    ///
    /// # Panics
    /// If a field is named `time` or `event`.
    pub fn record(&self, event: &str, fields: &[(&str, Value)]) -> Result<(), Error> {
        let mut object = Map::new();
        object.insert("time".to_owned(), rfc3339(self.clock.unix_ms()).into());
        object.insert("event".to_owned(), event.into());
        for (name, value) in fields {
            assert!(!matches!(*name, "time" | "event"), "an event's field must not be named `{name}`");
            object.insert((*name).to_owned(), value.clone());
        }
        self.lines.append(&object)
    }

    /// Make everything recorded so far durable.
    ///
    /// # Errors
    /// Names the file.
    pub fn sync(&self) -> Result<(), Error> {
        self.lines.sync()
    }

    /// Make the log durable and close it.
    ///
    /// # Errors
    /// Names the file.
    pub fn close(self) -> Result<(), Error> {
        self.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ManualClock;

    #[test]
    fn events_are_appended_with_the_injected_time() {
        let dir = tempfile::tempdir().expect("the system gives a temporary directory");
        let path = dir.path().join("events.jsonl");
        let clock = Arc::new(ManualClock::new(0));
        let log = EventLog::open(&path, clock.clone()).expect("writable");
        log.record("started", &[("seed", 7.into()), ("name", "a".into())]).expect("writable");
        log.close().expect("writable");
        clock.advance(1500);
        let log = EventLog::open(&path, clock).expect("writable");
        log.record("resumed", &[]).expect("writable");
        let expected = "{\"time\":\"1970-01-01T00:00:00.000Z\",\"event\":\"started\",\"seed\":7,\"name\":\"a\"}\n\
             {\"time\":\"1970-01-01T00:00:01.500Z\",\"event\":\"resumed\"}\n";
        assert_eq!(std::fs::read_to_string(&path).expect("there"), expected);
    }

    #[test]
    fn a_torn_last_line_is_cut_before_the_next_event() {
        let dir = tempfile::tempdir().expect("the system gives a temporary directory");
        let path = dir.path().join("events.jsonl");
        std::fs::write(&path, "{\"event\":\"a\"}\n{\"eve").expect("writable");
        let log = EventLog::open(&path, Arc::new(ManualClock::new(0))).expect("writable");
        log.record("b", &[]).expect("writable");
        let text = std::fs::read_to_string(&path).expect("there");
        assert_eq!(text, "{\"event\":\"a\"}\n{\"time\":\"1970-01-01T00:00:00.000Z\",\"event\":\"b\"}\n");
    }

    #[test]
    fn a_directory_that_is_missing_is_named() {
        let error =
            EventLog::open(Path::new("no/such/events.jsonl"), Arc::new(ManualClock::new(0))).expect_err("no dir");
        assert!(error.to_string().starts_with("cannot open no/such/events.jsonl: "), "{error}");
    }
}
