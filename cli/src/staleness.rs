//! Batches generated ahead of their step: what a recipe may ask for, and what that means for its run.

use crate::recipe::{Placement, PlacementMode, Recipe, RecipeError, Source};
use temper_controller::{Generation, MAX_STALENESS, PolicyStage, Stage};
use temper_reward::{RewardKind, RewardModelSource};

/// Check `placement.staleness`.
///
/// # Errors
/// A number out of range, by key.
pub fn check(placement: &Placement, source: &Source) -> Result<(), RecipeError> {
    let staleness = placement.staleness;
    if staleness <= MAX_STALENESS {
        return Ok(());
    }
    let problem = format!("{staleness} is out of range: expected 0 (synchronous) to {MAX_STALENESS}");
    Err(source.error("placement.staleness", problem))
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

/// The part of a stage that generates ahead, where it does.
fn generates_ahead(stage: &Stage) -> Option<&PolicyStage> {
    match stage {
        Stage::Policy(policy) => Some(policy),
        Stage::OnlinePreference(stage) => Some(&stage.policy),
        Stage::Sft(_) | Stage::RewardModel(_) | Stage::Preference(_) | Stage::Distill(_) => None,
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
        let line = match (stage, generates_ahead(stage)) {
            (Stage::Distill(_), _) => "generates within its step: staleness 0".to_owned(),
            (Stage::Policy(_), Some(policy)) if !policy.algorithm.policy_loss.rollout_correction.is_active() => {
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
