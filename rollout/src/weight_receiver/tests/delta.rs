//! Weights that come as changes: asked for where both ends have the version before, and whole otherwise.

use super::{Source, receiver_from, threads};
use crate::{Sources, WeightTransport};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use temper_collective::reshard::Layout;
use temper_proto::{ServiceError, ServiceResult, WeightManifest, WeightRange, WeightService, WeightSink};
use temper_types::{ContentHash, ErrorCode, PolicyVersion};

/// The weights of one seed, and how they differ from those of the seed before.
struct Versions {
    now: Source,
    before: Source,
    /// Changes after so many elements that never come.
    cut: Mutex<Option<usize>>,
    /// An element that comes with its last bit flipped.
    flip: Option<usize>,
    /// How often changes were handed on, and whole weights.
    asked: [AtomicUsize; 2],
}

impl Versions {
    fn new(seed: u64) -> Self {
        let (now, before) = (Source::new(16, seed), Source::new(16, seed - 1));
        Versions { now, before, cut: Mutex::default(), flip: None, asked: Default::default() }
    }

    fn asked(&self) -> [usize; 2] {
        [0, 1].map(|way| self.asked[way].load(Ordering::Relaxed))
    }
}

impl WeightService for Versions {
    fn manifest(&self) -> ServiceResult<WeightManifest> {
        self.now.manifest()
    }

    fn pull(&self, version: PolicyVersion, ranges: &[WeightRange], sink: WeightSink<'_>) -> ServiceResult<()> {
        self.asked[1].fetch_add(1, Ordering::Relaxed);
        self.now.pull(version, ranges, sink)
    }

    fn changes(
        &self,
        base: ContentHash,
        version: PolicyVersion,
        ranges: &[WeightRange],
        sink: WeightSink<'_>,
    ) -> ServiceResult<bool> {
        assert_eq!(version, self.now.version);
        assert_eq!(ranges.iter().map(|r| r.len as usize).sum::<usize>(), self.now.values().len());
        if base != self.before.version.hash {
            return Ok(false);
        }
        self.asked[0].fetch_add(1, Ordering::Relaxed);
        let change = |(a, b): (&f32, &f32)| f32::from_bits(a.to_bits() ^ b.to_bits());
        let mut changes: Vec<f32> = self.now.values().iter().zip(&self.before.values()).map(change).collect();
        if let Some(index) = self.flip {
            changes[index] = f32::from_bits(changes[index].to_bits() ^ 1);
        }
        let cut = self.cut.lock().unwrap().take();
        changes[..cut.unwrap_or(changes.len())].chunks(13).try_for_each(sink)?;
        match cut {
            Some(_) => Err(ServiceError::new(ErrorCode::Unavailable, "source", "changes", "the connection broke")),
            None => Ok(true),
        }
    }
}

fn by(transport: WeightTransport, holder: &Arc<Versions>) -> Sources {
    let ranks = vec![Arc::clone(holder) as Arc<dyn WeightService>];
    Sources { ranks, layout: Layout::Replicated { world: 1 }, transport }
}

#[test]
fn changes_of_the_weights_that_are_held_give_the_new_ones_to_the_bit() {
    for (transport, expected) in [(WeightTransport::Delta, [1, 0]), (WeightTransport::Grpc, [0, 1])] {
        let versions = Arc::new(Versions::new(2));
        let (receiver, policy) = receiver_from(by(transport, &versions));
        receiver.receive(versions.now.version).unwrap();
        assert_eq!((versions.asked(), policy.read().unwrap().version), (expected, versions.now.version));
        let staging = receiver.staging.lock().unwrap();
        assert_eq!(staging.params.content_hash(&*threads(1)), versions.now.version.hash);
    }
}

#[test]
fn where_the_holder_lacks_what_is_held_the_weights_come_whole() {
    let versions = Arc::new(Versions::new(3));
    let (receiver, _) = receiver_from(by(WeightTransport::Delta, &versions));
    receiver.receive(versions.now.version).unwrap();
    assert_eq!((versions.asked(), receiver.version()), ([0, 1], versions.now.version));
}

/// What is left by changes that break off is of no version: the next attempt asks for everything.
#[test]
fn changes_that_break_off_anywhere_leave_the_old_version_serving_and_are_not_built_on() {
    let total = Versions::new(2).now.values().len();
    for cut in (0..total).step_by(331) {
        let versions = Arc::new(Versions::new(2));
        *versions.cut.lock().unwrap() = Some(cut);
        let (receiver, _) = receiver_from(by(WeightTransport::Delta, &versions));
        let old = receiver.version();
        assert_eq!(receiver.receive(versions.now.version).unwrap_err().code, ErrorCode::Unavailable);
        assert_eq!(receiver.version(), old);
        receiver.receive(versions.now.version).unwrap();
        assert_eq!((versions.asked(), receiver.version()), ([1, 1], versions.now.version), "cut at {cut}");
    }
}

#[test]
fn a_flipped_bit_of_a_change_is_caught_and_mended_by_what_is_whole() {
    let versions = Arc::new(Versions { flip: Some(5), ..Versions::new(2) });
    let (receiver, _) = receiver_from(by(WeightTransport::Delta, &versions));
    let old = receiver.version();
    assert_eq!(receiver.receive(versions.now.version).unwrap_err().code, ErrorCode::VersionMismatch);
    assert_eq!(receiver.version(), old);
    receiver.receive(versions.now.version).unwrap();
    assert_eq!((versions.asked(), receiver.version()), ([1, 1], versions.now.version));
}
