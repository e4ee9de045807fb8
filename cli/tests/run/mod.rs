//! Runs of the small recipe, and what two equal runs have in common.

mod metrics;

use crate::common::temper;
use metrics::metrics;
use std::path::Path;
use std::process::Output;
use temper_controller::{latest_checkpoint, verify_checkpoint};
use temper_data::trajectories::read_dataset;
use temper_types::{Sample, SampleTimings};

/// Steps of the small recipe.
pub const NUM_STEPS: u64 = 10;

/// Train `recipe` into `run_dir` with further arguments; `kill_at` is `STEP:PHASE`.
pub fn train(recipe: &Path, run_dir: &Path, args: &[&str], kill_at: Option<&str>) -> Output {
    let mut command = temper();
    command.arg("train").arg(recipe).arg("--run-dir").arg(run_dir).args(args);
    if let Some(point) = kill_at {
        command.env("TEMPER_KILL_AT", point);
    }
    command.output().expect("the binary starts")
}

/// Everything that two equal runs have in common.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    /// Bytes of the final weights.
    pub weights: Vec<u8>,
    /// Rows of metrics.
    pub metrics: Vec<String>,
    /// Every sample.
    pub samples: Vec<Sample>,
}

/// What is left of a complete run.
pub fn outcome(run_dir: &Path) -> Outcome {
    let last = latest_checkpoint(&run_dir.join("checkpoints")).expect("readable").expect("a checkpoint");
    assert_eq!(last.state.step, NUM_STEPS);
    whole_outcome(run_dir)
}

/// As [`outcome`], of a run of any length.
pub fn whole_outcome(run_dir: &Path) -> Outcome {
    let last = latest_checkpoint(&run_dir.join("checkpoints")).expect("readable").expect("a checkpoint");
    verify_checkpoint(&last.path).expect("an intact checkpoint");
    let mut samples = read_dataset(&run_dir.join("rollouts")).expect("a dataset");
    for sample in &mut samples {
        sample.timings = SampleTimings::default();
        sample.worker = String::new();
        // How much was guessed ahead is the clock's too.
        (sample.num_drafted, sample.num_accepted) = (0, 0);
    }
    Outcome {
        weights: std::fs::read(last.model().join("model.safetensors")).expect("weights"),
        metrics: metrics(run_dir).iter().map(|row| serde_json::to_string(row).expect("plain data")).collect(),
        samples,
    }
}
