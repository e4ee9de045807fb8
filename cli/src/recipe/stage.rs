//! `[[stage]]` tables: the kind decides which keys there are and what the algorithm is where nothing is said.

use super::preference_stage::{self, PREFERENCE_KINDS};
use super::source::merge;
use super::typed::{typed, unknown_key};
use super::{RecipeError, Source};
use temper_algos::{AdvEstimator, AlgorithmConfig, LossAggMode, LossMode, PolicyLossConfig};
use temper_controller::{CriticConfig, DistillStage, PolicyStage, RewardModelStage, SftStage, Stage};
use temper_types::did_you_mean;
use toml::{Table, Value};

/// Kinds of stages that are not over preferences.
const OTHER_KINDS: [&str; 17] = [
    "sft",
    "distill",
    "reward_model",
    "ppo",
    "grpo",
    "dr_grpo",
    "dapo",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "opo",
    "gpg",
    "gspo",
    "cispo",
    "sapo",
    "gmpo",
];

/// Every kind of stage.
fn kinds() -> Vec<&'static str> {
    OTHER_KINDS.into_iter().chain(PREFERENCE_KINDS).collect()
}

/// Every stage of a recipe, typed.
pub(super) fn stages(source: &Source) -> Result<Vec<Stage>, RecipeError> {
    let tables = match source.table.get("stage") {
        None => return Ok(Vec::new()),
        Some(Value::Array(tables)) => tables,
        Some(_) => return Err(source.error("stage", "expected tables: write [[stage]] with two brackets")),
    };
    tables.iter().enumerate().map(|(index, value)| stage(source, &format!("stage.{index}"), value)).collect()
}

fn stage(source: &Source, key: &str, value: &Value) -> Result<Stage, RecipeError> {
    let Value::Table(table) = value else {
        return Err(source.error(key, "expected a table"));
    };
    let mut table = table.clone();
    let kind = match table.remove("kind") {
        Some(Value::String(kind)) => kind,
        Some(_) => return Err(source.error(&format!("{key}.kind"), "expected a string")),
        None => return Err(source.error(key, format!("`kind` is missing: expected one of {}", kinds().join(", ")))),
    };
    if !kinds().contains(&kind.as_str()) {
        let near = did_you_mean(&kind, kinds()).map_or_else(String::new, |near| format!(" did you mean `{near}`?"));
        let problem = format!("unknown kind `{kind}`:{near} expected one of {}", kinds().join(", "));
        return Err(source.error(&format!("{key}.kind"), problem));
    }
    table.entry("name").or_insert_with(|| Value::String(kind.clone()));
    if PREFERENCE_KINDS.contains(&kind.as_str()) {
        return preference_stage::read(source, key, &kind, table);
    }
    if kind == "sft" {
        return Ok(Stage::Sft(typed::<SftStage>(source, key, Value::Table(table))?));
    }
    if kind == "distill" {
        return Ok(Stage::Distill(Box::new(typed::<DistillStage>(source, key, Value::Table(table))?)));
    }
    if kind == "reward_model" {
        return Ok(Stage::RewardModel(typed::<RewardModelStage>(source, key, Value::Table(table))?));
    }
    if let Some(estimator) = table.get("adv_estimator") {
        let problem = format!(
            "{}: `adv_estimator` stands in [stage.algorithm.advantage] = {estimator}",
            unknown_key("adv_estimator", [])
        );
        return Err(source.error(&format!("{key}.adv_estimator"), problem));
    }
    let mut with_preset = Table::new();
    with_preset.insert("algorithm".to_owned(), Value::Table(preset(&kind)));
    if let ("ppo", Ok(critic)) = (kind.as_str(), Value::try_from(CriticConfig::default())) {
        with_preset.insert("critic".to_owned(), critic);
    }
    merge(&mut with_preset, table);
    Ok(Stage::Policy(Box::new(typed::<PolicyStage>(source, key, Value::Table(with_preset))?)))
}

/// What a kind means where the recipe says nothing else.
fn preset(kind: &str) -> Table {
    let mut algorithm = AlgorithmConfig::default();
    match kind {
        "dr_grpo" => {
            algorithm.advantage.norm_adv_by_std_in_grpo = false;
            algorithm.policy_loss.loss_agg_mode = LossAggMode::SeqMeanTokenSumNorm;
        }
        "dapo" => {
            algorithm.policy_loss.clip_ratio_low = Some(0.2);
            algorithm.policy_loss.clip_ratio_high = Some(0.28);
            algorithm.filter_groups.enable = true;
            algorithm.filter_groups.max_num_gen_batches = 10;
        }
        "ppo" => algorithm.advantage.adv_estimator = AdvEstimator::Gae,
        "rloo" => algorithm.advantage.adv_estimator = AdvEstimator::Rloo,
        "reinforce_plus_plus" => algorithm.advantage.adv_estimator = AdvEstimator::ReinforcePlusPlus,
        "reinforce_plus_plus_baseline" => {
            algorithm.advantage.adv_estimator = AdvEstimator::ReinforcePlusPlusBaseline;
        }
        "remax" => algorithm.advantage.adv_estimator = AdvEstimator::Remax,
        "opo" => algorithm.advantage.adv_estimator = AdvEstimator::Opo,
        "gpg" => {
            algorithm.advantage.adv_estimator = AdvEstimator::Gpg;
            algorithm.policy_loss.loss_mode = LossMode::Gpg;
        }
        _ => loss_preset(kind, &mut algorithm.policy_loss),
    }
    match Value::try_from(algorithm) {
        Ok(Value::Table(table)) => table,
        _ => Table::new(),
    }
}

/// Kinds that are GRPO with another loss, with the clip ranges of their papers.
fn loss_preset(kind: &str, loss: &mut PolicyLossConfig) {
    let clip = match kind {
        "gspo" => {
            loss.loss_mode = LossMode::Gspo;
            loss.loss_agg_mode = LossAggMode::SeqMeanTokenMean;
            Some((3e-4, 4e-4))
        }
        // Only the upper bound acts.
        "cispo" => {
            loss.loss_mode = LossMode::Cispo;
            Some((10.0, 0.2))
        }
        "sapo" => {
            loss.loss_mode = LossMode::Sapo;
            None
        }
        "gmpo" => {
            loss.loss_mode = LossMode::GeoMean;
            Some((0.4, 0.4))
        }
        _ => None,
    };
    if let Some((low, high)) = clip {
        loss.clip_ratio_low = Some(low);
        loss.clip_ratio_high = Some(high);
    }
}
