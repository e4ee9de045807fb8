//! Sequences that begin alike run their common rows once: the same bits forward, the same gradients within rounding.

use crate::bitwise::{VOCAB, bits, params, sized_config};
use crate::support::{Fixture, device};
use proptest::prelude::*;
use temper_actor::{ModelConfig, OutputGrads, PackedPolicy, ParamStore, Recompute, TrainArena, TrainBatch};
use temper_tensor::{DType, Device, TokenStats};
use temper_types::Philox;

/// A prompt and its responses, of which some repeat or extend others.
#[derive(Debug, Clone)]
struct Group {
    prompt: usize,
    responses: Vec<usize>,
}

#[derive(Debug, Clone)]
struct Setup {
    family: &'static str,
    heads: (usize, usize),
    window: Option<usize>,
    dtype: DType,
    threads: usize,
    groups: Vec<Group>,
    seed: u64,
}

fn setup() -> impl Strategy<Value = Setup> {
    let family = prop::sample::select(vec!["llama", "qwen2", "qwen3", "mistral"]);
    let heads = prop::sample::select(vec![(1, 1), (1, 3), (2, 2), (3, 1)]);
    let window = prop::sample::select(vec![None, Some(3), Some(21)]);
    let dtype = prop::sample::select(vec![DType::F32, DType::Bf16]);
    let group = (1..60usize, prop::collection::vec(1..40usize, 1..6))
        .prop_map(|(prompt, responses)| Group { prompt, responses });
    (family, heads, window, dtype, 1..=3usize, prop::collection::vec(group, 1..4), any::<u64>()).prop_map(
        |(family, heads, window, dtype, threads, groups, seed)| Setup {
            family,
            heads,
            window,
            dtype,
            threads,
            groups,
            seed,
        },
    )
}

/// Prompts begin with two common tokens; every third response repeats the tokens of the first as far as it goes.
fn sequences(setup: &Setup) -> Vec<(Vec<u32>, usize)> {
    let noise = Philox::new(setup.seed);
    let token = |slot: usize, stream: u64| noise.below(VOCAB as u64, slot as u64, stream) as u32;
    let mut all = Vec::new();
    for (g, group) in setup.groups.iter().enumerate() {
        for (r, len) in group.responses.iter().enumerate() {
            let stream = 1000 * g as u64 + if r % 3 == 2 { 1 } else { 1 + r as u64 };
            let prompt = (0..group.prompt).map(|t| token(t, if t < 2 { 9_999 } else { 1000 * g as u64 }));
            all.push((prompt.chain((0..*len).map(|t| token(100 + t, stream))).collect(), group.prompt));
        }
    }
    all
}

fn batch(sequences: &[(Vec<u32>, usize)]) -> TrainBatch {
    let mut batch = TrainBatch::new();
    for (tokens, prompt) in sequences {
        batch.push_sequence(tokens, *prompt..tokens.len());
    }
    batch
}

fn d_log_prob(target: usize) -> f32 {
    ((target * 7 % 5) as f32 - 1.6) / 3.0
}

/// Gradients of all batches, added up; targets are numbered through.
fn gradients(
    (dev, store, policy): (&dyn Device, &ParamStore, &PackedPolicy),
    batches: &[TrainBatch],
    recompute: Recompute,
) -> (ParamStore, Vec<TokenStats>) {
    let mut grads = store.zeros_like(dev);
    let mut arena = TrainArena::new();
    let (mut first, mut stats) = (0, Vec::new());
    for batch in batches {
        let d: Vec<f32> = (first..first + batch.num_targets()).map(d_log_prob).collect();
        first += batch.num_targets();
        let tape = policy.train_forward(batch, recompute, &mut arena);
        stats.push(policy.log_probs(&tape, 1.0));
        let outputs = OutputGrads::LogProbs { d_log_probs: &d, d_entropies: &d, temperature: 1.0 };
        policy.backward(store, tape, outputs, &mut grads);
    }
    (grads, stats)
}

/// Largest `|got - want| / |want|` over tensors, in Euclidean norms, with the tensor's name.
fn worst_gap(dev: &dyn Device, got: &ParamStore, want: &ParamStore) -> (f64, String) {
    let gap = |name: &str| {
        let (got, want) = (got.read_tensor(dev, name).unwrap(), want.read_tensor(dev, name).unwrap());
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let difference = norm(&mut got.iter().zip(&want).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        difference / norm(&mut want.iter().map(|x| f64::from(*x))).max(1e-3)
    };
    let gaps = want.tensors().map(|(_, slot)| (gap(&slot.name), slot.name.clone()));
    gaps.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
}

fn check(setup: &Setup) -> Result<(), TestCaseError> {
    let config = sized_config(setup.family, (36, 52), setup.heads, setup.window);
    let dev = device(setup.threads);
    let store = params(&*dev, &config, setup.seed);
    let policy = PackedPolicy::new(&dev, &store, &config, setup.dtype);
    let sequences = sequences(setup);
    let together = [batch(&sequences)];
    let apart: Vec<TrainBatch> = sequences.iter().map(|one| batch(std::slice::from_ref(one))).collect();
    let rows_apart: usize = apart.iter().map(TrainBatch::num_rows).sum();
    let saved: usize = setup.groups.iter().map(|group| (group.responses.len() - 1) * (group.prompt)).sum();
    prop_assert!(together[0].num_rows() <= rows_apart - saved, "prompts run once");

    let parts = (&*dev, &store, &policy);
    let (want, stats_apart) = gradients(parts, &apart, Recompute::None);
    let (got, stats) = gradients(parts, &together, Recompute::None);
    prop_assert_eq!(bits(&stats), bits(&stats_apart), "log-probs");
    let scored = policy.score_only(&together[0], 1.0, &mut TrainArena::new());
    prop_assert_eq!(bits([&scored]), bits(&stats), "scoring");
    let (gap, tensor) = worst_gap(&*dev, &got, &want);
    let allowed = if setup.dtype == DType::F32 { 1e-5 } else { 2e-2 };
    prop_assert!(gap <= allowed, "gradient of {}: relative difference {}", tensor, gap);

    let (recomputed, _) = gradients(parts, &together, Recompute::Layers);
    prop_assert_eq!(recomputed.content_hash(&*dev), got.content_hash(&*dev), "recomputation");
    let alone = device(1);
    let policy = PackedPolicy::new(&alone, &store, &config, setup.dtype);
    let (one_thread, _) = gradients((&*alone, &store, &policy), &together, Recompute::None);
    prop_assert_eq!(one_thread.content_hash(&*dev), got.content_hash(&*dev), "threads");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn shared_rows_change_no_bit_forward_and_only_rounding_backward(setup in setup()) {
        check(&setup)?;
    }
}

/// Values of a critic and scores of a reward model.
#[test]
fn values_share_rows_as_well() {
    for name in ["critic_qwen2", "reward_llama"] {
        let fixture = Fixture::load(name);
        let ids = |len: usize, salt: usize| (0..len).map(move |t| ((t * 13 + salt * 7) % 60) as u32);
        let sequences: Vec<Vec<u32>> = (0..3).map(|r| ids(21, 0).chain(ids(5 + 9 * r, r + 1)).collect()).collect();
        let positions: Vec<u32> = (4..80).collect();
        let push = |batch: &mut TrainBatch, tokens: &Vec<u32>| {
            batch.push_values(tokens, &positions[..tokens.len()], 3..tokens.len());
        };
        let mut together = TrainBatch::new();
        sequences.iter().for_each(|tokens| push(&mut together, tokens));
        assert!(together.num_rows() <= sequences.iter().map(Vec::len).sum::<usize>() - 2 * 21);
        let mut arena = TrainArena::new();
        let mut run = |batch: &TrainBatch, d: &[f32], grads: &mut ParamStore| {
            let mut tape = fixture.policy.train_forward(batch, Recompute::None, &mut arena);
            let values = fixture.policy.values(&mut tape);
            fixture.policy.backward(&fixture.params, tape, OutputGrads::Values { d_values: d }, grads);
            assert_eq!(values, fixture.policy.values_only(batch, &mut arena));
            values
        };
        let d: Vec<f32> = (0..together.num_targets()).map(d_log_prob).collect();
        let (mut got, mut want) = (fixture.params.zeros_like(&*fixture.dev), fixture.params.zeros_like(&*fixture.dev));
        let values = run(&together, &d, &mut got);
        let mut apart = Vec::new();
        for tokens in &sequences {
            let mut batch = TrainBatch::new();
            push(&mut batch, tokens);
            let d = &d[apart.len()..apart.len() + batch.num_targets()];
            apart.extend(run(&batch, d, &mut want));
        }
        assert_eq!(values, apart, "{name}");
        let (gap, tensor) = worst_gap(&*fixture.dev, &got, &want);
        assert!(gap <= 1e-5, "{name}: gradient of {tensor}: relative difference {gap}");
    }
}

/// The gradient over shared rows against central differences along itself.
#[test]
fn shared_gradients_match_differences() {
    for (family, window) in [("qwen3", None), ("qwen2", None), ("mistral", Some(9))] {
        let (dev, config): (_, ModelConfig) = (device(2), sized_config(family, (36, 52), (2, 2), window));
        let mut store = params(&*dev, &config, 3);
        let mut policy = PackedPolicy::new(&dev, &store, &config, DType::F32);
        let groups = vec![Group { prompt: 18, responses: vec![6, 9, 4] }, Group { prompt: 5, responses: vec![3, 7] }];
        let setup = Setup { family: "", heads: (2, 2), window, dtype: DType::F32, threads: 2, groups, seed: 5 };
        let batches = [batch(&sequences(&setup))];
        let (grads, _) = gradients((&*dev, &store, &policy), &batches, Recompute::None);
        for name in ["model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"] {
            let (base, grad) = (store.read_tensor(&*dev, name).unwrap(), grads.read_tensor(&*dev, name).unwrap());
            let norm = grad.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            let mut loss_at = |step: f64| {
                let moved = base.iter().zip(&grad).map(|(w, g)| (f64::from(*w) + step * f64::from(*g) / norm) as f32);
                store.write_tensor(&*dev, name, &moved.collect::<Vec<_>>()).unwrap();
                policy.repack(&store);
                let stats = policy.score_only(&batches[0], 1.0, &mut TrainArena::new());
                let sums = stats.log_probs.iter().zip(&stats.entropies).enumerate();
                sums.map(|(i, (l, h))| f64::from(d_log_prob(i)) * (f64::from(*l) + f64::from(*h))).sum::<f64>()
            };
            let slope = (loss_at(1e-2) - loss_at(-1e-2)) / 2e-2;
            loss_at(0.0);
            assert!((slope - norm).abs() <= 1e-2 * norm, "{family} {name}: slope {slope}, gradient norm {norm}");
        }
    }
}

/// Output gradients that are all zero add nothing: neither where the pass is left out, nor where one gradient too small
/// to be seen makes it run.
#[test]
fn zero_gradients_add_nothing() {
    let (dev, config) = (device(2), sized_config("qwen3", (36, 52), (2, 2), None));
    let store = params(&*dev, &config, 7);
    let policy = PackedPolicy::new(&dev, &store, &config, DType::F32);
    let groups = vec![Group { prompt: 18, responses: vec![6, 9, 4] }];
    let setup = Setup { family: "", heads: (2, 2), window: None, dtype: DType::F32, threads: 2, groups, seed: 5 };
    let batch = batch(&sequences(&setup));
    let grads = || gradients((&*dev, &store, &policy), std::slice::from_ref(&batch), Recompute::None).0;
    let want = grads();
    for smallest in [0.0, 1e-45] {
        let (mut got, mut arena) = (grads(), TrainArena::new());
        let tape = policy.train_forward(&batch, Recompute::None, &mut arena);
        let mut d = vec![0.0; batch.num_targets()];
        d[3] = smallest;
        let outputs = OutputGrads::LogProbs { d_log_probs: &d, d_entropies: &[], temperature: 1.0 };
        policy.backward(&store, tape, outputs, &mut got);
        for (_, slot) in want.tensors() {
            let read = |grads: &ParamStore| grads.read_tensor(&*dev, &slot.name).unwrap();
            let seen = |x: f32| if x.abs() > 1e-30 { x } else { 0.0 };
            let same = read(&got).iter().zip(read(&want)).all(|(got, want)| seen(*got) == seen(want));
            assert!(same, "{} after gradients of at most {smallest}", slot.name);
        }
    }
}
