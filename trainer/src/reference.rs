//! The policy that a KL or a preference is measured against: its own weights, moved only when asked.

use crate::store::Store;
use crate::trainer::SharedPolicy;
use crate::weights::{pack, repack};
use crate::{Error, Trainer};
use std::sync::PoisonError;

/// Weights of the reference, and the same packed.
#[derive(Debug)]
pub(crate) struct Reference {
    pub(crate) masters: Store,
    pub(crate) packed: SharedPolicy,
}

impl Trainer {
    /// Make `masters` the reference.
    pub(crate) fn set_reference(&mut self, masters: Store) -> Result<(), Error> {
        let masked = self.policy.read().unwrap_or_else(PoisonError::into_inner).masked_ids().to_vec();
        let ranks = self.ranks.as_ref();
        let packed = pack((&self.device, ranks), &masters, (&self.config, self.dtype), &masked)?;
        self.reference = Some(Reference { masters, packed });
        Ok(())
    }

    /// Move the reference towards the policy: `reference = alpha * policy + (1 - alpha) * reference`, in f32.
    ///
    /// # Errors
    /// A stage without a reference, `alpha` out of range, or a lost rank.
    pub fn mix_reference(&mut self, alpha: f64) -> Result<(), Error> {
        if !(alpha > 0.0 && alpha <= 1.0) {
            return Err(Error::invalid("mix_reference", format!("alpha is {alpha}: expected more than 0, at most 1")));
        }
        let Some(reference) = &mut self.reference else {
            return Err(Error::invalid("mix_reference", "this stage keeps no reference policy"));
        };
        reference.masters.lerp_from(&*self.device, &self.weights.masters, (1.0 - alpha) as f32);
        repack(&*self.device, self.ranks.as_ref(), &reference.masters, &reference.packed)
    }
}
