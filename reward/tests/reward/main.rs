//! Rewards as a recipe writes them, run on responses.

mod config;
mod laws;
mod math;
mod model;
mod number;
mod service;
mod text;

use temper_reward::{RewardConfig, ScoreInput, Scorer};
use temper_types::{FinishReason, RewardOutcome};

/// What a case expects.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Want {
    /// This reward.
    Reward(f64),
    /// A failure whose text contains this.
    Failure(&'static str),
}

/// The answer is right.
pub const RIGHT: Want = Want::Reward(1.0);
/// The answer is wrong.
pub const WRONG: Want = Want::Reward(0.0);

/// A sample that ended by itself after as many tokens as it has bytes.
pub fn input<'a>(response: &'a str, ground_truth: Option<&'a str>) -> ScoreInput<'a> {
    ScoreInput {
        data_source: "test",
        response,
        ground_truth,
        extra_info: None,
        finish_reason: FinishReason::Stop,
        response_len_tokens: response.len(),
    }
}

/// The scorer of a reward written as in a recipe: the right side of `reward = `.
pub fn scorer(reward: &str) -> Scorer {
    #[derive(serde::Deserialize)]
    struct Recipe {
        reward: RewardConfig,
    }
    let recipe: Recipe = toml::from_str(&format!("reward = {reward}")).unwrap_or_else(|e| panic!("{reward}: {e}"));
    Scorer::new(recipe.reward).unwrap_or_else(|e| panic!("{reward}: {e}"))
}

/// Score every `(response, ground truth, wanted)` with one reward and report all cases that differ.
pub fn check(reward: &str, cases: &[(&str, Option<&str>, Want)]) {
    let scorer = scorer(reward);
    let mut wrong = Vec::new();
    for &(response, truth, want) in cases {
        let outcome = scorer.score(input(response, truth));
        let as_wanted = match (&outcome, want) {
            (RewardOutcome::Scored { reward, .. }, Want::Reward(wanted)) => (reward - wanted).abs() < 1e-12,
            (RewardOutcome::Failed(failure), Want::Failure(part)) => failure.to_string().contains(part),
            _ => false,
        };
        if !as_wanted {
            wrong.push(format!("  {response:?} against {truth:?}: wanted {want:?}, got {outcome:?}"));
        }
    }
    assert!(wrong.is_empty(), "reward = {reward}\n{}", wrong.join("\n"));
}
