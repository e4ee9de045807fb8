//! The phases of a run, announced as they begin: for logs, and for tests that kill a run in a given phase.

/// What a run is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// A new optimizer, objective and reference.
    BeginStage,
    /// Prompts to requests, requests to responses.
    Rollout,
    /// Responses to rewards.
    Reward,
    /// Log-probs by the trainer, old and reference.
    LogProbs,
    /// Rewards to advantages.
    Advantages,
    /// Optimizer steps.
    Update,
    /// A new policy version.
    Publish,
    /// The step's rows and metrics go to disk.
    Record,
    /// Held-out prompts.
    Validation,
    /// What a lost trainer rank would need is kept in memory, where the run asks for it.
    Mirror,
    /// Weights of a checkpoint.
    CheckpointModel,
    /// Optimizer and trainer state of a checkpoint.
    CheckpointOptimizer,
    /// Controller state and manifest of a checkpoint.
    CheckpointManifest,
    /// The checkpoint is renamed into place.
    CheckpointRename,
    /// Old checkpoints are removed.
    CheckpointPrune,
}

impl Phase {
    /// Every phase, in the order of a step.
    pub const ALL: [Phase; 15] = [
        Phase::BeginStage,
        Phase::Rollout,
        Phase::Reward,
        Phase::LogProbs,
        Phase::Advantages,
        Phase::Update,
        Phase::Publish,
        Phase::Record,
        Phase::Validation,
        Phase::Mirror,
        Phase::CheckpointModel,
        Phase::CheckpointOptimizer,
        Phase::CheckpointManifest,
        Phase::CheckpointRename,
        Phase::CheckpointPrune,
    ];

    /// Name in logs.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::BeginStage => "begin_stage",
            Phase::Rollout => "rollout",
            Phase::Reward => "reward",
            Phase::LogProbs => "log_probs",
            Phase::Advantages => "advantages",
            Phase::Update => "update",
            Phase::Publish => "publish",
            Phase::Record => "record",
            Phase::Validation => "validation",
            Phase::Mirror => "mirror",
            Phase::CheckpointModel => "checkpoint_model",
            Phase::CheckpointOptimizer => "checkpoint_optimizer",
            Phase::CheckpointManifest => "checkpoint_manifest",
            Phase::CheckpointRename => "checkpoint_rename",
            Phase::CheckpointPrune => "checkpoint_prune",
        }
    }
}

/// Is told of every phase before it begins.
pub trait PhaseObserver: Send + Sync {
    /// `phase` of global step `step` begins.
    fn enter(&self, step: u64, phase: Phase);
}

impl PhaseObserver for () {
    fn enter(&self, _step: u64, _phase: Phase) {}
}
