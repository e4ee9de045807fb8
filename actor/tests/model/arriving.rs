//! The hash of weights that arrive in pieces, against a plain one of what was written.

use proptest::prelude::*;
use std::path::Path;
use temper_actor::{ArrivingHash, ModelConfig, ParamStore};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_types::ContentHash;
use xxhash_rust::xxh3::xxh3_128;

/// Leaves of 1 MiB.
const LEAF: usize = 1 << 18;

/// An embedding of more than two leaves, and much that is less than one.
fn weights(dev: &CpuDevice, seed: u64) -> ParamStore {
    let json = serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 18_000, "hidden_size": 32,
        "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
        "initializer_range": 0.3, "hidden_act": "silu",
    });
    let serde_json::Value::Object(json) = json else { panic!("an object") };
    ParamStore::init(dev, &ModelConfig::from_json(json, Path::new("config.json")).unwrap(), seed)
}

fn device(num_threads: usize) -> CpuDevice {
    CpuDevice::new(CpuConfig { num_threads, isa: None })
}

/// The hash by its definition, every leaf at once.
fn plain_hash(dev: &CpuDevice, store: &ParamStore) -> ContentHash {
    let sized = |bytes: &[u8]| [&(bytes.len() as u64).to_le_bytes(), bytes].concat();
    let mut tensors: Vec<(String, u128)> = store
        .tensors()
        .map(|(_, slot)| {
            let values = store.read_tensor(dev, &slot.name).unwrap();
            let shape: Vec<u8> = slot.shape.iter().flat_map(|n| (*n as u64).to_le_bytes()).collect();
            let mut node = [sized(slot.name.as_bytes()), sized(&shape)].concat();
            for leaf in values.chunks(LEAF) {
                let bytes: Vec<u8> = leaf.iter().flat_map(|x| x.to_le_bytes()).collect();
                node.extend(xxh3_128(&bytes).to_le_bytes());
            }
            (slot.name.clone(), xxh3_128(&node))
        })
        .collect();
    tensors.sort();
    let root: Vec<u8> = tensors.iter().flat_map(|(_, node)| node.to_le_bytes()).collect();
    ContentHash(xxh3_128(&root).to_le_bytes())
}

#[test]
fn the_hash_is_what_it_is_defined_as_on_any_number_of_threads() {
    for num_threads in [1, 2, 3] {
        let dev = device(num_threads);
        let store = weights(&dev, 4);
        assert_eq!(store.content_hash(&dev), plain_hash(&dev, &store));
        assert_ne!(store.content_hash(&dev), weights(&dev, 5).content_hash(&dev));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Pieces in order, in any order, some twice, some that came another way: the hash is that of what stands in the
    /// store.
    #[test]
    fn pieces_hash_to_what_was_written(
        piece in 1_000usize..300_000,
        order in prop_oneof![Just(0u64), 1u64..9],
        skip in prop_oneof![Just(usize::MAX), 2usize..9],
    ) {
        let dev = device(2);
        let (store, mut kept) = (weights(&dev, 7), weights(&dev, 8));
        let arriving = ArrivingHash::new(&kept);
        for (index, (unit, to)) in store.units().iter().zip(kept.units_mut()).enumerate() {
            let len = unit.buffer().len();
            let mut starts: Vec<usize> = (0..len).step_by(piece).collect();
            let shuffled = |start: &usize| (*start as u64 + 1).wrapping_mul(order * 0x9e37_79b9);
            starts.sort_by_key(|start| if order == 0 { 0 } else { shuffled(start) });
            for (count, start) in starts.iter().enumerate() {
                let end = len.min(start + piece);
                let mut values = vec![0.0; end - start];
                dev.read( unit.buffer().view(*start..end), &mut values);
                let times = if order == 5 { 2 } else { 1 };
                if count % skip.max(1) == skip.wrapping_sub(1) {
                    dev.write(to.buffer_mut().view_mut(*start..end), &values);
                    continue;
                }
                for _ in 0..times {
                    let to = to.buffer_mut().view_mut(*start..end);
                    arriving.receive(&dev, (index, *start), values[..].into(), to);
                }
            }
        }
        prop_assert_eq!(kept.content_hash(&dev), store.content_hash(&dev));
        prop_assert_eq!(arriving.finish(&dev, &kept), store.content_hash(&dev));
    }
}

/// What is hashed is what is kept: another value than the one that was sent gives another hash.
#[test]
fn what_arrives_otherwise_is_seen() {
    let dev = device(1);
    let store = weights(&dev, 7);
    let hash_with = |flip: Option<(usize, usize)>| {
        let mut kept = weights(&dev, 8);
        let arriving = ArrivingHash::new(&kept);
        for (index, (unit, to)) in store.units().iter().zip(kept.units_mut()).enumerate() {
            let mut values = vec![0.0; unit.buffer().len()];
            dev.read(unit.buffer().all(), &mut values);
            if let Some((_, element)) = flip.filter(|(unit, _)| *unit == index) {
                values[element] = f32::from_bits(values[element].to_bits() ^ 1);
            }
            for (start, part) in (0..).step_by(50_000).zip(values.chunks(50_000)) {
                let to = to.buffer_mut().view_mut(start..start + part.len());
                arriving.receive(&dev, (index, start), part.into(), to);
            }
        }
        let hash = arriving.finish(&dev, &kept);
        assert_eq!(hash, kept.content_hash(&dev));
        hash
    };
    let expected = store.content_hash(&dev);
    assert_eq!(hash_with(None), expected);
    for element in [0, 1, LEAF - 1, LEAF, 2 * LEAF + 5, 18_000 * 32 - 1] {
        assert_ne!(hash_with(Some((0, element))), expected, "element {element}");
    }
}
