//! Workers without a model: every number is a plain function of the request, and what the trainer is told is kept.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use temper_controller::{
    CheckpointInfo, Controller, Generation, PolicyStage, ReplaySpec, RunDir, RunSpec, Scoring, Services, Stage,
    SystemClock, latest_checkpoint,
};
use temper_proto::{
    DistillService, DistillSpec, GeneratedSample, GroupRequest, GroupResult, LogProbs, MiniBatch, MirrorService,
    PolicyRole, PreferencePair, RewardService, RolloutService, RolloutStats, ScalarModelService, ScalarModelSpec,
    ScalarReport, ScoreRequest, ServiceResult, StageSpec, TextService, TokenSequence, TrainerService, UpdateReport,
};
use temper_types::{
    FinishReason, PolicyVersion, PromptContent, RewardComponent, RewardFailure, RewardOutcome, SampleIndex,
    SampleTimings, WeightFormat,
};

/// What the trainer was asked.
#[derive(Debug, Clone, PartialEq)]
pub enum Call {
    /// Log-probs of so many sequences.
    LogProbs(PolicyRole, usize),
    /// An update.
    Update(MiniBatch),
    /// The reference moved.
    Mix(f64),
    /// An update of the critic.
    Critic(MiniBatch),
}

/// How the fakes behave.
#[derive(Debug, Clone, Copy)]
pub struct Behaviour {
    /// What the trainer's log-prob of an odd token exceeds the engine's by.
    pub gap: f32,
    /// The reward of a response.
    pub reward: fn(&ScoreRequest) -> Option<f64>,
    /// What later passes have of earlier ones.
    pub replay: ReplaySpec,
}

impl Default for Behaviour {
    fn default() -> Self {
        Behaviour { gap: 0.0, reward: |r| Some(f64::from(first_id(r) % 3) / 2.0), replay: ReplaySpec::Exact }
    }
}

/// First id of a response.
pub fn first_id(request: &ScoreRequest) -> u32 {
    request.response.split(' ').next().and_then(|id| id.parse().ok()).unwrap_or(0)
}

/// The engine's log-prob of an id: exact in f32.
pub fn engine_log_prob(id: u32) -> f32 {
    -0.25 * (id + 1) as f32
}

struct Text;

impl TextService for Text {
    fn encode_prompt(&self, prompt: &PromptContent) -> ServiceResult<Vec<u32>> {
        Ok(format!("{prompt:?}").bytes().map(|b| u32::from(b % 7) + 1).collect())
    }
    fn encode_response(&self, response: &PromptContent) -> ServiceResult<Vec<u32>> {
        self.encode_prompt(response)
    }
    fn encode_text(&self, text: &str) -> ServiceResult<Vec<u32>> {
        Ok(text.bytes().map(u32::from).collect())
    }
    fn decode(&self, token_ids: &[u32]) -> String {
        token_ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
    }
    fn stop_token_ids(&self) -> Vec<u32> {
        vec![0]
    }
}

/// An engine that answers the last group first, in the version that was set last.
#[derive(Default)]
pub struct Rollout {
    groups: Mutex<Vec<GroupRequest>>,
    version: Mutex<PolicyVersion>,
}

fn response(seed: u64, temperature: f32) -> Vec<u32> {
    if temperature == 0.0 {
        return vec![2, 0];
    }
    let mut ids: Vec<u32> = (0..2 + seed % 3).map(|k| (seed >> (8 * k + 3)) as u32 % 7 + 1).collect();
    ids.push(0);
    ids
}

/// What a round draws of a sample.
struct Round {
    num_begun: u32,
    num_kept: u32,
    token_ids: Vec<u32>,
    finish_reason: FinishReason,
}

/// The next tokens of a response that is drawn in rounds; `None` of one that is drawn in one piece.
fn next_tokens(group: &GroupRequest, index: usize, seed: u64) -> Option<Round> {
    if group.round_tokens == 0 && group.begun.is_empty() {
        return None;
    }
    let begun = group.begun.get(index).cloned().unwrap_or_default();
    let whole = response(seed, group.sampling.temperature);
    assert!(whole.starts_with(&begun.token_ids), "{begun:?} is no beginning of {whole:?}");
    assert_eq!(begun.is_complete, begun.token_ids == whole);
    let rest = &whole[begun.token_ids.len()..];
    let round = if group.round_tokens == 0 { rest.len() } else { rest.len().min(group.round_tokens as usize) };
    let finish_reason = if round == rest.len() { FinishReason::Stop } else { FinishReason::Paused };
    let num_begun = begun.token_ids.len() as u32;
    let num_kept = if group.keep_kv { num_begun } else { 0 };
    Some(Round { num_begun, num_kept, token_ids: rest[..round].to_vec(), finish_reason })
}

impl Round {
    fn sample(self, index: usize, seed: u64, version: PolicyVersion) -> GeneratedSample {
        GeneratedSample {
            sample_index: SampleIndex(index as u32),
            seed,
            num_begun: self.num_begun,
            num_kept: self.num_kept,
            reused: Vec::new(),
            log_probs: self.token_ids.iter().map(|id| engine_log_prob(*id)).collect(),
            policy_versions: if self.token_ids.is_empty() {
                Vec::new()
            } else {
                vec![(version, self.token_ids.len() as u32)]
            },
            token_ids: self.token_ids,
            sampled_log_probs: Vec::new(),
            surviving_mass: Vec::new(),
            finish_reason: self.finish_reason,
            num_drafted: 0,
            num_accepted: 0,
            timings: SampleTimings::default(),
        }
    }
}

impl RolloutService for Rollout {
    fn submit(&self, groups: Vec<GroupRequest>) -> ServiceResult<()> {
        self.groups.lock().expect("no panic elsewhere").extend(groups);
        Ok(())
    }
    fn next_group(&self, _timeout: Duration) -> ServiceResult<Option<GroupResult>> {
        let Some(group) = self.groups.lock().expect("no panic elsewhere").pop() else { return Ok(None) };
        let version = *self.version.lock().expect("no panic elsewhere");
        let sample = |(index, seed): (usize, &u64)| {
            if let Some(round) = next_tokens(&group, index, *seed) {
                return round.sample(index, *seed, version);
            }
            let earlier = group.reuse.as_ref().map(|reuse| reuse.responses[index].token_ids.clone());
            let reused = earlier.iter().flatten().map(|_| 1).collect();
            let token_ids = earlier.unwrap_or_else(|| response(*seed, group.sampling.temperature));
            GeneratedSample {
                sample_index: SampleIndex(index as u32),
                seed: *seed,
                num_begun: 0,
                num_kept: 0,
                reused,
                log_probs: token_ids.iter().map(|id| engine_log_prob(*id)).collect(),
                policy_versions: vec![(version, token_ids.len() as u32)],
                token_ids,
                sampled_log_probs: Vec::new(),
                surviving_mass: Vec::new(),
                finish_reason: FinishReason::Stop,
                num_drafted: 0,
                num_accepted: 0,
                timings: SampleTimings::default(),
            }
        };
        let samples = group.seeds.iter().enumerate().map(sample).collect();
        Ok(Some(GroupResult {
            group_id: group.group_id,
            prompt_id: group.prompt_id,
            worker: "fake".to_owned(),
            samples,
        }))
    }
    fn abort_all(&self) -> ServiceResult<usize> {
        Ok(std::mem::take(&mut *self.groups.lock().expect("no panic elsewhere")).len())
    }
    fn set_version(&self, version: PolicyVersion) -> ServiceResult<()> {
        let open = self.groups.lock().expect("no panic elsewhere").len();
        assert_eq!(open, 0, "version {version} comes while groups are open");
        *self.version.lock().expect("no panic elsewhere") = version;
        Ok(())
    }
    fn stats(&self) -> RolloutStats {
        RolloutStats::default()
    }
}

struct Reward(Behaviour);

impl RewardService for Reward {
    fn score(&self, requests: &[ScoreRequest]) -> ServiceResult<Vec<RewardOutcome>> {
        let outcome = |request: &ScoreRequest| match (self.0.reward)(request) {
            Some(reward) => {
                let length = request.num_response_tokens as f64;
                let components = [("fake", reward), ("length", length)];
                let components =
                    components.map(|(name, value)| RewardComponent { name: name.to_owned(), value }).into();
                RewardOutcome::Scored { reward, components }
            }
            None => RewardOutcome::Failed(RewardFailure { scorer: "fake".to_owned(), cause: "asked to".to_owned() }),
        };
        Ok(requests.iter().map(outcome).collect())
    }
}

struct Trainer {
    behaviour: Behaviour,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl Trainer {
    fn log_probs_of(&self, sequence: &TokenSequence) -> Vec<f32> {
        let gap = |id: u32| if id % 2 == 1 { self.behaviour.gap } else { 0.0 };
        sequence.response_token_ids.iter().map(|id| engine_log_prob(*id) + gap(*id)).collect()
    }
    fn note(&self, call: Call) {
        self.calls.lock().expect("no panic elsewhere").push(call);
    }
}

/// The critic's value at an id: exact in f32.
pub fn value(id: u32) -> f32 {
    0.125 * id as f32
}

impl ScalarModelService for Trainer {
    fn begin_scalar_model(&self, _spec: ScalarModelSpec) -> ServiceResult<()> {
        Ok(())
    }
    fn values(&self, sequences: &[TokenSequence]) -> ServiceResult<Vec<Vec<f32>>> {
        Ok(sequences.iter().map(|s| s.response_token_ids.iter().map(|id| value(*id)).collect()).collect())
    }
    fn update_critic(&self, batch: MiniBatch) -> ServiceResult<ScalarReport> {
        self.note(Call::Critic(batch));
        Ok(ScalarReport { loss: 2.0, grad_norm: 3.0, ..ScalarReport::default() })
    }
    fn update_reward_model(&self, _pairs: &[PreferencePair], _learning_rate: f64) -> ServiceResult<ScalarReport> {
        Ok(ScalarReport::default())
    }
    fn scores(&self, sequences: &[TokenSequence]) -> ServiceResult<Vec<f32>> {
        Ok(vec![0.0; sequences.len()])
    }
    fn save_reward_model(&self, _dir: &Path) -> ServiceResult<bool> {
        Ok(false)
    }
    fn restore_reward_model(&self, _dir: &Path) -> ServiceResult<()> {
        Ok(())
    }
}

impl DistillService for Trainer {
    fn begin_distillation(&self, _spec: DistillSpec) -> ServiceResult<()> {
        Ok(())
    }
    fn update_distilled(&self, batch: MiniBatch) -> ServiceResult<UpdateReport> {
        self.update(batch)
    }
}

impl MirrorService for Trainer {}

impl TrainerService for Trainer {
    fn begin_stage(&self, _spec: StageSpec) -> ServiceResult<()> {
        Ok(())
    }
    fn log_probs(&self, role: PolicyRole, sequences: &[TokenSequence], _temperature: f32) -> ServiceResult<LogProbs> {
        self.note(Call::LogProbs(role, sequences.len()));
        let log_probs: Vec<Vec<f32>> = sequences.iter().map(|s| self.log_probs_of(s)).collect();
        let constant = |value: f32| log_probs.iter().map(|row| vec![value; row.len()]).collect();
        Ok(LogProbs { entropies: constant(1.0), sum_pi_squared: constant(0.5), log_probs })
    }
    fn mix_reference(&self, alpha: f64) -> ServiceResult<()> {
        self.note(Call::Mix(alpha));
        Ok(())
    }
    fn update(&self, batch: MiniBatch) -> ServiceResult<UpdateReport> {
        let log_probs = batch.rows.iter().map(|row| self.log_probs_of(&row.sequence)).collect();
        self.note(Call::Update(batch));
        Ok(UpdateReport { log_probs, ..UpdateReport::default() })
    }
    fn publish(&self, number: u64) -> ServiceResult<PolicyVersion> {
        Ok(PolicyVersion { number, ..PolicyVersion::default() })
    }
    fn version(&self) -> PolicyVersion {
        PolicyVersion::default()
    }
    fn save_model(&self, _dir: &Path) -> ServiceResult<()> {
        Ok(())
    }
    fn save_state(&self, _dir: &Path) -> ServiceResult<()> {
        Ok(())
    }
    fn restore(&self, _model_dir: &Path, _state_dir: &Path, _version: PolicyVersion) -> ServiceResult<()> {
        Ok(())
    }
}

/// A stage over eight prompts, four samples each.
pub fn stage(steps: u64, algorithm: serde_json::Value) -> PolicyStage {
    let algorithm = serde_json::from_value(algorithm).expect("an algorithm");
    PolicyStage { steps, prompts_per_step: 4, num_generations: 4, algorithm, ..PolicyStage::default() }
}

/// A synchronous run of one stage.
pub fn spec(stage: PolicyStage, replay: ReplaySpec) -> RunSpec {
    let data = serde_json::json!({"train": {"generate": {
        "generator": {"task": "sort_digits", "min_digits": 2, "max_digits": 3}, "num_rows": 8
    }}});
    RunSpec {
        name: "fake".to_owned(),
        seed: 3,
        identity: "fake".to_owned(),
        data: serde_json::from_value(data).expect("datasets"),
        stages: vec![Stage::Policy(Box::new(stage))],
        validation: Default::default(),
        checkpoint: serde_json::from_value(serde_json::json!({"every_steps": 2, "keep_last": 9})).expect("settings"),
        rollout_timeout_seconds: 5.0,
        replay,
        weights: WeightFormat::Exact,
        staleness: 0,
        generation: Generation::BeforeTraining,
        scoring: Scoring::default(),
        sleep: false,
        mirror_shards: false,
    }
}

/// A run in `dir`, the checkpoint that it goes on from, and what the trainer is asked.
pub type Prepared = (Controller, Option<CheckpointInfo>, Arc<Mutex<Vec<Call>>>);

pub fn prepare(dir: &Path, stage: PolicyStage, behaviour: Behaviour) -> Result<Prepared, temper_controller::Error> {
    let (services, calls) = services(behaviour);
    let run_dir = RunDir::open(dir)?;
    let resume = latest_checkpoint(&run_dir.checkpoints())?;
    let controller =
        Controller::new(spec(stage, behaviour.replay), services, run_dir, Arc::new(SystemClock::default()))?;
    Ok((controller, resume, calls))
}

/// Run, or go on from the last checkpoint of `dir`; gives what the trainer was asked.
pub fn run_in(dir: &Path, stage: PolicyStage, behaviour: Behaviour) -> Result<Vec<Call>, temper_controller::Error> {
    run_spec(dir, spec(stage, behaviour.replay), behaviour)
}

/// The same of any run.
pub fn run_spec(dir: &Path, spec: RunSpec, behaviour: Behaviour) -> Result<Vec<Call>, temper_controller::Error> {
    let (services, calls) = services(behaviour);
    run_services(dir, spec, services)?;
    Ok(std::mem::take(&mut *calls.lock().expect("no panic elsewhere")))
}

/// Fakes, and what their trainer is asked.
pub fn services(behaviour: Behaviour) -> (Services, Arc<Mutex<Vec<Call>>>) {
    let calls: Arc<Mutex<Vec<Call>>> = Arc::default();
    let services = Services {
        rollout: Arc::new(Rollout::default()),
        reward: Arc::new(Reward(behaviour)),
        trainer: Arc::new(Trainer { behaviour, calls: Arc::clone(&calls) }),
        text: Arc::new(Text),
    };
    (services, calls)
}

/// Run, or go on from the last checkpoint of `dir`.
pub fn run_services(dir: &Path, spec: RunSpec, services: Services) -> Result<(), temper_controller::Error> {
    let run_dir = RunDir::open(dir)?;
    let resume = latest_checkpoint(&run_dir.checkpoints())?;
    let mut controller = Controller::new(spec, services, run_dir, Arc::new(SystemClock::default()))?;
    controller.run(resume.as_ref()).map(|_outcome| ())
}

/// Rows of metrics of a run.
pub fn metrics(dir: &Path) -> Vec<serde_json::Map<String, serde_json::Value>> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).expect("metrics");
    text.lines().map(|line| serde_json::from_str(line).expect("a row")).collect()
}

/// The mini-batches among the calls.
pub fn updates(calls: &[Call]) -> Vec<&MiniBatch> {
    calls.iter().filter_map(|call| if let Call::Update(batch) = call { Some(batch) } else { None }).collect()
}
