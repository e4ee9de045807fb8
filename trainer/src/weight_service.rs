//! The trainer's weights for engines in other processes.

use crate::{Error, LocalTrainerService, Trainer};
use temper_proto::{
    ServiceError, ServiceResult, SharedWeights, WEIGHT_PIECE, WeightManifest, WeightRange, WeightService, WeightSink,
    exclusive_or,
};
use temper_types::{ContentHash, ErrorCode, PolicyVersion};

/// Each piece is read under the trainer's lock, so that an update may come between two pieces: the receiver's hash
/// finds that.
impl WeightService for LocalTrainerService {
    fn manifest(&self) -> ServiceResult<WeightManifest> {
        let trainer = self.lock();
        let shapes = trainer.weights.masters.shapes();
        let unit_lens = (0..shapes.num_units()).map(|unit| shapes.unit_len(unit) as u64).collect();
        Ok(WeightManifest { version: trainer.version(), unit_lens })
    }

    fn shared(&self, version: PolicyVersion) -> ServiceResult<Option<SharedWeights>> {
        let trainer = self.lock();
        check_version(&trainer, version, "shared")?;
        let weights = &trainer.weights;
        Ok(weights.shared.as_ref().map(|shared| shared.to_message(&weights.masters)))
    }

    fn pull(&self, version: PolicyVersion, ranges: &[WeightRange], sink: WeightSink<'_>) -> ServiceResult<()> {
        let mut values = Vec::new();
        for piece in pieces(ranges) {
            read(&self.lock(), version, piece, &mut values)?;
            sink(&values)?;
        }
        Ok(())
    }

    fn changes(
        &self,
        base: ContentHash,
        version: PolicyVersion,
        ranges: &[WeightRange],
        sink: WeightSink<'_>,
    ) -> ServiceResult<bool> {
        let (mut values, mut before) = (Vec::new(), Vec::new());
        for (index, piece) in pieces(ranges).enumerate() {
            let trainer = self.lock();
            read(&trainer, version, piece, &mut values)?;
            let Some(store) = trainer.weights.published.as_ref().and_then(|published| published.before(base)) else {
                // Between two pieces only another version can take its place, and that was found before.
                return if index == 0 { Ok(false) } else { Err(gone(base)) };
            };
            before.resize(values.len(), 0.0);
            let range = piece.start as usize..(piece.start + piece.len) as usize;
            trainer.device.read(store.view(piece.unit as usize, range), &mut before);
            drop(trainer);
            exclusive_or(&mut values, &before);
            sink(&values)?;
        }
        Ok(true)
    }
}

/// What is read under one lock.
fn pieces(ranges: &[WeightRange]) -> impl Iterator<Item = WeightRange> + '_ {
    ranges.iter().flat_map(|range| {
        (0..range.len).step_by(WEIGHT_PIECE).map(move |start| WeightRange {
            unit: range.unit,
            start: range.start.saturating_add(start),
            len: (WEIGHT_PIECE as u64).min(range.len - start),
        })
    })
}

fn gone(base: ContentHash) -> ServiceError {
    let message = format!("the weights that hash to {base} are not kept any more");
    ServiceError::new(ErrorCode::VersionMismatch, "trainer", "changes", message)
}

fn check_version(trainer: &Trainer, version: PolicyVersion, operation: &'static str) -> ServiceResult<()> {
    let held = trainer.version();
    if held == version {
        return Ok(());
    }
    let message = format!("asked for weights of version {version}, the trainer holds {held}");
    Err(ServiceError::new(ErrorCode::VersionMismatch, "trainer", operation, message))
}

fn read(trainer: &Trainer, version: PolicyVersion, range: WeightRange, values: &mut Vec<f32>) -> ServiceResult<()> {
    check_version(trainer, version, "pull")?;
    let outside = || {
        let WeightRange { unit, start, len } = range;
        let problem = format!("{len} elements from {start} are not all inside of what is held");
        Error::invalid(format!("range of unit {unit}"), problem).into_service("pull")
    };
    let masters = &trainer.weights.masters;
    let index = usize::try_from(range.unit).ok().filter(|unit| *unit < masters.num_units()).ok_or_else(outside)?;
    let end = range.start.checked_add(range.len).ok_or_else(outside)?;
    let (wanted, held) = (range.start as usize..end as usize, masters.held(index));
    if wanted.start < held.start || wanted.end > held.end {
        return Err(outside());
    }
    values.resize(range.len as usize, 0.0);
    trainer.device.read(masters.view(index, wanted), values);
    Ok(())
}
