//! Transfers that are whole, cut, damaged, or of another model.

mod delta;
mod int8;
mod shared;

use super::{Sources, WeightReceiver};
use crate::WeightTransport;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use temper_actor::{ModelConfig, PackedPolicy, ParamStore};
use temper_collective::reshard::{Layout, Unit};
use temper_proto::{ServiceError, ServiceResult, WeightManifest, WeightRange, WeightService, WeightSink};
use temper_tensor::{CpuConfig, CpuDevice, DType, Device};
use temper_types::{ErrorCode, PolicyVersion};

fn device() -> Arc<dyn Device> {
    threads(1)
}

fn threads(num_threads: usize) -> Arc<dyn Device> {
    Arc::new(CpuDevice::new(CpuConfig { num_threads, isa: None }))
}

fn model(hidden_size: usize) -> ModelConfig {
    let json = serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": hidden_size,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "initializer_range": 0.3, "hidden_act": "silu",
    });
    let serde_json::Value::Object(json) = json else { panic!("an object") };
    ModelConfig::from_json(json, Path::new("config.json")).expect("a valid configuration")
}

/// Weights in pieces of 7 elements; element `flip` comes with its last bit flipped, and nothing after `cut`.
pub(crate) struct Source {
    pub params: ParamStore,
    pub version: PolicyVersion,
    pub cut: Option<usize>,
    pub flip: Option<usize>,
}

impl Source {
    pub fn new(hidden_size: usize, seed: u64) -> Self {
        let dev = device();
        let params = ParamStore::init(&*dev, &model(hidden_size), seed);
        let version = PolicyVersion { number: seed, hash: params.content_hash(&*dev) };
        Source { params, version, cut: None, flip: None }
    }

    fn values(&self) -> Vec<f32> {
        let dev = device();
        let read = |unit: &temper_actor::Unit| {
            let mut values = vec![0.0; unit.buffer().len()];
            dev.read(unit.buffer().all(), &mut values);
            values
        };
        self.params.units().iter().flat_map(read).collect()
    }
}

impl WeightService for Source {
    fn manifest(&self) -> ServiceResult<WeightManifest> {
        let unit_lens = self.params.units().iter().map(|unit| unit.buffer().len() as u64).collect();
        Ok(WeightManifest { version: self.version, unit_lens })
    }

    fn pull(&self, _: PolicyVersion, ranges: &[WeightRange], sink: WeightSink<'_>) -> ServiceResult<()> {
        let mut values = self.values();
        assert_eq!(ranges.iter().map(|r| r.len as usize).sum::<usize>(), values.len());
        if let Some(index) = self.flip {
            values[index] = f32::from_bits(values[index].to_bits() ^ 1);
        }
        let sent = &values[..self.cut.unwrap_or(values.len())];
        sent.chunks(7).try_for_each(sink)?;
        match self.cut {
            Some(_) => Err(ServiceError::new(ErrorCode::Unavailable, "source", "pull", "the connection broke")),
            None => Ok(()),
        }
    }
}

/// A receiver that serves the weights of seed 1.
pub(crate) fn receiver(source: Source) -> (WeightReceiver, Arc<RwLock<PackedPolicy>>) {
    receiver_from(Sources::one(Arc::new(source)))
}

fn receiver_from(sources: Sources) -> (WeightReceiver, Arc<RwLock<PackedPolicy>>) {
    let (dev, config) = (device(), model(16));
    let params = ParamStore::init(&*dev, &config, 1);
    let mut policy = PackedPolicy::new(&dev, &params, &config, DType::F32);
    policy.version = PolicyVersion { number: 1, hash: params.content_hash(&*dev) };
    let policy = Arc::new(RwLock::new(policy));
    (WeightReceiver::new(dev, Arc::clone(&policy), params, sources, "rollout-3".to_owned()), policy)
}

#[test]
fn a_whole_transfer_is_proven_and_served() {
    let source = Source::new(16, 2);
    let version = source.version;
    let (receiver, policy) = receiver(source);
    receiver.receive(version).unwrap();
    assert_eq!((receiver.version(), policy.read().unwrap().version), (version, version));
}

#[test]
fn the_same_weights_under_another_number_are_not_pulled() {
    let source = Source { cut: Some(0), ..Source::new(16, 1) };
    let version = PolicyVersion { number: 9, ..source.version };
    let (receiver, _) = receiver(source);
    receiver.receive(version).unwrap();
    assert_eq!(receiver.version(), version);
}

#[test]
fn a_transfer_cut_anywhere_leaves_the_old_version_serving_and_can_be_repeated() {
    let total = Source::new(16, 2).values().len();
    for cut in (0..total).step_by(97) {
        let source = Source { cut: Some(cut), ..Source::new(16, 2) };
        let version = source.version;
        let (receiver, _) = receiver(source);
        let old = receiver.version();
        assert_eq!(receiver.receive(version).unwrap_err().code, ErrorCode::Unavailable, "cut at {cut}");
        assert_eq!(receiver.version(), old);
    }
}

#[test]
fn a_flipped_bit_anywhere_is_caught() {
    let whole = Source::new(16, 2);
    // Padding between tensors is part of no tensor and of no hash.
    let mut start = 0;
    for unit in whole.params.units() {
        for slot in unit.slots() {
            for index in [slot.range.start, slot.range.end - 1] {
                let source = Source { flip: Some(start + index), ..Source::new(16, 2) };
                let (receiver, _) = receiver(source);
                let old = receiver.version();
                let error = receiver.receive(whole.version).unwrap_err();
                assert_eq!(error.code, ErrorCode::VersionMismatch, "{}", slot.name);
                assert!(error.to_string().contains("what arrived hashes to"), "{error}");
                assert_eq!(receiver.version(), old);
            }
        }
        start += unit.buffer().len();
    }
}

#[test]
fn another_model_is_refused() {
    let source = Source::new(24, 2);
    let version = source.version;
    let (receiver, _) = receiver(source);
    assert_eq!(receiver.receive(version).unwrap_err().code, ErrorCode::DataLoss);
}

/// A source that holds its shard of every unit, and counts what it gives.
struct Shard {
    whole: Source,
    layout: Layout,
    rank: usize,
    sent: Arc<AtomicUsize>,
}

impl WeightService for Shard {
    fn manifest(&self) -> ServiceResult<WeightManifest> {
        self.whole.manifest()
    }

    fn pull(&self, _: PolicyVersion, ranges: &[WeightRange], sink: WeightSink<'_>) -> ServiceResult<()> {
        let dev = device();
        for range in ranges {
            let buffer = self.whole.params.unit(range.unit as usize).buffer();
            let wanted = range.start as usize..(range.start + range.len) as usize;
            let held = self.layout.held(&Unit { len: buffer.len(), tensors: Vec::new() }, self.rank);
            assert!(held.iter().any(|h| h.start <= wanted.start && wanted.end <= h.end), "{wanted:?} of {held:?}");
            let mut values = vec![0.0; wanted.len()];
            dev.read(buffer.view(wanted), &mut values);
            self.sent.fetch_add(values.len(), Ordering::Relaxed);
            values.chunks(5).try_for_each(&mut *sink)?;
        }
        Ok(())
    }
}

#[test]
fn every_element_comes_once_from_a_rank_that_holds_it() {
    let layouts = [
        Layout::Replicated { world: 3 },
        Layout::Fsdp { world: 3, shards: 3 },
        Layout::Fsdp { world: 4, shards: 2 },
        Layout::Fsdp { world: 5, shards: 5 },
    ];
    for layout in layouts {
        let total = Source::new(16, 2).values().len();
        let version = Source::new(16, 2).version;
        let sent: Vec<Arc<AtomicUsize>> = (0..layout.world()).map(|_| Arc::default()).collect();
        let shard = |(rank, sent): (usize, &Arc<AtomicUsize>)| {
            Arc::new(Shard { whole: Source::new(16, 2), layout, rank, sent: Arc::clone(sent) })
                as Arc<dyn WeightService>
        };
        let ranks = sent.iter().enumerate().map(shard).collect();
        let (dev, config) = (device(), model(16));
        let params = ParamStore::init(&*dev, &config, 1);
        let policy = Arc::new(RwLock::new(PackedPolicy::new(&dev, &params, &config, DType::F32)));
        let sources = Sources { ranks, layout, transport: WeightTransport::Auto };
        let receiver = WeightReceiver::new(dev, policy, params, sources, "rollout-0".to_owned());
        receiver.receive(version).unwrap();
        assert_eq!(receiver.version(), version);
        let sent: Vec<usize> = sent.iter().map(|sent| sent.load(Ordering::Relaxed)).collect();
        assert_eq!(sent.iter().sum::<usize>(), total, "{layout:?}");
        // Ranks that hold the same give equal amounts; how much a rank holds alone is the layout's affair.
        if let Layout::Replicated { .. } = layout {
            let (least, most) = (sent.iter().min(), sent.iter().max());
            assert!(most.zip(least).is_some_and(|(most, least)| most - least <= 8), "{layout:?}: {sent:?}");
        }
    }
}

/// Gives what it is asked for in pieces of one size, with one bit of one element of one unit flipped.
struct Damaged {
    whole: Source,
    piece: usize,
    /// Unit, element and bit.
    flip: Option<(usize, usize, u32)>,
}

impl WeightService for Damaged {
    fn manifest(&self) -> ServiceResult<WeightManifest> {
        self.whole.manifest()
    }

    fn pull(&self, _: PolicyVersion, ranges: &[WeightRange], sink: WeightSink<'_>) -> ServiceResult<()> {
        let dev = device();
        for range in ranges {
            let wanted = range.start as usize..(range.start + range.len) as usize;
            let mut values = vec![0.0; wanted.len()];
            dev.read(self.whole.params.unit(range.unit as usize).buffer().view(wanted.clone()), &mut values);
            if let Some((unit, element, bit)) = self.flip
                && unit == range.unit as usize
                && wanted.contains(&element)
            {
                let value = &mut values[element - wanted.start];
                *value = f32::from_bits(value.to_bits() ^ (1 << bit));
            }
            values.chunks(self.piece).try_for_each(&mut *sink)?;
        }
        Ok(())
    }
}

/// What a receiver with `num_threads` threads says of weights that come from ranks in `layout`.
fn receive_damaged(
    num_threads: usize,
    layout: Layout,
    (piece, flip): (usize, Option<(usize, usize, u32)>),
) -> Result<(), (ErrorCode, PolicyVersion)> {
    let rank = |_| Arc::new(Damaged { whole: Source::new(16, 2), piece, flip }) as Arc<dyn WeightService>;
    let (version, config) = (Source::new(16, 2).version, model(16));
    let params = ParamStore::init(&*device(), &config, 1);
    let policy = Arc::new(RwLock::new(PackedPolicy::new(&device(), &params, &config, DType::F32)));
    let sources = Sources { ranks: (0..layout.world()).map(rank).collect(), layout, transport: WeightTransport::Auto };
    let receiver = WeightReceiver::new(threads(num_threads), policy, params, sources, "rollout-0".to_owned());
    receiver.receive(version).map_err(|error| (error.code, receiver.version()))
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    #[test]
    fn any_flipped_bit_of_any_piece_is_caught_for_every_layout(
        piece in 1usize..400,
        num_threads in 1usize..5,
        layout in proptest::sample::select(vec![
            Layout::Replicated { world: 1 },
            Layout::Replicated { world: 3 },
            Layout::Fsdp { world: 3, shards: 3 },
            Layout::Fsdp { world: 4, shards: 2 },
        ]),
        (place, bit) in (0usize..1 << 20, 0u32..32),
    ) {
        // An element of a tensor: padding is part of no hash.
        let whole = Source::new(16, 2);
        let slots: Vec<_> = whole.params.tensors().map(|(unit, slot)| (unit, slot.range.clone())).collect();
        let (unit, range) = slots[place % slots.len()].clone();
        let flip = (unit, range.start + place % range.len(), bit);
        proptest::prop_assert_eq!(receive_damaged(num_threads, layout, (piece, None)), Ok(()));
        let caught = receive_damaged(num_threads, layout, (piece, Some(flip)));
        let kept = (ErrorCode::VersionMismatch, PolicyVersion::default());
        proptest::prop_assert_eq!(caught, Err(kept), "{:?}", flip);
    }
}
