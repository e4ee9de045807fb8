//! Rows of a batch divided over ranks: the bits of one rank forward, its gradients within rounding backward.

use crate::bitwise::{VOCAB, bits, params, sized_config};
use crate::support::device;
use proptest::prelude::*;
use std::sync::{Arc, Barrier, Mutex};
use temper_actor::{
    OutputGrads, PackedPolicy, ParamStore, Recompute, SequenceExchange, TrainArena, TrainBatch,
    sequence_parallel_problem,
};
use temper_tensor::{DType, Device, TokenStats};
use temper_types::Philox;

/// Ranks that are threads, and lay what they give on one table.
#[derive(Debug)]
struct Table {
    rank: usize,
    here: Arc<Barrier>,
    /// By giver and taker.
    given: Arc<Mutex<Vec<Vec<Vec<f64>>>>>,
}

impl Table {
    fn ranks(size: usize) -> Vec<Arc<dyn SequenceExchange>> {
        let (here, given) = (Arc::new(Barrier::new(size)), Arc::new(Mutex::new(vec![Vec::new(); size])));
        let rank = |rank| Arc::new(Table { rank, here: here.clone(), given: given.clone() }) as _;
        (0..size).map(rank).collect()
    }

    fn give(&self, parts: Vec<Vec<f64>>, lens: &[usize]) -> Vec<Vec<f64>> {
        assert_eq!(parts.len(), self.size());
        self.given.lock().unwrap()[self.rank] = parts;
        self.here.wait();
        let own: Vec<Vec<f64>> = self.given.lock().unwrap().iter().map(|parts| parts[self.rank].clone()).collect();
        assert_eq!(own.iter().map(Vec::len).collect::<Vec<_>>(), lens);
        self.here.wait();
        own
    }
}

impl SequenceExchange for Table {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.given.lock().unwrap().len()
    }

    fn all_to_all(&self, parts: Vec<Vec<f32>>, lens: &[usize]) -> Vec<Vec<f32>> {
        let wide = parts.into_iter().map(|part| part.into_iter().map(f64::from).collect()).collect();
        self.give(wide, lens).into_iter().map(|part| part.into_iter().map(|x| x as f32).collect()).collect()
    }

    fn all_gather(&self, own: &[f64], lens: &[usize]) -> Vec<Vec<f64>> {
        self.give(vec![own.to_vec(); self.size()], lens)
    }
}

#[derive(Debug, Clone)]
struct Setup {
    family: &'static str,
    /// Key/value heads, and query heads of each.
    heads: (usize, usize),
    size: usize,
    window: Option<usize>,
    dtype: DType,
    lens: Vec<(usize, usize)>,
    seed: u64,
}

fn setup() -> impl Strategy<Value = Setup> {
    let family = prop::sample::select(vec!["llama", "qwen2", "qwen3", "mistral"]);
    let heads =
        prop::sample::select(vec![((2, 1), 2), ((2, 2), 2), ((2, 2), 4), ((1, 4), 4), ((1, 2), 2), ((3, 1), 3)]);
    let window = prop::sample::select(vec![None, Some(3), Some(21)]);
    let dtype = prop::sample::select(vec![DType::F32, DType::Bf16]);
    let lens = prop::collection::vec((1..50usize, 1..40usize), 1..5);
    (family, heads, window, dtype, lens, any::<u64>()).prop_map(|(family, (heads, size), window, dtype, lens, seed)| {
        Setup { family, heads, size, window, dtype, lens, seed }
    })
}

/// Every second sequence shares the prompt of the one before.
fn batch(setup: &Setup) -> TrainBatch {
    let noise = Philox::new(setup.seed);
    let mut batch = TrainBatch::new();
    for (index, (_, response)) in setup.lens.iter().enumerate() {
        let prompt = setup.lens[index / 2 * 2].0;
        let stream = |t: usize| if t < prompt { index / 2 } else { 100 + index };
        let ids: Vec<u32> =
            (0..prompt + response).map(|t| noise.below(VOCAB as u64, t as u64, stream(t) as u64) as u32).collect();
        batch.push_sequence(&ids, prompt..ids.len());
    }
    batch
}

fn d_log_probs(count: usize) -> Vec<f32> {
    (0..count).map(|target| ((target * 7 % 5) as f32 - 1.6) / 3.0).collect()
}

/// One rank's forward and backward: what it says, what it scores, its gradients.
fn pass(
    (dev, store, policy): (&dyn Device, &ParamStore, &PackedPolicy),
    batch: &TrainBatch,
    (mut arena, recompute): (TrainArena, Recompute),
) -> (TokenStats, TokenStats, ParamStore) {
    let scored = policy.score_only(batch, 0.7, &mut arena);
    let tape = policy.train_forward(batch, recompute, &mut arena);
    let said = policy.log_probs(&tape, 0.7);
    let d = d_log_probs(batch.num_targets());
    let mut grads = store.zeros_like(dev);
    let outputs = OutputGrads::LogProbs { d_log_probs: &d, d_entropies: &d, temperature: 0.7 };
    policy.backward(store, tape, outputs, &mut grads);
    (said, scored, grads)
}

/// The same on all ranks of a group, in rank order.
fn shared_pass(
    on: (&dyn Device, &ParamStore, &PackedPolicy),
    batch: &TrainBatch,
    (size, recompute): (usize, Recompute),
) -> Vec<(TokenStats, TokenStats, ParamStore)> {
    std::thread::scope(|scope| {
        let run = |exchange| scope.spawn(move || pass(on, batch, (TrainArena::of_group(exchange), recompute)));
        let ranks: Vec<_> = Table::ranks(size).into_iter().map(run).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn check(setup: &Setup) -> Result<(), TestCaseError> {
    let config = sized_config(setup.family, (36, 52), setup.heads, setup.window);
    let dev = device(2);
    let store = params(&*dev, &config, setup.seed);
    let policy = PackedPolicy::new(&dev, &store, &config, setup.dtype);
    let (batch, on) = (batch(setup), (&*dev, &store, &policy));
    let (said, scored, want) = pass(on, &batch, (TrainArena::new(), Recompute::None));
    prop_assert_eq!(bits([&scored]), bits([&said]));
    let ranks = shared_pass(on, &batch, (setup.size, Recompute::None));
    for (rank, (own_said, own_scored, _)) in ranks.iter().enumerate() {
        prop_assert_eq!(bits([own_said]), bits([&said]), "rank {} says", rank);
        prop_assert_eq!(bits([own_scored]), bits([&said]), "rank {} scores", rank);
    }
    let allowed = if setup.dtype == DType::F32 { 1e-5 } else { 2e-2 };
    for (_, slot) in want.tensors() {
        let of = |store: &ParamStore| store.read_tensor(&*dev, &slot.name).unwrap();
        let expected = of(&want);
        let mut gap: Vec<f64> = expected.iter().map(|x| -f64::from(*x)).collect();
        for (_, _, grads) in &ranks {
            gap.iter_mut().zip(of(grads)).for_each(|(gap, x)| *gap += f64::from(x));
        }
        let norm = |values: &[f64]| values.iter().map(|x| x * x).sum::<f64>().sqrt();
        let scale = norm(&expected.iter().map(|x| f64::from(*x)).collect::<Vec<_>>()).max(1e-3);
        prop_assert!(norm(&gap) <= allowed * scale, "{}: {} of {}", slot.name, norm(&gap), scale);
    }
    let again = shared_pass(on, &batch, (setup.size, Recompute::Layers));
    for ((_, _, recomputed), (_, _, kept)) in again.iter().zip(&ranks) {
        prop_assert_eq!(recomputed.content_hash(&*dev), kept.content_hash(&*dev), "recomputation");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ranks_that_share_rows_give_the_bits_of_one_and_parts_of_its_gradient(setup in setup()) {
        check(&setup)?;
    }
}

/// Ranks without rows or without targets take part all the same.
#[test]
fn there_may_be_fewer_rows_than_ranks() {
    let setup = |lens: Vec<(usize, usize)>| Setup {
        family: "qwen3",
        heads: (1, 4),
        size: 4,
        window: None,
        dtype: DType::F32,
        lens,
        seed: 3,
    };
    for lens in [vec![(1, 1)], vec![(1, 2)], vec![(30, 1)], vec![(1, 1), (1, 1)]] {
        check(&setup(lens)).unwrap();
    }
}

#[test]
fn heads_that_cannot_be_divided_are_told() {
    let problem = |heads, size| sequence_parallel_problem(&sized_config("llama", (36, 52), heads, None), size);
    assert_eq!(problem((2, 3), 2), None);
    assert_eq!(problem((2, 2), 4), None);
    for (heads, size) in [((2, 3), 3), ((2, 3), 4), ((3, 2), 2), ((2, 2), 8), ((2, 2), 0)] {
        let text = problem(heads, size).unwrap();
        assert!(text.contains(&format!("{size} ranks cannot divide {} query heads", heads.0 * heads.1)), "{text}");
    }
}
