//! Rollout correction of a step: importance weights and rejection, where the plan asks for them.
//!
//! Both look at the gap between the log-probs of the trainer at the start of the step and those of the engine.

use crate::packed::Packed;
use crate::record_row::Columns;
use crate::{Controller, Error, Phase, PolicyStage};
use temper_algos::{CorrectionOutput, Plan, TokenBatch, rollout_correction};
use temper_types::Sample;

impl Controller {
    /// Weigh the rows and clear the mask where tokens are rejected; gives the metrics, named `rollout_corr/...`.
    pub(crate) fn correct_rollouts(
        &mut self,
        stage: &PolicyStage,
        plan: &Plan,
        packed: &mut Packed,
        samples: &[Sample],
    ) -> Result<Columns, Error> {
        if !plan.rollout_correction {
            return Ok(Columns::new());
        }
        self.enter(Phase::Advantages);
        let step = self.state.step + 1;
        let failed = |source| Error::Algorithm { step, source };
        let batch = TokenBatch::new(&packed.offsets, &packed.response_mask).map_err(failed)?;
        let old = packed.gather(samples, |s| &s.old_log_probs);
        let rollout = packed.gather(samples, |s| &s.rollout_log_probs);
        let config = &stage.algorithm.policy_loss.rollout_correction;
        let out = rollout_correction(config, &batch, &old, &rollout).map_err(failed)?;
        assert_on_policy_is_exact(step, &batch, (&old, &rollout), &out);
        let columns = out.columns();
        if !out.response_mask.contains(&1) {
            let cause = "rollout correction rejected every token".to_owned();
            return Err(Error::NothingToTrain { step, cause });
        }
        packed.response_mask = out.response_mask;
        packed.rollout_weights = out.weights.unwrap_or_default();
        Ok(columns)
    }
}

/// On-policy, correction must change nothing: weights of exactly 1 and no rejection.
fn assert_on_policy_is_exact(step: u64, batch: &TokenBatch, (old, rollout): (&[f64], &[f64]), out: &CorrectionOutput) {
    let is_on_policy = (0..batch.num_slots()).all(|t| !batch.is_active(t) || old[t] == rollout[t]);
    if !is_on_policy {
        return;
    }
    let is_one = |(weight, mask): (&f64, &u8)| *mask == 0 || *weight == 1.0;
    let weights = out.weights.as_deref().unwrap_or_default();
    assert!(weights.iter().zip(batch.response_mask()).all(is_one), "step {step}: an on-policy weight is not 1");
    assert!(out.response_mask == batch.response_mask(), "step {step}: an on-policy token was rejected");
}
