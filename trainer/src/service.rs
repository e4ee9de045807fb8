//! The trainer as a service in the same process.

use crate::Trainer;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use temper_proto::{
    LogProbs, MiniBatch, PolicyRole, ServiceResult, StageSpec, TokenSequence, TrainerService, UpdateReport,
};
use temper_types::PolicyVersion;

/// One trainer behind the service trait; calls take turns.
#[derive(Debug)]
pub struct LocalTrainerService {
    trainer: Mutex<Trainer>,
}

impl LocalTrainerService {
    /// Serve `trainer`.
    pub fn new(trainer: Trainer) -> Self {
        LocalTrainerService { trainer: Mutex::new(trainer) }
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
