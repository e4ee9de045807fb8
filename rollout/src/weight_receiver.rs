//! An engine whose weights are trained elsewhere: it pulls them, proves them, and only then serves them.
//!
//! What arrives lies apart from what is served: a transfer that is cut anywhere, or that does not hash to the version
//! that was announced, leaves the old version serving.

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;
use temper_actor::{PackedPolicy, ParamStore};
use temper_proto::{
    GroupRequest, GroupResult, RolloutService, RolloutStats, ServiceError, ServiceResult, WeightRange, WeightService,
};
use temper_tensor::Device;
use temper_types::{ErrorCode, PolicyVersion};

/// Receives weights for a packed policy.
pub struct WeightReceiver {
    device: Arc<dyn Device>,
    policy: Arc<RwLock<PackedPolicy>>,
    source: Arc<dyn WeightService>,
    /// The weights as they arrive, f32 in canonical units.
    staging: Mutex<ParamStore>,
    name: String,
}

impl WeightReceiver {
    /// Receive into `policy`, whose weights `params` are, from `source`. `name` is the engine's, for errors.
    pub fn new(
        device: Arc<dyn Device>,
        policy: Arc<RwLock<PackedPolicy>>,
        params: ParamStore,
        source: Arc<dyn WeightService>,
        name: String,
    ) -> Self {
        WeightReceiver { device, policy, source, staging: Mutex::new(params), name }
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
        let held = self.version();
        if held == version {
            return Ok(());
        }
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        if held.hash != version.hash {
            self.pull(&mut staging, version)?;
            let got = staging.content_hash(&*self.device);
            if got != version.hash {
                let message = format!("expected weights that hash to {}, what arrived hashes to {got}", version.hash);
                return Err(self.error(ErrorCode::VersionMismatch, message));
            }
        }
        let mut policy = self.policy.write().unwrap_or_else(PoisonError::into_inner);
        if held.hash != version.hash {
            policy.repack(&staging);
        }
        policy.version = version;
        Ok(())
    }

    fn pull(&self, staging: &mut ParamStore, version: PolicyVersion) -> ServiceResult<()> {
        let manifest = self.source.manifest()?;
        let expected: Vec<u64> = staging.units().iter().map(|unit| unit.buffer().len() as u64).collect();
        if manifest.unit_lens != expected {
            let message = format!(
                "the source has {} parameter units of another model: expected {} of other lengths",
                manifest.unit_lens.len(),
                expected.len()
            );
            return Err(self.error(ErrorCode::DataLoss, message));
        }
        let ranges: Vec<WeightRange> =
            (0u32..).zip(&expected).map(|(unit, len)| WeightRange { unit, start: 0, len: *len }).collect();
        let mut writer = Writer { device: &*self.device, staging, unit: 0, filled: 0 };
        self.source.pull(version, &ranges, &mut |values| {
            writer
                .write(values)
                .ok_or_else(|| self.error(ErrorCode::DataLoss, "more weights arrived than were asked for"))
        })
    }

    fn error(&self, code: ErrorCode, message: impl std::fmt::Display) -> ServiceError {
        ServiceError::new(code, self.name.as_str(), "set_version", message)
    }
}

/// Fills unit after unit.
struct Writer<'a> {
    device: &'a dyn Device,
    staging: &'a mut ParamStore,
    unit: usize,
    filled: usize,
}

impl Writer<'_> {
    /// `None` where nothing is left to fill.
    fn write(&mut self, mut values: &[f32]) -> Option<()> {
        while !values.is_empty() {
            let len = self.staging.units().get(self.unit)?.buffer().len();
            let part = values.len().min(len - self.filled);
            let (now, later) = values.split_at(part);
            let to = self.staging.unit_mut(self.unit).buffer_mut().view_mut(self.filled..self.filled + part);
            self.device.write(to, now);
            values = later;
            self.filled += part;
            if self.filled == len {
                (self.unit, self.filled) = (self.unit + 1, 0);
            }
        }
        Some(())
    }
}

/// A rollout service that receives its weights from a trainer.
pub struct SyncedRolloutService<S> {
    engine: S,
    receiver: WeightReceiver,
}

impl<S: RolloutService> SyncedRolloutService<S> {
    /// `engine` generates with the policy that `receiver` fills.
    pub fn new(engine: S, receiver: WeightReceiver) -> Self {
        SyncedRolloutService { engine, receiver }
    }

    /// The version that is served.
    pub fn version(&self) -> PolicyVersion {
        self.receiver.version()
    }
}

impl<S: RolloutService> RolloutService for SyncedRolloutService<S> {
    fn submit(&self, groups: Vec<GroupRequest>) -> ServiceResult<()> {
        self.engine.submit(groups)
    }

    fn next_group(&self, timeout: Duration) -> ServiceResult<Option<GroupResult>> {
        self.engine.next_group(timeout)
    }

    fn abort_all(&self) -> ServiceResult<usize> {
        self.engine.abort_all()
    }

    fn set_version(&self, version: PolicyVersion) -> ServiceResult<()> {
        self.receiver.receive(version)?;
        self.engine.set_version(version)
    }

    fn stats(&self) -> RolloutStats {
        self.engine.stats()
    }
}

#[cfg(test)]
mod tests;
