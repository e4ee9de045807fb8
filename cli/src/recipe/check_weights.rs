//! What `engine.weights` means for a run: engines of other weights than those that train are off-policy.

use super::check_replay::policy_stages;
use super::{Recipe, RecipeError, Source};
use temper_algos::{BypassLoss, IsLevel, LossMode};
use temper_controller::{PolicyStage, Stage};
use temper_types::WeightFormat;

/// What it adds to the run's identity; nothing where engines have the weights that train.
pub(super) fn identity(recipe: &Recipe) -> String {
    match recipe.engine.weights {
        WeightFormat::Exact => String::new(),
        weights => format!("weights {weights}"),
    }
}

/// Stages that learn from log-probs must weigh whose they are, and engines must be able to hold such weights.
pub(super) fn check(recipe: &Recipe, source: &Source) -> Result<(), RecipeError> {
    let weights = recipe.engine.weights;
    if weights == WeightFormat::Exact {
        return Ok(());
    }
    let num_ranks = recipe.placement.rollout_tensor_parallel;
    if num_ranks > 1 {
        let problem = format!(
            "\"{weights}\" does not go with placement.rollout_tensor_parallel = {num_ranks}, whose ranks hold exact \
             weights: expected \"exact\", or rollout_tensor_parallel = 1"
        );
        return Err(source.error("engine.weights", problem));
    }
    for (index, stage) in recipe.stages.iter().enumerate() {
        let Stage::Policy(stage) = stage else { continue };
        if !weighs_engine(stage) {
            let problem = format!(
                "engine.weights = \"{weights}\" draws from another policy than the one that trains, and nothing weighs \
                 that: expected rollout_is = \"token\" or \"sequence\" (or loss_mode = \"bypass_mode\")"
            );
            let key = format!("stage.{index}.algorithm.policy_loss.rollout_correction");
            return Err(source.error(&key, problem));
        }
    }
    Ok(())
}

/// True where the ratio against the engine's log-probs enters the loss.
fn weighs_engine(stage: &PolicyStage) -> bool {
    let loss = &stage.algorithm.policy_loss;
    let is_ratio = loss.loss_mode == LossMode::BypassMode && loss.rollout_correction.loss_type == BypassLoss::PpoClip;
    is_ratio || loss.rollout_correction.rollout_is != IsLevel::None
}

/// In words, where it changes what is drawn.
pub(super) fn summary(recipe: &Recipe) -> Vec<String> {
    let weights = recipe.engine.weights;
    if weights == WeightFormat::Exact {
        return Vec::new();
    }
    let mut lines = vec![format!(
        "weights {weights}: OFF-POLICY, engines quantise every new set of weights and draw from what that leaves; \
         rollout_train_log_prob_diff_max says how far that is, and validation is of the quantised policy too"
    )];
    let unweighed = policy_stages(recipe).filter(|(_, stage)| !weighs_engine(stage));
    lines.extend(unweighed.map(|(index, stage)| {
        format!("stage {} `{}`: the loss compares pairs and weighs no token's law", index + 1, stage.name)
    }));
    lines
}
