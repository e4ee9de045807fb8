//! A rollout service whose weights are trained elsewhere: the driver of [`crate::refit`].

use crate::refit::{Refit, RefitAction, RefitEvent};
use crate::weight_receiver::WeightReceiver;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use temper_proto::{GroupRequest, GroupResult, RolloutService, RolloutStats, ServiceResult};
use temper_types::{ErrorCode, PolicyVersion};

/// An engine that can compute what it has in hand to the end.
pub trait Drain: RolloutService {
    /// Compute open groups to their ends; their results stay to be taken.
    ///
    /// # Errors
    /// Where the engine fails.
    fn drain(&self) -> ServiceResult<()>;
}

/// A rollout service that receives its weights from a trainer. It changes them only when no group is open: a group that
/// it admitted is computed to its end under the weights that it began with.
pub struct SyncedRolloutService<S> {
    engine: S,
    receiver: WeightReceiver,
    refit: Mutex<Refit>,
    /// Held while weights change: one change at a time.
    changing: Mutex<()>,
    refit_micros: AtomicU64,
}

impl<S: Drain> SyncedRolloutService<S> {
    /// `engine` generates with the policy that `receiver` fills.
    pub fn new(engine: S, receiver: WeightReceiver) -> Self {
        let refit = Mutex::new(Refit::Serving(receiver.version()));
        SyncedRolloutService { engine, receiver, refit, changing: Mutex::default(), refit_micros: AtomicU64::new(0) }
    }

    /// A state is replaced as a whole, so that a panic elsewhere leaves one.
    fn refit(&self) -> MutexGuard<'_, Refit> {
        self.refit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn advance(&self, event: RefitEvent) -> Vec<RefitAction> {
        let mut refit = self.refit();
        let (next, actions) = refit.step(event);
        *refit = next;
        actions
    }

    /// Do what an action says; gives what came of it, where something can.
    fn perform(&self, action: RefitAction, outcome: &mut ServiceResult<()>) -> Option<RefitEvent> {
        let begin = Instant::now();
        let mut told = |done: ServiceResult<RefitEvent>| {
            Some(done.unwrap_or_else(|error| {
                *outcome = Err(error);
                RefitEvent::Failed
            }))
        };
        let event = match action {
            // Admission follows the state.
            RefitAction::Pause | RefitAction::Resume => return None,
            RefitAction::Drain => return told(self.engine.drain().map(|()| RefitEvent::Drained)),
            RefitAction::Fetch(wanted) => match self.receiver.fetch(wanted) {
                Ok(found) if found == wanted => {
                    told(self.receiver.hand_out(wanted).map(|()| RefitEvent::Attested(found)))
                }
                Ok(found) => {
                    *outcome = self.receiver.check(wanted, found);
                    Some(RefitEvent::Attested(found))
                }
                Err(error) => told(Err(error)),
            },
            RefitAction::Bump(version) => {
                self.receiver.serve(version);
                None
            }
        };
        self.refit_micros.fetch_add(begin.elapsed().as_micros() as u64, Ordering::Relaxed);
        event
    }
}

impl<S: Drain> RolloutService for SyncedRolloutService<S> {
    /// Refused as `Unavailable` while weights change.
    fn submit(&self, groups: Vec<GroupRequest>) -> ServiceResult<()> {
        // Held until the groups are in: weights cannot begin to change in between.
        let refit = self.refit();
        if !refit.admits() {
            let message = format!("no group is admitted: version {} gives way to another", refit.served());
            return Err(self.receiver.error(ErrorCode::Unavailable, "submit", message));
        }
        self.engine.submit(groups)
    }

    fn next_group(&self, timeout: Duration) -> ServiceResult<Option<GroupResult>> {
        self.engine.next_group(timeout)
    }

    fn abort_all(&self) -> ServiceResult<usize> {
        self.engine.abort_all()
    }

    /// Computes open groups to their ends first.
    fn set_version(&self, version: PolicyVersion) -> ServiceResult<()> {
        let _one_change = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut outcome = Ok(());
        let mut events = VecDeque::from([RefitEvent::Publish(version)]);
        while let Some(event) = events.pop_front() {
            for action in self.advance(event) {
                events.extend(self.perform(action, &mut outcome));
            }
        }
        outcome.and_then(|()| self.engine.set_version(version))
    }

    fn sleep(&self) -> ServiceResult<u64> {
        self.engine.sleep()
    }

    fn stats(&self) -> RolloutStats {
        let bytes = self.receiver.bytes();
        RolloutStats {
            refit_micros: self.refit_micros.load(Ordering::Relaxed),
            shared_weight_bytes: bytes.shared,
            streamed_weight_bytes: bytes.streamed,
            ..self.engine.stats()
        }
    }
}

#[cfg(test)]
mod tests;
