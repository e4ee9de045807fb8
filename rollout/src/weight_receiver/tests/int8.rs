//! An engine of int8 weights: proved as they were sent, quantised anew from each set.

use super::{Source, Sources, WeightReceiver, device, model};
use std::sync::{Arc, RwLock};
use temper_actor::{PackedPolicy, ParamStore, PolicyFormat, TrainArena, TrainBatch};
use temper_tensor::DType;
use temper_types::{PolicyVersion, WeightFormat};

const INT8: PolicyFormat = PolicyFormat { dtype: DType::F32, weights: WeightFormat::Int8 };

/// Bits of the log-probs of some tokens.
fn log_probs(policy: &PackedPolicy) -> Vec<u32> {
    let tokens: Vec<u32> = (0..30).map(|i| (i * 7 + 3) % 50).collect();
    let mut batch = TrainBatch::new();
    batch.push_sequence(&tokens, 1..tokens.len());
    let stats = policy.score_only(&batch, 1.0, &mut TrainArena::new());
    stats.log_probs.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn new_weights_are_quantised_as_if_they_had_been_the_first() {
    let (dev, config) = (device(), model(16));
    let params = |seed| ParamStore::init(&*dev, &config, seed);
    let fresh = |seed, format: PolicyFormat| PackedPolicy::new(&dev, &params(seed), &config, format);
    let mut policy = fresh(1, INT8);
    policy.version = PolicyVersion { number: 1, hash: params(1).content_hash(&*dev) };
    let policy = Arc::new(RwLock::new(policy));
    let source = Source::new(16, 2);
    let version = source.version;
    let sources = Sources::one(Arc::new(source));
    let receiver = WeightReceiver::new(device(), Arc::clone(&policy), params(1), sources, "rollout-0".to_owned());
    receiver.receive(version).unwrap();
    let policy = policy.read().unwrap();
    assert_eq!(policy.version, version, "the hash is that of what was sent");
    assert_eq!(log_probs(&policy), log_probs(&fresh(2, INT8)));
    assert_ne!(log_probs(&policy), log_probs(&fresh(1, INT8)), "they are other weights");
    assert_ne!(log_probs(&policy), log_probs(&fresh(2, DType::F32.into())), "and not the exact ones");
}
