//! Whether every row of the data can be encoded and fits the model, so that no run stops at one.

use super::{Recipe, RecipeError, Source};
use crate::draft_model;
use crate::local_text::LocalText;
use std::num::NonZeroUsize;
use std::path::Path;
use temper_actor::{ModelConfig, Tokenizer};
use temper_controller::{DatasetConfig, DistillStage, Stage};
use temper_data::prompts::read_prompts;
use temper_proto::TextService;
use temper_types::{PromptContent, PromptRow, SamplingParams};

/// The tokenizer of a recipe's model, and the positions that it has.
pub(super) struct Texts {
    text: LocalText,
    config: ModelConfig,
}

/// What a row must leave room for.
#[derive(Clone, Copy)]
enum Use {
    /// The prompt and so many tokens that are drawn behind it, of which the last is never computed.
    Prompt { new_tokens: usize },
    /// The prompt and each of the row's responses.
    Responses,
}

impl Texts {
    /// Of a model by its tokenizer and its shape.
    pub(super) fn new((tokenizer, config): (Tokenizer, ModelConfig)) -> Self {
        Texts { text: LocalText::new(tokenizer, &config), config }
    }

    /// The tokenizer.
    pub(super) fn service(&self) -> &dyn TextService {
        &self.text
    }

    /// Check the model that drafts, where there is one.
    pub(super) fn check_draft_model(&self, recipe: &Recipe, source: &Source) -> Result<(), RecipeError> {
        let dir = &recipe.engine.draft_model;
        if dir.is_empty() {
            return Ok(());
        }
        let checked = draft_model::check(Path::new(dir), &self.text, self.config.vocab_size);
        checked.map_err(|e| source.error("engine.draft_model", format!("{e:#}")))
    }

    /// Check the rows that a stage reads.
    pub(super) fn check_stage(
        &self,
        recipe: &Recipe,
        source: &Source,
        (stage, rows, held_out): (&Stage, &[PromptRow], &[PromptRow]),
    ) -> Result<(), RecipeError> {
        let check = |name: &str, rows: &[PromptRow], needed: Use| self.check(recipe, source, (name, rows), needed);
        match stage {
            Stage::Policy(stage) => check(&stage.data, rows, Use::drawn(&stage.sampling)),
            Stage::OnlinePreference(stage) => check(&stage.policy.data, rows, Use::drawn(&stage.policy.sampling)),
            Stage::Distill(stage) => {
                let DistillStage { data, on_policy_fraction, sampling, .. } = &**stage;
                if *on_policy_fraction > 0.0 {
                    check(data, rows, Use::drawn(sampling))?;
                }
                if *on_policy_fraction < 1.0 { check(data, rows, Use::Responses) } else { Ok(()) }
            }
            Stage::Sft(stage) => check(&stage.data, rows, Use::Responses),
            Stage::RewardModel(stage) => {
                check(&stage.data, rows, Use::Responses)?;
                check(&stage.held_out, held_out, Use::Responses)
            }
            Stage::Preference(stage) => {
                check(&stage.data, rows, Use::Responses)?;
                check(&stage.held_out, held_out, Use::Responses)
            }
        }
    }

    /// Check the rows that validation answers with `sampling`.
    pub(super) fn check_validation(
        &self,
        recipe: &Recipe,
        source: &Source,
        (rows, sampling): (&[PromptRow], &SamplingParams),
    ) -> Result<(), RecipeError> {
        self.check(recipe, source, (&recipe.validation.data, rows), Use::drawn(sampling))
    }

    fn check(
        &self,
        recipe: &Recipe,
        source: &Source,
        (name, rows): (&str, &[PromptRow]),
        needed: Use,
    ) -> Result<(), RecipeError> {
        match self.first_problem(rows, needed) {
            None => Ok(()),
            Some((row, problem)) => {
                let place = recipe.data.get(name).map(|config| place(config, row)).unwrap_or_default();
                Err(source.error(&format!("data.{name}"), format!("{place}: {problem}")))
            }
        }
    }

    /// The first row that does not fit, and why. Rows are cut into parts that are read at once.
    fn first_problem<'a>(&self, rows: &'a [PromptRow], needed: Use) -> Option<(&'a PromptRow, String)> {
        let num_parts = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let part_len = rows.len().div_ceil(num_parts).max(1);
        let find = |part: &'a [PromptRow]| part.iter().find_map(|row| Some((row, self.problem(row, needed)?)));
        std::thread::scope(|scope| {
            let parts: Vec<_> = rows.chunks(part_len).map(|part| scope.spawn(move || find(part))).collect();
            // A thread that panicked found nothing that could be said; the run will meet it.
            parts.into_iter().filter_map(|part| part.join().ok().flatten()).next()
        })
    }

    /// What is wrong with a row, if anything.
    fn problem(&self, row: &PromptRow, needed: Use) -> Option<String> {
        let prompt = match self.text.encode_prompt(&row.prompt) {
            Ok(ids) if ids.is_empty() => return Some("the prompt has no token: expected at least one".to_owned()),
            Ok(ids) => ids.len(),
            Err(error) => return Some(format!("the prompt cannot be encoded: {}", error.message)),
        };
        let most = self.config.max_position_embeddings;
        match needed {
            Use::Prompt { new_tokens } if prompt + new_tokens - 1 > most => Some(format!(
                "the prompt has {prompt} tokens and up to {new_tokens} are drawn behind it: the model has {most} \
                 positions; expected max_prompt_tokens = {} or less, which leaves longer prompts out",
                (most + 1).saturating_sub(new_tokens)
            )),
            Use::Prompt { .. } => None,
            Use::Responses => {
                let responses = [("completion", &row.completion), ("chosen", &row.chosen), ("rejected", &row.rejected)];
                let mut given = responses.into_iter().filter_map(|(name, response)| Some((name, response.as_ref()?)));
                given.find_map(|(name, response)| self.response_problem(prompt, name, response))
            }
        }
    }

    fn response_problem(&self, prompt: usize, name: &str, response: &PromptContent) -> Option<String> {
        let most = self.config.max_position_embeddings;
        match self.text.encode_response(response) {
            Err(error) => Some(format!("`{name}` cannot be encoded: {}", error.message)),
            Ok(ids) if !ids.iter().all(|id| self.text.tokenizer().token_bytes(*id).is_some()) => {
                Some(format!("`{name}` has an id that is no token of the model"))
            }
            Ok(ids) if prompt + ids.len() > most => Some(format!(
                "the prompt has {prompt} tokens and `{name}` {}: the model has {most} positions",
                ids.len()
            )),
            Ok(_) => None,
        }
    }
}

impl Use {
    fn drawn(sampling: &SamplingParams) -> Self {
        Use::Prompt { new_tokens: (sampling.max_new_tokens as usize).max(1) }
    }
}

/// A row by its file and its number there, from 0; only its number where it was made, or files cannot be read again.
fn place(config: &DatasetConfig, row: &PromptRow) -> String {
    let mut number = row.prompt_id.0;
    for file in &config.files {
        let Ok(rows) = read_prompts(std::slice::from_ref(file)) else { break };
        match number.checked_sub(rows.len() as u64) {
            Some(rest) => number = rest,
            None => return format!("row {number} of {}", file.display()),
        }
    }
    format!("row {}", row.prompt_id)
}
