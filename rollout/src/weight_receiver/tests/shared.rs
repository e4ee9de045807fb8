//! Weights in memory that a trainer shares: read, refused, damaged, changed under the reader, of a process that ends.

use super::{Source, device, receiver_from, threads};
use crate::nearby_weights::{Arrival, NearbyWeights};
use crate::{Sources, WeightBytes, WeightTransport};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use temper_collective::reshard::Layout;
use temper_proto::{
    ServiceError, ServiceResult, SharedUnit, SharedWeights, WeightManifest, WeightRange, WeightService, WeightSink,
};
use temper_tensor::{Buffer, SharedBuffers};
use temper_types::{ContentHash, ErrorCode, PolicyVersion};

/// The weights of seed 2 in shared memory of this process.
struct Sharing {
    whole: Source,
    buffers: Mutex<Vec<Buffer>>,
    /// What is told of the memory.
    offer: SharedWeights,
}

impl Sharing {
    fn new() -> Self {
        let (dev, whole) = (device(), Source::new(16, 2));
        let lens: Vec<usize> = whole.params.units().iter().map(|unit| unit.buffer().len()).collect();
        let SharedBuffers { place, offsets, mut buffers } = dev.shared_zeros(&lens).unwrap();
        for (unit, buffer) in whole.params.units().iter().zip(&mut buffers) {
            dev.copy(unit.buffer().all(), buffer.all_mut());
        }
        let unit = |(len, offset_bytes)| SharedUnit { start: 0, len: len as u64, offset_bytes };
        let units = lens.into_iter().zip(offsets).map(unit).collect();
        let (process_id, descriptor, nonce) = (place.process_id, place.descriptor, place.nonce);
        let offer = SharedWeights { process_id, descriptor, nonce, units };
        Sharing { whole, buffers: Mutex::new(buffers), offer }
    }

    fn flip(&self, unit: usize, element: usize) {
        let (dev, mut value) = (device(), [0.0]);
        let buffer = &mut self.buffers.lock().unwrap()[unit];
        dev.read(buffer.view(element..element + 1), &mut value);
        dev.write(buffer.view_mut(element..element + 1), &[f32::from_bits(value[0].to_bits() ^ 1)]);
    }

    fn num_bytes(&self) -> u64 {
        self.offer.units.iter().map(|unit| unit.len * 4).sum()
    }
}

impl WeightService for Sharing {
    fn manifest(&self) -> ServiceResult<WeightManifest> {
        self.whole.manifest()
    }

    fn shared(&self, _: PolicyVersion) -> ServiceResult<Option<SharedWeights>> {
        Ok(Some(self.offer.clone()))
    }

    fn pull(&self, version: PolicyVersion, ranges: &[WeightRange], sink: WeightSink<'_>) -> ServiceResult<()> {
        self.whole.pull(version, ranges, sink)
    }
}

/// Makes what is told of a unit wrong.
type Damage = fn(&mut SharedUnit);

fn by(transport: WeightTransport, holder: Arc<dyn WeightService>) -> Sources {
    Sources { ranks: vec![holder], layout: Layout::Replicated { world: 1 }, transport }
}

#[test]
fn both_ways_give_the_same_weights_and_the_one_that_was_asked_for() {
    let sharing = Arc::new(Sharing::new());
    let (version, all) = (sharing.whole.version, sharing.num_bytes());
    let ways = [
        (WeightTransport::Auto, WeightBytes { shared: all, streamed: 0 }),
        (WeightTransport::Grpc, WeightBytes { shared: 0, streamed: all }),
    ];
    for (transport, expected) in ways {
        let (receiver, policy) = receiver_from(by(transport, sharing.clone()));
        receiver.receive(version).unwrap();
        assert_eq!((receiver.bytes(), policy.read().unwrap().version), (expected, version), "{transport:?}");
        let staging = receiver.staging.lock().unwrap();
        assert_eq!(staging.params.content_hash(&*device()), version.hash, "{transport:?}");
    }
}

/// As another host answers, or a process of another user, or one that ended.
#[test]
fn memory_that_is_not_of_this_host_is_done_without() {
    let wrong: [fn(&mut SharedWeights); 3] =
        [|offer| offer.nonce[15] ^= 1, |offer| offer.process_id = u32::MAX, |offer| offer.descriptor = u32::MAX];
    for (index, change) in wrong.into_iter().enumerate() {
        let mut sharing = Sharing::new();
        change(&mut sharing.offer);
        let (version, all) = (sharing.whole.version, sharing.num_bytes());
        let (receiver, _) = receiver_from(by(WeightTransport::Auto, Arc::new(sharing)));
        receiver.receive(version).unwrap();
        let expected = WeightBytes { shared: 0, streamed: all };
        assert_eq!((receiver.bytes(), receiver.version()), (expected, version), "case {index}");
    }
}

#[test]
fn a_flipped_bit_of_shared_memory_is_caught_and_a_range_outside_refused() {
    let sharing = Arc::new(Sharing::new());
    let version = sharing.whole.version;
    let (receiver, _) = receiver_from(by(WeightTransport::Auto, sharing.clone()));
    let old = receiver.version();
    let slots: Vec<_> = sharing.whole.params.tensors().map(|(unit, slot)| (unit, slot.range.clone())).collect();
    for (unit, range) in slots {
        for element in [range.start, range.end - 1] {
            sharing.flip(unit, element);
            assert_eq!(receiver.receive(version).unwrap_err().code, ErrorCode::VersionMismatch, "{unit} {element}");
            assert_eq!(receiver.version(), old);
            sharing.flip(unit, element);
        }
    }
    receiver.receive(version).unwrap();
    let outside: [(Damage, ErrorCode); 3] = [
        (|unit| unit.len -= 1, ErrorCode::InvalidArgument),
        (|unit| unit.start += 1, ErrorCode::InvalidArgument),
        (|unit| unit.offset_bytes = 1 << 40, ErrorCode::DataLoss),
    ];
    for (change, expected) in outside {
        let mut sharing = Sharing::new();
        change(&mut sharing.offer.units[1]);
        let (receiver, _) = receiver_from(by(WeightTransport::Auto, Arc::new(sharing)));
        assert_eq!(receiver.receive(version).unwrap_err().code, expected);
        assert_eq!(receiver.version(), old);
    }
}

/// A trainer that updates while an engine reads: the engine takes what it was told of, or nothing.
#[test]
fn weights_that_change_under_the_reader_are_never_taken_for_others() {
    let sharing = Arc::new(Sharing::new());
    let (version, ended) = (sharing.whole.version, AtomicBool::new(false));
    let last = sharing.whole.params.units().len() - 1;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                sharing.flip(0, 0);
                sharing.flip(last, 0);
            }
        });
        for _ in 0..200 {
            let (receiver, _) = receiver_from(by(WeightTransport::Auto, sharing.clone()));
            let old = receiver.version();
            let received = receiver.receive(version);
            let staged = receiver.staging.lock().unwrap().params.content_hash(&*threads(1));
            match received {
                Ok(()) => assert_eq!((receiver.version(), staged), (version, version.hash)),
                Err(error) => {
                    assert_eq!((error.code, receiver.version()), (ErrorCode::VersionMismatch, old));
                    assert_ne!(staged, version.hash);
                }
            }
        }
        ended.store(true, Ordering::Relaxed);
    });
}

/// Set for the process that is killed.
const HOLDER: &str = "TEMPER_TEST_HOLDER";

/// Weights in another process, and nothing by any other way.
struct Elsewhere {
    whole: Source,
    offer: SharedWeights,
    child: Mutex<Child>,
}

impl Elsewhere {
    /// Run the calling test again, in a process of its own, which shares weights and waits.
    fn start(test: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(HOLDER, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let told = lines.find_map(|line| line.strip_prefix("offer ").map(str::to_owned));
        let told: Vec<u64> = serde_json::from_str(&told.expect("the process tells where its weights are")).unwrap();
        let (head, rest) = told.split_at(2);
        let (nonce, units) = rest.split_at(16);
        let unit = |u: &[u64]| SharedUnit { start: u[0], len: u[1], offset_bytes: u[2] };
        let offer = SharedWeights {
            process_id: head[0] as u32,
            descriptor: head[1] as u32,
            nonce: std::array::from_fn(|i| nonce[i] as u8),
            units: units.chunks(3).map(unit).collect(),
        };
        assert_eq!(offer.process_id, child.id());
        Elsewhere { whole: Source::new(16, 2), offer, child: Mutex::new(child) }
    }

    /// What the other process does: it ends when whoever started it does.
    fn hold() {
        let sharing = Sharing::new();
        let offer = &sharing.offer;
        let mut told = vec![u64::from(offer.process_id), u64::from(offer.descriptor)];
        told.extend(offer.nonce.iter().map(|byte| u64::from(*byte)));
        told.extend(offer.units.iter().flat_map(|unit| [unit.start, unit.len, unit.offset_bytes]));
        println!("\noffer {}", serde_json::to_string(&told).unwrap());
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    }
}

impl WeightService for Elsewhere {
    fn manifest(&self) -> ServiceResult<WeightManifest> {
        self.whole.manifest()
    }

    fn shared(&self, _: PolicyVersion) -> ServiceResult<Option<SharedWeights>> {
        Ok(Some(self.offer.clone()))
    }

    fn pull(&self, _: PolicyVersion, _: &[WeightRange], _: WeightSink<'_>) -> ServiceResult<()> {
        Err(ServiceError::new(ErrorCode::Unavailable, "trainer-0", "pull", "the connection broke"))
    }
}

impl Elsewhere {
    fn kill(&self) {
        let mut child = self.child.lock().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
fn a_trainer_killed_during_a_sync_leaves_what_was_opened_and_the_old_version_serving() {
    if std::env::var_os(HOLDER).is_some() {
        return Elsewhere::hold();
    }
    let test = "weight_receiver::tests::shared::\
        a_trainer_killed_during_a_sync_leaves_what_was_opened_and_the_old_version_serving";
    let elsewhere = Arc::new(Elsewhere::start(test));
    let version = elsewhere.whole.version;
    let num_bytes: u64 = elsewhere.offer.units.iter().map(|unit| unit.len * 4).sum();
    let all = WeightBytes { shared: num_bytes, streamed: 0 };
    let (early, _) = receiver_from(by(WeightTransport::Auto, elsewhere.clone()));
    early.receive(version).unwrap();
    assert_eq!((early.version(), early.bytes()), (version, all), "from a process that lives");
    // Weights that are not those that were announced.
    let (other, _) = receiver_from(by(WeightTransport::Auto, elsewhere.clone()));
    let old = other.version();
    let announced = PolicyVersion { number: 2, hash: ContentHash([9; 16]) };
    assert_eq!(other.receive(announced).unwrap_err().code, ErrorCode::VersionMismatch);
    assert_eq!((other.version(), other.bytes()), (old, all));
    // The process is killed before the first range is copied: all arrive.
    let nearby = NearbyWeights::new(elsewhere.clone(), 0, WeightTransport::Auto);
    let range = |(unit, held): (usize, &SharedUnit)| WeightRange { unit: unit as u32, start: 0, len: held.len };
    let ranges: Vec<WeightRange> = elsewhere.offer.units.iter().enumerate().map(range).collect();
    let mut arrived = Vec::new();
    let mut keep = |arrival: Arrival<'_>| {
        elsewhere.kill();
        let Arrival::Whole(values) = arrival else { panic!("nobody asked for changes") };
        let start = arrived.len();
        arrived.resize(start + values.len(), 0.0);
        values.copy_to(&mut arrived[start..]);
        Ok(())
    };
    nearby.pull((None, version), &ranges, &mut keep).unwrap();
    assert_eq!(arrived, elsewhere.whole.values());
    // Whoever comes later finds nothing, whether or not it came before.
    nearby.rest();
    assert_eq!(nearby.pull((None, version), &ranges, &mut |_| Ok(())).unwrap_err().code, ErrorCode::Unavailable);
    assert_eq!(other.receive(version).unwrap_err().code, ErrorCode::Unavailable);
    assert_eq!((other.version(), other.bytes()), (old, all));
}
