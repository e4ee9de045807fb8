//! What a later pass over the prompts is offered of the pass before.

use crate::fakes::{Behaviour, run_in, stage};
use crate::{metrics, number, samples};
use std::path::Path;
use temper_controller::{ReplaySpec, latest_checkpoint};
use temper_types::Sample;

const LENIENT: ReplaySpec = ReplaySpec::Lenient { lenience: 1.5 };

fn run(dir: &Path, replay: ReplaySpec) {
    // Eight prompts, four a step: two steps a pass.
    let behaviour = Behaviour { replay, ..Behaviour::default() };
    run_in(dir, stage(4, serde_json::json!({})), behaviour).expect("the run ends well");
}

/// Each sample of the second pass with that of the first.
fn passes(samples: &[Sample]) -> Vec<(&Sample, &Sample)> {
    let of = |later: &Sample| {
        let mut earlier = samples.iter().filter(|s| s.epoch == 0 && s.sample_index == later.sample_index);
        earlier.find(|s| s.prompt_id == later.prompt_id).expect("every prompt had a first pass")
    };
    samples.iter().filter(|s| s.epoch == 1).map(|later| (of(later), later)).collect()
}

#[test]
fn coupled_passes_share_their_noise_and_others_do_not() {
    for (replay, is_shared) in [(ReplaySpec::Exact, false), (ReplaySpec::Coupled, true), (LENIENT, false)] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        run(dir.path(), replay);
        let samples = samples(dir.path());
        let pairs = passes(&samples);
        assert_eq!(pairs.len(), 32);
        assert!(pairs.iter().all(|(a, b)| (a.seed == b.seed) == is_shared), "{replay:?}");
    }
}

#[test]
fn lenient_passes_are_offered_what_was_recorded_and_keep_its_log_probs() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    run(dir.path(), LENIENT);
    let all = samples(dir.path());
    for (earlier, later) in passes(&all) {
        assert_eq!(later.response_token_ids, earlier.response_token_ids);
        assert_eq!(later.rollout_log_probs, earlier.rollout_log_probs);
        assert_eq!(later.response_reused, vec![1; later.response_token_ids.len()]);
        assert!(earlier.response_reused.is_empty(), "null where nothing could be reused");
    }
    let rows = metrics(dir.path());
    assert!(!rows[1].contains_key("num_reused_tokens"));
    let num_tokens: usize = all.iter().filter(|s| s.epoch == 1).map(|s| s.response_token_ids.len()).sum();
    assert_eq!(number(&rows[2], "num_reused_tokens") + number(&rows[3], "num_reused_tokens"), num_tokens as f64);
    assert!(!rows[3].contains_key("rollout_train_log_prob_diff_max"), "reused tokens are no gap of kernels");
}

/// A resumed run reads back the steps before its checkpoint, and not those after.
#[test]
fn a_resumed_run_is_offered_the_same() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    run(dir.path(), LENIENT);
    let expected = samples(dir.path());
    let checkpoints = dir.path().join("checkpoints");
    let last = latest_checkpoint(&checkpoints).expect("readable").expect("there is one");
    assert_eq!(last.state.step, 4);
    std::fs::remove_dir_all(&last.path).expect("it can be removed");
    run(dir.path(), LENIENT);
    let plain = |samples: &[Sample]| -> Vec<_> {
        samples.iter().map(|s| (s.seed, s.response_token_ids.clone(), s.response_reused.clone())).collect()
    };
    assert_eq!(plain(&samples(dir.path())), plain(&expected));
}
