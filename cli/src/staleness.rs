//! What overlaps in a run: batches generated ahead of their step, and scoring beside generation. What a recipe may ask
//! for, and what that means for its run.

use crate::recipe::{Placement, PlacementMode, Recipe, RecipeError, Source};
use temper_controller::{Generation, MAX_STALENESS, Scoring, Stage};
use temper_reward::{RewardKind, RewardModelSource};

/// Check `placement.staleness`, and that engines which may sleep have nothing to do then.
///
/// # Errors
/// A number out of range, or sleep beside batches that are ahead, by key.
pub fn check(placement: &Placement, source: &Source) -> Result<(), RecipeError> {
    let staleness = placement.staleness;
    if staleness > MAX_STALENESS {
        let problem = format!("{staleness} is out of range: expected 0 (synchronous) to {MAX_STALENESS}");
        return Err(source.error("placement.staleness", problem));
    }
    if placement.sleep && staleness > 0 {
        let problem = format!(
            "true does not go with staleness = {staleness}: engines generate while the trainer trains, and need their \
             K/V memory then; expected sleep = false or staleness = 0"
        );
        return Err(source.error("placement.sleep", problem));
    }
    Ok(())
}

/// True where a reward asks the trainer, whose ranks answer one call after the other.
fn asks_the_trainer(recipe: &Recipe) -> bool {
    let trained =
        |kind: &RewardKind| matches!(kind, RewardKind::RewardModel(c) if c.model == RewardModelSource::Trained);
    recipe.reward.components.iter().any(|component| trained(&component.kind))
}

/// When batches that are ahead are generated.
pub fn generation(recipe: &Recipe) -> Generation {
    match recipe.placement.mode {
        PlacementMode::Processes if !asks_the_trainer(recipe) => Generation::DuringTraining,
        PlacementMode::Processes | PlacementMode::Embedded => Generation::BeforeTraining,
    }
}

/// Calls of reward workers that may be under way at once.
const MAX_SCORE_CALLS: usize = 64;

/// When responses are scored. A reward model in the engine's own process computes where the engine does: it waits until
/// the engine is done. One process scores one group after another, so that the breaker of a reward sees the samples of
/// two equal runs in one order.
pub fn scoring(recipe: &Recipe) -> Scoring {
    let is_model = |kind: &RewardKind| matches!(kind, RewardKind::RewardModel(_));
    let has_model = recipe.reward.components.iter().any(|component| is_model(&component.kind));
    match recipe.placement.mode {
        _ if !recipe.placement.stream_rewards => Scoring::AfterGeneration,
        PlacementMode::Embedded if has_model => Scoring::AfterGeneration,
        PlacementMode::Embedded => Scoring::AsGroupsEnd { max_calls: 1 },
        PlacementMode::Processes => Scoring::AsGroupsEnd { max_calls: MAX_SCORE_CALLS },
    }
}

/// What `temper check` says of staleness; nothing of a synchronous run.
pub fn summary(recipe: &Recipe) -> Vec<String> {
    let n = recipe.placement.staleness;
    if n == 0 {
        return Vec::new();
    }
    let when = match (generation(recipe), recipe.placement.mode) {
        (Generation::DuringTraining, _) => "generated while the trainer trains",
        (Generation::BeforeTraining, PlacementMode::Embedded) => {
            "generated before the trainer trains, for one process does one thing after another (same numbers, no overlap)"
        }
        (Generation::BeforeTraining, PlacementMode::Processes) => {
            "generated before the trainer trains, which also scores them (same numbers, no overlap)"
        }
    };
    let mut lines = vec![format!(
        "staleness {n}: the batch of step k comes from the weights after step k-{}, or the stage's first ones; {n} \
         batch(es) ahead, {when}",
        n + 1
    )];
    for (index, stage) in recipe.stages.iter().enumerate() {
        let line = match stage {
            Stage::Distill(_) => "generates within its step: staleness 0".to_owned(),
            Stage::Policy(policy) if !policy.algorithm.policy_loss.rollout_correction.is_active() => {
                "no rollout correction: the ratio is against the trainer's own log-probs at the start of a step, and \
                 what lies between those and the engine's is not weighed; algorithm.policy_loss.rollout_correction = \
                 { rollout_is = \"token\" } weighs it"
                    .to_owned()
            }
            _ => continue,
        };
        lines.push(format!("stage {} `{}`: {line}", index + 1, stage.name()));
    }
    lines
}
