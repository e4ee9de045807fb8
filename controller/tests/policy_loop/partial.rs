//! Steps that train on the groups that are complete first: what is trained on, and that nothing is lost or told twice.

use crate::fakes::{Behaviour, Call, Rollout, metrics, run_services, run_spec, services, stage};
use crate::staleness::{ahead, numbers, timeless};
use crate::{number, samples};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use temper_controller::{Generation, PartialPolicy, PartialRollouts, PolicyStage, latest_checkpoint};
use temper_proto::{GroupRequest, GroupResult, RolloutService, RolloutStats, ServiceResult};
use temper_types::{FinishReason, PolicyVersion, Sample};

const STEPS: u64 = 6;

/// Responses of 3 to 5 tokens, two a group, in rounds of 2: about half of the groups are complete after two rounds.
fn partial(policy: PartialPolicy, over_sampling: f64) -> PolicyStage {
    let mut stage = stage(STEPS, json!({}));
    stage.num_generations = 2;
    stage.partial_rollouts = Some(PartialRollouts { policy, over_sampling, round_tokens: 2 });
    stage
}

fn run(dir: &Path, stage: PolicyStage) -> Vec<Call> {
    run_spec(dir, ahead(stage, 0, Generation::BeforeTraining), Behaviour::default()).expect("the run ends well")
}

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Sum of a column over the run; a row without it counts 0.
fn total(dir: &Path, key: &str) -> f64 {
    metrics(dir).iter().map(|row| row.get(key).map_or(0.0, |_| number(row, key))).sum()
}

/// Every sample that was drawn, once.
fn check_samples(all: &[Sample]) {
    assert_eq!(all.len(), STEPS as usize * 8, "nothing is begun that no step trains on");
    let mut of_group: BTreeMap<u64, Vec<&Sample>> = BTreeMap::new();
    all.iter().for_each(|sample| of_group.entry(sample.group_id.0).or_default().push(sample));
    assert_eq!(of_group.keys().copied().collect::<BTreeSet<u64>>(), (0..STEPS * 4).collect());
    for samples in of_group.values() {
        assert_eq!(samples.iter().map(|s| s.sample_index.0).collect::<Vec<_>>(), [0, 1]);
        assert!(samples.iter().all(|s| s.step == samples[0].step), "a group is trained on in one step");
    }
    for sample in all {
        let num_tokens = sample.response_token_ids.len();
        let versions: Vec<u64> = sample.policy_versions.iter().map(|(version, _)| version.number).collect();
        assert_eq!(sample.finish_reason, FinishReason::Stop);
        assert!((3..=5).contains(&num_tokens) && sample.response_token_ids.last() == Some(&0), "{sample:?}");
        assert_eq!((sample.rollout_log_probs.len(), sample.response_mask.len()), (num_tokens, num_tokens));
        assert_eq!(sample.policy_versions.iter().map(|(_, n)| *n as usize).sum::<usize>(), num_tokens);
        assert!(versions.is_sorted_by(|a, b| a < b), "{versions:?}");
        assert_eq!(u64::from(sample.staleness), sample.step.0 - 1 - versions[0]);
        let words: Vec<String> = sample.response_token_ids[..num_tokens - 1].iter().map(u32::to_string).collect();
        assert_eq!(sample.response, words.join(" "), "the text is that of the whole response but for the stop token");
    }
}

#[test]
fn samples_that_go_on_have_the_versions_that_drew_them() {
    let dir = temporary();
    run(dir.path(), partial(PartialPolicy::Recompute, 2.0));
    let all = samples(dir.path());
    check_samples(&all);
    let num_mixed = all.iter().filter(|sample| sample.policy_versions.len() > 1).count();
    assert!(num_mixed > 3, "{num_mixed} samples of several versions");
    let column = |key: &str| total(dir.path(), &format!("partial/{key}"));
    assert!(column("num_unfinished_samples") > 3.0 && column("num_carried_tokens") > column("num_unfinished_samples"));
    assert_eq!((column("num_aborted_samples"), column("num_aborted_tokens")), (0.0, 0.0));
    assert_eq!(
        total(dir.path(), "ledger/issued"),
        all.len() as f64,
        "a sample is issued once, however often it goes on"
    );
    assert_eq!(total(dir.path(), "ledger/trained"), all.len() as f64);
    let last = metrics(dir.path()).pop().expect("a row");
    assert_eq!(number(&last, "partial/num_unfinished_samples") + number(&last, "partial/num_waiting_groups"), 0.0);
}

/// The gap between engine and trainer is that of tokens of the version that the step begins with, and of no other.
#[test]
fn the_gap_is_over_tokens_of_the_current_version() {
    let dir = temporary();
    run(dir.path(), partial(PartialPolicy::Recompute, 2.0));
    let has_current = |step: u64| {
        let is_current = |s: &Sample| s.policy_versions.iter().any(|(version, _)| version.number + 1 == step);
        samples(dir.path()).iter().any(|s| s.step.0 == step && is_current(s))
    };
    for (row, step) in metrics(dir.path()).iter().zip(1..) {
        assert_eq!(row.contains_key("rollout_train_log_prob_diff_max"), has_current(step), "step {step}");
    }
}

/// Tokens over K/V of other weights have log-probs that no weights give: they are counted, and out of the comparison.
#[test]
fn samples_that_keep_their_kv_are_told_so_and_compared_where_they_are_of_one_version() {
    let (anew, kept) = (temporary(), temporary());
    run(anew.path(), partial(PartialPolicy::Recompute, 2.0));
    run(kept.path(), partial(PartialPolicy::KeepKv, 2.0));
    let all = samples(kept.path());
    check_samples(&all);
    assert!(all.iter().any(|sample| sample.policy_versions.len() > 1));
    assert_eq!(total(anew.path(), "partial/num_kept_tokens"), 0.0);
    let carried = |row: usize| metrics(kept.path()).get(row).map(|row| number(row, "partial/num_carried_tokens"));
    for (index, row) in metrics(kept.path()).iter().enumerate() {
        let before = index.checked_sub(1).and_then(carried).unwrap_or(0.0);
        assert_eq!(number(row, "partial/num_kept_tokens"), before, "what step {index} left over goes on");
        let is_own = |s: &Sample| s.policy_versions.len() == 1 && s.policy_versions[0].0.number == index as u64;
        let has_own = all.iter().any(|s| s.step.0 == index as u64 + 1 && is_own(s));
        assert_eq!(row.contains_key("rollout_train_log_prob_diff_max"), has_own, "step {}", index + 1);
    }
}

#[test]
fn aborted_samples_begin_anew_and_are_counted() {
    let dir = temporary();
    run(dir.path(), partial(PartialPolicy::Abort, 2.0));
    let all = samples(dir.path());
    check_samples(&all);
    assert!(all.iter().all(|sample| sample.policy_versions.len() == 1), "no response is of two versions");
    let num_aborted = total(dir.path(), "partial/num_aborted_samples");
    assert!(num_aborted > 3.0 && total(dir.path(), "partial/num_aborted_tokens") >= 2.0 * num_aborted);
    assert_eq!(total(dir.path(), "ledger/dropped/unfinished"), num_aborted);
    assert_eq!(total(dir.path(), "ledger/issued"), all.len() as f64 + num_aborted);
    assert_eq!(total(dir.path(), "partial/num_carried_tokens"), 0.0);
}

/// Without over-sampling, finishing is what a step does anyway.
#[test]
fn finishing_without_over_sampling_is_the_plain_loop() {
    let (plain, finished) = (temporary(), temporary());
    let stage = partial(PartialPolicy::Finish, 1.0);
    let expected = run(plain.path(), PolicyStage { partial_rollouts: None, ..stage.clone() });
    assert_eq!(run(finished.path(), stage), expected);
    assert_eq!(timeless(finished.path()), timeless(plain.path()));
}

#[test]
fn finished_samples_wait_whole() {
    let dir = temporary();
    run(dir.path(), partial(PartialPolicy::Finish, 1.5));
    let all = samples(dir.path());
    check_samples(&all);
    assert!(all.iter().all(|sample| sample.policy_versions.len() == 1));
    assert_eq!(total(dir.path(), "partial/num_unfinished_samples"), 0.0);
    assert!(all.iter().any(|sample| sample.staleness == 1), "two of six groups wait for the next step");
}

/// An engine that takes groups in the reverse order, and so answers in the reverse order.
struct Reversed(Rollout);

impl RolloutService for Reversed {
    fn submit(&self, mut groups: Vec<GroupRequest>) -> ServiceResult<()> {
        groups.reverse();
        self.0.submit(groups)
    }
    fn next_group(&self, timeout: Duration) -> ServiceResult<Option<GroupResult>> {
        self.0.next_group(timeout)
    }
    fn abort_all(&self) -> ServiceResult<usize> {
        self.0.abort_all()
    }
    fn set_version(&self, version: PolicyVersion) -> ServiceResult<()> {
        self.0.set_version(version)
    }
    fn stats(&self) -> RolloutStats {
        self.0.stats()
    }
}

#[test]
fn the_order_of_answers_changes_nothing() {
    for policy in [PartialPolicy::Recompute, PartialPolicy::Abort] {
        let (one, other) = (temporary(), temporary());
        run(one.path(), partial(policy, 2.0));
        let (mut services, _calls) = services(Behaviour::default());
        services.rollout = Arc::new(Reversed(Rollout::default()));
        let spec = ahead(partial(policy, 2.0), 0, Generation::BeforeTraining);
        run_services(other.path(), spec, services).expect("the run ends well");
        assert_eq!(numbers(one.path()), numbers(other.path()));
        assert_eq!(timeless(one.path()), timeless(other.path()));
    }
}

/// What is left over stands in the checkpoint; with batches ahead too, whether they overlap with training or not.
#[test]
fn groups_that_go_on_are_resumed_to_the_bit() {
    for (policy, staleness) in [(PartialPolicy::Recompute, 0), (PartialPolicy::Abort, 0), (PartialPolicy::Recompute, 2)]
    {
        let spec = |generation| ahead(partial(policy, 2.0), staleness, generation);
        let whole = temporary();
        let before = spec(Generation::BeforeTraining);
        let calls = run_spec(whole.path(), before, Behaviour::default()).expect("the run ends well");
        check_samples(&samples(whole.path()));
        for keep in [2, 4] {
            let rest = temporary();
            let spec = spec(Generation::DuringTraining);
            run_spec(rest.path(), spec.clone(), Behaviour::default()).expect("the run ends well");
            (keep + 1..=STEPS).for_each(|step| {
                // Checkpoints are written every second step.
                let _ = std::fs::remove_dir_all(rest.path().join(format!("checkpoints/step-{step}")));
            });
            let last = latest_checkpoint(&rest.path().join("checkpoints")).expect("readable").expect("a checkpoint");
            assert_eq!(last.state.step, keep);
            assert!(!last.state.carried.is_empty() || staleness > 0, "something is left over after step {keep}");
            let resumed = run_spec(rest.path(), spec, Behaviour::default()).expect("the run goes on");
            assert!(!resumed.is_empty() && calls.ends_with(&resumed), "{} calls of {}", resumed.len(), calls.len());
            assert_eq!(numbers(rest.path()), numbers(whole.path()));
            assert_eq!(timeless(rest.path()), timeless(whole.path()));
        }
    }
}
