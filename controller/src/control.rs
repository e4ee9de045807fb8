//! The run as others control it: status, events, and requests that take effect between two steps.
//!
//! The loop comes by before every step ([`RunControl::gate`]); nothing here interrupts a step, so that what a request
//! changes is a function of the step at which it takes effect.

use crate::control_journal::{Change, ControlJournal};
use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use temper_proto::{Changed, RunEvent, RunPhase, RunStatus, ServiceError, ServiceResult, Snapshot};
use temper_types::{ErrorCode, PolicyVersion};

/// Events that a watcher may lag behind.
const WATCH_QUEUE: usize = 512;

/// What the loop is to do before its next step.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Directive {
    /// Take the step, with these settings changed.
    Go(Vec<(String, f64)>),
    /// Write a checkpoint, answer by [`RunControl::answer_snapshot`], and ask again.
    Snapshot,
    /// End the run with a checkpoint.
    Drain,
}

/// A setting of the stage under way.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Setting {
    pub(crate) value: f64,
    /// How many steps later than others a change takes effect, because that many batches were drawn before it: where
    /// it comes before the next step, and where it comes while that one is under way.
    pub(crate) lead: (u64, u64),
}

impl From<f64> for Setting {
    fn from(value: f64) -> Self {
        Setting { value, lead: (0, 0) }
    }
}

/// The control of one run.
#[derive(Debug, Default)]
pub struct RunControl {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    status: RunStatus,
    wants_pause: bool,
    wants_drain: bool,
    has_ended: bool,
    /// Settings of the stage under way that can be changed, with their values.
    settings: BTreeMap<String, Setting>,
    changes: Vec<(String, f64)>,
    /// The step before which a change that comes now takes effect.
    next_step: u64,
    journal: Option<ControlJournal>,
    /// Changes of before the run was resumed, in their order.
    replay: VecDeque<Change>,
    snapshots_asked: u64,
    snapshots_answered: u64,
    last_snapshot: Option<Snapshot>,
    watchers: Vec<SyncSender<RunEvent>>,
}

impl RunControl {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the run stands.
    pub fn status(&self) -> RunStatus {
        self.lock().status.clone()
    }

    /// Events from now on. A receiver that lags too far is dropped.
    pub fn watch(&self) -> Receiver<RunEvent> {
        let (sender, receiver) = sync_channel(WATCH_QUEUE);
        self.lock().watchers.push(sender);
        receiver
    }

    /// Wait before the next step; returns when the step under way is done.
    ///
    /// # Errors
    /// `DeadlineExceeded` where that takes longer than `timeout`: the run will pause all the same.
    pub fn pause(&self, timeout: Duration) -> ServiceResult<RunStatus> {
        self.lock().wants_pause = true;
        self.changed.notify_all();
        self.wait("pause", timeout, |inner| {
            (inner.has_ended || inner.status.state == RunPhase::Paused).then(|| Ok(inner.status.clone()))
        })
    }

    /// Go on.
    pub fn resume(&self) -> RunStatus {
        let mut inner = self.lock();
        inner.wants_pause = false;
        if inner.status.state == RunPhase::Paused {
            inner.status.state = RunPhase::Running;
        }
        self.changed.notify_all();
        inner.status.clone()
    }

    /// End the run after the step under way, with a checkpoint.
    pub fn drain(&self) -> RunStatus {
        let mut inner = self.lock();
        inner.wants_drain = true;
        if !inner.has_ended {
            inner.status.state = RunPhase::Draining;
        }
        self.changed.notify_all();
        inner.status.clone()
    }

    /// Write a checkpoint after the step under way, or now where the run is paused.
    ///
    /// # Errors
    /// `DeadlineExceeded` where that takes longer than `timeout`, `Cancelled` where the run has ended.
    pub fn snapshot(&self, timeout: Duration) -> ServiceResult<Snapshot> {
        let asked = {
            let mut inner = self.lock();
            inner.snapshots_asked += 1;
            inner.snapshots_asked
        };
        self.changed.notify_all();
        self.wait("snapshot", timeout, |inner| {
            if inner.snapshots_answered >= asked {
                return inner.last_snapshot.clone().map(Ok);
            }
            inner.has_ended.then(|| Err(error(ErrorCode::Cancelled, "snapshot", "the run has ended")))
        })
    }

    /// Change a setting of the stage under way from its next step on; one that decides how samples are drawn, from the
    /// next batch on that is not drawn yet. The answer says which step that is.
    ///
    /// # Errors
    /// `InvalidArgument` for a key that cannot be changed in this stage, or a value out of range; `Unavailable` where
    /// the change cannot be made durable, and is not made.
    pub fn set(&self, key: &str, value: f64) -> ServiceResult<Changed> {
        let mut inner = self.lock();
        let Some(setting) = inner.settings.get(key).copied() else {
            let known: Vec<&str> = inner.settings.keys().map(String::as_str).collect();
            let message = match &known[..] {
                [] => format!("`{key}` cannot be changed: no step has begun, or the run has ended"),
                known => format!("`{key}` cannot be changed in this stage; what can: {}", known.join(", ")),
            };
            return Err(error(ErrorCode::InvalidArgument, "set", message));
        };
        if !(value.is_finite() && value >= 0.0) {
            return Err(error(ErrorCode::InvalidArgument, "set", format!("{key} = {value}: expected 0 or more")));
        }
        let change = Change { step: inner.next_step, key: key.to_owned(), value };
        if let Some(Err(problem)) = inner.journal.as_ref().map(|journal| journal.append(&change)) {
            return Err(error(ErrorCode::Unavailable, "set", format!("the change cannot be stored: {problem}")));
        }
        let is_in_step = change.step > inner.status.step + 1;
        let from_step = change.step + if is_in_step { setting.lead.1 } else { setting.lead.0 };
        inner.settings.insert(change.key.clone(), Setting { value, ..setting });
        inner.changes.push((change.key, value));
        Ok(Changed { previous: setting.value, from_step })
    }

    fn wait<T>(
        &self,
        operation: &'static str,
        timeout: Duration,
        done: impl Fn(&Inner) -> Option<ServiceResult<T>>,
    ) -> ServiceResult<T> {
        let deadline = Instant::now() + timeout;
        let mut inner = self.lock();
        loop {
            if let Some(result) = done(&inner) {
                return result;
            }
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                let message = format!("the step under way did not end within {timeout:?}");
                return Err(error(ErrorCode::DeadlineExceeded, operation, message));
            }
            inner = self.changed.wait_timeout(inner, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The loop's side: wait here while the run is paused, and hear what to do. `is_stopping` is asked now and then.
    pub(crate) fn gate(&self, settings: BTreeMap<String, Setting>, is_stopping: impl Fn() -> bool) -> Directive {
        const TICK: Duration = Duration::from_millis(100);
        let mut inner = self.lock();
        inner.next_step = inner.status.step + 1;
        inner.take_due();
        let pending: Vec<(String, f64)> = inner.changes.clone();
        inner.settings = settings;
        for (key, value) in pending {
            inner.settings.entry(key).or_default().value = value;
        }
        loop {
            if inner.snapshots_asked > inner.snapshots_answered {
                return Directive::Snapshot;
            }
            if inner.wants_drain {
                return Directive::Drain;
            }
            if !inner.wants_pause || is_stopping() {
                inner.status.state = RunPhase::Running;
                inner.next_step += 1;
                return Directive::Go(std::mem::take(&mut inner.changes));
            }
            if inner.status.state != RunPhase::Paused {
                inner.status.state = RunPhase::Paused;
                self.changed.notify_all();
            }
            inner = self.changed.wait_timeout(inner, TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The loop's side: true where the run is to end after the step under way.
    pub(crate) fn wants_drain(&self) -> bool {
        self.lock().wants_drain
    }

    /// The loop's side: a checkpoint was written for whoever asked so far.
    pub(crate) fn answer_snapshot(&self, snapshot: Snapshot) {
        let mut inner = self.lock();
        inner.snapshots_answered = inner.snapshots_asked;
        inner.last_snapshot = Some(snapshot);
        self.changed.notify_all();
    }

    /// The loop's side: keep changes in `journal`, and make those that stand there before their steps.
    pub(crate) fn keep(&self, (journal, changes): (ControlJournal, Vec<Change>)) {
        let mut inner = self.lock();
        inner.journal = Some(journal);
        inner.replay = changes.into();
    }

    /// The loop's side: the state after `step` is there; it holds the changes before.
    pub(crate) fn resume_after(&self, step: u64) {
        self.lock().replay.retain(|change| change.step > step);
    }

    /// The loop's side: names that do not change.
    pub(crate) fn begin(&self, run: &str, num_steps: u64) {
        let mut inner = self.lock();
        run.clone_into(&mut inner.status.run);
        inner.status.num_steps = num_steps;
    }

    /// The loop's side: where it is.
    pub(crate) fn at(&self, stage: &str, step: u64, version: PolicyVersion) {
        let mut inner = self.lock();
        stage.clone_into(&mut inner.status.stage);
        (inner.status.step, inner.status.version) = (step, version);
    }

    /// The loop's side: a phase begins.
    pub(crate) fn enter(&self, phase: &'static str) {
        phase.clone_into(&mut self.lock().status.phase);
    }

    /// The loop's side: something happened.
    pub(crate) fn publish(&self, name: &str, json: String) {
        let mut inner = self.lock();
        if name == "metrics" {
            inner.status.metrics_json.clone_from(&json);
        }
        let event = RunEvent { name: name.to_owned(), json };
        inner.watchers.retain(|watcher| {
            !matches!(watcher.try_send(event.clone()), Err(TrySendError::Disconnected(_) | TrySendError::Full(_)))
        });
    }

    /// The loop's side: the run is over; `error` is empty where it did not fail.
    pub(crate) fn end(&self, error: &str) {
        let mut inner = self.lock();
        inner.has_ended = true;
        inner.settings.clear();
        inner.status.state = if error.is_empty() { RunPhase::Completed } else { RunPhase::Failed };
        error.clone_into(&mut inner.status.error);
        inner.watchers.clear();
        self.changed.notify_all();
    }
}

impl Inner {
    /// Changes of before that are due at this gate come before those of now.
    fn take_due(&mut self) {
        let mut index = 0;
        while let Some(change) = self.replay.pop_front_if(|change| change.step <= self.next_step) {
            self.changes.insert(index, (change.key, change.value));
            index += 1;
        }
    }
}

fn error(code: ErrorCode, operation: &'static str, message: impl std::fmt::Display) -> ServiceError {
    ServiceError::new(code, "controller", operation, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    const SOON: Duration = Duration::from_secs(30);

    fn settings() -> BTreeMap<String, Setting> {
        let temperature = Setting { value: 1.0, lead: (1, 2) };
        [("learning_rate".to_owned(), 0.5.into()), ("temperature".to_owned(), temperature)].into_iter().collect()
    }

    #[test]
    fn what_decides_how_samples_are_drawn_reaches_the_next_batch_that_is_not_drawn() {
        let control = RunControl::default();
        assert_eq!(control.gate(settings(), || false), Directive::Go(vec![]));
        let changed = control.set("temperature", 0.5).unwrap();
        assert_eq!(
            changed,
            Changed { previous: 1.0, from_step: 4 },
            "step 1 is under way, 2 and 3 are drawn by its end"
        );
        control.at("grpo", 1, PolicyVersion::default());
        assert_eq!(control.set("temperature", 0.6).unwrap(), Changed { previous: 0.5, from_step: 3 });
        assert_eq!(control.set("learning_rate", 0.1).unwrap().from_step, 2);
    }

    #[test]
    fn a_change_takes_effect_at_the_next_gate_and_says_when() {
        let control = RunControl::default();
        assert_eq!(control.set("learning_rate", 0.1).unwrap_err().code, ErrorCode::InvalidArgument);
        assert_eq!(control.gate(settings(), || false), Directive::Go(vec![]));
        let changed = control.set("learning_rate", 0.1).unwrap();
        assert_eq!(changed, Changed { previous: 0.5, from_step: 2 }, "step 1 is under way");
        assert_eq!(control.set("learning_rate", 0.2).unwrap().previous, 0.1);
        let unknown = control.set("clip", 0.1).unwrap_err();
        assert!(unknown.message.contains("what can: learning_rate"), "{unknown}");
        assert_eq!(control.set("learning_rate", f64::NAN).unwrap_err().code, ErrorCode::InvalidArgument);
        control.at("grpo", 1, PolicyVersion::default());
        let both = vec![("learning_rate".to_owned(), 0.1), ("learning_rate".to_owned(), 0.2)];
        assert_eq!(control.gate(settings(), || false), Directive::Go(both));
    }

    #[test]
    fn a_pause_ends_at_the_gate_and_a_snapshot_is_answered_there() {
        let control = Arc::new(RunControl::default());
        let loop_side = Arc::clone(&control);
        control.lock().wants_pause = true;
        let thread = std::thread::spawn(move || {
            let mut snapshots = 0;
            loop {
                match loop_side.gate(settings(), || false) {
                    Directive::Snapshot => {
                        snapshots += 1;
                        loop_side.answer_snapshot(Snapshot { path: "p".to_owned(), step: 4 });
                    }
                    other => return (other, snapshots),
                }
            }
        });
        assert_eq!(control.pause(SOON).unwrap().state, RunPhase::Paused);
        assert_eq!(control.snapshot(SOON).unwrap().step, 4);
        assert_eq!(control.resume().state, RunPhase::Running);
        assert_eq!(thread.join().unwrap(), (Directive::Go(vec![]), 1));
    }

    #[test]
    fn a_drain_wins_over_a_pause_and_the_end_answers_everybody() {
        let control = RunControl::default();
        control.lock().wants_pause = true;
        assert_eq!(control.drain().state, RunPhase::Draining);
        assert_eq!(control.gate(settings(), || false), Directive::Drain);
        let events = control.watch();
        control.publish("metrics", "{}".to_owned());
        control.end("");
        assert_eq!(events.iter().count(), 1, "the stream ends with the run");
        assert_eq!(control.pause(SOON).unwrap().state, RunPhase::Completed);
        assert_eq!(control.snapshot(SOON).unwrap_err().code, ErrorCode::Cancelled);
    }

    #[test]
    fn a_watcher_that_lags_too_far_is_dropped_and_holds_nobody_up() {
        let control = RunControl::default();
        let events = control.watch();
        (0..WATCH_QUEUE + 10).for_each(|i| control.publish("event", i.to_string()));
        assert_eq!(events.iter().count(), WATCH_QUEUE);
    }
}
