//! Weights on their way from a trainer to an engine.

use crate::ServiceResult;
use temper_types::{ContentHash, PolicyVersion};

/// Elements that are handed on at once: 8 KiB, which stay in the nearest cache until they are written and hashed.
pub const WEIGHT_PIECE: usize = 1 << 11;

/// What a holder of weights has: the canonical order of the parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightManifest {
    /// The version that its weights are.
    pub version: PolicyVersion,
    /// Number of f32 in each parameter unit, in the canonical order.
    pub unit_lens: Vec<u64>,
}

/// A range of a parameter unit, in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WeightRange {
    /// Index of the unit.
    pub unit: u32,
    /// First element.
    pub start: u64,
    /// Number of elements.
    pub len: u64,
}

/// Memory of the holder's host in which its weights lie: an anonymous file, which only processes of that host can open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedWeights {
    /// Process that holds the file, as it knows itself.
    pub process_id: u32,
    /// Its descriptor of the file.
    pub descriptor: u32,
    /// Random bytes with which the file begins, and by which it is known.
    pub nonce: [u8; 16],
    /// What is held of each parameter unit.
    pub units: Vec<SharedUnit>,
}

/// The part of a parameter unit that is held: f32 in the byte order of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedUnit {
    /// First element.
    pub start: u64,
    /// Number of elements.
    pub len: u64,
    /// Where they begin in the file, in bytes.
    pub offset_bytes: u64,
}

/// Turn elements into changes since `others`, or changes of `others` into what they are now: bits by exclusive or.
pub fn exclusive_or(values: &mut [f32], others: &[f32]) {
    for (value, other) in values.iter_mut().zip(others) {
        *value = f32::from_bits(value.to_bits() ^ other.to_bits());
    }
}

/// Takes the elements of the ranges as they come, in order.
pub type WeightSink<'a> = &'a mut (dyn FnMut(&[f32]) -> ServiceResult<()> + Send);

/// Gives the weights of the version last published.
pub trait WeightService: Send + Sync {
    /// What it holds.
    ///
    /// # Errors
    /// Where the service cannot answer.
    fn manifest(&self) -> ServiceResult<WeightManifest>;
    /// Where the weights lie in memory that processes of the same host can read; `None` where they do not. They may
    /// change while they are read: whoever reads them proves what it has by the hash of `version`.
    ///
    /// # Errors
    /// `VersionMismatch` where it does not hold `version` now.
    fn shared(&self, _version: PolicyVersion) -> ServiceResult<Option<SharedWeights>> {
        Ok(None)
    }
    /// Hand the elements of `ranges` to `sink`, in the order of the ranges, in pieces of any size.
    ///
    /// # Errors
    /// `VersionMismatch` where it does not hold `version` now, `InvalidArgument` for a range outside of its unit, and
    /// what `sink` gives.
    fn pull(&self, version: PolicyVersion, ranges: &[WeightRange], sink: WeightSink<'_>) -> ServiceResult<()>;
    /// As [`WeightService::pull`], but that each element's bits come by exclusive or with those that it has in the
    /// weights that hash to `base`. False, and nothing is handed on, where the holder does not have these any more.
    ///
    /// # Errors
    /// As there.
    fn changes(
        &self,
        _base: ContentHash,
        _version: PolicyVersion,
        _ranges: &[WeightRange],
        _sink: WeightSink<'_>,
    ) -> ServiceResult<bool> {
        Ok(false)
    }
}
