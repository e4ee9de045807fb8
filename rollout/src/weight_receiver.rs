//! Weights that are trained elsewhere: pulled, proved, and only then served.
//!
//! What arrives lies apart from what is served: a transfer that is cut anywhere, or that does not hash to the version
//! that was announced, leaves the old version serving.

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use temper_actor::{PackedPolicy, ParamStore};
use temper_collective::reshard::{Layout, Receiver, Transfer, Unit, plan};
use temper_proto::{ServiceError, ServiceResult, WeightRange, WeightService};
use temper_tensor::Device;
use temper_types::{ErrorCode, PolicyVersion};

/// Receives weights for a packed policy.
pub struct WeightReceiver {
    device: Arc<dyn Device>,
    policy: Arc<RwLock<PackedPolicy>>,
    sources: Sources,
    /// The weights as they arrive, f32 in canonical units.
    staging: Mutex<ParamStore>,
    name: String,
}

/// The ranks that hold the weights, and how they lie on them.
pub struct Sources {
    /// In the order of the ranks.
    pub ranks: Vec<Arc<dyn WeightService>>,
    /// What each of them holds.
    pub layout: Layout,
}

impl Sources {
    /// One rank that holds everything.
    pub fn one(rank: Arc<dyn WeightService>) -> Self {
        Sources { ranks: vec![rank], layout: Layout::Replicated { world: 1 } }
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
        WeightReceiver { device, policy, sources, staging: Mutex::new(params), name }
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
        self.pull(&mut staging, version)?;
        Ok(PolicyVersion { hash: staging.content_hash(&*self.device), ..version })
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
        Err(self.error(ErrorCode::VersionMismatch, "set_version", message))
    }

    /// Swap in the weights that were fetched last and proved to be `version`.
    pub fn serve(&self, version: PolicyVersion) {
        let staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let mut policy = self.policy.write().unwrap_or_else(PoisonError::into_inner);
        if policy.version.hash != version.hash {
            policy.repack(&staging);
        }
        policy.version = version;
    }

    /// Every element once, from a rank that holds it; ranks that hold the same give equal amounts.
    fn pull(&self, staging: &mut ParamStore, version: PolicyVersion) -> ServiceResult<()> {
        const OPERATION: &str = "set_version";
        let Sources { ranks, layout } = &self.sources;
        let units: Vec<Unit> =
            staging.units().iter().map(|unit| Unit { len: unit.buffer().len(), tensors: Vec::new() }).collect();
        let receiver = Receiver { rank: 0, source_rank: None };
        let transfers = plan(&units, (*layout, Layout::Replicated { world: 1 }), receiver)
            .map_err(|e| self.error(ErrorCode::InvalidArgument, OPERATION, e))?;
        for (rank, source) in ranks.iter().enumerate() {
            let manifest = source.manifest()?;
            if !manifest.unit_lens.iter().copied().eq(units.iter().map(|unit| unit.len as u64)) {
                let message = format!(
                    "rank {rank} has {} parameter units of another model: expected {} of other lengths",
                    manifest.unit_lens.len(),
                    units.len()
                );
                return Err(self.error(ErrorCode::DataLoss, OPERATION, message));
            }
            let own: Vec<&Transfer> = transfers.iter().filter(|transfer| transfer.source == rank).collect();
            let range = |t: &&Transfer| WeightRange {
                unit: t.unit as u32,
                start: t.range.start as u64,
                len: t.range.len() as u64,
            };
            let ranges: Vec<WeightRange> = own.iter().map(range).collect();
            let mut writer = Writer { device: &*self.device, staging: &mut *staging, transfers: &own, filled: 0 };
            let beyond = || self.error(ErrorCode::DataLoss, OPERATION, "more weights arrived than were asked for");
            source.pull(version, &ranges, &mut |values| writer.write(values).ok_or_else(beyond))?;
        }
        Ok(())
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

/// Fills the ranges of a source's transfers, one after the other.
struct Writer<'a> {
    device: &'a dyn Device,
    staging: &'a mut ParamStore,
    transfers: &'a [&'a Transfer],
    /// Elements of the first transfer that are there.
    filled: usize,
}

impl Writer<'_> {
    /// `None` where nothing is left to fill.
    fn write(&mut self, mut values: &[f32]) -> Option<()> {
        while !values.is_empty() {
            let (transfer, later) = self.transfers.split_first()?;
            let part = values.len().min(transfer.range.len() - self.filled);
            let (now, rest) = values.split_at(part);
            let start = transfer.range.start + self.filled;
            let to = self.staging.unit_mut(transfer.unit).buffer_mut().view_mut(start..start + part);
            self.device.write(to, now);
            values = rest;
            self.filled += part;
            if self.filled == transfer.range.len() {
                (self.transfers, self.filled) = (later, 0);
            }
        }
        Some(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
