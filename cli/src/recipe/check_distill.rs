//! Checks of stages that distil a teacher.

use super::check::{check_lengths, check_model_dir};
use super::{Recipe, RecipeError, Source};
use crate::teachers::same_tokenizer;
use std::path::Path;
use temper_actor::{ModelConfig, sequence_parallel_problem};
use temper_controller::{DistillStage, Stage};
use temper_types::PromptRow;

/// A teacher that can be loaded and reads the policy's ids, and completions where the policy does not answer itself.
/// A policy that is made with the run is compared with its teacher when it is there.
pub(super) fn check(
    recipe: &Recipe,
    source: &Source,
    key: &str,
    (stage, rows): (&DistillStage, &[PromptRow]),
) -> Result<(), RecipeError> {
    let (teacher, teacher_key) = (&stage.teacher.path, format!("{key}.teacher.path"));
    check_model_dir(teacher).map_err(|problem| source.error(&teacher_key, problem))?;
    let config = ModelConfig::load(teacher).map_err(|e| source.error(&teacher_key, e))?;
    check_heads(recipe, source, (&config, teacher))?;
    if let Some(policy) = &recipe.model.path {
        same_tokenizer(teacher, policy).map_err(|e| source.error(&teacher_key, format!("{e:#}")))?;
        let expected = ModelConfig::load(policy).map_err(|e| source.error(&teacher_key, e))?.vocab_size;
        let own = config.vocab_size;
        if own != expected {
            let problem = format!("has a vocabulary of {own}: expected {expected}, the policy's");
            return Err(source.error(&teacher_key, problem));
        }
    }
    if stage.on_policy_fraction > 0.0 {
        check_lengths(recipe, source, key, &stage.rollout())?;
    }
    match rows.iter().find(|row| row.completion.is_none()) {
        Some(row) if stage.on_policy_fraction < 1.0 => {
            let problem = format!(
                "row {} of `{}` has no `completion`: expected one in every row, or on_policy_fraction = 1",
                row.prompt_id, stage.data
            );
            Err(source.error(&format!("{key}.data"), problem))
        }
        _ => Ok(()),
    }
}

/// Check that the heads of a teacher can be divided over the ranks that share rows.
///
/// # Errors
/// That they cannot, by key.
fn check_heads(recipe: &Recipe, source: &Source, (config, dir): (&ModelConfig, &Path)) -> Result<(), RecipeError> {
    match sequence_parallel_problem(config, recipe.placement.sequence_parallel) {
        Some(problem) => {
            let problem = format!("{problem}, of the teacher in {}", dir.display());
            Err(source.error("placement.sequence_parallel", problem))
        }
        None => Ok(()),
    }
}

/// Check the heads of every stage's teacher, as [`check`] does.
///
/// # Errors
/// A teacher that cannot be read, or whose heads cannot be divided, by key.
pub fn check_teachers(recipe: &Recipe, source: &Source) -> Result<(), RecipeError> {
    for (index, stage) in recipe.stages.iter().enumerate() {
        let Stage::Distill(stage) = stage else { continue };
        let teacher = &stage.teacher.path;
        let read = ModelConfig::load(teacher);
        let config = read.map_err(|e| source.error(&format!("stage.{index}.teacher.path"), e))?;
        check_heads(recipe, source, (&config, teacher))?;
    }
    Ok(())
}

/// What the stage does, in words.
pub(super) fn summary(stage: &DistillStage, rows: usize) -> String {
    let taken = stage.steps as f64 * stage.prompts_per_step as f64;
    format!(
        "{} steps; each {} prompts, of which the policy answers {:.0} % with {} sample(s) of at most {} tokens; teacher \
         {}; {rows} rows, {:.1} passes over them",
        stage.steps,
        stage.prompts_per_step,
        100.0 * stage.on_policy_fraction,
        stage.num_generations,
        stage.sampling.max_new_tokens,
        stage.teacher.path.display(),
        taken / rows.max(1) as f64
    )
}
