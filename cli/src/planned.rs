//! From a recipe to the work that is planned for it: its stage, its model's sizes, its prompts' lengths.

use crate::local_text::LocalText;
use crate::plan::{Divisions, Expected, Workload};
use crate::recipe::{Placement, Recipe, RecipeError, Source, check_teachers, config_error, config_error_at};
use crate::{rollout_ranks, trainer_ranks, usage};
use anyhow::{Context, Result};
use std::path::Path;
use temper_actor::ModelConfig;
use temper_controller::{PolicyStage, Stage, load_dataset};
use temper_proto::TextService;
use temper_types::{DType, PromptRow, WeightFormat};

/// Prompts whose lengths are taken for those of all.
const SAMPLED_PROMPTS: usize = 256;

/// Lengths that the recipe does not tell.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Lengths {
    /// Expected tokens of a prompt; without it the mean over the first prompts of the stage's data.
    #[arg(long, value_name = "N")]
    pub prompt_tokens: Option<f64>,
    /// Expected tokens of a response, such as response_length_mean of an earlier run; without it max_new_tokens.
    #[arg(long, value_name = "N")]
    pub response_tokens: Option<f64>,
}

/// A recipe to plan for.
pub struct Planned {
    /// The recipe.
    pub recipe: Recipe,
    /// The model.
    pub config: ModelConfig,
    /// Number format that the recipe computes in on this machine.
    pub dtype: DType,
    /// Index of the stage.
    pub stage: usize,
    /// What a step of it does.
    pub work: Workload,
}

impl Planned {
    /// Read a recipe and find out what a step of its stage does. Weights are not read.
    ///
    /// # Errors
    /// A recipe that cannot be (exit code 2), by file, line and key; no stage that learns from samples.
    pub fn load((path, set): (&Path, &[String]), stage: Option<&str>, lengths: &Lengths) -> Result<Self> {
        let source = Source::read(path, set).map_err(usage)?;
        let recipe = Recipe::from_source(&source).map_err(usage)?;
        let (index, policy) = find_stage(&recipe, &source, stage).map_err(usage)?;
        recipe.stages[index].validate(&format!("stage.{index}")).map_err(|e| usage(config_error(&source, e)))?;
        recipe.engine.validate().map_err(|e| usage(source.error("engine", e)))?;
        if recipe.engine.weights != WeightFormat::Exact {
            let problem = "engines of other weights than those that train are not planned: expected \"exact\" here";
            return Err(usage(source.error("engine.weights", problem)));
        }
        trainer_ranks::check(&recipe.placement, &source).map_err(usage)?;
        let config = recipe.model_config(&source).map_err(usage)?;
        let expected = expect(&recipe, &source, policy, lengths)?;
        let longest = config.max_position_embeddings as f64;
        if expected.prompt_tokens + expected.response_tokens > longest {
            let (prompt, response) = (expected.prompt_tokens, expected.response_tokens);
            let problem = format!("{prompt:.1} + {response:.1} tokens do not fit the model's {longest} positions");
            return Err(usage(source.error(&format!("stage.{index}"), problem)));
        }
        let dtype = recipe.dtype.resolve(crate::runtime::device(1).info().native_bf16);
        let (divisions, setting) = (divisions(&recipe, &source), (&recipe.engine, &recipe.placement));
        let work = Workload::new(&recipe.stages[index], (&config, dtype), divisions, setting, expected)
            .context("a stage that learns from samples")?;
        Ok(Planned { stage: index, config, dtype, work, recipe })
    }

    /// The stage.
    pub fn policy(&self) -> Result<&PolicyStage> {
        self.recipe.stages[self.stage].policy().context("a stage that learns from samples")
    }
}

/// The numbers of ranks that `temper check` accepts of this recipe's models. A teacher that cannot be read allows no
/// ranks that share rows.
fn divisions(recipe: &Recipe, source: &Source) -> Divisions {
    let with = |change: &dyn Fn(&mut Placement)| {
        let mut other = recipe.clone();
        change(&mut other.placement);
        other
    };
    let tensor = |n: &usize| rollout_ranks::check(&with(&|to| to.rollout_tensor_parallel = *n), source).is_ok();
    let sequence = |n: &usize| {
        let other = with(&|to| to.sequence_parallel = *n);
        *n == 1 || trainer_ranks::check_heads(&other, source).and_then(|()| check_teachers(&other, source)).is_ok()
    };
    Divisions {
        tensor_parallel: rollout_ranks::NUM_RANKS.into_iter().filter(tensor).collect(),
        sequence_parallel: (1..=trainer_ranks::MAX_RANKS).filter(sequence).collect(),
    }
}

fn find_stage<'a>(
    recipe: &'a Recipe,
    source: &Source,
    name: Option<&str>,
) -> Result<(usize, &'a PolicyStage), RecipeError> {
    let all = || recipe.stages.iter().enumerate();
    let names = || recipe.stages.iter().map(Stage::name).collect::<Vec<_>>().join(", ");
    let chosen = match name {
        None => all().find_map(|(index, stage)| Some((index, stage.policy()?))),
        Some(name) => {
            let Some((index, stage)) = all().find(|(_, stage)| stage.name() == name) else {
                return Err(source.error("stage", format!("--stage {name}: expected one of: {}", names())));
            };
            stage.policy().map(|policy| (index, policy))
        }
    };
    chosen.ok_or_else(|| {
        let which = name.map_or_else(|| "no stage".to_owned(), |name| format!("stage `{name}` does not"));
        let problem = format!("{which} of {} draws samples: nothing is generated, there is nothing to place", names());
        source.error("stage", problem)
    })
}

fn expect(recipe: &Recipe, source: &Source, policy: &PolicyStage, lengths: &Lengths) -> Result<Expected> {
    let most = f64::from(policy.sampling.max_new_tokens);
    let response_tokens = lengths.response_tokens.unwrap_or(most);
    if !(1.0..=most).contains(&response_tokens) {
        return Err(usage(format!(
            "--response-tokens {response_tokens}: expected from 1 to max_new_tokens = {most} of the stage"
        )));
    }
    let prompt_tokens = match lengths.prompt_tokens {
        Some(tokens) if tokens >= 1.0 && tokens.is_finite() => tokens,
        Some(tokens) => return Err(usage(format!("--prompt-tokens {tokens}: expected 1 or more"))),
        None => mean_prompt_tokens(recipe, source, &policy.data)?,
    };
    Ok(Expected { prompt_tokens, response_tokens })
}

/// Mean over the first prompts of a dataset.
fn mean_prompt_tokens(recipe: &Recipe, source: &Source, name: &str) -> Result<f64> {
    let key = format!("data.{name}");
    let Some(config) = recipe.data.get(name) else {
        return Err(usage(source.error(&key, format!("there is no dataset `{name}`"))));
    };
    let text = LocalText::of(recipe.model.path.as_deref(), recipe.model.init.as_ref()).map_err(|e| {
        usage(source.error("model", format!("{e:#}; or say --prompt-tokens, which needs no tokenizer")))
    })?;
    let rows = load_dataset(&key, config, &text).map_err(|e| usage(config_error_at(source, &key, e)))?.rows;
    let rows = &rows[..rows.len().min(SAMPLED_PROMPTS)];
    let count = |row: &PromptRow| Ok(text.encode_prompt(&row.prompt)?.len());
    Ok(rows.iter().map(count).sum::<Result<usize>>()? as f64 / rows.len() as f64)
}
