//! Assembly: from a checked recipe to the services of one process.

use crate::control::{AddressFile, LocalControl, RunAddress, run_id};
use crate::draft_model;
use crate::local_text::LocalText;
use crate::recipe::{CheckReport, PlacementMode, Recipe, Source, render};
use crate::reward_models::RewardModels;
use crate::rollout_ranks::{self, EngineSetting};
use crate::tls::TlsPlacement;
use crate::workers::{Cluster, ClusterSpec, Work};
use crate::{staleness, teachers, trainer_ranks};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use temper_actor::ModelConfig;
use temper_controller::{ReplaySpec, RunSpec, Services};
use temper_proto::RolloutService;
use temper_rollout::{LocalRolloutService, Replay};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_types::DType;

/// The compute device of the process.
pub fn device(threads: usize) -> Arc<dyn Device> {
    Arc::new(CpuDevice::new(CpuConfig { num_threads: threads, isa: None }))
}

/// The model directory that a run starts from: the recipe's own, or a new one made below `run_dir`.
///
/// # Errors
/// Where the new model cannot be written.
pub fn initial_model(recipe: &Recipe, run_dir: &Path) -> Result<PathBuf> {
    match (&recipe.model.path, &recipe.model.init) {
        (Some(path), _) => Ok(path.clone()),
        (None, Some(init)) => {
            let dir = run_dir.join("init");
            temper_actor::init::init_model(&dir, init, recipe.seed).context("making the initial model")?;
            Ok(dir)
        }
        (None, None) => anyhow::bail!("the recipe has no model"),
    }
}

/// Everything that a run needs, in this process.
pub struct Runtime {
    /// The services.
    pub services: Services,
    /// The resolved run.
    pub spec: RunSpec,
    /// Number format that `auto` became.
    pub dtype: DType,
    /// What computes in this process.
    pub device: Arc<dyn Device>,
    /// The worker processes, where there are any. They end with it.
    pub cluster: Option<Cluster>,
    /// Where it is controlled, where that is over the network. Last: the file is there until nobody answers any more.
    _address: Option<AddressFile>,
}

/// Load the model and start the services of embedded mode for a run in `run_dir`.
///
/// # Errors
/// A model file that is missing or damaged, or a reward that cannot be compiled.
pub fn embedded(recipe: &Recipe, report: &CheckReport, (model_dir, run_dir): (&Path, &Path)) -> Result<Runtime> {
    let device = device(recipe.placement.threads);
    let dtype = recipe.dtype.resolve(device.info().native_bf16);
    let text = Arc::new(LocalText::load(model_dir)?);
    let vocab_size = ModelConfig::load(model_dir)?.vocab_size;
    let masked = text.tokenizer().missing_ids(vocab_size);
    let trainer = trainer_ranks::load(recipe, (&device, dtype), (model_dir, run_dir), &masked)?;
    let initial = trainer.version.hash;
    let bytes = text.token_byte_table(vocab_size);
    let rollout: Arc<dyn RolloutService> = if rollout_ranks::has_own_weights(recipe) {
        let engine = EngineSetting { recipe, device: &device, dtype, model_dir, run_dir, name: "rollout-0" };
        Arc::new(engine.start_beside_trainer((trainer.version, trainer.holders))?)
    } else {
        let rollout =
            LocalRolloutService::new(Arc::clone(&device), trainer.policy, recipe.engine.clone(), Arc::new(bytes))?;
        let rollout = draft_model::attach(rollout, (&device, dtype), Some(&text), &recipe.engine)?;
        Arc::new(rollout.with_history(&history_dir(recipe, run_dir)))
    };
    let trainer = trainer.service;
    let scorer = Arc::clone(&trainer);
    let models = RewardModels { trainer: scorer, device: &device, policy_dir: model_dir, dtype };
    let services = Services { rollout, reward: Arc::new(models.reward_service(recipe)?), trainer, text };
    let spec = run_spec(recipe, report, (dtype, &format!("{initial}")), model_dir)?;
    Ok(Runtime { services, spec, dtype, device, cluster: None, _address: None })
}

/// Where drafters remember earlier responses.
pub fn history_dir(recipe: &Recipe, run_dir: &Path) -> PathBuf {
    let given = Path::new(&recipe.engine.history_dir);
    if recipe.engine.history_dir.is_empty() { run_dir.join("history") } else { given.to_owned() }
}

/// Start the services of a recipe where it places them.
///
/// # Errors
/// As [`embedded`], or a worker that does not start.
pub fn start(
    recipe: &Recipe,
    (source, report): (&Source, &CheckReport),
    dirs: (&Path, &Path),
    control: &Arc<LocalControl>,
) -> Result<Runtime> {
    match recipe.placement.mode {
        PlacementMode::Embedded => embedded(recipe, report, dirs),
        PlacementMode::Processes => processes(recipe, (source, report), dirs, control),
    }
}

/// Start the workers of a run in `run_dir` in processes of their own, or wait for them to join.
///
/// # Errors
/// A worker that does not start or join, by name and cause.
pub fn processes(
    recipe: &Recipe,
    (source, report): (&Source, &CheckReport),
    (model_dir, run_dir): (&Path, &Path),
    control: &Arc<LocalControl>,
) -> Result<Runtime> {
    let device = device(recipe.placement.threads);
    let dtype = recipe.dtype.resolve(device.info().native_bf16);
    // What this machine chose is what every worker computes in.
    let resolved = Recipe { dtype: dtype.into(), ..recipe.clone() };
    let text = Arc::new(LocalText::load(model_dir)?);
    let placement = &recipe.placement;
    let spec = ClusterSpec {
        work: Work {
            recipe: render(&resolved, source),
            model_dir: path_text(&model_dir.canonicalize().context("finding the model")?)?,
            run_dir: path_text(&run_dir.canonicalize().context("finding the run directory")?)?,
            world: placement.trainer_ranks as u32,
        },
        run_id: run_id().context("making an id for the run")?,
        listen: placement.listen,
        sequence_parallel: placement.sequence_parallel,
        mirrors: placement.mirror_shards.then(|| trainer_ranks::num_shards(placement)),
        rollout_workers: placement.rollout_workers,
        reward_workers: placement.reward_workers,
        staleness: placement.staleness,
        tls: placement.tls.as_ref().map(TlsPlacement::files),
        is_local: placement.spawn_workers,
    };
    let cluster = Cluster::start(&spec, control)?;
    let address = RunAddress { address: cluster.address().to_string(), run_id: spec.run_id, tls: spec.tls };
    let address = address.write(run_dir).context("writing where the run is controlled")?;
    let trainer = cluster.trainer()?;
    let initial = trainer.version().hash;
    let spec = run_spec(recipe, report, (dtype, &format!("{initial}")), model_dir)?;
    let services = Services { rollout: cluster.rollout(), reward: cluster.reward(), trainer, text };
    Ok(Runtime { services, spec, dtype, device, cluster: Some(cluster), _address: Some(address) })
}

fn path_text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).with_context(|| format!("{} is not UTF-8: workers cannot be told", path.display()))
}

/// The resolved run; `initial` is the hash of the weights that it starts from.
fn run_spec(
    recipe: &Recipe,
    report: &CheckReport,
    (dtype, initial): (DType, &str),
    model_dir: &Path,
) -> Result<RunSpec> {
    Ok(RunSpec {
        name: recipe.name.clone(),
        seed: recipe.seed,
        identity: format!(
            "{}-{dtype}-{initial}{}{}",
            report.identity,
            teachers::identity(recipe, model_dir)?,
            trainer_ranks::identity(&recipe.placement)
        ),
        data: recipe.data.clone(),
        stages: recipe.stages.clone(),
        validation: recipe.validation.clone(),
        checkpoint: recipe.checkpoint.clone(),
        rollout_timeout_seconds: recipe.rollout_timeout_seconds,
        replay: match recipe.engine.replay {
            Replay::Exact => ReplaySpec::Exact,
            Replay::Coupled => ReplaySpec::Coupled,
            Replay::Lenient => ReplaySpec::Lenient { lenience: recipe.engine.lenience },
        },
        weights: recipe.engine.weights,
        staleness: recipe.placement.staleness,
        generation: staleness::generation(recipe),
        scoring: staleness::scoring(recipe),
        sleep: recipe.placement.sleep,
        mirror_shards: recipe.placement.mirror_shards,
    })
}
