//! The policy that a KL or a preference is measured against: its own weights, moved only when asked.

use crate::{Error, Trainer};
use std::sync::PoisonError;
use temper_actor::{PackedPolicy, ParamStore};

/// Weights of the reference, and the same packed.
#[derive(Debug)]
pub(crate) struct Reference {
    pub(crate) params: ParamStore,
    pub(crate) packed: PackedPolicy,
}

impl Trainer {
    /// Make `params` the reference.
    pub(crate) fn set_reference(&mut self, params: ParamStore) {
        let mut packed = PackedPolicy::new(&self.device, &params, &self.config, self.dtype);
        let masked = self.policy.read().unwrap_or_else(PoisonError::into_inner).masked_ids().to_vec();
        packed.set_masked_ids(masked);
        self.reference = Some(Reference { params, packed });
    }

    /// Move the reference towards the policy: `reference = alpha * policy + (1 - alpha) * reference`, in f32.
    ///
    /// # Errors
    /// A stage without a reference, or `alpha` out of range.
    pub fn mix_reference(&mut self, alpha: f64) -> Result<(), Error> {
        if !(alpha > 0.0 && alpha <= 1.0) {
            return Err(Error::invalid("mix_reference", format!("alpha is {alpha}: expected more than 0, at most 1")));
        }
        let Some(reference) = &mut self.reference else {
            return Err(Error::invalid("mix_reference", "this stage keeps no reference policy"));
        };
        reference.params.lerp_from(&*self.device, &self.params, (1.0 - alpha) as f32);
        reference.packed.repack(&reference.params);
        Ok(())
    }
}
