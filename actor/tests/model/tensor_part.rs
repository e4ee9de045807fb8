//! Tensor-parallel ranks against the whole model: the same bits, or a refusal by name.

use crate::bitwise::{bits, params, sized_config};
use crate::support::{Paged, Sums, device, fixture_dir};
use std::sync::Arc;
use temper_actor::{CheckpointReader, ModelConfig, PackedPolicy, ParamStore, TensorPart};
use temper_tensor::{DType, TokenStats};
use temper_types::Philox;

const DTYPES: [DType; 2] = [DType::F32, DType::Bf16];
const LENS: [usize; 3] = [41, 7, 23];
const BLOCK_SIZE: usize = 16;

fn sequences(vocab: usize) -> Vec<Vec<u32>> {
    let noise = Philox::new(11);
    let ids =
        |(s, len): (usize, &usize)| (0..*len).map(|t| noise.below(vocab as u64, t as u64, s as u64) as u32).collect();
    LENS.iter().enumerate().map(ids).collect()
}

/// Log-probs of all sequences in steps that mix long chunks and single tokens.
fn log_probs(policy: &PackedPolicy, ranks: Option<Sums>) -> Vec<TokenStats> {
    let mut paged = Paged::new(policy, LENS.len(), 48, BLOCK_SIZE);
    paged.ranks = ranks;
    let chunk = |sequence: usize, step: usize| if (step + sequence).is_multiple_of(3) { 9 } else { 1 };
    paged.log_probs(&sequences(policy.config().vocab_size), chunk)
}

/// The same over ranks that are threads, whose sums are handed on in `order`; what rank 0 says.
fn log_probs_of_ranks(parts: &[PackedPolicy], order: &[usize]) -> Vec<TokenStats> {
    std::thread::scope(|scope| {
        let ranks = parts.iter().zip(Sums::connect(order));
        let threads: Vec<_> = ranks.map(|(part, ranks)| scope.spawn(move || log_probs(part, Some(ranks)))).collect();
        let mut said: Vec<_> = threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect();
        said.swap_remove(0)
    })
}

fn parts(params: &ParamStore, config: &ModelConfig, num_ranks: usize, dtype: DType) -> Vec<PackedPolicy> {
    let dev = device(2);
    let part = |rank| {
        let part = Arc::new(TensorPart::new(config, rank, num_ranks).expect("a model that can be divided"));
        PackedPolicy::new_part(&dev, params, &part, dtype)
    };
    (0..num_ranks).map(part).collect()
}

fn check(label: &str, params: &ParamStore, config: &ModelConfig, num_ranks: &[usize]) {
    for dtype in DTYPES {
        let whole = log_probs(&PackedPolicy::new(&device(2), params, config, dtype), None);
        assert_eq!(bits(&whole).len(), LENS.iter().sum::<usize>() - LENS.len());
        for num_ranks in num_ranks {
            let order: Vec<usize> = (0..*num_ranks).collect();
            let got = log_probs_of_ranks(&parts(params, config, *num_ranks, dtype), &order);
            assert_eq!(bits(&got), bits(&whole), "{label} in {dtype} over {num_ranks} ranks");
        }
    }
}

#[test]
fn ranks_give_the_bits_of_the_whole_model() {
    // Biases on every projection (llama), on queries, keys and values (qwen2), normed heads (qwen3), an LM head of its
    // own and a window (mistral).
    for (family, window) in [("llama", None), ("qwen2", None), ("qwen3", None), ("mistral", Some(7))] {
        let config = sized_config(family, (36, 48), (4, 2), window);
        check(family, &params(&*device(2), &config, 5), &config, &[1, 2, 4]);
    }
    let config = sized_config("llama", (36, 48), (8, 1), None);
    check("a head on each rank", &params(&*device(2), &config, 6), &config, &[8]);
}

#[test]
fn checkpoints_of_other_programs_are_divided_too() {
    for (name, num_ranks) in [("llama", 2), ("llama_mha_v5cfg", 4), ("mistral_swa", 2), ("qwen2", 2)] {
        let dir = fixture_dir(name);
        let config = ModelConfig::load(&dir).expect("a configuration");
        let reader = CheckpointReader::open(&dir).expect("weights");
        let params = ParamStore::load(&*device(2), &config, &reader).expect("weights of the model");
        check(name, &params, &config, &[num_ranks]);
    }
}

#[test]
fn sums_joined_in_another_order_are_seen() {
    let config = sized_config("qwen3", (36, 48), (4, 2), None);
    let parts = parts(&params(&*device(2), &config, 5), &config, 4, DType::F32);
    let [right, wrong] = [[0, 1, 2, 3], [0, 2, 1, 3]].map(|order| bits(&log_probs_of_ranks(&parts, &order)));
    assert!(right != wrong, "sums of f32 depend on their order");
}

#[test]
fn a_part_takes_new_weights_as_the_whole_model_does() {
    let (dev, config) = (device(2), sized_config("mistral", (36, 48), (4, 2), None));
    let [old, new] = [5, 6].map(|seed| params(&*dev, &config, seed));
    let whole = PackedPolicy::new(&dev, &new, &config, DType::F32);
    let mut ranks = parts(&old, &config, 2, DType::F32);
    let before = bits(&log_probs_of_ranks(&ranks, &[0, 1]));
    // One of them reads the masters, as whoever holds them does; the other is sent its values.
    ranks[0].repack(&new);
    let part = Arc::clone(ranks[1].part().expect("a part"));
    for (index, unit) in new.units().iter().enumerate() {
        ranks[1].repack_part(index, &part.values(&*dev, unit));
    }
    let after = bits(&log_probs_of_ranks(&ranks, &[0, 1]));
    assert_eq!(after, bits(&log_probs(&whole, None)));
    assert_ne!(after, before);
}

#[test]
fn a_model_that_cannot_be_divided_is_refused_by_key() {
    let refusal = |config: &ModelConfig, num_ranks| TensorPart::check(config, num_ranks).unwrap_err().to_string();
    let config = sized_config("llama", (36, 48), (4, 2), None);
    for (message, expected) in [
        (refusal(&config, 3), "`tensor-parallel ranks` is 3: expected 1, 2, 4 or 8"),
        (refusal(&config, 8), "`num_key_value_heads` is 4: expected a multiple of 8, so that each"),
        (refusal(&sized_config("llama", (36, 48), (2, 3), None), 4), "`num_attention_heads` is 6: expected a multiple"),
        (
            refusal(&sized_config("llama", (36, 48), (4, 1), None), 4),
            "`num_attention_heads * head_dim` is 56: expected",
        ),
        (
            refusal(&sized_config("llama", (36, 52), (4, 2), None), 2),
            "`intermediate_size` is 52: expected a multiple of 16",
        ),
        (refusal(&config.with_head(temper_actor::Head::TokenValue).unwrap(), 2), "`architectures` is ForTokenClass"),
    ] {
        assert!(message.contains(expected), "{message}");
    }
    assert!(TensorPart::check(&sized_config("llama", (36, 52), (2, 1), None), 1).is_ok(), "one rank divides nothing");
}
