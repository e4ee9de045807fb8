//! What `partial_rollouts` of a stage means for its steps, in words.

use super::Recipe;
use super::check_replay::policy_stages;
use temper_controller::{PartialPolicy, PartialRollouts, PolicyStage};

/// What `temper check` says of stages that train on the first groups that are complete.
pub(super) fn summary(recipe: &Recipe) -> Vec<String> {
    let line = |(index, stage): (usize, &PolicyStage)| {
        let partial = stage.partial_rollouts.as_ref()?;
        Some(format!("stage {} `{}`: {}", index + 1, stage.name, describe(stage, partial)))
    };
    policy_stages(recipe).filter_map(line).collect()
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
        PartialPolicy::KeepKv => under_way,
    }
}
