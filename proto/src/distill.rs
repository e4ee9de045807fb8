//! Distillation: a policy learns from the whole distributions of a frozen teacher.

use crate::{MiniBatch, ServiceResult, UpdateReport};
use std::path::PathBuf;

/// What a stage asks for beside the policy.
#[derive(Debug, Clone, PartialEq)]
pub struct DistillSpec {
    /// The teacher, a Hugging Face directory of a language model with the policy's vocabulary.
    pub teacher: PathBuf,
    /// The loss as JSON of `temper_algos::distill::DistillConfig`.
    pub loss_json: String,
}

/// Trains on a teacher's distributions. Part of a trainer.
pub trait DistillService: Send + Sync {
    /// Load the teacher of the stage that has begun. It is gone when the next stage begins, and part of no checkpoint.
    ///
    /// # Errors
    /// `InvalidArgument` for a loss that this trainer does not know or a teacher of another vocabulary, `DataLoss` for
    /// a damaged file.
    fn begin_distillation(&self, spec: DistillSpec) -> ServiceResult<()>;
    /// One optimizer step on the mean divergence over the rows' unmasked tokens. The report's `kl` is
    /// KL(policy || teacher) over the same tokens.
    ///
    /// # Errors
    /// `InvalidArgument` for a bad row or without a teacher, `NonFinite` where the loss or a gradient is: the weights
    /// are unchanged then.
    fn update_distilled(&self, batch: MiniBatch) -> ServiceResult<UpdateReport>;
}
