//! Scoring beside generation: a group is scored as soon as its last sample ends.
//!
//! Owns: the calls of the reward service for one batch, and the threads that wait for them. Knows nothing of what a
//! group is for or of what an outcome means.
//!
//! consumes: groups in the order in which they end, each with its place in the batch
//! produces: outcomes by place, whatever order they come in
//! waits for: one of `max_calls` calls to end, where as many are under way
//! is unblocked by: the outcomes of the last group, or the first call that fails

use crate::Clock;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::Duration;
use temper_proto::{RewardService, ScoreRequest, ServiceError, ServiceResult};
use temper_types::{ErrorCode, RewardOutcome};

/// When responses are scored. Never changes a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// All together, once the last group is generated: the scorer computes where the engine does.
    AfterGeneration,
    /// Each group as its last sample ends, while the others are generated.
    AsGroupsEnd {
        /// Most calls under way at once. Groups that end meanwhile wait, and go together.
        max_calls: usize,
    },
}

impl Default for Scoring {
    fn default() -> Self {
        Scoring::AsGroupsEnd { max_calls: 1 }
    }
}

/// Outcomes of one group.
#[derive(Debug, PartialEq)]
pub(crate) struct Scored {
    /// In the order of its requests.
    pub(crate) outcomes: Vec<RewardOutcome>,
    /// Seconds of the call, by response.
    pub(crate) seconds_each: f64,
}

/// A group that waits for a call.
struct Waiting {
    place: usize,
    requests: Vec<ScoreRequest>,
}

#[derive(Default)]
struct State {
    /// In the order in which they ended.
    waiting: Vec<Waiting>,
    scored: BTreeMap<usize, Scored>,
    num_threads: usize,
    num_calls: usize,
    /// Groups that were pushed.
    num_pushed: usize,
    /// No group comes any more; threads end.
    is_closed: bool,
    failure: Option<ServiceError>,
    /// When the calls under way began, and time with a call under way before that.
    busy_since: Option<Duration>,
    busy: Duration,
}

/// The calls of one batch.
pub(crate) struct ScoreLine {
    reward: Arc<dyn RewardService>,
    clock: Arc<dyn Clock>,
    scoring: Scoring,
    state: Mutex<State>,
    changed: Condvar,
}

/// Ends the threads of a line when it is dropped, however the batch ended.
pub(crate) struct Closing<'a>(&'a ScoreLine);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.lock().is_closed = true;
        self.0.changed.notify_all();
    }
}

impl ScoreLine {
    pub(crate) fn new(reward: Arc<dyn RewardService>, clock: Arc<dyn Clock>, scoring: Scoring) -> Self {
        ScoreLine { reward, clock, scoring, state: Mutex::default(), changed: Condvar::new() }
    }

    /// What every scope that pushes has to hold: its threads wait for groups until it is dropped.
    pub(crate) fn closing(&self) -> Closing<'_> {
        Closing(self)
    }

    /// A group ended: score it as soon as may be.
    ///
    /// # Errors
    /// Where an earlier call failed: nothing is called after that.
    pub(crate) fn push<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        place: usize,
        requests: Vec<ScoreRequest>,
    ) -> ServiceResult<()> {
        let mut state = self.lock();
        if let Some(error) = &state.failure {
            return Err(error.clone());
        }
        state.waiting.push(Waiting { place, requests });
        state.num_pushed += 1;
        let Scoring::AsGroupsEnd { max_calls } = self.scoring else { return Ok(()) };
        let num_idle = state.num_threads - state.num_calls;
        if state.waiting.len() > num_idle && state.num_threads < max_calls.max(1) {
            state.num_threads += 1;
            let thread = std::thread::Builder::new().name("scoring".to_owned());
            thread.spawn_scoped(scope, move || self.serve()).map_err(|e| error(ErrorCode::ResourceExhausted, e))?;
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Wait for the outcomes of all groups; they stand by place.
    ///
    /// # Errors
    /// The first failure of a call.
    pub(crate) fn finish(&self) -> ServiceResult<Vec<Scored>> {
        if self.scoring == Scoring::AfterGeneration {
            self.score_all();
        }
        self.outcomes()
    }

    /// Score groups that are all there, in one call of the thread that asks; outcomes in their order.
    ///
    /// # Errors
    /// Where the call fails.
    pub(crate) fn score_groups(&self, groups: Vec<Vec<ScoreRequest>>) -> ServiceResult<Vec<Scored>> {
        let mut state = self.lock();
        state.num_pushed += groups.len();
        state.waiting.extend(groups.into_iter().enumerate().map(|(place, requests)| Waiting { place, requests }));
        drop(state);
        self.score_all();
        self.outcomes()
    }

    /// Wait until every group that was pushed is scored, or a call has failed.
    fn outcomes(&self) -> ServiceResult<Vec<Scored>> {
        let mut state = self.lock();
        while state.failure.is_none() && state.scored.len() < state.num_pushed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        match &state.failure {
            Some(error) => Err(error.clone()),
            None => Ok(std::mem::take(&mut state.scored).into_values().collect()),
        }
    }

    /// Time so far in which a call was under way.
    pub(crate) fn busy(&self) -> Duration {
        let state = self.lock();
        let running = state.busy_since.map(|since| self.clock.elapsed().saturating_sub(since));
        state.busy + running.unwrap_or_default()
    }

    /// Everything that waits, by place, in one call of the thread that asks.
    fn score_all(&self) {
        let mut state = self.lock();
        let mut groups = std::mem::take(&mut state.waiting);
        groups.sort_by_key(|group| group.place);
        self.begin(&mut state);
        drop(state);
        self.score(groups);
    }

    /// One thread: score what waits until nothing comes any more.
    fn serve(&self) {
        let mut state = self.lock();
        loop {
            while state.waiting.is_empty() && !state.is_closed && state.failure.is_none() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.is_closed || state.failure.is_some() {
                return;
            }
            // The calls that may still begin take equal parts.
            let free = self.max_calls().saturating_sub(state.num_calls);
            let count = state.waiting.len().div_ceil(free.max(1));
            let groups = state.waiting.drain(..count).collect();
            self.begin(&mut state);
            drop(state);
            self.score(groups);
            state = self.lock();
        }
    }

    fn max_calls(&self) -> usize {
        match self.scoring {
            Scoring::AfterGeneration => 1,
            Scoring::AsGroupsEnd { max_calls } => max_calls.max(1),
        }
    }

    fn begin(&self, state: &mut State) {
        if state.num_calls == 0 {
            state.busy_since = Some(self.clock.elapsed());
        }
        state.num_calls += 1;
    }

    /// One call.
    fn score(&self, groups: Vec<Waiting>) {
        let lens: Vec<(usize, usize)> = groups.iter().map(|group| (group.place, group.requests.len())).collect();
        let requests: Vec<ScoreRequest> = groups.into_iter().flat_map(|group| group.requests).collect();
        let begin = self.clock.elapsed();
        let panicked = |_| Err(error(ErrorCode::Internal, "the scorer panicked"));
        let answer = catch_unwind(AssertUnwindSafe(|| self.reward.score(&requests))).unwrap_or_else(panicked);
        let seconds_each = (self.clock.elapsed().saturating_sub(begin)).as_secs_f64() / requests.len().max(1) as f64;
        let answer = answer.and_then(|outcomes| {
            let message = || format!("expected {} outcomes, got {}", requests.len(), outcomes.len());
            if outcomes.len() == requests.len() { Ok(outcomes) } else { Err(error(ErrorCode::Internal, message())) }
        });
        let mut state = self.lock();
        state.num_calls -= 1;
        if state.num_calls == 0 {
            let since = state.busy_since.take().unwrap_or_default();
            state.busy += self.clock.elapsed().saturating_sub(since);
        }
        match answer {
            Ok(outcomes) => {
                let mut outcomes = outcomes.into_iter();
                for (place, len) in lens {
                    let outcomes = outcomes.by_ref().take(len).collect();
                    state.scored.insert(place, Scored { outcomes, seconds_each });
                }
            }
            Err(error) => {
                state.failure.get_or_insert(error);
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// A panic elsewhere leaves the state whole: each change is one.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn error(code: ErrorCode, cause: impl std::fmt::Display) -> ServiceError {
    ServiceError::new(code, "reward", "score", cause)
}

#[cfg(test)]
mod tests;
