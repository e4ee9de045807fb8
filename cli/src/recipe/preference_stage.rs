//! Stages over preferences: the kind decides the loss, its `loss` table the settings.

use super::source::merge;
use super::typed::typed;
use super::{RecipeError, Source};
use serde::Serialize;
use serde::de::DeserializeOwned;
use temper_algos::Objective;
use temper_algos::preference::{CpoConfig, CpoLossType, DpoConfig, GdpoConfig, KtoConfig, OrpoConfig, PreferenceForm};
use temper_controller::{OnlinePreferenceStage, PolicyStage, PreferenceStage, Stage, check_preferences};
use temper_types::PromptRow;
use toml::{Table, Value};

/// Kinds that this module reads.
pub(super) const PREFERENCE_KINDS: [&str; 7] = ["dpo", "cpo", "simpo", "orpo", "kto", "gdpo", "online_dpo"];

/// SimPO's scale of the reward and target margin, as in its paper's Llama-3 runs.
const SIMPO: (f64, f64) = (2.0, 1.0);

/// The stage of `kind` that `table` (without its `kind`) describes.
pub(super) fn read(source: &Source, key: &str, kind: &str, mut table: Table) -> Result<Stage, RecipeError> {
    let loss = table.remove("loss").unwrap_or_else(|| Value::Table(Table::new()));
    let objective = objective(source, &format!("{key}.loss"), kind, loss)?;
    if kind != "online_dpo" {
        let stage = typed::<PreferenceStage>(source, key, Value::Table(table))?;
        return Ok(Stage::Preference(Box::new(PreferenceStage { objective, ..stage })));
    }
    if table.contains_key("algorithm") {
        let problem = "sampled pairs have no advantages: expected a `loss` table with the settings of dpo";
        return Err(source.error(&format!("{key}.algorithm"), problem));
    }
    let policy = typed::<PolicyStage>(source, key, Value::Table(table))?;
    if policy.num_generations < 2 {
        let problem = format!("{} sample per prompt gives no pair: expected at least 2", policy.num_generations);
        return Err(source.error(&format!("{key}.num_generations"), problem));
    }
    Ok(Stage::OnlinePreference(Box::new(OnlinePreferenceStage { policy, objective })))
}

fn objective(source: &Source, key: &str, kind: &str, loss: Value) -> Result<Objective, RecipeError> {
    match kind {
        "cpo" => settings(source, key, CpoConfig::default(), loss).map(Objective::Cpo),
        "simpo" => {
            let (beta, simpo_gamma) = SIMPO;
            let loss_type = CpoLossType::Simpo;
            let preset = CpoConfig { loss_type, beta, simpo_gamma, cpo_alpha: 0.0, ..CpoConfig::default() };
            settings(source, key, preset, loss).map(Objective::Cpo)
        }
        "orpo" => settings(source, key, OrpoConfig::default(), loss).map(Objective::Orpo),
        "kto" => settings(source, key, KtoConfig::default(), loss).map(Objective::Kto),
        "gdpo" => settings(source, key, GdpoConfig::default(), loss).map(Objective::Gdpo),
        _ => settings(source, key, DpoConfig::default(), one_or_more(loss)).map(Objective::Dpo),
    }
}

/// The preset with what the recipe says laid over it.
fn settings<T: Serialize + DeserializeOwned>(
    source: &Source,
    key: &str,
    preset: T,
    loss: Value,
) -> Result<T, RecipeError> {
    let (Ok(Value::Table(mut table)), Value::Table(given)) = (Value::try_from(preset), loss) else {
        return Err(source.error(key, "expected a table"));
    };
    merge(&mut table, given);
    typed(source, key, Value::Table(table))
}

/// `loss_type = "hinge"` for `loss_type = ["hinge"]`.
fn one_or_more(mut loss: Value) -> Value {
    if let Value::Table(table) = &mut loss
        && let Some(kind @ Value::String(_)) = table.get("loss_type").cloned()
    {
        table.insert("loss_type".to_owned(), Value::Array(vec![kind]));
    }
    loss
}

/// What a stage has as `loss` in the resolved recipe, and the kind that reads it back.
pub(super) fn rendered(objective: &Objective, is_online: bool) -> (&'static str, Option<Value>) {
    match objective {
        Objective::Cpo(config) => ("cpo", Value::try_from(config).ok()),
        Objective::Orpo(config) => ("orpo", Value::try_from(config).ok()),
        Objective::Kto(config) => ("kto", Value::try_from(config).ok()),
        Objective::Gdpo(config) => ("gdpo", Value::try_from(config).ok()),
        Objective::Dpo(config) => (if is_online { "online_dpo" } else { "dpo" }, Value::try_from(config).ok()),
        Objective::Sft(_) | Objective::Policy(_) => ("dpo", None),
    }
}

/// A row of either dataset that the objective cannot read.
pub(super) fn check(
    source: &Source,
    key: &str,
    stage: &PreferenceStage,
    (rows, held_out): (&[PromptRow], Option<&[PromptRow]>),
) -> Result<(), RecipeError> {
    let Some(form) = stage.objective.preference_form() else { return Ok(()) };
    check_preferences(form, &stage.data, rows).map_err(|e| source.error(&format!("{key}.data"), e))?;
    let checked = held_out.map_or(Ok(()), |rows| check_preferences(form.held_out(), &stage.held_out, rows));
    checked.map_err(|e| source.error(&format!("{key}.held_out"), e))
}

/// What the stage does, in words.
pub(super) fn summary(stage: &PreferenceStage, rows: usize) -> String {
    let is_labels = matches!(stage.objective.preference_form(), Some(PreferenceForm::Labels { .. }));
    let taken = stage.steps as f64 * stage.batch_size as f64;
    let unit = if is_labels { "labelled responses" } else { "pairs" };
    let reference = if stage.objective.needs_reference() { ", against the policy at its start" } else { "" };
    let passes = taken / rows.max(1) as f64;
    format!(
        "{} steps of {} {unit}{reference}; {rows} rows, {passes:.1} passes over them",
        stage.steps, stage.batch_size
    )
}
