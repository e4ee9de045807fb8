//! The recipe with every key known and every value of its type.

use super::stage::stages;
use super::{RecipeError, Source};
use crate::tls::TlsPlacement;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use temper_actor::ModelConfig;
use temper_actor::init::InitConfig;
use temper_controller::{CheckpointConfig, DatasetConfig, Stage, ValidationConfig};
use temper_reward::RewardConfig;
use temper_rollout::{EngineConfig, WeightTransport};
use temper_types::{DTypeChoice, did_you_mean};
use toml::Value;

/// Where the pretrained model comes from: exactly one of the two.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSource {
    /// A Hugging Face model directory.
    pub path: Option<PathBuf>,
    /// A new model, made from scratch with the run's seed.
    pub init: Option<InitConfig>,
}

/// Where the parts of a run live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PlacementMode {
    /// All in this process.
    #[default]
    Embedded,
    /// Every worker in a process of its own, joined by gRPC.
    Processes,
}

/// What of a model trainer ranks divide between them. Never changes a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ShardingKind {
    /// Optimizer moments.
    Zero1,
    /// Moments and gradients.
    #[default]
    Zero2,
    /// Moments, gradients and masters.
    Zero3,
    /// As zero3 within groups of `shard_size` ranks; every group holds everything.
    Hybrid,
}

/// Where things run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Placement {
    /// How the parts are joined.
    pub mode: PlacementMode,
    /// Compute threads; 0: one per core. Never changes a number.
    pub threads: usize,
    /// Threads that score responses. Never changes a number.
    pub reward_threads: usize,
    /// Rollout engines, each in a process of its own. Never changes a number.
    pub rollout_workers: usize,
    /// Tensor-parallel ranks that the model of each engine is divided over: 1, 2, 4 or 8. Threads where mode is
    /// "embedded", processes otherwise. Never changes a number.
    pub rollout_tensor_parallel: usize,
    /// Reward workers, each in a process of its own. Never changes a number.
    pub reward_workers: usize,
    /// Score a group as soon as its last sample ends, while others are generated; false: all of a batch together, after
    /// its generation. Never changes a number.
    pub stream_rewards: bool,
    /// How many updates may lie between the weights that generate a batch and those that train on it: so many batches
    /// of policy stages are generated ahead. 0: none (synchronous). At most 8.
    pub staleness: u32,
    /// Engines give their K/V memory back while the trainer trains, and take it again for the next batch; with
    /// `staleness = 0` only. Never changes a number.
    pub sleep: bool,
    /// Whether the workers are started with the run, or join it: `temper serve ROLE --join ADDR`.
    pub spawn_workers: bool,
    /// Where workers join and control commands reach the run; port 0 takes any.
    pub listen: SocketAddr,
    /// Ranks that train together, each on its rows of every batch. Another number rounds sums differently.
    pub trainer_ranks: usize,
    /// What the ranks divide. Never changes a number.
    pub sharding: ShardingKind,
    /// Ranks of a group under `sharding = "hybrid"`: a divisor of `trainer_ranks`; 0 otherwise.
    pub shard_size: usize,
    /// Consecutive ranks that share the rows of every micro-batch, which may then have as many times
    /// `max_micro_batch_tokens`: a divisor of `trainer_ranks`. Another number rounds sums of gradients differently.
    pub sequence_parallel: usize,
    /// Keep every trainer rank's state after each step in the memory of another rank as well, so that a rank that is
    /// lost costs the step under way and no return to a checkpoint. Needs mode = "processes" and two ranks or more, and
    /// twice a rank's masters and moments in memory, four times while they are sent. Never changes a number.
    pub mirror_shards: bool,
    /// How new weights come to engines of other processes: "auto", through memory shared with the trainer where both
    /// run on one host; "grpc"; or "delta", by gRPC and as compressed changes alone, for slow links, for which every
    /// trainer rank keeps its masters twice more. Never changes a number.
    pub weight_transport: WeightTransport,
    /// Longest wait of a rank for the others, in seconds: the longest difference between trainer ranks in one update,
    /// or between the tensor-parallel ranks of an engine in one step.
    pub collective_timeout_seconds: u64,
    /// Certificates by which the processes prove themselves to each other; none: they speak plain text.
    pub tls: Option<TlsPlacement>,
}

impl Default for Placement {
    fn default() -> Self {
        Placement {
            mode: PlacementMode::Embedded,
            threads: 0,
            reward_threads: 1,
            rollout_workers: 1,
            rollout_tensor_parallel: 1,
            reward_workers: 1,
            stream_rewards: true,
            staleness: 0,
            sleep: false,
            spawn_workers: true,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            trainer_ranks: 1,
            sharding: ShardingKind::Zero2,
            shard_size: 0,
            sequence_parallel: 1,
            mirror_shards: false,
            weight_transport: WeightTransport::Auto,
            collective_timeout_seconds: 600,
            tls: None,
        }
    }
}

/// A recipe, typed. [`super::check()`] says whether it can run.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Name of the run.
    pub name: String,
    /// What it shows, in a sentence.
    pub description: String,
    /// Seed of everything.
    pub seed: u64,
    /// Number format of matrix products and K/V.
    pub dtype: DTypeChoice,
    /// The model.
    pub model: ModelSource,
    /// Datasets by name.
    pub data: BTreeMap<String, DatasetConfig>,
    /// How responses are scored.
    pub reward: RewardConfig,
    /// Limits of the rollout engine.
    pub engine: EngineConfig,
    /// Stages in order.
    pub stages: Vec<Stage>,
    /// Held-out prompts.
    pub validation: ValidationConfig,
    /// Checkpoints.
    pub checkpoint: CheckpointConfig,
    /// Where things run.
    pub placement: Placement,
    /// Longest wait for one finished group, in seconds.
    pub rollout_timeout_seconds: f64,
}

const KEYS: [&str; 13] = [
    "name",
    "description",
    "seed",
    "dtype",
    "model",
    "data",
    "reward",
    "engine",
    "stage",
    "validation",
    "checkpoint",
    "placement",
    "rollout_timeout_seconds",
];

impl Recipe {
    /// Configuration of the model that the run begins with.
    ///
    /// # Errors
    /// Not one model, or one that cannot be read or made, by key.
    pub fn model_config(&self, source: &Source) -> Result<ModelConfig, RecipeError> {
        match (&self.model.path, &self.model.init) {
            (Some(path), None) => ModelConfig::load(path).map_err(|e| source.error("model.path", e)),
            (None, Some(init)) => init.model_config().map_err(|e| source.error("model.init", e)),
            _ => Err(source.error("model", "expected `path` (a Hugging Face directory) or [model.init], one of them")),
        }
    }

    /// Give every value of `source` its type.
    ///
    /// # Errors
    /// An unknown key (with the nearest known one), a missing one, or a value of the wrong type, by file and line.
    pub fn from_source(source: &Source) -> Result<Self, RecipeError> {
        if let Some(unknown) = source.table.keys().find(|key| !KEYS.contains(&key.as_str())) {
            return Err(source.error(unknown, unknown_key(unknown, KEYS)));
        }
        let file_name = source.path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned());
        let data: BTreeMap<String, Value> = read(source, "data")?.unwrap_or_default();
        let dataset = |name: String, value| Ok((name.clone(), typed(source, &format!("data.{name}"), value)?));
        Ok(Recipe {
            name: read(source, "name")?.unwrap_or(file_name),
            description: read(source, "description")?.unwrap_or_default(),
            seed: read(source, "seed")?.unwrap_or(0),
            dtype: read(source, "dtype")?.unwrap_or_default(),
            model: read(source, "model")?.unwrap_or_default(),
            data: data.into_iter().map(|(name, value)| dataset(name, value)).collect::<Result<_, _>>()?,
            reward: read(source, "reward")?.unwrap_or(RewardConfig { components: Vec::new() }),
            engine: read(source, "engine")?.unwrap_or_default(),
            stages: stages(source)?,
            validation: read(source, "validation")?.unwrap_or_default(),
            checkpoint: read(source, "checkpoint")?.unwrap_or_default(),
            placement: read(source, "placement")?.unwrap_or_default(),
            rollout_timeout_seconds: read(source, "rollout_timeout_seconds")?.unwrap_or(600.0),
        })
    }
}

fn read<T: DeserializeOwned>(source: &Source, key: &str) -> Result<Option<T>, RecipeError> {
    source.table.get(key).cloned().map(|value| typed(source, key, value)).transpose()
}

/// Deserialize the value at `key`; errors name the innermost key and where it was given.
pub fn typed<T: DeserializeOwned>(source: &Source, key: &str, value: Value) -> Result<T, RecipeError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let inner = error.path().to_string().replace('[', ".").replace(']', "");
        let mut path = if inner == "." { key.to_owned() } else { format!("{key}.{inner}") };
        let message = error.inner().message().to_owned();
        if let Some(unknown) = quoted_after(&message, "unknown field `").filter(|u| !path.ends_with(&format!(".{u}"))) {
            path = format!("{path}.{unknown}");
        }
        source.error(&path, with_suggestion(&message))
    })
}

/// serde's message, with the nearest known name where a name is unknown.
fn with_suggestion(message: &str) -> String {
    for kind in ["unknown field `", "unknown variant `"] {
        let Some(given) = quoted_after(message, kind) else { continue };
        let rest = message.split_once("expected").map_or("", |(_, rest)| rest);
        let candidates = rest.split('`').skip(1).step_by(2);
        let what = if kind.contains("field") { "key" } else { "value" };
        let all: Vec<&str> = candidates.clone().collect();
        let list = if all.is_empty() { String::new() } else { format!("; known: {}", all.join(", ")) };
        return match did_you_mean(given, candidates) {
            Some(near) => format!("unknown {what} `{given}`: did you mean `{near}`?{list}"),
            None => format!("unknown {what} `{given}`{list}"),
        };
    }
    too_large(message).unwrap_or_else(|| message.to_owned())
}

/// What to say where an integer was expected and stands as text, because it is larger than any integer of TOML.
fn too_large(message: &str) -> Option<String> {
    let (given, rest) = message.strip_prefix("invalid type: string \"")?.split_once('"')?;
    let is_integer = ["expected u", "expected i"].iter().any(|expected| rest.contains(expected));
    let is_too_large = given.parse::<i128>().is_ok_and(|given| i64::try_from(given).is_err());
    let least = if rest.contains("expected u") { 0 } else { i64::MIN };
    (is_integer && is_too_large)
        .then(|| format!("{given} is out of range: expected an integer from {least} to {}", i64::MAX))
}

fn quoted_after<'a>(message: &'a str, prefix: &str) -> Option<&'a str> {
    message.split_once(prefix).and_then(|(_, rest)| rest.split_once('`')).map(|(name, _)| name)
}

/// What to say of an unknown key.
pub(super) fn unknown_key<'a>(given: &str, known: impl IntoIterator<Item = &'a str> + Clone) -> String {
    let list: Vec<&str> = known.clone().into_iter().collect();
    match did_you_mean(given, known) {
        Some(near) => format!("unknown key: did you mean `{near}`?"),
        None => format!("unknown key; known: {}", list.join(", ")),
    }
}
