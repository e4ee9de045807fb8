//! Replay across passes end to end: coupled noise with and without drafts, lenient reuse of batches that are ahead.

mod common;
mod finished;
mod run;

use common::{SMALL, recipe, stderr};
use finished::finish;
use run::{NUM_STEPS, Outcome, outcome, train};
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use temper_types::Sample;

/// Eight prompts, four a step: the six steps of the second stage are three passes. Tokens of other weights are weighed.
fn three_passes() -> String {
    let changes = [
        ("num_rows = 32, seed = 2", "num_rows = 8, seed = 2"),
        ("entropy_coeff = 0.001", "rollout_correction = { rollout_is = \"token\" }"),
    ];
    changes.into_iter().fold(SMALL.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    })
}

/// A run under these settings, and what equal runs have in common of it.
fn finish_with(recipe: &Path, run_dir: &Path, sets: &[&str]) -> Outcome {
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
    finish(recipe, run_dir, &args)
}

/// Seeds of each (prompt, sample), pass by pass.
fn seeds(samples: &[Sample]) -> BTreeMap<(u64, u32), Vec<u64>> {
    let mut seeds: BTreeMap<_, Vec<u64>> = BTreeMap::new();
    for sample in samples {
        seeds.entry((sample.prompt_id.0, sample.sample_index.0)).or_default().push(sample.seed);
    }
    seeds
}

#[test]
fn coupled_noise_gives_one_run_with_and_without_drafts() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &three_passes());
    let run = |name: &str, sets: &[&str]| finish_with(&recipe, &dir.path().join(name), sets);
    let plain = run("plain", &["engine.replay=coupled", "engine.speculative=off"]);
    assert_eq!(run("drafts", &["engine.replay=coupled", "engine.speculative=replay"]), plain, "drafts of replay");
    let cut = ["engine.replay=coupled", "engine.speculative=auto", "engine.prefill_chunk=5", "engine.max_num_seqs=3"];
    assert_eq!(run("cut", &cut), plain, "all drafters, another engine");
    assert!(seeds(&plain.samples).values().all(|seeds| seeds.len() == 3 && seeds.iter().all(|s| *s == seeds[0])));
    // The first pass is that of independent noise, the later ones are not.
    let exact = run("exact", &["engine.replay=exact"]);
    assert!(seeds(&exact.samples).values().all(|seeds| seeds[0] != seeds[1] && seeds[1] != seeds[2]));
    let is_first = |sample: &&Sample| sample.epoch == 0;
    let first = |outcome: &Outcome| outcome.samples.iter().filter(is_first).cloned().collect::<Vec<Sample>>();
    assert_eq!((first(&plain).len(), first(&plain)), (32, first(&exact)));
    assert_ne!(plain.weights, exact.weights);
}

/// Numbers of a column, step by step.
fn column(outcome: &Outcome, key: &str) -> Vec<f64> {
    let rows = outcome.metrics.iter().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("a row"));
    rows.filter_map(|row| row[key].as_f64()).collect()
}

/// Reused tokens are flagged, and have the log-probs and versions that they were recorded with. A batch that is one
/// ahead is drawn when the step before the last is recorded: that is where the latest earlier response comes from.
fn check_reuse(outcome: &Outcome) {
    let samples = &outcome.samples;
    let is_same = |a: &Sample, b: &Sample| (a.prompt_id, a.sample_index) == (b.prompt_id, b.sample_index);
    let number = |s: &Sample| s.policy_versions.first().map(|(version, _)| version.number);
    let mut num_reused = 0;
    for sample in samples {
        let count = sample.response_reused.iter().take_while(|flag| **flag == 1).count();
        assert!(sample.response_reused[count..].iter().all(|flag| *flag == 0), "a prefix is reused: {sample:?}");
        num_reused += count;
        let recorded = samples.iter().rev().find(|s| is_same(s, sample) && s.step.0 + 2 <= sample.step.0);
        let Some(last) = recorded else {
            assert_eq!(count, 0, "nothing was said before");
            continue;
        };
        assert_eq!(sample.response_token_ids[..count], last.response_token_ids[..count]);
        assert_eq!(sample.rollout_log_probs[..count], last.rollout_log_probs[..count]);
        assert!(count == 0 || number(sample) == number(last), "{sample:?}");
    }
    assert_eq!(samples.last().map(|sample| sample.step.0), Some(NUM_STEPS));
    assert!(num_reused > 32, "{num_reused} tokens");
    assert_eq!(column(outcome, "num_reused_tokens").iter().sum::<f64>(), num_reused as f64);
    let ratios = column(outcome, "rollout_corr/ppl_ratio");
    // The first update has a learning rate of 0.
    assert!(ratios.len() == 6 && ratios[2..].iter().all(|ratio| *ratio != 1.0), "weighed: {ratios:?}");
    let staleness = column(outcome, "staleness_max");
    assert!(staleness[1] == 1.0 && staleness.iter().any(|versions| *versions > 2.0), "{staleness:?}");
}

#[test]
fn lenient_reuse_goes_with_batches_that_are_ahead() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &three_passes());
    let sets = ["engine.replay=lenient", "engine.speculative=replay", "placement.staleness=1"];
    let expected = finish_with(&recipe, &dir.path().join("straight"), &sets);
    check_reuse(&expected);

    let killed = dir.path().join("killed");
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
    let resume = [&args[..], &["--resume"]].concat();
    let processes = [&resume[..], &["--set", "placement.mode=processes"]].concat();
    for (point, args) in [("7:rollout", &args), ("9:update", &resume), ("9:publish", &processes)] {
        let output = train(&recipe, &killed, args, Some(point));
        assert_eq!(output.status.signal(), Some(9), "{point}: {}", stderr(&output));
    }
    let output = train(&recipe, &killed, &resume, None);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(outcome(&killed), expected);
}
