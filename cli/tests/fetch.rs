//! Trajectories leave a run under way, and are those that it keeps.

mod common;
mod wait;

use arrow_ipc::reader::FileReader;
use common::{SMALL, recipe, stderr, temper};
use std::path::Path;
use std::process::{Output, Stdio};
use temper_data::trajectories::{export_parquet, from_batch, read_dataset};
use temper_types::Sample;
use wait::until;

fn on_run(run_dir: &Path, args: &[&str]) -> Output {
    temper().args(args).arg("--run-dir").arg(run_dir).arg("--json").output().expect("the binary starts")
}

fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn samples(path: &Path) -> Vec<Sample> {
    let file = FileReader::try_new(std::fs::File::open(path).expect("a file"), None).expect("an Arrow file");
    file.flat_map(|batch| from_batch(&batch.expect("rows")).expect("samples")).collect()
}

#[test]
fn what_is_fetched_while_a_run_goes_on_is_what_the_run_keeps() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let text = SMALL.replace("steps = 6", "steps = 30").replace("every_steps = 2", "every_steps = 10");
    let recipe = recipe(dir.path(), &text);
    let run_dir = dir.path().join("run");
    let mut train = temper();
    train.arg("train").arg(&recipe).arg("--run-dir").arg(&run_dir).args(["--set", "placement.mode=processes"]);
    let train = train.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    let paused = until("a pause", || Some(on_run(&run_dir, &["pause"])).filter(|output| output.status.success()));
    assert_eq!(json(&paused)["state"], "paused");

    let (all, part) = (dir.path().join("all.arrow"), dir.path().join("part.parquet"));
    let mut follow = temper();
    follow.arg("fetch").arg("--run-dir").arg(&run_dir).arg("--follow").arg("--output").arg(&all);
    let follow = follow.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    until("the follower", || dir.path().join("all.arrow.tmp").exists().then_some(()));
    let tables = json(&on_run(&run_dir, &["fetch"]));
    let names: Vec<_> = tables.as_array().expect("a list").iter().map(|table| table["dataset"].as_str()).collect();
    assert_eq!(names, [Some("rollouts"), Some("metrics")]);
    let refused = on_run(&run_dir, &["fetch", "--step", "9999", "--output", part.to_str().expect("UTF-8")]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("rollouts has no step 9999"), "{}", stderr(&refused));
    assert!(!part.exists(), "nothing is written");
    assert_eq!(json(&on_run(&run_dir, &["resume"]))["state"], "running");

    let fetched = follow.wait_with_output().expect("it ends");
    assert!(fetched.status.success(), "{}", stderr(&fetched));
    let trained = train.wait_with_output().expect("it ends");
    assert!(trained.status.success(), "{}", stderr(&trained));
    let kept = read_dataset(&run_dir.join("rollouts")).expect("a dataset");
    assert!(!kept.is_empty() && samples(&all) == kept, "every sample of the run, and no other");
    assert_eq!(export_parquet(&run_dir.join("rollouts"), &part).expect("writes"), kept.len() as u64);
}

#[test]
fn a_file_of_no_known_kind_is_refused_before_anything_is_asked() {
    let output =
        temper().args(["fetch", "--run-dir", "nowhere", "--output", "rows.csv"]).output().expect("the binary starts");
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("rows.csv: expected a name that ends in .parquet, .arrow"), "{}", stderr(&output));
    let output = temper().args(["fetch", "--step", "3", "--follow"]).output().expect("the binary starts");
    assert_eq!(output.status.code(), Some(2));
}
