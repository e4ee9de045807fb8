//! Weights of a trainer that may run on this host: read from memory that both share where that is proved, asked for
//! piece by piece otherwise.
//!
//! Owns: the proof (the memory that the trainer names can be opened, and begins with the trainer's random bytes), the
//! mapping, and what came which way. Both ways hand the same elements on in the same order, to be hashed as they
//! arrive: a trainer that changes its weights meanwhile is found by the hash.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use temper_proto::{ServiceError, ServiceResult, SharedWeights, WeightManifest, WeightRange, WeightService};
use temper_tensor::{Incoming, SharedPlace, SharedReader};
use temper_types::{ContentHash, ErrorCode, PolicyVersion};

/// How new weights come to an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WeightTransport {
    /// Through memory that trainer and engine share where they are on one host, by gRPC otherwise.
    #[default]
    Auto,
    /// By gRPC, wherever they are.
    Grpc,
    /// As `grpc`, but only how they changed since the version before, compressed: for slow links. Trainer ranks keep
    /// the last two versions for that.
    Delta,
}

/// Bytes of weights that arrived, by the way that they came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WeightBytes {
    /// From memory shared with the holder.
    pub shared: u64,
    /// From the holder, piece by piece.
    pub streamed: u64,
}

/// Weights that come in.
pub(crate) enum Arrival<'a> {
    /// As they are. They may lie in memory that the holder writes meanwhile.
    Whole(Incoming<'a>),
    /// By exclusive or with those that are held.
    Changes(&'a [f32]),
}

/// Takes weights as they come, in order.
pub(crate) type ArrivalSink<'a> = &'a mut (dyn FnMut(Arrival<'_>) -> ServiceResult<()> + Send);

/// A holder of weights, on this host or elsewhere.
pub(crate) struct NearbyWeights {
    holder: Arc<dyn WeightService>,
    /// Which one, for the log.
    rank: usize,
    transport: WeightTransport,
    /// What the memory that was named last turned out to be.
    found: Mutex<Option<Found>>,
    /// Whether it was said that changes come.
    says_changes: AtomicBool,
    shared_bytes: AtomicU64,
    streamed_bytes: AtomicU64,
}

struct Found {
    /// Nothing where no memory was named.
    place: Option<SharedPlace>,
    /// False where it could not be read from here.
    is_readable: bool,
    /// Open while weights are on their way.
    reader: Option<Arc<SharedReader>>,
}

impl NearbyWeights {
    /// The weights of trainer rank `rank`.
    pub(crate) fn new(holder: Arc<dyn WeightService>, rank: usize, transport: WeightTransport) -> Self {
        let (found, says_changes, shared_bytes, streamed_bytes) = Default::default();
        NearbyWeights { holder, rank, transport, found, says_changes, shared_bytes, streamed_bytes }
    }

    pub(crate) fn manifest(&self) -> ServiceResult<WeightManifest> {
        self.holder.manifest()
    }

    /// What arrived whole so far.
    pub(crate) fn bytes(&self) -> WeightBytes {
        let count = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
        WeightBytes { shared: count(&self.shared_bytes), streamed: count(&self.streamed_bytes) }
    }

    /// As [`WeightService::pull`], or as [`WeightService::changes`] where that is wanted and the holder still has the
    /// weights that hash to `base`.
    pub(crate) fn pull(
        &self,
        (base, version): (Option<ContentHash>, PolicyVersion),
        ranges: &[WeightRange],
        sink: ArrivalSink<'_>,
    ) -> ServiceResult<()> {
        let count = match self.shared(version)? {
            Some((weights, reader)) => {
                for range in ranges {
                    sink(Arrival::Whole(values(&weights, &reader, range)?))?;
                }
                &self.shared_bytes
            }
            None => {
                let base = base.filter(|_| self.transport == WeightTransport::Delta);
                let mut keep = |changes: &[f32]| sink(Arrival::Changes(changes));
                let came = base.map(|base| self.holder.changes(base, version, ranges, &mut keep)).transpose()?;
                if came != Some(true) {
                    self.holder.pull(version, ranges, &mut |values| sink(Arrival::Whole(values.into())))?;
                } else if !self.says_changes.swap(true, Ordering::Relaxed) {
                    tracing::info!(rank = self.rank, "weights come as changes since the version before");
                }
                &self.streamed_bytes
            }
        };
        let num_elements: u64 = ranges.iter().map(|range| range.len).sum();
        count.fetch_add(num_elements * size_of::<f32>() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// The holder's memory, where it can be read from here.
    fn shared(&self, version: PolicyVersion) -> ServiceResult<Option<(SharedWeights, Arc<SharedReader>)>> {
        if self.transport != WeightTransport::Auto {
            return Ok(None);
        }
        let weights = self.holder.shared(version)?;
        let place = |weights: &SharedWeights| SharedPlace {
            process_id: weights.process_id,
            descriptor: weights.descriptor,
            nonce: weights.nonce,
        };
        let reader = self.reader(weights.as_ref().map(place));
        Ok(weights.zip(reader))
    }

    /// The memory at `place`. One that could not be read is not tried again; what came of a new one is said once.
    fn reader(&self, place: Option<SharedPlace>) -> Option<Arc<SharedReader>> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let known = found.as_ref().filter(|found| found.place == place);
        if let Some(known) = known.filter(|known| known.reader.is_some() || !known.is_readable) {
            return known.reader.clone();
        }
        let (rank, is_new) = (self.rank, known.is_none());
        let reader = match place.map(|place| SharedReader::open(&place)) {
            Some(Ok(reader)) => {
                if is_new {
                    tracing::info!(rank, "weights come through memory shared with the trainer");
                }
                Some(Arc::new(reader))
            }
            Some(Err(reason)) => {
                tracing::info!(rank, %reason, "weights come by gRPC: the trainer's memory cannot be read from here");
                None
            }
            None => {
                tracing::info!(rank, "weights come by gRPC: the trainer shares no memory");
                None
            }
        };
        *found = Some(Found { place, is_readable: reader.is_some(), reader: reader.clone() });
        reader
    }

    /// Let go of the trainer's memory until weights are on their way again.
    pub(crate) fn rest(&self) {
        if let Some(found) = &mut *self.found.lock().unwrap_or_else(PoisonError::into_inner) {
            found.reader = None;
        }
    }
}

/// The elements of a range.
fn values<'a>(weights: &SharedWeights, reader: &'a SharedReader, range: &WeightRange) -> ServiceResult<Incoming<'a>> {
    let begin = place_of(weights, range).ok_or_else(|| outside(range))?;
    let unreadable = |error| ServiceError::new(ErrorCode::DataLoss, "trainer", "shared", error);
    reader.values(begin, range.len).map_err(unreadable)
}

/// Where a range begins in the memory, in bytes.
fn place_of(weights: &SharedWeights, range: &WeightRange) -> Option<u64> {
    let unit = weights.units.get(usize::try_from(range.unit).ok()?)?;
    let before = range.start.checked_sub(unit.start)?;
    let end = before.checked_add(range.len)?;
    (end <= unit.len).then_some(())?;
    unit.offset_bytes.checked_add(before.checked_mul(size_of::<f32>() as u64)?)
}

fn outside(range: &WeightRange) -> ServiceError {
    let WeightRange { unit, start, len } = range;
    let message = format!("{len} elements from {start} of unit {unit} are not all inside of what the trainer shares");
    ServiceError::new(ErrorCode::InvalidArgument, "trainer", "shared", message)
}
