//! Masters in memory that engines of other processes on this host read in place.
//!
//! A publication then costs no copy: what is published is what is trained on. An update changes it under a reader, who
//! finds that by the hash.

use crate::store::Store;
use crate::weights::Weights;
use crate::{Error, LocalTrainerService, Trainer};
use std::io;
use temper_proto::{SharedUnit, SharedWeights};
use temper_tensor::{Device, SharedBuffers, SharedPlace};

/// Where the masters of a rank lie.
#[derive(Debug)]
pub(crate) struct SharedMasters {
    place: SharedPlace,
    /// Where the part of each unit begins, in bytes.
    offsets: Vec<u64>,
}

impl SharedMasters {
    /// What another process is told of them.
    pub(crate) fn to_message(&self, masters: &Store) -> SharedWeights {
        let unit = |(index, offset_bytes): (usize, &u64)| {
            let held = masters.held(index);
            SharedUnit { start: held.start as u64, len: held.len() as u64, offset_bytes: *offset_bytes }
        };
        let SharedPlace { process_id, descriptor, nonce } = self.place;
        SharedWeights { process_id, descriptor, nonce, units: self.offsets.iter().enumerate().map(unit).collect() }
    }
}

impl Weights {
    /// Move the masters to shared memory, unit by unit. On an error they stay where they are.
    fn share(&mut self, dev: &dyn Device) -> io::Result<()> {
        let lens: Vec<usize> = (0..self.masters.num_units()).map(|index| self.masters.held(index).len()).collect();
        let SharedBuffers { place, offsets, buffers } = dev.shared_zeros(&lens)?;
        for (index, mut buffer) in buffers.into_iter().enumerate() {
            dev.copy(self.masters.view(index, self.masters.held(index)), buffer.all_mut());
            self.masters.replace(index, buffer);
        }
        self.shared = Some(SharedMasters { place, offsets });
        Ok(())
    }

    /// Take other masters of the same model: into shared memory where the masters are there.
    pub(crate) fn set_masters(&mut self, dev: &dyn Device, masters: Store) {
        if self.shared.is_none() {
            self.masters = masters;
            return;
        }
        self.masters.copy_from(dev, &masters);
    }
}

impl Trainer {
    /// Keep the masters in memory that other processes of this host can read, from now on.
    ///
    /// # Errors
    /// Where the device or the system has no such memory: nothing changed.
    pub fn share_masters(&mut self) -> Result<(), Error> {
        if self.weights.shared.is_some() {
            return Ok(());
        }
        self.weights.share(&*self.device).map_err(Error::SharedMemory)
    }
}

impl LocalTrainerService {
    /// As [`Trainer::share_masters`].
    ///
    /// # Errors
    /// As there.
    pub fn share_masters(&self) -> Result<(), Error> {
        self.lock().share_masters()
    }
}
