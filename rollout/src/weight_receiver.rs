//! Weights that are trained elsewhere: pulled, proved, and only then served.
//!
//! What arrives lies apart from what is served: a transfer that is cut anywhere, or that does not hash to the version
//! that was announced, leaves the old version serving. Each number is hashed as it is copied, from one reading of it;
//! all ranks are asked at once, by as many threads as the device computes with.

use crate::RankGroup;
use crate::nearby_weights::{Arrival, NearbyWeights, WeightBytes, WeightTransport};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use temper_actor::{ArrivingHash, PackedPolicy, ParamStore};
use temper_collective::reshard::{Layout, Receiver, Transfer, Unit, plan};
use temper_proto::{ServiceError, ServiceResult, WeightRange, WeightService, exclusive_or};
use temper_tensor::{Device, ViewMut};
use temper_types::{ContentHash, ErrorCode, PolicyVersion};

/// What errors name.
const OPERATION: &str = "set_version";

/// Receives weights for a packed policy.
pub struct WeightReceiver {
    device: Arc<dyn Device>,
    policy: Arc<RwLock<PackedPolicy>>,
    /// The ranks that hold the weights, in their order.
    ranks: Vec<NearbyWeights>,
    layout: Layout,
    /// The weights as they arrive.
    staging: Mutex<Staging>,
    /// The other tensor-parallel ranks of the engine, where there are any.
    group: Option<Arc<RankGroup>>,
    name: String,
}

/// Weights beside those that are served.
struct Staging {
    /// f32 in canonical units.
    params: ParamStore,
    /// What they hash to, where they are whole.
    hash: Option<ContentHash>,
}

/// The ranks that hold the weights, and how they lie on them.
pub struct Sources {
    /// In the order of the ranks.
    pub ranks: Vec<Arc<dyn WeightService>>,
    /// What each of them holds.
    pub layout: Layout,
    /// How their weights come.
    pub transport: WeightTransport,
}

impl Sources {
    /// One rank that holds everything.
    pub fn one(rank: Arc<dyn WeightService>) -> Self {
        Sources { ranks: vec![rank], layout: Layout::Replicated { world: 1 }, transport: WeightTransport::Auto }
    }
}

impl WeightReceiver {
    /// Receive into `policy`, whose weights `params` are, from `sources`. `name` is the engine's, for errors.
    pub fn new(
        device: Arc<dyn Device>,
        policy: Arc<RwLock<PackedPolicy>>,
        params: ParamStore,
        sources: Sources,
        name: String,
    ) -> Self {
        let Sources { ranks, layout, transport } = sources;
        let nearby = |(rank, holder)| NearbyWeights::new(holder, rank, transport);
        let ranks = ranks.into_iter().enumerate().map(nearby).collect();
        let hash = Some(policy.read().unwrap_or_else(PoisonError::into_inner).version.hash);
        let staging = Mutex::new(Staging { params, hash });
        WeightReceiver { device, policy, ranks, layout, staging, group: None, name }
    }

    /// Divide what is received over `group`, of which `policy` is rank 0's part.
    #[must_use]
    pub fn divided_over(mut self, group: Arc<RankGroup>) -> Self {
        self.group = Some(group);
        self
    }

    /// What arrived so far, and how.
    pub fn bytes(&self) -> WeightBytes {
        self.ranks.iter().map(NearbyWeights::bytes).fold(WeightBytes::default(), |sum, bytes| WeightBytes {
            shared: sum.shared + bytes.shared,
            streamed: sum.streamed + bytes.streamed,
        })
    }

    /// The version that is served.
    pub fn version(&self) -> PolicyVersion {
        self.policy.read().unwrap_or_else(PoisonError::into_inner).version
    }

    /// Pull `version` where it is not held, prove it, and swap it in.
    ///
    /// # Errors
    /// What the source gives, `DataLoss` where what arrived is of another model, `VersionMismatch` where it hashes to
    /// something else. The old version serves on.
    pub fn receive(&self, version: PolicyVersion) -> ServiceResult<()> {
        if self.version() == version {
            return Ok(());
        }
        let found = self.fetch(version)?;
        self.check(version, found)?;
        self.hand_out(version)?;
        self.serve(version);
        Ok(())
    }

    /// Bring the weights of `version` beside those that are served, where they are others; gives what they hash to,
    /// under the number that was asked for.
    ///
    /// # Errors
    /// Those of [`WeightReceiver::receive`], but for weights that hash to something else.
    pub fn fetch(&self, version: PolicyVersion) -> ServiceResult<PolicyVersion> {
        if self.version().hash == version.hash {
            return Ok(version);
        }
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let hash = self.pull(&mut staging, version)?;
        Ok(PolicyVersion { hash, ..version })
    }

    /// Whether the weights that were fetched are those that were asked for.
    ///
    /// # Errors
    /// `VersionMismatch`, with both hashes.
    pub fn check(&self, version: PolicyVersion, found: PolicyVersion) -> ServiceResult<()> {
        if found == version {
            return Ok(());
        }
        let (expected, got) = (version.hash, found.hash);
        let message = format!("expected weights that hash to {expected}, what arrived hashes to {got}");
        Err(self.error(ErrorCode::VersionMismatch, OPERATION, message))
    }

    /// Give the other tensor-parallel ranks what they hold of the weights that were fetched last and proved to be
    /// `version`, where they have others. They compute nothing with them before this engine serves them.
    ///
    /// # Errors
    /// `Unavailable`: a rank that is lost, and with it the engine.
    pub fn hand_out(&self, version: PolicyVersion) -> ServiceResult<()> {
        let Some(group) = self.group.as_ref().filter(|_| self.version().hash != version.hash) else { return Ok(()) };
        let staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let handed_out = group.hand_out(&*self.device, &staging.params, version.hash);
        handed_out.map_err(|e| self.error(e.code(), OPERATION, e))
    }

    /// Swap in the weights that were fetched last and proved to be `version`.
    pub fn serve(&self, version: PolicyVersion) {
        let staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let mut policy = self.policy.write().unwrap_or_else(PoisonError::into_inner);
        if policy.version.hash != version.hash {
            policy.repack(&staging.params);
        }
        policy.version = version;
    }

    /// Fill `staging`, and hash what arrives.
    fn pull(&self, staging: &mut Staging, version: PolicyVersion) -> ServiceResult<ContentHash> {
        let transfers = self.transfers(&staging.params)?;
        let arriving = ArrivingHash::new(&staging.params);
        // A transfer that ends early leaves weights of two versions.
        let base = staging.hash.take();
        let errands = errands(&mut staging.params, &transfers, self.errands_per_source());
        let ended = self.run(errands, (base, version), &arriving);
        self.ranks.iter().for_each(NearbyWeights::rest);
        ended?;
        let hash = arriving.finish(&*self.device, &staging.params);
        staging.hash = Some(hash);
        Ok(hash)
    }

    /// Every element once, from a rank that holds it; ranks that hold the same give equal amounts.
    fn transfers(&self, staging: &ParamStore) -> ServiceResult<Vec<Transfer>> {
        let units: Vec<Unit> =
            staging.units().iter().map(|unit| Unit { len: unit.buffer().len(), tensors: Vec::new() }).collect();
        for (rank, source) in self.ranks.iter().enumerate() {
            let manifest = source.manifest()?;
            if !manifest.unit_lens.iter().copied().eq(units.iter().map(|unit| unit.len as u64)) {
                let message = format!(
                    "rank {rank} has {} parameter units of another model: expected {} of other lengths",
                    manifest.unit_lens.len(),
                    units.len()
                );
                return Err(self.error(ErrorCode::DataLoss, OPERATION, message));
            }
        }
        let receiver = Receiver { rank: 0, source_rank: None };
        plan(&units, (self.layout, Layout::Replicated { world: 1 }), receiver)
            .map_err(|e| self.error(ErrorCode::InvalidArgument, OPERATION, e))
    }

    /// All ranks are asked at once; where there are fewer of them than threads, each by several.
    fn errands_per_source(&self) -> usize {
        (self.device.info().num_threads / self.ranks.len().max(1)).max(1)
    }

    /// Run every errand to its end, each in a thread; the first failure in their order counts.
    fn run(
        &self,
        errands: Vec<Errand<'_>>,
        versions: (Option<ContentHash>, PolicyVersion),
        arriving: &ArrivingHash,
    ) -> ServiceResult<()> {
        let run = |errand: Errand<'_>| {
            let source = self.ranks.get(errand.source);
            let source = source.ok_or_else(|| self.error(ErrorCode::Internal, OPERATION, "a source that is none"))?;
            let ranges = errand.ranges();
            let mut writer = Writer { device: &*self.device, arriving, parts: errand.parts.into_iter(), now: None };
            let beyond = || self.error(ErrorCode::DataLoss, OPERATION, "more weights arrived than were asked for");
            source.pull(versions, &ranges, &mut |arrival| writer.write(arrival).ok_or_else(beyond))
        };
        if errands.len() == 1 {
            return errands.into_iter().try_for_each(run);
        }
        std::thread::scope(|scope| {
            let run = &run;
            let threads: Vec<_> = errands.into_iter().map(|errand| scope.spawn(move || run(errand))).collect();
            let panicked =
                |_| Err(self.error(ErrorCode::Internal, OPERATION, "a thread that receives weights panicked"));
            let ended: Vec<ServiceResult<()>> =
                threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect();
            ended.into_iter().collect()
        })
    }

    /// An error of the engine that these weights are for.
    pub(crate) fn error(
        &self,
        code: ErrorCode,
        operation: &'static str,
        message: impl std::fmt::Display,
    ) -> ServiceError {
        ServiceError::new(code, self.name.as_str(), operation, message)
    }
}

/// A place that is filled from one source.
struct Part<'a> {
    unit: usize,
    /// First element in the unit.
    start: usize,
    to: ViewMut<'a>,
}

/// What one thread asks of one source.
struct Errand<'a> {
    source: usize,
    parts: Vec<Part<'a>>,
}

impl Errand<'_> {
    fn len(&self) -> usize {
        self.parts.iter().map(|part| part.to.len()).sum()
    }

    fn ranges(&self) -> Vec<WeightRange> {
        let range = |part: &Part<'_>| WeightRange {
            unit: part.unit as u32,
            start: part.start as u64,
            len: part.to.len() as u64,
        };
        self.parts.iter().map(range).collect()
    }
}

/// Divide transfers, which ascend, into up to `per_source` errands of equal size for each source.
fn errands<'a>(staging: &'a mut ParamStore, transfers: &[Transfer], per_source: usize) -> Vec<Errand<'a>> {
    let mut totals: BTreeMap<usize, usize> = BTreeMap::new();
    for transfer in transfers {
        *totals.entry(transfer.source).or_default() += transfer.range.len();
    }
    let mut open: BTreeMap<usize, Errand<'a>> = BTreeMap::new();
    let mut done = Vec::new();
    let mut transfers = transfers.iter().peekable();
    for (index, unit) in staging.units_mut().iter_mut().enumerate() {
        let (mut rest, mut at) = (unit.buffer_mut().all_mut(), 0);
        while let Some(transfer) = transfers.next_if(|transfer| transfer.unit == index) {
            let (source, mut start) = (transfer.source, transfer.range.start);
            let share = totals[&source].div_ceil(per_source).max(1);
            while start < transfer.range.end {
                let errand = open.entry(source).or_insert_with(|| Errand { source, parts: Vec::new() });
                let len = (share - errand.len()).min(transfer.range.end - start);
                let (to, tail) = rest.split_at(start - at).1.split_at(len);
                errand.parts.push(Part { unit: index, start, to });
                start += len;
                (rest, at) = (tail, start);
                if errand.len() == share {
                    done.extend(open.remove(&source));
                }
            }
        }
    }
    done.extend(open.into_values());
    done
}

/// Fills the parts of an errand, one after the other, and hashes what it writes.
struct Writer<'a, 'b> {
    device: &'b dyn Device,
    arriving: &'b ArrivingHash,
    parts: std::vec::IntoIter<Part<'a>>,
    /// What is being filled.
    now: Option<Part<'a>>,
}

impl<'a> Writer<'a, '_> {
    /// `None` where nothing is left to fill.
    fn write(&mut self, arrival: Arrival<'_>) -> Option<()> {
        match arrival {
            Arrival::Whole(mut values) => {
                while !values.is_empty() {
                    let Part { unit, start, to } = self.part(values.len())?;
                    let (now, later) = values.split_at(to.len());
                    self.arriving.receive(self.device, (unit, start), now, to);
                    values = later;
                }
            }
            Arrival::Changes(mut changes) => {
                while !changes.is_empty() {
                    let Part { unit, start, to } = self.part(changes.len())?;
                    let (now, later) = changes.split_at(to.len());
                    let mut values = vec![0.0; now.len()];
                    self.device.read(to.as_view(), &mut values);
                    exclusive_or(&mut values, now);
                    self.arriving.receive(self.device, (unit, start), values[..].into(), to);
                    changes = later;
                }
            }
        }
        Some(())
    }

    /// The place of the next elements, of up to `len`.
    fn part(&mut self, len: usize) -> Option<Part<'a>> {
        let Part { unit, start, to } = self.now.take().or_else(|| self.parts.next())?;
        let len = len.min(to.len());
        let (to, rest) = to.split_at(len);
        self.now = (!rest.is_empty()).then_some(Part { unit, start: start + len, to: rest });
        Some(Part { unit, start, to })
    }
}

#[cfg(test)]
pub(crate) mod tests;
