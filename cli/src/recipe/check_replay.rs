//! What `engine.replay` means for a run: part of its identity, and announced where it is lossy.

use super::{Recipe, RecipeError, Source};
use temper_controller::PolicyStage;
use temper_rollout::{Replay, Speculative};

/// What it adds to the run's identity; nothing where it changes no token.
pub(super) fn identity(recipe: &Recipe) -> String {
    match recipe.engine.replay {
        Replay::Exact => String::new(),
        Replay::Coupled => "replay coupled".to_owned(),
        Replay::Lenient => format!("replay lenient {}", recipe.engine.lenience),
    }
}

/// Lenient replay compares log-probs of the untruncated law.
pub(super) fn check(recipe: &Recipe, source: &Source) -> Result<(), RecipeError> {
    if recipe.engine.replay != Replay::Lenient {
        return Ok(());
    }
    for (index, stage) in policy_stages(recipe) {
        if stage.partial_rollouts.is_some() {
            let problem = "a response that goes on is not replayed leniently too: expected engine.replay = \
                           \"exact\" or \"coupled\", or no partial_rollouts";
            return Err(source.error(&format!("stage.{index}.partial_rollouts"), problem));
        }
        let sampling = &stage.sampling;
        // The model's stop ids, which the recipe need not name, are banned before min_new_tokens.
        if sampling.is_truncated() || sampling.min_new_tokens > 0 {
            let problem = "engine.replay = \"lenient\" compares log-probs of the untruncated law: expected no top_p, \
                           top_k, min_p, penalty, bias, ban or min_new_tokens";
            return Err(source.error(&format!("stage.{index}.sampling"), problem));
        }
    }
    Ok(())
}

/// In words, where it changes what is drawn.
pub(super) fn summary(recipe: &Recipe) -> Option<String> {
    let idle = match recipe.engine.speculative {
        Speculative::Off | Speculative::Suffix => {
            "; nothing is faster without engine.speculative = \"replay\" or \"auto\""
        }
        _ => "",
    };
    match recipe.engine.replay {
        Replay::Exact => None,
        Replay::Coupled => Some(format!(
            "replay coupled: every pass over a prompt draws with the noise of the first; passes are not independent{idle}"
        )),
        Replay::Lenient => {
            let l = recipe.engine.lenience;
            let corrects = |stage: &PolicyStage| stage.algorithm.plan().rollout_correction;
            let uncorrected = match policy_stages(recipe).all(|(_, stage)| corrects(stage)) {
                true => "",
                false => {
                    "; no rollout correction is set (rollout_is), so that the loss takes them for the policy's own"
                }
            };
            Some(format!(
                "replay lenient, l = {l}: LOSSY, from the second pass over a prompt on tokens of the pass before are taken \
                 again with probability min(1, {l} p_new / p_old) and do not follow the policy{uncorrected}{idle}"
            ))
        }
    }
}

pub(super) fn policy_stages(recipe: &Recipe) -> impl Iterator<Item = (usize, &PolicyStage)> {
    recipe.stages.iter().enumerate().filter_map(|(index, stage)| Some((index, stage.policy()?)))
}
