//! A run from start to end: stages, steps, checkpoints, resume.

use crate::accounts::Accounts;
use crate::batch::{Batch, load_queue, save_queue};
use crate::carried;
use crate::checkpoint::{self, PendingCheckpoint};
use crate::control::RunControl;
use crate::control_journal::ControlJournal;
use crate::kept::{KeptStep, Recovery};
use crate::place::Place;
use crate::preference_step::PreferenceCache;
use crate::record::Record;
use crate::reuse::EarlierSteps;
use crate::rollouts::Group;
use crate::{
    CheckpointConfig, CheckpointInfo, Clock, Error, Phase, PhaseObserver, PolicyStage, RunDir, RunSpec, RunState,
    Stage, load_dataset, verify_checkpoint,
};
use serde_json::json;
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use temper_algos::{Objective, SftLossType};
use temper_proto::{MirrorReport, RewardService, RolloutService, ServiceError, StageSpec, TextService, TrainerService};
use temper_telemetry::MetricsRow;
use temper_types::{PromptRow, did_you_mean};

/// The workers of a run, known by what they do.
#[derive(Clone)]
pub struct Services {
    /// Generates.
    pub rollout: Arc<dyn RolloutService>,
    /// Scores.
    pub reward: Arc<dyn RewardService>,
    /// Trains.
    pub trainer: Arc<dyn TrainerService>,
    /// Tokenizes.
    pub text: Arc<dyn TextService>,
}

/// What is told to whoever watches the run: one row of metrics a step.
pub type StepSink = Box<dyn FnMut(&MetricsRow) + Send>;

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum RunOutcome {
    /// Every stage is done.
    Completed {
        /// The final weights, a Hugging Face directory.
        model: PathBuf,
    },
    /// Asked to stop; everything done so far is in a checkpoint.
    Interrupted {
        /// That checkpoint.
        checkpoint: PathBuf,
    },
}

/// Drives one run.
pub struct Controller {
    pub(crate) spec: RunSpec,
    pub(crate) services: Services,
    pub(crate) accounts: Arc<Accounts>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) state: RunState,
    pub(crate) data: BTreeMap<String, Arc<Vec<PromptRow>>>,
    /// Batches that wait for their steps, in their order.
    pub(crate) queue: VecDeque<Batch>,
    /// Groups that the last batch left over, the oldest first.
    pub(crate) carried: Vec<Group>,
    pub(crate) record: Record,
    pub(crate) preferences: Option<PreferenceCache>,
    pub(crate) earlier: EarlierSteps,
    pub(crate) dir: RunDir,
    sink: StepSink,
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) control: Arc<RunControl>,
    /// The row of the last step and the checkpoint written after it.
    pub(crate) last_row: Option<MetricsRow>,
    /// True where a row of this process had the metric that ranks checkpoints.
    has_metric: bool,
    pub(crate) place: Place,
    /// True where the trainer's weights are newer than the last published version.
    pub(crate) unpublished: bool,
    /// The state after the last steps, where the trainer mirrors its own.
    pub(crate) kept: VecDeque<KeptStep>,
    /// What mirrors cost last.
    pub(crate) mirrored: MirrorReport,
}

/// Where a run begins.
enum Start<'a> {
    Afresh,
    Checkpoint(&'a CheckpointInfo),
    Memory(Box<Recovery>),
}

impl Controller {
    /// Load the data and open the run's records. Nothing is computed yet.
    ///
    /// # Errors
    /// Data that cannot be read, or a directory that cannot be written.
    pub fn new(spec: RunSpec, services: Services, dir: RunDir, clock: Arc<dyn Clock>) -> Result<Self, Error> {
        let mut data = BTreeMap::new();
        for (name, config) in &spec.data {
            let loaded = load_dataset(&format!("data.{name}"), config, &*services.text)?;
            data.insert(name.clone(), Arc::new(loaded.rows));
        }
        let control = Arc::new(RunControl::default());
        control.begin(&spec.name, spec.stages.iter().map(Stage::steps).sum());
        let record = Record::open(&dir, (&spec.name, spec.weights), (&clock, &control))?;
        control.keep(ControlJournal::open(&dir.control_journal(), &clock)?);
        let accounts = Arc::new(Accounts::new(services.rollout));
        let services = Services { rollout: accounts.clone(), ..services };
        let state = RunState::new(&spec.identity);
        Ok(Controller {
            spec,
            services,
            accounts,
            clock,
            state,
            data,
            queue: VecDeque::new(),
            carried: Vec::new(),
            record,
            preferences: None,
            earlier: EarlierSteps::default(),
            dir,
            sink: Box::new(|_| {}),
            stop: Arc::new(AtomicBool::new(false)),
            place: Place::new(Arc::clone(&control)),
            control,
            last_row: None,
            has_metric: false,
            unpublished: true,
            kept: VecDeque::new(),
            mirrored: MirrorReport::default(),
        })
    }

    /// Tell `observer` of every phase before it begins.
    pub fn observe_phases(&mut self, observer: Box<dyn PhaseObserver>) {
        self.place.observe(observer.into());
    }

    /// Tell `sink` of every row of metrics.
    pub fn observe_steps(&mut self, sink: StepSink) {
        self.sink = sink;
    }

    /// When the flag is set, the run ends after the current step with a checkpoint.
    pub fn stop_on(&mut self, flag: Arc<AtomicBool>) {
        self.stop = flag;
    }

    /// The control of this run, for whoever serves it.
    pub fn control(&self) -> Arc<RunControl> {
        Arc::clone(&self.control)
    }

    /// Run to the end, or until asked to stop. `resume` goes on from that checkpoint.
    ///
    /// # Errors
    /// A worker's failure, damaged data, or a full disk; what was completed before stays on disk.
    pub fn run(&mut self, resume: Option<&CheckpointInfo>) -> Result<RunOutcome, Error> {
        self.run_from(resume.map_or(Start::Afresh, Start::Checkpoint))
    }

    /// As [`Controller::run`], from the memory of a run that lost trainer ranks, and of those that are there.
    ///
    /// # Errors
    /// As [`Controller::run`]; [`Error::Recovery`] where the memory is of no use.
    pub fn recover(&mut self, recovery: Recovery) -> Result<RunOutcome, Error> {
        self.run_from(Start::Memory(Box::new(recovery)))
    }

    fn run_from(&mut self, start: Start<'_>) -> Result<RunOutcome, Error> {
        let result = self.run_stages(start).and_then(|outcome| self.check_accounts().map(|()| outcome));
        if let Err(error) = &result {
            tracing::error!(step = self.place.step, phase = self.place.phase().name(), %error, "stopped in this step");
            let fields = [("step", json!(self.state.step)), ("error", json!(error.to_string()))];
            self.record.event("failed", &fields)?;
        }
        self.control.end(&result.as_ref().err().map(ToString::to_string).unwrap_or_default());
        result
    }

    fn run_stages(&mut self, start: Start<'_>) -> Result<RunOutcome, Error> {
        let mut last = self.begin(start)?;
        while let Some(stage) = self.spec.stages.get(self.state.stage).cloned() {
            let Some(stage) = self.gate(stage, &mut last)? else { return self.interrupted(last) };
            let row = self.step(&stage)?;
            let stage_ended = self.state.stage_step == stage.steps();
            if stage_ended {
                self.enter_next_stage()?;
            }
            let every = self.spec.checkpoint.every_steps;
            let stopping = self.stop.load(Ordering::SeqCst) || self.control.wants_drain();
            self.last_row = Some(row);
            let is_due = stage_ended || stopping || (every > 0 && self.state.stage_step.is_multiple_of(every));
            self.keep_step(is_due)?;
            if is_due {
                last = Some(self.checkpoint()?);
            }
            if stopping && !self.is_complete() {
                return self.interrupted(last);
            }
        }
        self.warn_of_unknown_metric();
        self.record.event("completed", &[("step", json!(self.state.step))])?;
        let model = last.unwrap_or_else(|| self.dir.checkpoints()).join("model");
        Ok(RunOutcome::Completed { model })
    }

    /// A metric that no row had ranked no checkpoint. The default is that of policy steps, which a run may not have.
    fn warn_of_unknown_metric(&self) {
        let (name, default) = (&self.spec.checkpoint.best_metric, CheckpointConfig::default().best_metric);
        let Some(row) = self.last_row.as_ref().filter(|_| !self.has_metric && *name != default) else { return };
        let row = row.to_json();
        let known = did_you_mean(name, row.keys().map(String::as_str));
        let hint = known.map(|known| format!("; did you mean `{known}`?")).unwrap_or_default();
        tracing::warn!("no row of metrics had `{name}`, checkpoint.best_metric: no best checkpoint was kept{hint}");
    }

    /// What comes before the first step; gives the checkpoint that it begins with.
    fn begin(&mut self, start: Start<'_>) -> Result<Option<PathBuf>, Error> {
        let last = match start {
            Start::Afresh => self.start()?,
            Start::Checkpoint(checkpoint) => Some(self.resume_from(checkpoint)?),
            Start::Memory(recovery) => return self.recover_from(*recovery),
        };
        self.keep_step(false)?;
        Ok(last)
    }

    fn interrupted(&self, last: Option<PathBuf>) -> Result<RunOutcome, Error> {
        self.record.event("interrupted", &[("step", json!(self.state.step))])?;
        Ok(RunOutcome::Interrupted { checkpoint: last.unwrap_or_else(|| self.dir.checkpoints()) })
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.state.stage == self.spec.stages.len()
    }

    fn start(&mut self) -> Result<Option<PathBuf>, Error> {
        checkpoint::remove_temporaries(&self.dir.checkpoints())?;
        self.record.truncate_after(0)?;
        self.record.event("started", &[("run", json!(self.spec.name)), ("seed", json!(self.spec.seed))])?;
        self.begin_stage()?;
        Ok(None)
    }

    fn resume_from(&mut self, checkpoint: &CheckpointInfo) -> Result<PathBuf, Error> {
        checkpoint::remove_temporaries(&self.dir.checkpoints())?;
        verify_checkpoint(&checkpoint.path)?;
        let (saved, saved_ranks) = split_ranks(&checkpoint.state.identity);
        let (own, ranks) = split_ranks(&self.spec.identity);
        let ranks = ranks.to_owned();
        if saved != own {
            let problem = "it is of another recipe, seed, dtype, data or teacher; resume with the run's own recipe.toml, or start in a new directory";
            return Err(Error::Checkpoint { path: checkpoint.path.clone(), problem: problem.to_owned() });
        }
        self.state = checkpoint.state.clone();
        self.state.identity = self.spec.identity.clone();
        self.place.step = self.state.step;
        self.queue = load_queue(checkpoint)?;
        self.carried = carried::load(checkpoint)?;
        self.warn_of_lost_kv();
        let waiting = self.queue.iter().flat_map(|batch| &batch.samples);
        self.accounts.restore(waiting.chain(carried::begun(&self.carried)));
        self.control.resume_after(self.state.step);
        if !self.is_complete() {
            self.begin_stage()?;
        }
        let (model, optimizer, version) = (checkpoint.model(), checkpoint.optimizer(), self.state.version);
        if checkpoint.reward_model().is_dir() {
            let restored = self.services.trainer.restore_reward_model(&checkpoint.reward_model());
            self.attribute(restored)?;
        }
        let restored = self.services.trainer.restore(&model, &optimizer, version);
        self.attribute(restored)?;
        let proven = self.services.rollout.set_version(version);
        self.attribute(proven)?;
        self.unpublished = false;
        self.record.truncate_after(self.state.step)?;
        self.record.event("resumed", &[("step", json!(self.state.step))])?;
        if saved_ranks != ranks {
            let what = format!("the checkpoint is of {saved_ranks} trainer ranks, this run has {ranks}");
            tracing::warn!("{what}: it goes on, but not bit for bit as the run that was saved");
            let fields = [("from", json!(saved_ranks)), ("to", json!(ranks)), ("bit_identical", json!(false))];
            self.record.event("trainer_ranks_changed", &fields)?;
        }
        Ok(checkpoint.path.clone())
    }

    /// One step of the current stage, recorded.
    fn step(&mut self, stage: &Stage) -> Result<MetricsRow, Error> {
        self.place.step = self.state.step + 1;
        let row = match stage {
            Stage::Sft(stage) => self.sft_step(stage)?,
            Stage::Policy(stage) => self.policy_step(stage)?,
            Stage::RewardModel(stage) => self.reward_model_step(stage)?,
            Stage::Preference(stage) => self.preference_step(stage)?,
            Stage::OnlinePreference(stage) => self.online_preference_step(stage)?,
            Stage::Distill(stage) => self.distill_step(stage)?,
        };
        (self.sink)(&row);
        self.control.at(stage.name(), self.state.step, self.state.version);
        self.control.publish("metrics", serde_json::Value::Object(row.to_json()).to_string());
        Ok(row)
    }

    /// Write a row of metrics and count the step as done.
    pub(crate) fn finish_step(&mut self, row: &mut MetricsRow) -> Result<(), Error> {
        self.accounts.columns(row);
        self.mirror_columns(row);
        self.check_accounts()?;
        self.record.metrics(row)?;
        self.state.metric = row.get(&self.spec.checkpoint.best_metric);
        self.has_metric |= self.state.metric.is_some();
        self.state.step += 1;
        self.state.stage_step += 1;
        Ok(())
    }

    fn enter_next_stage(&mut self) -> Result<(), Error> {
        assert!(self.queue.is_empty(), "a batch is left that no step of the stage trains on");
        assert!(self.carried.is_empty(), "a group is left that no step of the stage trains on");
        self.state.stage += 1;
        self.state.stage_step = 0;
        self.state.cursor = temper_data::sampler::PromptCursor::default();
        self.state.kl_coef = None;
        self.state.settings.clear();
        self.state.pass_rates = Default::default();
        if self.is_complete() { Ok(()) } else { self.begin_stage() }
    }

    /// K/V that samples kept are in the memory of engines that are gone.
    fn warn_of_lost_kv(&self) {
        let stage = self.spec.stages.get(self.state.stage);
        if stage.and_then(Stage::policy).is_some_and(PolicyStage::keeps_kv) && !self.carried.is_empty() {
            tracing::warn!(
                num_groups = self.carried.len(),
                "samples that go on have lost the K/V that they kept (keep_kv): those are computed anew, and the run is \
                 not the one that would not have been interrupted"
            );
        }
    }

    pub(crate) fn begin_stage(&mut self) -> Result<(), Error> {
        self.enter(Phase::BeginStage);
        self.rest_engines()?;
        let stage = self.spec.stages[self.state.stage].clone();
        let spec = stage_spec(&stage);
        let begun = self.services.trainer.begin_stage(spec);
        self.attribute(begun)?;
        self.begin_scalar_model(&stage)?;
        if let Stage::Distill(distill) = &stage {
            self.attribute(self.services.trainer.begin_distillation(distill.spec()))?;
        }
        if let (Stage::Policy(policy), None) = (&stage, self.state.kl_coef) {
            self.state.kl_coef = Some(policy.algorithm.kl_in_reward.kl_ctrl.kl_coef);
        }
        self.record.event("stage", &[("stage", json!(stage.name())), ("step", json!(self.state.step))])
    }

    /// Ask for the critic or the reward model of a stage that has one.
    fn begin_scalar_model(&mut self, stage: &Stage) -> Result<(), Error> {
        let seed = self.stage_seed();
        let spec = match stage {
            Stage::Policy(policy) => policy.critic.as_ref().map(|critic| critic.spec(seed)),
            Stage::RewardModel(stage) => Some(stage.spec(seed)),
            Stage::Sft(_) | Stage::Preference(_) | Stage::OnlinePreference(_) | Stage::Distill(_) => None,
        };
        match spec {
            Some(spec) => self.attribute(self.services.trainer.begin_scalar_model(spec)),
            None => Ok(()),
        }
    }

    /// Name the weights and let the engines prove that they serve them.
    pub(crate) fn publish(&mut self, number: u64) -> Result<(), Error> {
        if !self.unpublished {
            return Ok(());
        }
        self.enter(Phase::Publish);
        let published = self.services.trainer.publish(number);
        self.state.version = self.attribute(published)?;
        let proven = self.services.rollout.set_version(self.state.version);
        self.attribute(proven)?;
        self.unpublished = false;
        Ok(())
    }

    pub(crate) fn checkpoint(&mut self) -> Result<PathBuf, Error> {
        self.publish(self.state.step)?;
        self.state.metric = self.last_row.as_ref().and_then(|row| row.get(&self.spec.checkpoint.best_metric));
        let dir = self.dir.checkpoints();
        let pending = PendingCheckpoint::create(&dir, self.state.step)?;
        self.record.sync()?;
        self.enter(Phase::CheckpointModel);
        let saved = self.services.trainer.save_model(&pending.model());
        self.attribute(saved)?;
        let saved = self.services.trainer.save_reward_model(&pending.reward_model());
        self.attribute(saved)?;
        self.enter(Phase::CheckpointOptimizer);
        let saved = self.services.trainer.save_state(&pending.optimizer());
        self.attribute(saved)?;
        self.enter(Phase::CheckpointManifest);
        self.state.queue = save_queue(&self.queue, (&pending, &self.spec.name))?;
        self.state.carried = carried::save(&self.carried, self.state.step, (&pending, &self.spec.name))?;
        pending.seal(&self.state)?;
        self.enter(Phase::CheckpointRename);
        let path = pending.publish()?;
        self.enter(Phase::CheckpointPrune);
        checkpoint::prune(&dir, self.spec.checkpoint.keep_last, self.spec.checkpoint.keep_best)?;
        let fields = [("step", json!(self.state.step)), ("path", json!(path.display().to_string()))];
        self.record.event("checkpoint", &fields)?;
        Ok(path)
    }

    pub(crate) fn enter(&mut self, phase: Phase) {
        self.place.enter(phase);
    }

    /// Say in which step and phase a service failed.
    pub(crate) fn attribute<T>(&self, result: Result<T, ServiceError>) -> Result<T, Error> {
        self.place.attribute(result)
    }
}

fn stage_spec(stage: &Stage) -> StageSpec {
    let (objective, needs_reference, memory) = match stage {
        Stage::Sft(s) => (Objective::Sft(s.loss_type), false, &s.memory),
        Stage::Policy(s) => {
            let plan = s.algorithm.plan();
            (Objective::Policy(s.algorithm.policy_loss.clone()), plan.ref_log_probs, &s.memory)
        }
        // The policy stays as it is; the loss of the reward model goes with its own message.
        Stage::RewardModel(s) => (Objective::Sft(SftLossType::Nll), false, &s.memory),
        // The loss goes with the teacher's message.
        Stage::Distill(s) => (Objective::Sft(SftLossType::Nll), false, &s.memory),
        Stage::Preference(s) => (s.objective.clone(), s.objective.needs_reference(), &s.memory),
        Stage::OnlinePreference(s) => (s.objective.clone(), s.objective.needs_reference(), &s.policy.memory),
    };
    StageSpec {
        name: stage.name().to_owned(),
        objective_json: serde_json::to_string(&objective).expect("an objective is plain data"),
        optimizer: stage.optimizer().clone(),
        needs_reference,
        max_micro_batch_tokens: memory.max_micro_batch_tokens,
        recompute_activations: memory.recompute_activations,
    }
}

/// An identity without its trainer ranks, and their number. Sums over another number of ranks round differently, but a
/// checkpoint loads on any.
fn split_ranks(identity: &str) -> (&str, &str) {
    identity.rsplit_once("-ranks").unwrap_or((identity, "1"))
}
