//! The models with a scalar head behind the service trait.

use crate::LocalTrainerService;
use std::path::Path;
use temper_proto::{
    MiniBatch, PreferencePair, ScalarModelService, ScalarModelSpec, ScalarReport, ServiceResult, TokenSequence,
};

impl ScalarModelService for LocalTrainerService {
    fn begin_scalar_model(&self, spec: ScalarModelSpec) -> ServiceResult<()> {
        self.lock().begin_scalar_model(spec).map_err(|e| e.into_service("begin_scalar_model"))
    }

    fn values(&self, sequences: &[TokenSequence]) -> ServiceResult<Vec<Vec<f32>>> {
        self.lock().values(sequences).map_err(|e| e.into_service("values"))
    }

    fn update_critic(&self, batch: MiniBatch) -> ServiceResult<ScalarReport> {
        self.lock().update_critic(&batch).map_err(|e| e.into_service("update_critic"))
    }

    fn update_reward_model(&self, pairs: &[PreferencePair], learning_rate: f64) -> ServiceResult<ScalarReport> {
        self.lock().update_reward_model(pairs, learning_rate).map_err(|e| e.into_service("update_reward_model"))
    }

    fn scores(&self, sequences: &[TokenSequence]) -> ServiceResult<Vec<f32>> {
        self.lock().scores(sequences).map_err(|e| e.into_service("scores"))
    }

    fn save_reward_model(&self, dir: &Path) -> ServiceResult<bool> {
        self.lock().save_reward_model(dir).map_err(|e| e.into_service("save_reward_model"))
    }

    fn restore_reward_model(&self, dir: &Path) -> ServiceResult<()> {
        self.lock().restore_reward_model(dir).map_err(|e| e.into_service("restore_reward_model"))
    }
}
