//! Runs of the small recipe to their end.

use crate::common::stderr;
use crate::run::{Outcome, outcome, train};
use std::path::Path;

/// Train to the end with further arguments.
pub fn finish(recipe: &Path, run_dir: &Path, args: &[&str]) -> Outcome {
    let output = train(recipe, run_dir, args, None);
    assert!(output.status.success(), "{}", stderr(&output));
    outcome(run_dir)
}
