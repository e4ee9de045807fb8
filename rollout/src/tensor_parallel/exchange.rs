//! Between ranks: partial sums, and weights on their way.

use crate::Error;
use temper_actor::PartialSums;
use temper_collective::Collective;

/// Elements that are sent at once: 4 MiB.
pub(super) const PIECE: usize = 1 << 20;

/// Joins the ranks of a step.
pub(crate) struct Exchange<'a>(pub(super) &'a Collective);

impl PartialSums for Exchange<'_> {
    type Error = Error;

    fn exchange(&mut self, own: &[f32]) -> Result<Vec<Vec<f32>>, Error> {
        let all = self.0.all_gather_lists(own).map_err(lost)?;
        match all.iter().position(|sums| sums.len() != own.len()) {
            None => Ok(all),
            Some(rank) => {
                let (got, expected) = (all[rank].len(), own.len());
                Err(Error::Ranks(format!("rank {rank} sent {got} sums: expected {expected}")))
            }
        }
    }
}

/// A rank that cannot be reached, by the name that the collective gives it.
pub(super) fn lost(error: temper_collective::Error) -> Error {
    Error::Ranks(error.to_string())
}

/// Hash of values as they are sent and arrive.
#[derive(Default)]
pub(super) struct SliceHash(blake3::Hasher);

impl SliceHash {
    pub(super) fn update(&mut self, values: &[f32]) {
        let mut bytes = Vec::with_capacity(4096);
        for block in values.chunks(1024) {
            bytes.clear();
            block.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
            self.0.update(&bytes);
        }
    }

    pub(super) fn finish(&self) -> [u8; 16] {
        let mut out = [0; 16];
        out.copy_from_slice(&self.0.finalize().as_bytes()[..16]);
        out
    }
}
