//! Where every sample ends that a run asked for: in one step that trained on it, or dropped for one reason.
//!
//! Owns: the books between the loop and its engines. It stands in front of the rollout service, so that nothing is
//! issued or handed on without being noted, whoever asks. The loop says what became of each sample
//! ([`RolloutService::settle`]); at the end of every step, and of the run, nothing may be left over.
//!
//! Attempts that were lost with a worker are not seen here: a fleet issues them again and keeps books of its own.

use crate::carried::begun;
use crate::{Controller, Error};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{sync::Arc, time::Duration};
use temper_proto::{
    Fate, FleetCounts, GroupRequest, GroupResult, RolloutService, RolloutStats, ServiceError, ServiceResult, Settled,
    Unused,
};
use temper_telemetry::MetricsRow;
use temper_types::{ErrorCode, GroupId, PolicyVersion, PromptId, RewardOutcome, Sample, SampleIndex};

/// Samples that an error names.
const MAX_NAMED: usize = 8;

/// A rollout service that keeps account of what is asked of it.
pub(crate) struct Accounts {
    engine: Arc<dyn RolloutService>,
    books: Mutex<Books>,
}

/// A group of which a sample's fate is open.
#[derive(Debug, PartialEq)]
struct Group {
    prompt: PromptId,
    is_delivered: bool,
    open: BTreeSet<SampleIndex>,
}

#[derive(Debug, Default)]
struct Books {
    groups: BTreeMap<GroupId, Group>,
    /// Groups that the engine does not know: of before the run was resumed, or kept for a later batch.
    restored: BTreeSet<GroupId>,
    /// Since the last balance: samples issued, and samples settled, by what became of them.
    issued: u64,
    settled: BTreeMap<Fate, u64>,
    /// The engine's counters at the last balance.
    counted: RolloutStats,
}

fn wrong(operation: &'static str, message: String) -> ServiceError {
    ServiceError::new(ErrorCode::Internal, "accounts", operation, message)
}

impl Books {
    fn issue(&mut self, request: &GroupRequest) -> ServiceResult<()> {
        self.restored.remove(&request.group_id);
        if !request.begun.is_empty() {
            return self.issue_again(request);
        }
        let open: BTreeSet<SampleIndex> = (0..request.seeds.len() as u32).map(SampleIndex).collect();
        let num_samples = open.len() as u64;
        let group = Group { prompt: request.prompt_id, is_delivered: false, open };
        if let Some(earlier) = self.groups.insert(request.group_id, group) {
            let (id, prompt, open) = (request.group_id, earlier.prompt, earlier.open.len());
            let message = format!("group {id} is issued while {open} samples of it (prompt {prompt}) are not settled");
            return Err(wrong("issue", message));
        }
        self.issued += num_samples;
        Ok(())
    }

    /// The next round of a group: samples of which something is drawn go on, the others are new attempts.
    fn issue_again(&mut self, request: &GroupRequest) -> ServiceResult<()> {
        let (id, prompt) = (request.group_id, request.prompt_id);
        let new = || Group { prompt, is_delivered: true, open: BTreeSet::new() };
        let group = self.groups.entry(id).or_insert_with(new);
        if !group.is_delivered {
            return Err(wrong("issue", format!("group {id} (prompt {prompt}) goes on before its last round is over")));
        }
        group.is_delivered = false;
        for (index, begun) in (0..).map(SampleIndex).zip(&request.begun) {
            let is_known = !begun.token_ids.is_empty();
            if group.open.insert(index) == is_known {
                let message =
                    format!("sample {index} of group {id} (prompt {prompt}) goes on and has ended, or begins twice");
                return Err(wrong("issue", message));
            }
            self.issued += u64::from(!is_known);
        }
        Ok(())
    }

    fn deliver(&mut self, result: &GroupResult) -> ServiceResult<()> {
        match self.groups.get_mut(&result.group_id) {
            Some(group) if !group.is_delivered => {
                group.is_delivered = true;
                Ok(())
            }
            known => {
                let what = if known.is_some() { "was delivered before" } else { "is not open" };
                let message = format!("group {} (prompt {}) {what}", result.group_id, result.prompt_id);
                Err(wrong("deliver", message))
            }
        }
    }

    fn settle(&mut self, step: u64, settled: &Settled) -> ServiceResult<()> {
        let Settled { group_id, sample_index, fate } = *settled;
        let group = self.groups.get_mut(&group_id).filter(|group| group.is_delivered);
        let Some(group) = group.filter(|group| group.open.contains(&sample_index)) else {
            let message = format!(
                "step {step}: sample {sample_index} of group {group_id} ends as {fate:?}, and has ended before or was \
                 never delivered"
            );
            return Err(wrong("settle", message));
        };
        group.open.remove(&sample_index);
        if group.open.is_empty() {
            self.groups.remove(&group_id);
        }
        *self.settled.entry(fate).or_default() += 1;
        Ok(())
    }

    fn abort(&mut self) {
        let is_aborted = |group: &Group| !group.is_delivered;
        let num_samples: u64 = self.groups.values().filter(|g| is_aborted(g)).map(|g| g.open.len() as u64).sum();
        self.groups.retain(|_, group| !is_aborted(group));
        if num_samples > 0 {
            *self.settled.entry(Fate::Dropped(Unused::Aborted)).or_default() += num_samples;
        }
    }

    /// Samples that are open and not among `waiting`, in words.
    fn left_over(&self, waiting: &BTreeSet<(GroupId, SampleIndex)>) -> Vec<String> {
        let samples =
            self.groups.iter().flat_map(|(id, group)| group.open.iter().map(move |index| (*id, group, *index)));
        let lost = samples.filter(|(id, _, index)| !waiting.contains(&(*id, *index)));
        lost.map(|(id, group, index)| format!("(prompt {}, group {id}, sample {index})", group.prompt)).collect()
    }
}

impl Accounts {
    pub(crate) fn new(engine: Arc<dyn RolloutService>) -> Self {
        Accounts { engine, books: Mutex::default() }
    }

    /// A panic elsewhere leaves the books whole: each change is one.
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These samples were delivered before the run was resumed, and wait for their steps.
    pub(crate) fn restore<'a>(&self, samples: impl Iterator<Item = &'a Sample>) {
        let mut books = self.books();
        for sample in samples {
            books.restored.insert(sample.group_id);
            let group = Group { prompt: sample.prompt_id, is_delivered: true, open: BTreeSet::new() };
            books.groups.entry(sample.group_id).or_insert(group).open.insert(sample.sample_index);
        }
    }

    /// These samples were delivered and stay in the loop's hands for a later batch: the engine may forget their groups.
    pub(crate) fn keep<'a>(&self, samples: impl Iterator<Item = &'a Sample>) -> ServiceResult<()> {
        let mut kept = Vec::new();
        let mut books = self.books();
        for sample in samples {
            if !books.restored.contains(&sample.group_id) {
                kept.push(settled(sample, Fate::Dropped(Unused::Unfinished)));
            }
        }
        books.restored.extend(kept.iter().map(|sample| sample.group_id));
        drop(books);
        if kept.is_empty() { Ok(()) } else { self.engine.settle(0, &kept) }
    }

    /// Fail where a sample has no fate and is not among those that wait for a later step.
    pub(crate) fn check(&self, step: u64, waiting: &BTreeSet<(GroupId, SampleIndex)>) -> Result<(), Error> {
        let lost = self.books().left_over(waiting);
        if lost.is_empty() {
            return Ok(());
        }
        let num_samples = lost.len();
        Err(Error::Unaccounted { step, num_samples, samples: lost[..num_samples.min(MAX_NAMED)].join(", ") })
    }

    /// What was issued, settled and computed since the last row, as columns of this one; none where nothing was.
    pub(crate) fn columns(&self, row: &mut MetricsRow) {
        let now = self.engine.stats();
        let (earlier, issued, settled) = {
            let mut books = self.books();
            let earlier = std::mem::replace(&mut books.counted, now);
            (earlier, std::mem::take(&mut books.issued), std::mem::take(&mut books.settled))
        };
        engine_columns(&now, &earlier, row);
        if issued > 0 || !settled.is_empty() {
            row.set_count("ledger/issued", issued);
            row.set_count("ledger/trained", settled.get(&Fate::Trained).copied().unwrap_or(0));
        }
        for (fate, count) in settled {
            if let Fate::Dropped(reason) = fate {
                row.set_count(&format!("ledger/dropped/{}", reason.name()), count);
            }
        }
        if let Some(counts) = self.engine.fleet_counts() {
            row.set_count("fleet/late_answers", counts.late_answers).set_count("fleet/duplicates", counts.duplicates);
            row.set_count("fleet/reissued", counts.reissued);
        }
    }
}

impl RolloutService for Accounts {
    fn submit(&self, groups: Vec<GroupRequest>) -> ServiceResult<()> {
        groups.iter().try_for_each(|request| self.books().issue(request))?;
        self.engine.submit(groups)
    }

    fn next_group(&self, timeout: Duration) -> ServiceResult<Option<GroupResult>> {
        let result = self.engine.next_group(timeout)?;
        result.iter().try_for_each(|group| self.books().deliver(group))?;
        Ok(result)
    }

    fn abort_all(&self) -> ServiceResult<usize> {
        let num_groups = self.engine.abort_all()?;
        self.books().abort();
        Ok(num_groups)
    }

    fn set_version(&self, version: PolicyVersion) -> ServiceResult<()> {
        self.engine.set_version(version)
    }

    fn sleep(&self) -> ServiceResult<u64> {
        self.engine.sleep()
    }

    fn stats(&self) -> RolloutStats {
        self.engine.stats()
    }

    fn settle(&self, step: u64, samples: &[Settled]) -> ServiceResult<()> {
        samples.iter().try_for_each(|settled| self.books().settle(step, settled))?;
        let mut books = self.books();
        let known: Vec<Settled> = samples.iter().filter(|s| !books.restored.contains(&s.group_id)).copied().collect();
        for settled in samples {
            books.restored.remove(&settled.group_id);
        }
        drop(books);
        self.engine.settle(step, &known)
    }

    fn fleet_counts(&self) -> Option<FleetCounts> {
        self.engine.fleet_counts()
    }
}

/// One of an engine's counters.
type Counter = fn(&RolloutStats) -> u64;

/// What engines did between two looks at their counters; nothing where they did not compute. Depends on the clock, as
/// drafts, workers and their losses do.
fn engine_columns(now: &RolloutStats, earlier: &RolloutStats, row: &mut MetricsRow) {
    let since = |count: Counter| count(now).saturating_sub(count(earlier));
    let num_steps = since(|stats| stats.num_steps);
    if num_steps == 0 {
        return;
    }
    row.set("engine/rows_per_step", since(|stats| stats.num_rows) as f64 / num_steps as f64);
    row.set("engine/kv_cache_peak_usage_perc", now.peak_kv_blocks as f64 / now.kv_blocks.max(1) as f64);
    let counts: [(&str, Counter); 6] = [
        ("engine/num_preemptions", |stats| stats.num_preemptions),
        ("engine/prefill_tokens", |stats| stats.num_prefill_tokens),
        ("engine/prefix_cache_queries", |stats| stats.prefix_cache_queries),
        ("engine/prefix_cache_hits", |stats| stats.prefix_cache_hits),
        ("engine/spec_decode_num_draft_tokens", |stats| stats.speculation.total().num_draft_tokens),
        ("engine/spec_decode_num_accepted_tokens", |stats| stats.speculation.total().num_accepted_tokens),
    ];
    for (name, count) in counts {
        row.set_count(name, since(count));
    }
    let times: [(&str, Counter); 4] = [
        ("engine/step_seconds", |stats| stats.step_micros),
        ("engine/tail_seconds", |stats| stats.tail_micros),
        ("engine/refit_seconds", |stats| stats.refit_micros),
        ("engine/pause_seconds", |stats| stats.pause_micros),
    ];
    for (name, micros) in times {
        row.set(name, since(micros) as f64 / 1e6);
    }
}

/// Generated samples that all end for one reason.
pub(crate) fn dropped(groups: &[GroupResult], reason: Unused) -> Vec<Settled> {
    let of_group = |group: &GroupResult| {
        let group_id = group.group_id;
        let settled = move |s: &temper_proto::GeneratedSample| Settled {
            group_id,
            sample_index: s.sample_index,
            fate: Fate::Dropped(reason),
        };
        group.samples.iter().map(settled).collect::<Vec<_>>()
    };
    groups.iter().flat_map(of_group).collect()
}

/// A sample and what became of it.
pub(crate) fn settled(sample: &Sample, fate: Fate) -> Settled {
    Settled { group_id: sample.group_id, sample_index: sample.sample_index, fate }
}

/// Why a step did not train on a sample of its batch.
fn unused(sample: &Sample) -> Unused {
    match &sample.outcome {
        Some(RewardOutcome::Failed(_)) => Unused::RewardError,
        _ if !sample.is_trainable() => Unused::Masked,
        _ => Unused::NotChosen,
    }
}

impl Controller {
    /// Say what became of a step's samples, before the weights that they made are published. `trained` are indices.
    pub(crate) fn settle(&self, samples: &[Sample], trained: &BTreeSet<usize>) -> Result<(), Error> {
        let fate = |(index, sample): (usize, &Sample)| {
            let is_trained = trained.contains(&index);
            settled(sample, if is_trained { Fate::Trained } else { Fate::Dropped(unused(sample)) })
        };
        let all: Vec<Settled> = samples.iter().enumerate().map(fate).collect();
        self.attribute(self.services.rollout.settle(self.state.step + 1, &all))
    }

    /// Fail where a sample was lost.
    pub(crate) fn check_accounts(&self) -> Result<(), Error> {
        let waiting = self.queue.iter().flat_map(|batch| &batch.samples).chain(begun(&self.carried));
        self.accounts.check(self.state.step, &waiting.map(|s| (s.group_id, s.sample_index)).collect())
    }
}

#[cfg(test)]
mod tests;
