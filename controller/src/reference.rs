//! The reference policy of a stage: frozen, or moved towards the policy every so many steps.

use crate::{Controller, Error, Phase, PolicyStage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use temper_algos::Plan;

/// How the reference policy moves.
///
/// # Source
/// TRL's `sync_ref_model`, `ref_model_sync_steps` and `ref_model_mixup_alpha` (TR-DPO, arXiv 2404.09656); temper's
/// default `mixup_alpha` copies the policy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ReferenceConfig {
    /// Move it after every so many steps of the stage; 0: frozen at the stage's start.
    pub sync_every_steps: u64,
    /// `reference = alpha * policy + (1 - alpha) * reference`; 1 copies the policy.
    pub mixup_alpha: f64,
}

impl Default for ReferenceConfig {
    fn default() -> Self {
        ReferenceConfig { sync_every_steps: 0, mixup_alpha: 1.0 }
    }
}

impl ReferenceConfig {
    /// Check the settings of the stage at `key`; `is_kept` says whether the algorithm reads a reference.
    ///
    /// # Errors
    /// A weight out of range, or a reference that moves where none is read.
    pub(crate) fn validate(&self, key: &str, plan: &Plan) -> Result<(), Error> {
        let alpha = self.mixup_alpha;
        if !(alpha > 0.0 && alpha <= 1.0) {
            let problem = format!("{alpha} is out of range: expected more than 0, at most 1");
            return Err(Error::config(format!("{key}.reference.mixup_alpha"), problem));
        }
        if self.sync_every_steps > 0 && !plan.ref_log_probs {
            let problem = "this algorithm reads no reference policy: expected policy_loss.use_kl_loss or \
                           kl_in_reward.use_kl_in_reward, or no sync";
            return Err(Error::config(format!("{key}.reference.sync_every_steps"), problem));
        }
        Ok(())
    }

    /// True where the reference moves after step `done` of the stage, counted from 1.
    pub(crate) fn is_due(&self, done: u64) -> bool {
        self.sync_every_steps > 0 && done.is_multiple_of(self.sync_every_steps)
    }
}

impl Controller {
    /// Move the reference where it is due after the step under way.
    pub(crate) fn sync_reference(&mut self, stage: &PolicyStage) -> Result<(), Error> {
        if !stage.reference.is_due(self.state.stage_step + 1) {
            return Ok(());
        }
        self.enter(Phase::Update);
        self.attribute(self.services.trainer.mix_reference(stage.reference.mixup_alpha))
    }
}
