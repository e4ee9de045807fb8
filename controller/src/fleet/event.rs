//! What the control plane is told, what it answers, and the names of things in both.

use super::journal::Entry;
use super::ledger::DropReason;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use temper_types::{GroupId, PolicyVersion, PromptId};

/// Logical time in ticks of the caller's choice (milliseconds in life); never goes back.
pub type Time = u64;

/// A worker, over all its lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkerId(pub u32);

/// One life of a worker: a restart has a higher incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Origin {
    /// The worker.
    pub worker: WorkerId,
    /// Its life, from 1.
    pub incarnation: u64,
}

/// One attempt at one job; no two attempts of a run share it, not even across a restart of the controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ticket(pub u64);

/// What a worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Generates.
    Rollout,
    /// Scores.
    Reward,
}

/// A group of samples of one prompt, as far as scheduling and accounting need to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSpec {
    /// The group.
    pub group: GroupId,
    /// The prompt.
    pub prompt: PromptId,
    /// Noise of each sample. Every attempt has these.
    pub seeds: Vec<u64>,
    /// Number of the version that is being trained when the group is consumed.
    pub due: u64,
    /// Prompt length in tokens.
    pub prompt_tokens: u64,
    /// Most response tokens of a sample.
    pub max_new_tokens: u64,
    /// Groups with equal keys profit from the same prefix cache.
    pub prefix: u64,
    /// Whether it waits for the worker that had it last: that one holds K/V that cannot be computed again.
    #[serde(default)]
    pub is_bound: bool,
}

/// Names a unit of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobKey {
    /// Generate a group.
    Group(GroupId),
    /// Score a bundle of responses; the number is the caller's.
    Score(u64),
}

/// A unit of work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Job {
    /// Generate a group.
    Group(Arc<GroupSpec>),
    /// Score a bundle of responses.
    Score {
        /// Its number.
        job: u64,
        /// How much work it is, in responses.
        cost: u64,
    },
}

impl Job {
    /// Its name.
    pub fn key(&self) -> JobKey {
        match self {
            Job::Group(spec) => JobKey::Group(spec.group),
            Job::Score { job, .. } => JobKey::Score(*job),
        }
    }

    /// Who does it.
    pub fn role(&self) -> Role {
        match self {
            Job::Group(_) => Role::Rollout,
            Job::Score { .. } => Role::Reward,
        }
    }
}

/// What becomes of one group in a training step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settlement {
    /// The group.
    pub group: GroupId,
    /// Indices of its samples that are trained on, ascending; the others are dropped as filtered.
    pub trained: Vec<u32>,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A worker is there. A higher incarnation than the known one ends the earlier life.
    Register {
        /// Who, in which life.
        origin: Origin,
        /// What it does.
        role: Role,
        /// Most jobs it is given at once; at least 1.
        capacity: u32,
    },
    /// A worker is alive.
    Renew {
        /// Who.
        origin: Origin,
    },
    /// A worker goes away on purpose.
    Leave {
        /// Who.
        origin: Origin,
    },
    /// A call to a worker failed.
    Failed {
        /// Who.
        origin: Origin,
    },
    /// Groups to generate.
    Submit {
        /// Each once; an id that is still open is refused.
        groups: Vec<GroupSpec>,
    },
    /// Responses to score.
    SubmitScore {
        /// Number of the bundle, new.
        job: u64,
        /// How much work it is, in responses.
        cost: u64,
    },
    /// A job is done.
    Answer {
        /// Who says so.
        origin: Origin,
        /// For which attempt.
        ticket: Ticket,
        /// Versions that produced its tokens, each once; empty where nothing was generated.
        versions: Vec<PolicyVersion>,
        /// Response tokens, all samples together.
        num_tokens: u64,
    },
    /// A worker refuses a job as wrong: it would be refused everywhere.
    Refuse {
        /// Who.
        origin: Origin,
        /// Which attempt.
        ticket: Ticket,
    },
    /// A worker proved which weights it serves.
    Attest {
        /// Who.
        origin: Origin,
        /// What it holds.
        version: PolicyVersion,
    },
    /// These weights are to be served from now on.
    Publish {
        /// A number above every earlier one, and the hash.
        version: PolicyVersion,
    },
    /// Give up every group that is queued or running.
    AbortAll,
    /// No step will train on these; those that were delivered are let go of.
    Discard {
        /// Which.
        groups: Vec<GroupId>,
    },
    /// Issue nothing until [`Event::Resume`].
    Pause,
    /// Issue again.
    Resume,
    /// Train on these groups, which were all delivered. Refused while a step is under way, and after a restart until
    /// the trainer said where it is.
    BeginStep {
        /// Number of the step, above the last one's.
        step: u64,
        /// What becomes of each.
        groups: Vec<Settlement>,
    },
    /// The trainer finished a step.
    StepDone {
        /// Which.
        step: u64,
        /// The weights it published, where they are to be served at once.
        version: Option<PolicyVersion>,
    },
    /// The trainer says where it is, in answer to [`Action::AskTrainer`].
    TrainerAt {
        /// Term of the question.
        term: u64,
        /// Last step it finished.
        step: u64,
        /// The weights it published then.
        version: Option<PolicyVersion>,
    },
    /// Time passed.
    Tick,
}

/// Why a worker is no longer counted on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LossCause {
    /// It stopped renewing its lease.
    LeaseExpired,
    /// It renewed its lease and answered nothing in time.
    Stalled,
    /// It did not attest a version in time.
    SyncTimedOut,
    /// A call to it failed.
    CallFailed,
    /// It could not take the weights that it was to hold, or found others. It had nothing in hand, and may come again.
    SyncFailed,
    /// It was registered again while it was thought to live.
    Superseded,
    /// It answered with weights that it was not asked for.
    WrongWeights,
    /// It went away on purpose.
    Left,
    /// The controller was restarted; the worker has to register again.
    ControllerRestarted,
}

impl LossCause {
    /// In words.
    pub fn describe(self) -> &'static str {
        match self {
            LossCause::LeaseExpired => "its lease expired",
            LossCause::Stalled => "it answered nothing in time",
            LossCause::SyncTimedOut => "it did not attest its weights in time",
            LossCause::CallFailed => "a call failed",
            LossCause::SyncFailed => "it could not take new weights",
            LossCause::Superseded => "it registered anew",
            LossCause::WrongWeights => "it answered with other weights than it attested",
            LossCause::Left => "it left",
            LossCause::ControllerRestarted => "the controller restarted",
        }
    }
}

/// Why a message changed nothing (or, where said, only its own attempt).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fence {
    /// From a worker nobody knows.
    UnknownWorker,
    /// From an earlier life of a worker, or from one that is counted as lost.
    StaleIncarnation,
    /// For an attempt that ended otherwise.
    LateAnswer,
    /// For an attempt that was answered before.
    DuplicateAnswer,
    /// For another worker's attempt.
    WrongWorker,
    /// An answer made with weights that the attempt was not issued for; the attempt is dropped and the worker lost.
    WrongVersion,
    /// An answer too old for the staleness bound; the attempt is dropped and the group issued again.
    StaleVersion,
    /// An attestation that nobody waits for.
    LateAttestation,
    /// An attestation of the right number with the wrong hash; the worker is asked again.
    HashMismatch,
    /// A publication whose number is not above the current one.
    VersionReused,
    /// A group or bundle whose id is open.
    DuplicateJob,
    /// A step that is not the next one, or whose groups are not all there.
    StepRefused,
    /// A trainer's answer for a step that is not under way.
    StepRepeated,
}

/// How an attempt's samples ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// These were trained on in a step; the attempt's others were filtered.
    Trained {
        /// The step.
        step: u64,
        /// Indices of the samples.
        samples: Vec<u32>,
    },
    /// None was trained on.
    Dropped(DropReason),
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Make these durable before anything that follows. Where that fails nothing that follows may be done, and the
    /// controller has to restart from what is durable.
    Append(Vec<Entry>),
    /// Give a worker a job.
    Dispatch {
        /// Who.
        to: Origin,
        /// Name of the attempt.
        ticket: Ticket,
        /// The job.
        job: Job,
        /// Weights to generate with.
        version: Option<PolicyVersion>,
    },
    /// Tell a worker to hold these weights and to attest them.
    Sync {
        /// Who.
        to: Origin,
        /// Which.
        version: PolicyVersion,
    },
    /// Tell a worker to give up every attempt below `before`.
    Abort {
        /// Who.
        to: Origin,
        /// The first ticket that is not meant.
        before: Ticket,
    },
    /// An answer was accepted: hand its payload on.
    Accept {
        /// Which attempt.
        ticket: Ticket,
        /// At which job.
        key: JobKey,
    },
    /// A job is given up: refused, lost too often, or delivered and then not trained on.
    GiveUp {
        /// The job.
        key: JobKey,
        /// How often it was issued.
        attempts: u32,
    },
    /// A worker is lost; what it had is issued again.
    Lost {
        /// Who.
        origin: Origin,
        /// Why.
        cause: LossCause,
    },
    /// A worker is not known in this life: it has to register anew, with a higher incarnation.
    Rejoin {
        /// Who, in the life that is not known.
        origin: Origin,
    },
    /// An attempt ended.
    Settled {
        /// Which.
        ticket: Ticket,
        /// Of which group.
        group: GroupId,
        /// How.
        outcome: Outcome,
    },
    /// Have the trainer do a step; it ignores a step that it has done, and messages of earlier terms.
    Train {
        /// Life of the controller.
        term: u64,
        /// The step.
        step: u64,
        /// Attempts whose samples it trains on.
        tickets: Vec<Ticket>,
    },
    /// Ask the trainer which step it finished last.
    AskTrainer {
        /// Life of the controller.
        term: u64,
    },
}

/// What becomes of groups that are running when new weights are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AtBump {
    /// A worker finishes what it has with the old weights, then takes the new ones.
    #[default]
    Finish,
    /// A worker gives up what it has; the groups are issued again with the new weights.
    AbortReissue,
}

/// Limits of the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlaneConfig {
    /// A worker that is silent for so long is lost. `u64::MAX`: workers have no lease.
    pub lease: Time,
    /// A worker that does not attest a version in so long is lost.
    pub sync_timeout: Time,
    /// A worker that has jobs and answers none in so long is lost.
    pub progress_timeout: Time,
    /// After so long without an answer the trainer is told again.
    pub train_timeout: Time,
    /// A job is given up after so many attempts.
    pub max_attempts: u32,
    /// By how many versions a sample may be behind the weights that it trains.
    pub max_staleness: u64,
    /// What becomes of running groups at a publication.
    pub at_bump: AtBump,
}

impl Default for PlaneConfig {
    fn default() -> Self {
        PlaneConfig {
            lease: u64::MAX,
            sync_timeout: 300_000,
            progress_timeout: 600_000,
            train_timeout: 3_600_000,
            max_attempts: 5,
            max_staleness: 0,
            at_bump: AtBump::Finish,
        }
    }
}
