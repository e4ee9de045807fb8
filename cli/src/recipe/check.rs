//! Whether a typed recipe can run: against itself, its data and its model. Nothing is computed and nothing written.

use super::check_replay::policy_stages;
use super::check_reward_model::{self, check_directories, check_earlier, check_pairs};
use super::check_texts::Texts;
use super::render::to_table;
use super::{ModelSource, PlacementMode, Recipe, RecipeError, Source};
use super::{check_distill, check_partial, check_replay, check_weights, idle_keys, preference_stage};
use crate::reward_models::launcher;
use crate::{rollout_ranks, staleness, tls, trainer_ranks};
use std::collections::BTreeMap;
use std::path::Path;
use temper_actor::init::init_tokenizer;
use temper_actor::{ModelConfig, Tokenizer};
use temper_controller::{PolicyStage, SftStage, Stage, load_dataset};
use temper_types::{PromptRow, did_you_mean};
use toml::Table;

/// Longest wait that a recipe may ask for, about 31 years: clocks count no further than some multiple of it.
pub const MAX_WAIT_SECONDS: u64 = 1_000_000_000;

/// What a check found out.
#[derive(Debug)]
pub struct CheckReport {
    /// Rows of every dataset.
    pub num_rows: BTreeMap<String, usize>,
    /// What the recipe does, in words.
    pub summary: String,
    /// Hash of what decides the run's numbers, but for the initial weights.
    pub identity: String,
}

/// Check everything that can be known before the first step.
///
/// # Errors
/// The first thing that cannot work, by file, line and key, with what would be right.
pub fn check(recipe: &Recipe, source: &Source) -> Result<CheckReport, RecipeError> {
    check_name(&recipe.name, source)?;
    let texts = check_model(&recipe.model, source)?;
    if recipe.stages.is_empty() {
        return Err(source.error("stage", "there is no stage: expected at least one [[stage]] table"));
    }
    recipe.engine.validate().map_err(|e| source.error("engine", e))?;
    trainer_ranks::check(&recipe.placement, source)?;
    trainer_ranks::check_heads(recipe, source)?;
    rollout_ranks::check(recipe, source)?;
    let (data, left_out) = load_data(recipe, source, &texts)?;
    for (index, stage) in recipe.stages.iter().enumerate() {
        check_stage(recipe, source, &data, (index, stage))?;
    }
    check_validation(recipe, source, &data)?;
    check_texts(recipe, source, (&data, &texts))?;
    texts.check_draft_model(recipe, source)?;
    if recipe.checkpoint.keep_last == 0 {
        return Err(
            source.error("checkpoint.keep_last", "0 is out of range: expected at least 1, or nothing could be resumed")
        );
    }
    let timeout = recipe.rollout_timeout_seconds;
    if !(timeout > 0.0 && timeout <= MAX_WAIT_SECONDS as f64) {
        let problem = format!("{timeout:?} is out of range: expected more than 0, at most {MAX_WAIT_SECONDS}");
        return Err(source.error("rollout_timeout_seconds", problem));
    }
    check_placement(recipe, source)?;
    check_replay::check(recipe, source)?;
    check_partial::check(recipe, source)?;
    check_weights::check(recipe, source)?;
    let identity = identity(recipe, &data);
    let num_rows: BTreeMap<String, usize> = data.into_iter().map(|(name, rows)| (name, rows.len())).collect();
    let idle_keys = idle_keys::lines(recipe, source);
    let summary = [summary(recipe, &num_rows)].into_iter().chain(left_out).chain(idle_keys);
    let summary = summary.collect::<Vec<String>>().join("\n");
    Ok(CheckReport { summary, num_rows, identity })
}

/// A run is kept in runs/NAME where nothing else is said.
fn check_name(name: &str, source: &Source) -> Result<(), RecipeError> {
    let is_name = !["", ".", ".."].contains(&name) && !name.contains(['/', '\\', '\0']);
    if is_name {
        return Ok(());
    }
    let problem = format!("\"{name}\" cannot name the directory of a run: expected a name without `/` and `\\`");
    Err(source.error("name", problem))
}

/// Check that there is one model, which can be loaded or made; gives its tokenizer.
fn check_model(model: &ModelSource, source: &Source) -> Result<Texts, RecipeError> {
    match (&model.path, &model.init) {
        (None, None) => {
            Err(source.error("model", "there is no model: expected `path` (a Hugging Face directory) or [model.init]"))
        }
        (Some(_), Some(_)) => Err(source.error("model.init", "excludes `path`: expected one of them")),
        (None, Some(init)) => {
            let made = init_tokenizer(init).and_then(|tokenizer| Ok((tokenizer, init.model_config()?)));
            made.map(Texts::new).map_err(|e| source.error("model.init", e))
        }
        (Some(path), None) => {
            check_model_dir(path).map(Texts::new).map_err(|problem| source.error("model.path", problem))
        }
    }
}

/// Check that a directory holds a whole model; gives its tokenizer and shape.
pub(super) fn check_model_dir(path: &Path) -> Result<(Tokenizer, ModelConfig), String> {
    if !path.is_dir() {
        return Err(format!("{} is no directory: expected a Hugging Face model directory", path.display()));
    }
    let config = ModelConfig::load(path).map_err(|e| e.to_string())?;
    let tokenizer = Tokenizer::load(path).map_err(|e| e.to_string())?;
    let reader = temper_actor::CheckpointReader::open(path).map_err(|e| e.to_string())?;
    reader.validate(&config).map_err(|e| e.to_string())?;
    Ok((tokenizer, config))
}

type Data = BTreeMap<String, Vec<PromptRow>>;

/// The rows of every dataset, and in words what was left out of them.
fn load_data(recipe: &Recipe, source: &Source, texts: &Texts) -> Result<(Data, Vec<String>), RecipeError> {
    let (mut data, mut left_out) = (Data::new(), Vec::new());
    for (name, config) in &recipe.data {
        let key = format!("data.{name}");
        let loaded = load_dataset(&key, config, texts.service()).map_err(|e| config_error_at(source, &key, e))?;
        if let (Some(max_tokens), 1..) = (config.max_prompt_tokens, loaded.num_left_out) {
            let num_rows = loaded.rows.len() + loaded.num_left_out;
            let left = loaded.num_left_out;
            left_out.push(format!(
                "{key}: {left} of {num_rows} prompts have more than {max_tokens} tokens and are left out"
            ));
        }
        data.insert(name.clone(), loaded.rows);
    }
    Ok((data, left_out))
}

/// Every row that a stage or validation reads can be encoded and fits the model.
fn check_texts(recipe: &Recipe, source: &Source, (data, texts): (&Data, &Texts)) -> Result<(), RecipeError> {
    let rows = |name: &str| data.get(name).map_or(&[][..], Vec::as_slice);
    for stage in &recipe.stages {
        let held_out = match stage {
            Stage::RewardModel(stage) => rows(&stage.held_out),
            Stage::Preference(stage) => rows(&stage.held_out),
            _ => &[],
        };
        texts.check_stage(recipe, source, (stage, rows(stage.data()), held_out))?;
    }
    // Stages of a policy are validated, each with its own sampling where the recipe says no other.
    let own = policy_stages(recipe).map(|(_, stage)| &stage.sampling);
    let longest = own.map(|own| recipe.validation.sampling.as_ref().unwrap_or(own)).max_by_key(|s| s.max_new_tokens);
    longest.map_or(Ok(()), |sampling| texts.check_validation(recipe, source, (rows(&recipe.validation.data), sampling)))
}

fn dataset<'a>(data: &'a Data, source: &Source, key: &str, name: &str) -> Result<&'a [PromptRow], RecipeError> {
    data.get(name).map(Vec::as_slice).ok_or_else(|| {
        let near = did_you_mean(name, data.keys().map(String::as_str));
        let hint = near.map_or_else(
            || format!("expected one of: {}", data.keys().cloned().collect::<Vec<_>>().join(", ")),
            |near| format!("did you mean `{near}`?"),
        );
        source.error(key, format!("there is no dataset `{name}`: {hint}"))
    })
}

fn check_stage(
    recipe: &Recipe,
    source: &Source,
    data: &Data,
    (index, stage): (usize, &Stage),
) -> Result<(), RecipeError> {
    let key = format!("stage.{index}");
    stage.validate(&key).map_err(|e| config_error(source, e))?;
    let rows = dataset(data, source, &format!("{key}.data"), stage.data())?;
    match stage {
        Stage::Sft(stage) => check_sft(source, &key, stage, rows),
        Stage::Distill(stage) => check_distill::check(recipe, source, &key, (stage, rows)),
        Stage::Policy(stage) => {
            check_policy(recipe, source, &key, (stage, rows))?;
            check_earlier(recipe, source, (index, stage))
        }
        Stage::RewardModel(stage) => {
            check_pairs(source, &format!("{key}.data"), &stage.data, rows)?;
            if stage.held_out.is_empty() {
                return Ok(());
            }
            let held_out = dataset(data, source, &format!("{key}.held_out"), &stage.held_out)?;
            check_pairs(source, &format!("{key}.held_out"), &stage.held_out, held_out)
        }
        Stage::OnlinePreference(stage) => {
            check_policy(recipe, source, &key, (&stage.policy, rows))?;
            check_earlier(recipe, source, (index, &stage.policy))
        }
        Stage::Preference(stage) => {
            let held_out_key = format!("{key}.held_out");
            let held_out = match stage.held_out.as_str() {
                "" => None,
                name => Some(dataset(data, source, &held_out_key, name)?),
            };
            preference_stage::check(source, &key, stage, (rows, held_out))
        }
    }
}

/// An error of a stage's own check, by file and line.
pub fn config_error(source: &Source, error: temper_controller::Error) -> RecipeError {
    config_error_at(source, "stage", error)
}

/// An error by file and line of the key that it names, of `key` where it names none.
pub fn config_error_at(source: &Source, key: &str, error: temper_controller::Error) -> RecipeError {
    match error {
        temper_controller::Error::Config { key, problem } => source.error(&key, problem),
        other => source.error(key, other),
    }
}

fn check_sft(source: &Source, key: &str, stage: &SftStage, rows: &[PromptRow]) -> Result<(), RecipeError> {
    match rows.iter().find(|row| row.completion.is_none()) {
        Some(row) => {
            let problem = format!(
                "row {} of `{}` has no `completion`: supervised stages need one in every row",
                row.prompt_id, stage.data
            );
            Err(source.error(&format!("{key}.data"), problem))
        }
        None => Ok(()),
    }
}

fn check_policy(
    recipe: &Recipe,
    source: &Source,
    key: &str,
    (stage, rows): (&PolicyStage, &[PromptRow]),
) -> Result<(), RecipeError> {
    if recipe.reward.components.is_empty() {
        return Err(source.error("reward", "there is no reward: expected [[reward.components]] with a `kind`"));
    }
    recipe.reward.validate().map_err(|e| source.error("reward", e))?;
    let names: Vec<&str> = recipe.reward.components.iter().map(|c| c.name()).collect();
    stage.check_components(key, &names).map_err(|e| config_error(source, e))?;
    check_directories(recipe, source)?;
    launcher().check(&recipe.reward).map_err(|e| source.error("reward", e))?;
    check_ground_truth(recipe, source, &format!("{key}.data"), rows)?;
    check_lengths(recipe, source, key, stage)
}

fn check_ground_truth(recipe: &Recipe, source: &Source, key: &str, rows: &[PromptRow]) -> Result<(), RecipeError> {
    match rows.iter().find(|row| row.ground_truth.is_none()) {
        Some(row) if recipe.reward.needs_ground_truth() => {
            Err(source.error(key, format!("row {} has no ground truth, which the reward compares with", row.prompt_id)))
        }
        _ => Ok(()),
    }
}

pub(super) fn check_lengths(
    recipe: &Recipe,
    source: &Source,
    key: &str,
    stage: &PolicyStage,
) -> Result<(), RecipeError> {
    let max_len = match (&recipe.model.init, &recipe.model.path) {
        (Some(init), _) => init.max_position_embeddings,
        (None, Some(path)) => ModelConfig::load(path).map_or(usize::MAX, |config| config.max_position_embeddings),
        (None, None) => usize::MAX,
    };
    let new_tokens = stage.sampling.max_new_tokens as usize;
    if new_tokens >= max_len {
        let problem = format!("{new_tokens} new tokens do not fit the model's {max_len} positions with a prompt");
        return Err(source.error(&format!("{key}.sampling.max_new_tokens"), problem));
    }
    Ok(())
}

fn check_placement(recipe: &Recipe, source: &Source) -> Result<(), RecipeError> {
    let placement = &recipe.placement;
    staleness::check(placement, source)?;
    let counts = [("rollout_workers", placement.rollout_workers), ("reward_workers", placement.reward_workers)];
    for (key, count) in counts {
        let key = format!("placement.{key}");
        if count == 0 {
            return Err(source.error(&key, "0 is out of range: expected at least 1"));
        }
        if placement.mode == PlacementMode::Embedded && count > 1 {
            let problem = format!("{count} workers need placement.mode = \"processes\"; in one process there is one");
            return Err(source.error(&key, problem));
        }
    }
    if placement.mode == PlacementMode::Processes && !placement.spawn_workers && placement.listen.port() == 0 {
        let problem = "workers that are started by hand must know where to join: expected HOST:PORT with a port";
        return Err(source.error("placement.listen", problem));
    }
    tls::check(placement, source)
}

/// Where things run, in words.
fn placement_summary(recipe: &Recipe) -> Option<String> {
    let p = &recipe.placement;
    let how = if p.spawn_workers { "started with the run" } else { "started by hand" };
    (p.mode == PlacementMode::Processes).then(|| {
        format!(
            "workers: {} trainer, {} rollout, {} reward, each in a process of its own, {how}",
            p.trainer_ranks, p.rollout_workers, p.reward_workers
        )
    })
}

fn check_validation(recipe: &Recipe, source: &Source, data: &Data) -> Result<(), RecipeError> {
    let validation = &recipe.validation;
    if !validation.correct_at.is_finite() {
        let problem = format!("{} is out of range: expected a finite number", validation.correct_at);
        return Err(source.error("validation.correct_at", problem));
    }
    if validation.data.is_empty() {
        return Ok(());
    }
    if validation.num_samples == 0 {
        return Err(source.error("validation.num_samples", "0 is out of range: expected at least 1"));
    }
    if let Some(sampling) = &validation.sampling {
        sampling.validate().map_err(|e| source.error("validation.sampling", e))?;
    }
    let rows = dataset(data, source, "validation.data", &validation.data)?;
    check_ground_truth(recipe, source, "validation.data", rows)
}

/// The tables whose every key decides the run's numbers.
pub(super) fn deciding_table(recipe: &Recipe) -> Table {
    let mut table = to_table(recipe);
    for key in ["name", "description", "engine", "placement", "checkpoint", "rollout_timeout_seconds"] {
        table.remove(key);
    }
    let components = table.get_mut("reward").and_then(|reward| reward.get_mut("components"));
    for component in components.and_then(toml::Value::as_array_mut).into_iter().flatten() {
        component.as_table_mut().and_then(|component| component.remove("workers"));
    }
    table
}

/// Hash of all that decides the run's numbers: the recipe without what never changes one (limits of the engine,
/// placement but for its staleness, checkpoints, names), and the data.
fn identity(recipe: &Recipe, data: &Data) -> String {
    let mut table = deciding_table(recipe);
    if recipe.placement.staleness > 0 {
        table.insert("staleness".to_owned(), i64::from(recipe.placement.staleness).into());
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(table.to_string().as_bytes());
    hasher.update(check_replay::identity(recipe).as_bytes());
    hasher.update(check_weights::identity(recipe).as_bytes());
    hasher.update(check_partial::identity(recipe).as_bytes());
    for rows in data.values() {
        hasher.update(format!("{rows:?}").as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

/// What the recipe does, in words: batch arithmetic in prompts and samples.
pub fn summary(recipe: &Recipe, num_rows: &BTreeMap<String, usize>) -> String {
    let model = match (&recipe.model.path, &recipe.model.init) {
        (Some(path), _) => format!("model: {}", path.display()),
        (None, _) => "model: a new one, made with the run's seed".to_owned(),
    };
    let mut lines = vec![format!("{}: {}", recipe.name, recipe.description), model];
    for (index, stage) in recipe.stages.iter().enumerate() {
        let rows = num_rows.get(stage.data()).copied().unwrap_or(0);
        lines.push(format!("stage {} `{}`: {}", index + 1, stage.name(), stage_summary(stage, rows)));
    }
    if let Some(rows) = num_rows.get(&recipe.validation.data) {
        lines.push(format!("validation: {rows} held-out prompts x {} samples", recipe.validation.num_samples));
    }
    lines.extend(check_weights::summary(recipe));
    lines.extend(check_replay::summary(recipe));
    lines.extend(check_partial::summary(recipe));
    lines.extend(placement_summary(recipe));
    lines.extend(trainer_ranks::summary(&recipe.placement));
    lines.extend(rollout_ranks::summary(&recipe.placement));
    lines.extend(staleness::summary(recipe));
    lines.join("\n")
}

fn stage_summary(stage: &Stage, rows: usize) -> String {
    let passes = |taken: u64| taken as f64 / rows.max(1) as f64;
    match stage {
        Stage::RewardModel(s) => check_reward_model::summary(s, rows),
        Stage::Preference(s) => preference_stage::summary(s, rows),
        Stage::Distill(s) => check_distill::summary(s, rows),
        Stage::OnlinePreference(s) => {
            let inner = stage_summary(&Stage::Policy(Box::new(s.policy.clone())), rows);
            format!("{inner}; the best and the worst sample of a prompt form a pair")
        }
        Stage::Sft(s) => {
            let taken = s.steps * s.batch_size as u64;
            format!(
                "{} steps of {} demonstrations; {rows} rows, {:.1} passes over them",
                s.steps,
                s.batch_size,
                passes(taken)
            )
        }
        Stage::Policy(s) => {
            let samples = s.prompts_per_step * s.num_generations;
            let taken = s.steps * s.prompts_per_step as u64;
            format!(
                "{} steps; each {} prompts x {} samples = {samples} samples of at most {} tokens, in {} optimizer step(s) \
                 of {} samples, {} epoch(s); {rows} rows, {:.1} passes over them",
                s.steps,
                s.prompts_per_step,
                s.num_generations,
                s.sampling.max_new_tokens,
                s.mini_batches,
                samples / s.mini_batches,
                s.epochs,
                passes(taken)
            )
        }
    }
}
