//! Runs of the small recipe to their end, and what equal ones have in common however much was guessed ahead.

use crate::common::stderr;
use crate::run::{Outcome, outcome, train};
use std::path::Path;

/// What equal runs have in common; how much was guessed is the clock's.
pub fn numbers(run_dir: &Path) -> Outcome {
    let mut outcome = outcome(run_dir);
    for sample in &mut outcome.samples {
        (sample.num_drafted, sample.num_accepted) = (0, 0);
    }
    outcome
}

/// Train to the end with further arguments.
pub fn finish(recipe: &Path, run_dir: &Path, args: &[&str]) -> Outcome {
    let output = train(recipe, run_dir, args, None);
    assert!(output.status.success(), "{}", stderr(&output));
    numbers(run_dir)
}
