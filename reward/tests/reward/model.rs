//! Reward models as components: whose scores they are, and what happens to a sample without one.

use crate::scorer;
use crate::service::request;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use temper_proto::{RewardService, ScoreRequest};
use temper_reward::{Error, LocalRewardService, ModelScorer, SequenceScorer};
use temper_tensor::{CpuConfig, CpuDevice, DType, Device};
use temper_types::RewardOutcome;

const REWARD: &str = "{ components = [{ kind = \"reward_model\", model = \"trained\", weight = 2.0 }, \
                      { kind = \"number\", weight = 0.0 }] }";

/// Scores a sequence with what stands in for it.
struct Fake(fn(u32) -> Result<f32, String>);

impl SequenceScorer for Fake {
    fn scores(&self, sequences: &[(&[u32], &[u32])]) -> Result<Vec<f32>, String> {
        sequences.iter().map(|(prompt, response)| (self.0)(prompt[0] * 100 + response[0])).collect()
    }
}

fn outcomes(fake: Fake) -> Vec<RewardOutcome> {
    let model: Arc<dyn SequenceScorer> = Arc::new(fake);
    let find = |_: &_| Ok::<_, Error>(Arc::clone(&model));
    let service = LocalRewardService::new(scorer(REWARD), NonZeroUsize::new(2).expect("2 is not 0"))
        .with_models(find)
        .expect("the model is there");
    let request = |prompt: u64| ScoreRequest { prompt_token_ids: vec![prompt as u32], ..request(prompt, Some("1")) };
    service.score(&(1..6).map(request).collect::<Vec<_>>()).expect("a batch is scored")
}

fn cause(outcome: &RewardOutcome) -> String {
    match outcome {
        RewardOutcome::Failed(failure) => failure.to_string(),
        scored => panic!("expected a failure, got {scored:?}"),
    }
}

#[test]
fn every_sample_gets_the_score_of_its_own_ids() {
    let rewards: Vec<_> = outcomes(Fake(|id| Ok(id as f32))).iter().map(RewardOutcome::reward).collect();
    let wanted: Vec<_> = (1..6).map(|prompt| Some(2.0 * f64::from(prompt * 100 + 2))).collect();
    assert_eq!(rewards, wanted);
}

#[test]
fn a_score_that_is_not_finite_fails_its_sample_alone() {
    let outcomes = outcomes(Fake(|id| Ok(if id == 302 { f32::NAN } else { 0.5 })));
    assert_eq!(outcomes.iter().filter(|o| o.reward() == Some(1.0)).count(), 4);
    let cause = cause(&outcomes[2]);
    assert!(cause.contains("reward_model") && cause.contains("not finite") && cause.contains("prompt 3"), "{cause}");
}

#[test]
fn a_model_that_cannot_score_fails_every_sample_with_its_cause() {
    for outcome in outcomes(Fake(|_| Err("out of order".to_owned()))) {
        assert!(cause(&outcome).contains("out of order"));
    }
    let without = LocalRewardService::new(scorer(REWARD), NonZeroUsize::MIN);
    assert!(cause(&without.score(&[request(1, Some("1"))]).unwrap()[0]).contains("without this model"));
}

#[test]
fn a_directory_scores_as_transformers_does() {
    let device: Arc<dyn Device> = Arc::new(CpuDevice::new(CpuConfig { num_threads: 2, isa: None }));
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../actor/tests/data/reward_llama");
    let model = ModelScorer::load(&device, &dir, DType::F32).unwrap();
    let text = std::fs::read_to_string(dir.join("reference.json")).unwrap();
    let reference: serde_json::Value = serde_json::from_str(&text).unwrap();
    let case = reference["cases"].as_array().unwrap().iter().find(|case| case["name"] == "padding_none").unwrap();
    let numbers = |value: &serde_json::Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let ids: Vec<Vec<u32>> = case["input_ids"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| numbers(row).into_iter().map(|id| id as u32).collect())
        .collect();
    let halves: Vec<(&[u32], &[u32])> = ids.iter().map(|row| row.split_at(2)).collect();
    let scores = model.scores(&halves).unwrap();
    for (got, want) in scores.iter().zip(numbers(&case["scores"])) {
        assert!((f64::from(*got) - want).abs() < 1e-4, "{got} against {want}");
    }
    assert!(model.scores(&[(&[64], &[1])]).unwrap_err().contains("token id 64"));
    let policy = dir.with_file_name("llama");
    assert!(
        ModelScorer::load(&device, &policy, DType::F32).unwrap_err().to_string().contains("SequenceClassification")
    );
}
