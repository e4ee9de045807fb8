use super::fixtures::{at_step, failed, full, minimal};
use super::*;
use crate::Error;
use arrow_array::Array;
use arrow_array::cast::AsArray;
use arrow_array::types::Float64Type;
use std::path::Path;
use temper_types::{FinishReason, RewardOutcome, Sample};

fn scored_without_components() -> Sample {
    let outcome = Some(RewardOutcome::Scored { reward: 0.0, components: Vec::new() });
    Sample { outcome, finish_reason: FinishReason::Stop, ..full() }
}

fn all_kinds() -> Vec<Sample> {
    vec![full(), minimal(), failed(), scored_without_components()]
}

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("the system gives a temporary directory")
}

fn writer(dir: &Path) -> DatasetWriter {
    DatasetWriter::open(dir, "test run").expect("an empty directory takes a dataset")
}

fn steps_of(dir: &Path) -> Vec<u64> {
    read_dataset(dir).expect("the dataset is whole").iter().map(|sample| sample.step.0).collect()
}

#[test]
fn every_column_survives_a_round_trip() {
    let dir = temporary();
    let samples = all_kinds();
    writer(dir.path()).write_step(Step(1), &samples).expect("the dataset is writable");
    assert_eq!(read_dataset(dir.path()).expect("the dataset is whole"), samples);
}

#[test]
fn what_is_said_of_a_dataset_stays_when_it_is_opened_again() {
    let dir = temporary();
    writer(dir.path()).describe("drawn by \"another\" policy").expect("the dataset is writable");
    drop(writer(dir.path()));
    let info = std::fs::read_to_string(dir.path().join("dataset_info.json")).expect("written");
    let info: serde_json::Value = serde_json::from_str(&info).expect("an object");
    assert_eq!(info["description"], "drawn by \"another\" policy");
}

/// `full` really fills every column: a column that decoding ignored could otherwise be lost unseen.
#[test]
fn a_full_sample_leaves_only_the_error_columns_null() {
    let batch = to_batch("r", &[full()]).expect("lengths agree");
    let is_null = |name: &String| batch.column_by_name(name).is_some_and(|column| column.is_null(0));
    let nulls: Vec<_> = schema().fields().iter().map(|f| f.name().clone()).filter(is_null).collect();
    assert_eq!(nulls, ["reward_error_scorer", "reward_error"]);
}

#[test]
fn absent_values_are_null_and_no_column_is_dropped() {
    let batch = to_batch("r", &[minimal(), failed()]).expect("lengths agree");
    assert_eq!(batch.schema(), schema());
    let is_null = |name: &str, row| batch.column_by_name(name).expect("in the schema").is_null(row);
    for name in ["prompt", "old_log_probs", "values", "reward", "reward_components", "reward_error", "policy_version"] {
        assert!(is_null(name, 0), "{name}");
    }
    assert!(is_null("reward", 1) && is_null("reward_components", 1) && !is_null("reward_error", 1));
    assert!(!is_null("response_token_ids", 0), "an empty response is a list without entries");
}

#[test]
fn the_schema_is_frozen() {
    let names: Vec<_> = schema().fields().iter().map(|field| field.name().clone()).collect();
    let expected = "run step prompt_id group_id sample_index epoch data_source prompt prompt_format response \
        prompt_token_ids response_token_ids response_mask response_reused rollout_log_probs sampled_log_probs surviving_mass \
        old_log_probs ref_log_probs values advantages returns reward reward_components reward_error_scorer \
        reward_error ground_truth extra_info finish_reason policy_version policy_version_hashes staleness \
        seed worker queue_seconds rollout_seconds reward_seconds num_drafted num_accepted";
    assert_eq!(names.join(" "), expected);
    assert_eq!(schema().metadata().get(SCHEMA_VERSION_KEY).map(String::as_str), Some(SCHEMA_VERSION));
}

#[test]
fn a_wrong_length_names_sample_and_column() {
    let sample = Sample { advantages: vec![1.0], ..full() };
    let error = to_batch("r", &[sample]).expect_err("one entry for three tokens").to_string();
    assert!(error.contains("step 3, ") && error.contains("`advantages`: 1 entries: expected 3"), "{error}");
}

#[test]
fn state_lists_the_shards_as_datasets_expects() {
    let dir = temporary();
    let mut writer = writer(dir.path());
    writer.write_step(Step(2), &[at_step(2)]).expect("writable");
    writer.write_step(Step(1), &[at_step(1)]).expect("writable");
    let text = std::fs::read(dir.path().join("state.json")).expect("written");
    let state: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let files = serde_json::json!([{"filename": "step-000001.arrow"}, {"filename": "step-000002.arrow"}]);
    assert_eq!(state["_data_files"], files);
    let keys: Vec<_> = state.as_object().expect("an object").keys().map(String::as_str).collect();
    let expected = "_data_files _fingerprint _format_columns _format_kwargs _format_type _output_all_columns _split";
    assert_eq!(keys.join(" "), expected);
    assert_eq!(std::fs::read_to_string(dir.path().join("dataset_info.json")).expect("written").trim(), "{}");
    assert_eq!(steps_of(dir.path()), [1, 2]);
}

#[test]
fn writing_a_step_again_replaces_it_and_changes_the_fingerprint() {
    let dir = temporary();
    let mut writer = writer(dir.path());
    let state = || std::fs::read_to_string(dir.path().join("state.json")).expect("written");
    writer.write_step(Step(1), &[at_step(1), at_step(1)]).expect("writable");
    let before = state();
    writer.write_step(Step(1), &[Sample { response: "other".to_owned(), ..at_step(1) }]).expect("writable");
    assert_ne!(before, state());
    let samples = read_dataset(dir.path()).expect("the dataset is whole");
    assert_eq!(samples.iter().map(|s| s.response.as_str()).collect::<Vec<_>>(), ["other"]);
}

/// After a crash between the shard and `state.json`, resume leaves exactly the shards up to the checkpoint.
#[test]
fn truncation_drops_later_steps_and_leftovers() {
    let dir = temporary();
    let mut first = writer(dir.path());
    for step in 1..=4 {
        first.write_step(Step(step), &[at_step(step)]).expect("writable");
    }
    let shard = std::fs::read(dir.path().join("step-000004.arrow")).expect("written");
    std::fs::write(dir.path().join("step-000005.arrow"), shard).expect("writable");
    std::fs::write(dir.path().join("step-000006.arrow.tmp"), b"half").expect("writable");
    std::fs::write(dir.path().join("notes.txt"), b"kept").expect("writable");
    assert_eq!(steps_of(dir.path()), [1, 2, 3, 4], "a shard that is not listed is not read");

    let mut resumed = writer(dir.path());
    resumed.truncate_after(Step(2)).expect("writable");
    assert_eq!(resumed.steps().collect::<Vec<_>>(), [Step(1), Step(2)]);
    assert_eq!(steps_of(dir.path()), [1, 2]);
    let mut names: Vec<_> = std::fs::read_dir(dir.path())
        .expect("listable")
        .map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let expected = ["dataset_info.json", "notes.txt", "state.json", "step-000001.arrow", "step-000002.arrow"];
    assert_eq!(names, expected);
    resumed.write_step(Step(3), &[at_step(3)]).expect("writable");
    assert_eq!(steps_of(dir.path()), [1, 2, 3]);
}

#[test]
fn an_empty_step_and_many_rows_are_shards_too() {
    let dir = temporary();
    let mut writer = writer(dir.path());
    writer.write_step(Step(1), &[]).expect("writable");
    writer.write_step(Step(2), &vec![at_step(2); 2500]).expect("writable");
    let sizes: Vec<_> = Dataset::open(dir.path()).expect("whole").samples().map(|s| s.map_or(0, |s| s.len())).collect();
    assert_eq!(sizes, [0, 2500]);
}

#[test]
fn one_column_reads_alone_and_a_typo_is_met_with_the_right_name() {
    let dir = temporary();
    writer(dir.path()).write_step(Step(1), &all_kinds()).expect("writable");
    let dataset = Dataset::open(dir.path()).expect("whole");
    let pieces = dataset.column("reward").expect("in the schema");
    let rewards: Vec<_> = pieces.iter().flat_map(|piece| piece.as_primitive::<Float64Type>().iter()).collect();
    assert_eq!(rewards, [Some(0.1 + 0.2), None, None, Some(0.0)]);
    let error = dataset.column("rewards").expect_err("no such column").to_string();
    assert!(error.contains("`rewards` (`reward`?)"), "{error}");
}

#[test]
fn parquet_export_holds_the_same_rows() {
    let dir = temporary();
    let mut writer = writer(dir.path());
    writer.write_step(Step(1), &all_kinds()).expect("writable");
    writer.write_step(Step(2), &[at_step(2)]).expect("writable");
    let out = dir.path().join("all.parquet");
    assert_eq!(export_parquet(dir.path(), &out).expect("writable"), 5);
    let table = crate::arrow_io::read_parquet(&out).expect("whole");
    // The reader of Parquet leaves the metadata to the table.
    let batches = table.batches.into_iter().map(|batch| batch.with_schema(table.schema.clone()).expect("same columns"));
    let read: Vec<_> = batches.flat_map(|batch| from_batch(&batch).expect("same schema")).collect();
    assert_eq!(read, read_dataset(dir.path()).expect("whole"));
}

/// Every cut of a shard, and every changed byte that matters, is an error that names the shard; none panics.
#[test]
fn a_damaged_shard_is_named() {
    let dir = temporary();
    writer(dir.path()).write_step(Step(1), &all_kinds()).expect("writable");
    let path = dir.path().join("step-000001.arrow");
    let whole = std::fs::read(&path).expect("written");
    let check = |bytes: &[u8]| -> Result<Vec<Sample>, Error> {
        std::fs::write(&path, bytes).expect("writable");
        read_dataset(dir.path())
    };
    for length in (0..whole.len()).step_by(61) {
        let error = check(&whole[..length]).expect_err("a cut shard").to_string();
        assert!(error.contains("step-000001.arrow"), "{error}");
    }
    for at in (0..whole.len()).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        if let Err(error) = check(&bytes) {
            assert!(error.to_string().contains("step-000001.arrow"), "{error}");
        }
    }
    std::fs::remove_file(&path).expect("there");
    let error = read_dataset(dir.path()).expect_err("a missing shard").to_string();
    assert!(error.contains("step-000001.arrow"), "{error}");
}

#[test]
fn a_malformed_state_is_named() {
    let dir = temporary();
    for (state, expected) in [
        ("{", "bad JSON"),
        ("{}", "`_data_files`"),
        (r#"{"_data_files":[{"filename":"../x.arrow"}]}"#, "plain file names"),
    ] {
        std::fs::write(dir.path().join("state.json"), state).expect("writable");
        let error = read_dataset(dir.path()).expect_err(state).to_string();
        assert!(error.contains("state.json") && error.contains(expected), "{error}");
    }
    std::fs::write(dir.path().join("state.json"), r#"{"_data_files":[{"filename":"data-0.arrow"}]}"#)
        .expect("writable");
    let error = DatasetWriter::open(dir.path(), "r").expect_err("a foreign dataset").to_string();
    assert!(error.contains("lists `data-0.arrow`"), "{error}");
}

#[test]
fn another_schema_is_refused() {
    let batch = to_batch("r", &[full()]).expect("lengths agree");
    let fewer = batch.project(&(0..10).collect::<Vec<_>>()).expect("ten columns");
    assert_eq!(from_batch(&fewer), Err(format!("10 columns: expected {}", schema().fields().len())));
    let bare = arrow_schema::Schema::new(batch.schema().fields().clone());
    let unversioned = batch.with_schema(bare.into());
    if let Ok(batch) = unversioned {
        let error = from_batch(&batch).expect_err("no version");
        assert!(error.contains(SCHEMA_VERSION_KEY), "{error}");
    }
}
