//! Settings that are changed while a run goes on, and what a resumed run makes of them.

use crate::fakes::{Behaviour, Call, prepare, stage, updates};
use serde_json::json;
use std::path::Path;
use temper_controller::PolicyStage;

const CHANGES: [(&str, f64); 3] = [("learning_rate", 0.125), ("temperature", 0.75), ("kl_coef", 0.5)];
const NUM_STEPS: u64 = 6;

fn recipe() -> PolicyStage {
    stage(
        NUM_STEPS,
        json!({"kl_in_reward": {"use_kl_in_reward": true, "kl_penalty": "abs",
        "kl_ctrl": {"type": "fixed", "kl_coef": 0.25}}}),
    )
}

/// Run, or go on; `changes` are asked for while the third step ends.
fn run(dir: &Path, changes: &'static [(&'static str, f64)]) -> Vec<Call> {
    let behaviour = Behaviour { gap: 0.5, ..Behaviour::default() };
    let (mut controller, resume, calls) = prepare(dir, recipe(), behaviour).expect("it begins");
    let control = controller.control();
    controller.observe_steps(Box::new(move |row| {
        for (key, value) in changes.iter().filter(|_| row.step() == 3) {
            assert_eq!(control.set(key, *value).expect("a known setting").from_step, 4);
        }
    }));
    controller.run(resume.as_ref()).expect("it ends well");
    drop(controller);
    std::mem::take(&mut *calls.lock().expect("no panic elsewhere"))
}

/// As a kill before the fourth step's checkpoint leaves it.
fn back_to_step_2(dir: &Path) {
    for step in [4, 6] {
        std::fs::remove_dir_all(dir.join(format!("checkpoints/step-{step}"))).expect("removable");
    }
}

#[test]
fn a_change_after_the_last_checkpoint_is_made_again_before_the_same_step() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let calls = run(dir.path(), &CHANGES);
    let rates: Vec<f64> = updates(&calls).iter().map(|batch| batch.learning_rate).collect();
    assert!(rates[..3].iter().all(|rate| *rate == rates[0] && *rate != 0.125), "{rates:?}");
    assert_eq!(rates[3..], [0.125; 3]);
    assert!(updates(&calls)[3..].iter().all(|batch| batch.temperature == 0.75));
    back_to_step_2(dir.path());
    let resumed = run(dir.path(), &[]);
    assert_eq!(updates(&resumed).len(), 4);
    assert!(calls.ends_with(&resumed), "the resumed run differs");
    // Without its journal it would.
    back_to_step_2(dir.path());
    std::fs::remove_file(dir.path().join("control.jsonl")).expect("removable");
    assert!(!calls.ends_with(&run(dir.path(), &[])));
}
