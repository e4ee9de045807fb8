//! The trainer as a service in the same process.

use crate::{Error, Ranks, Trainer};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use temper_proto::{
    HeldShard, LogProbs, MiniBatch, MirrorPlan, MirrorReport, MirrorService, PolicyRole, ServiceResult, StageSpec,
    TokenSequence, TrainerService, UpdateReport,
};
use temper_types::PolicyVersion;

/// How a rank meets the others once more, after one of them was lost.
pub struct Meeting(Box<dyn Fn() -> Result<Ranks, Error> + Send + Sync>);

impl Meeting {
    /// By `meet`, which waits for all ranks.
    pub fn new(meet: impl Fn() -> Result<Ranks, Error> + Send + Sync + 'static) -> Self {
        Meeting(Box::new(meet))
    }
}

impl std::fmt::Debug for Meeting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Meeting")
    }
}

/// One trainer behind the service trait; calls take turns.
#[derive(Debug)]
pub struct LocalTrainerService {
    trainer: Mutex<Trainer>,
    meeting: Option<Meeting>,
}

impl LocalTrainerService {
    /// Serve `trainer`.
    pub fn new(trainer: Trainer) -> Self {
        LocalTrainerService { trainer: Mutex::new(trainer), meeting: None }
    }

    /// The same, able to meet other ranks in place of those that it was loaded with.
    #[must_use]
    pub fn with_meeting(self, meeting: Meeting) -> Self {
        LocalTrainerService { meeting: Some(meeting), ..self }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Trainer> {
        self.trainer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TrainerService for LocalTrainerService {
    fn begin_stage(&self, spec: StageSpec) -> ServiceResult<()> {
        self.lock().begin_stage(spec).map_err(|e| e.into_service("begin_stage"))
    }

    fn log_probs(&self, role: PolicyRole, sequences: &[TokenSequence], temperature: f32) -> ServiceResult<LogProbs> {
        self.lock().log_probs(role, sequences, temperature).map_err(|e| e.into_service("log_probs"))
    }

    fn mix_reference(&self, alpha: f64) -> ServiceResult<()> {
        self.lock().mix_reference(alpha).map_err(|e| e.into_service("mix_reference"))
    }

    fn update(&self, batch: MiniBatch) -> ServiceResult<UpdateReport> {
        self.lock().update(&batch).map_err(|e| e.into_service("update"))
    }

    fn publish(&self, number: u64) -> ServiceResult<PolicyVersion> {
        self.lock().publish(number).map_err(|e| e.into_service("publish"))
    }

    fn version(&self) -> PolicyVersion {
        self.lock().version()
    }

    fn save_model(&self, dir: &Path) -> ServiceResult<()> {
        self.lock().save_model(dir).map_err(|e| e.into_service("save_model"))
    }

    fn save_state(&self, dir: &Path) -> ServiceResult<()> {
        self.lock().save_state(dir).map_err(|e| e.into_service("save_state"))
    }

    fn restore(&self, model_dir: &Path, state_dir: &Path, version: PolicyVersion) -> ServiceResult<()> {
        self.lock().restore(model_dir, state_dir, version).map_err(|e| e.into_service("restore"))
    }
}

impl MirrorService for LocalTrainerService {
    fn mirror(&self, step: u64) -> ServiceResult<MirrorReport> {
        self.lock().mirror(step).map_err(|e| e.into_service("mirror"))
    }

    fn held_shards(&self) -> ServiceResult<Vec<HeldShard>> {
        self.lock().held_shards().map_err(|e| e.into_service("held_shards"))
    }

    fn rejoin(&self) -> ServiceResult<()> {
        let alone = || Error::invalid("a trainer", "that was loaded with its ranks meets no others");
        let rejoin = || {
            let ranks = (self.meeting.as_ref().ok_or_else(alone)?.0)()?;
            self.lock().rejoin(ranks)
        };
        rejoin().map_err(|e: Error| e.into_service("rejoin"))
    }

    fn restore_mirrored(&self, plan: &MirrorPlan) -> ServiceResult<()> {
        self.lock().restore_mirrored(plan).map_err(|e| e.into_service("restore_mirrored"))
    }
}
