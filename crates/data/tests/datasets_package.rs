//! Hugging Face `datasets` loads what temper writes. Skipped, and said so, where Python or the package is missing.

use std::path::Path;
use std::process::Command;
use temper_data::trajectories::{DatasetWriter, schema};
use temper_types::{
    ContentHash, FinishReason, GroupId, PolicyVersion, PromptContent, PromptId, RewardComponent, RewardFailure,
    RewardOutcome, Sample, SampleIndex, SampleTimings, Step,
};

/// Exit code by which the script says that it has nothing to load with.
const SKIPPED: i32 = 77;

fn sample(step: u64, outcome: RewardOutcome) -> Sample {
    Sample {
        step: Step(step),
        prompt_id: PromptId(1),
        group_id: GroupId(2),
        sample_index: SampleIndex(3),
        epoch: 0,
        seed: u64::MAX,
        data_source: "temper/sort_digits".to_owned(),
        prompt: PromptContent::Text("sort 21=".to_owned()),
        response: "12".to_owned(),
        prompt_token_ids: vec![1, 2, 3],
        response_token_ids: vec![4, 5],
        response_mask: vec![1, 1],
        response_reused: Vec::new(),
        rollout_log_probs: vec![-0.5, -0.25],
        sampled_log_probs: Vec::new(),
        surviving_mass: Vec::new(),
        old_log_probs: vec![-0.5, -0.25],
        ref_log_probs: Vec::new(),
        values: Vec::new(),
        advantages: vec![1.0, 1.0],
        returns: Vec::new(),
        outcome: Some(outcome),
        ground_truth: Some("12".to_owned()),
        extra_info: None,
        finish_reason: FinishReason::Stop,
        policy_versions: vec![(PolicyVersion { number: 7, hash: ContentHash([1; 16]) }, 2)],
        staleness: 0,
        num_drafted: 0,
        num_accepted: 0,
        worker: "engine-0".to_owned(),
        timings: SampleTimings::default(),
    }
}

#[test]
fn datasets_loads_what_the_writer_writes() {
    let dir = tempfile::tempdir().expect("the system gives a temporary directory");
    let mut writer = DatasetWriter::open(dir.path(), "run").expect("writable");
    let components = vec![RewardComponent { name: "exact".to_owned(), value: 1.0 }];
    let scored = RewardOutcome::Scored { reward: 1.0, components };
    let failed = RewardOutcome::Failed(RewardFailure { scorer: "exact".to_owned(), cause: "deadline".to_owned() });
    writer.write_step(Step(1), &[sample(1, scored), sample(1, failed.clone())]).expect("writable");
    writer.write_step(Step(2), &[sample(2, failed)]).expect("writable");

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/check_dataset.py");
    let output = match Command::new("python3").arg(script).arg(dir.path()).output() {
        Ok(output) if output.status.code() == Some(SKIPPED) => {
            eprintln!("skipped: python3 has no package `datasets`");
            return;
        }
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("skipped: no python3");
            return;
        }
        Err(error) => panic!("python3 does not start: {error}"),
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("the script prints JSON");
    assert_eq!((&found["rows"], &found["reward_mean"]), (&3.into(), &1.0.into()));
    let names: Vec<_> = schema().fields().iter().map(|field| field.name().clone()).collect();
    assert_eq!(found["columns"], serde_json::json!(names));
}
