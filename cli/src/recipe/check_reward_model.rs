//! Checks of stages and rewards that hold a reward model.

use super::{Recipe, RecipeError, Source};
use temper_algos::preference::PreferenceForm;
use temper_controller::{PolicyStage, RewardModelStage, Stage, check_preferences};
use temper_proto::Backbone;
use temper_reward::{ModelScorer, RewardKind, RewardModelSource};
use temper_types::PromptRow;

/// Every row is a pair; `name` is the dataset's.
pub(super) fn check_pairs(source: &Source, key: &str, name: &str, rows: &[PromptRow]) -> Result<(), RecipeError> {
    check_preferences(PreferenceForm::Pairs, name, rows).map_err(|e| source.error(key, e))
}

/// Every reward model that is given by its directory is one.
pub(super) fn check_directories(recipe: &Recipe, source: &Source) -> Result<(), RecipeError> {
    for (index, component) in recipe.reward.components.iter().enumerate() {
        let RewardKind::RewardModel(config) = &component.kind else { continue };
        if let RewardModelSource::Path(path) = &config.model {
            let key = format!("reward.components.{index}.model.path");
            ModelScorer::config(path).map_err(|e| source.error(&key, e))?;
        }
    }
    Ok(())
}

/// What a policy stage takes from the reward model of an earlier stage must be there by then.
pub(super) fn check_earlier(
    recipe: &Recipe,
    source: &Source,
    (index, stage): (usize, &PolicyStage),
) -> Result<(), RecipeError> {
    let earlier: Vec<&RewardModelStage> = recipe.stages[..index].iter().filter_map(reward_model_stage).collect();
    if !earlier.is_empty() {
        return Ok(());
    }
    let from_stage =
        |kind: &RewardKind| matches!(kind, RewardKind::RewardModel(c) if c.model == RewardModelSource::Trained);
    if let Some(component) = recipe.reward.components.iter().position(|c| from_stage(&c.kind)) {
        let problem = format!(
            "\"trained\" is the reward model of an earlier stage, and no stage of kind `reward_model` comes before \
             stage {} `{}`: add one, or give model = {{ path = \"...\" }}",
            index + 1,
            stage.name
        );
        return Err(source.error(&format!("reward.components.{component}.model"), problem));
    }
    match &stage.critic {
        Some(critic) if critic.backbone == Backbone::RewardModel => {
            let problem = "no stage of kind `reward_model` comes before this one: expected \"policy\"";
            Err(source.error(&format!("stage.{index}.critic.backbone"), problem))
        }
        _ => Ok(()),
    }
}

fn reward_model_stage(stage: &Stage) -> Option<&RewardModelStage> {
    match stage {
        Stage::RewardModel(stage) => Some(stage),
        _ => None,
    }
}

/// What the stage does, in words.
pub(super) fn summary(stage: &RewardModelStage, rows: usize) -> String {
    let taken = stage.steps * stage.batch_size as u64;
    format!(
        "{} steps of {} pairs; {rows} rows, {:.1} passes over them",
        stage.steps,
        stage.batch_size,
        taken as f64 / rows.max(1) as f64
    )
}
