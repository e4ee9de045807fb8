//! What `partial_rollouts` of a stage means for its steps, in words.

use super::check_replay::policy_stages;
use super::{Recipe, RecipeError, Source};
use temper_controller::{PartialPolicy, PartialRollouts, PolicyStage};

/// What `temper check` says of stages that train on the first groups that are complete.
pub(super) fn summary(recipe: &Recipe) -> Vec<String> {
    let line = |(index, stage): (usize, &PolicyStage)| {
        let partial = stage.partial_rollouts.as_ref()?;
        Some(format!("stage {} `{}`: {}", index + 1, stage.name, describe(stage, partial)))
    };
    policy_stages(recipe).filter_map(line).collect()
}

/// True where a stage lets samples go on over K/V of older weights: whole blocks of them, so that their size decides
/// tokens.
pub(super) fn keeps_kv(recipe: &Recipe) -> bool {
    policy_stages(recipe).any(|(_, stage)| stage.keeps_kv())
}

/// What it adds to the run's identity; nothing where it changes no token.
pub(super) fn identity(recipe: &Recipe) -> String {
    if keeps_kv(recipe) { format!("kept in blocks of {}", recipe.engine.block_size) } else { String::new() }
}

/// K/V that are to be kept need memory where they are, and steps that are not redone.
pub(super) fn check(recipe: &Recipe, source: &Source) -> Result<(), RecipeError> {
    let Some((index, _)) = policy_stages(recipe).find(|(_, stage)| stage.keeps_kv()) else { return Ok(()) };
    let placement = &recipe.placement;
    let problem = if !recipe.engine.prefix_cache {
        "keep_kv would keep nothing: K/V are kept where prefixes are cached; expected engine.prefix_cache = true"
    } else if placement.sleep {
        "keep_kv would keep nothing: engines that sleep between steps give their K/V back; expected placement.sleep = \
         false"
    } else if placement.mirror_shards {
        "keep_kv does not go with mirrors: a step that is redone would not find the K/V that it began with; expected \
         placement.mirror_shards = false"
    } else {
        return Ok(());
    };
    Err(source.error(&format!("stage.{index}.partial_rollouts.policy"), format!("{problem}, or the policy recompute")))
}

fn describe(stage: &PolicyStage, partial: &PartialRollouts) -> String {
    let (prompts, round) = (stage.prompts_per_step, partial.round_tokens);
    let under_way = format!("{} prompts under way at once", partial.num_groups(prompts));
    let first =
        format!("{under_way}; a step trains on the first {prompts} that are complete, seen every {round} tokens");
    let weighed = match stage.algorithm.policy_loss.rollout_correction.is_active() {
        true => "",
        false => "; no rollout correction is set (rollout_is): tokens of older weights are not weighed",
    };
    match partial.policy {
        PartialPolicy::Finish => {
            format!("{under_way}, all drawn to their ends; a step trains on the oldest {prompts}{weighed}")
        }
        PartialPolicy::Abort => {
            format!("{first}; samples that have not ended are thrown away and drawn anew in the next step{weighed}")
        }
        PartialPolicy::Recompute => {
            format!("{first}; samples that have not ended go on under the weights of the next step{weighed}")
        }
        PartialPolicy::KeepKv => format!(
            "{first}; LOSSY, samples that have not ended go on over K/V of the weights that began them, and a run that is \
             resumed draws other tokens{weighed}"
        ),
    }
}
