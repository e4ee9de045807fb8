//! Sleep: an idle engine without K/V memory.

use super::Engine;
use crate::model::Model;
use crate::{Error, Speculation};

impl<M: Model> Engine<M> {
    /// Give the memory of the K/V pool back, a draft model's too; the next step takes it anew. What was cached there is
    /// forgotten, which changes no response. Gives the number of bytes; 0 where the engine sleeps already.
    ///
    /// # Errors
    /// Where a group is open.
    pub fn sleep(&mut self) -> Result<usize, Error> {
        if !self.is_idle() {
            return Err(Error::NotIdle { num_open: self.groups.len() });
        }
        let num_used = self.scheduler.blocks().num_used();
        assert_eq!(num_used, 0, "no group is open, and {num_used} K/V blocks are in use");
        self.clear_prefix_cache();
        let drafters = self.speculation.as_mut().map_or(Ok(0), Speculation::sleep)?;
        Ok(self.model.release_kv() + drafters)
    }
}
