//! Replay across passes end to end: coupled noise with and without drafts.

mod common;
mod run;

use common::{SMALL, recipe, stderr};
use run::{Outcome, outcome, train};
use std::collections::BTreeMap;
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

/// A run and what equal runs have in common of it; how much was guessed is the clock's.
fn finish(recipe: &Path, run_dir: &Path, sets: &[&str]) -> Outcome {
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
    let output = train(recipe, run_dir, &args, None);
    assert!(output.status.success(), "{}", stderr(&output));
    without_guesses(run_dir)
}

fn without_guesses(run_dir: &Path) -> Outcome {
    let mut outcome = outcome(run_dir);
    for sample in &mut outcome.samples {
        (sample.num_drafted, sample.num_accepted) = (0, 0);
    }
    outcome
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
    let run = |name: &str, sets: &[&str]| finish(&recipe, &dir.path().join(name), sets);
    let plain = run("plain", &["engine.replay=coupled"]);
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
