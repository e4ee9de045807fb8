//! The LM head: statistics, gradients, and the agreement of sampling and scoring.

use crate::reference;
use crate::support::{assert_bits, assert_close, device, devices, dot, finite_differences, host, random, wide};
use temper_tensor::{
    CpuDevice, DType, Device, LinearShape, LmHead, LmHeadGrad, LmHeadTrain, Reduction, RowGrads, SampleRow, Sampled,
    TokenStats,
};
use temper_types::uniform53;

const MASKED: [u32; 3] = [2, 5, 9];

/// A head and rows with targets.
struct Case {
    vocab: usize,
    dim: usize,
    temperature: f32,
    weight: Vec<f32>,
    hidden: Vec<f32>,
    targets: Vec<u32>,
}

impl Case {
    fn new(rows: usize, vocab: usize, dim: usize, temperature: f32) -> Case {
        let targets = (0..rows).map(|i| (10 + (i * 37) % (vocab - 10)) as u32).collect();
        let (weight, hidden) = (random(vocab * dim, 1, 1.0), random(rows * dim, 2, 1.0));
        Case { vocab, dim, temperature, weight, hidden, targets }
    }

    fn stats(&self, dev: &CpuDevice, dtype: DType) -> TokenStats {
        let shape = LinearShape { n: self.vocab, k: self.dim };
        let head = dev.pack(dev.upload(&self.weight).all(), shape, dtype, Reduction::Groups8);
        dev.lm_head_stats(self.head(&head, dev.upload(&self.hidden).all()))
    }

    fn head<'a>(&'a self, head: &'a temper_tensor::PackedLinear, hidden: temper_tensor::View<'a>) -> LmHead<'a> {
        LmHead { hidden, head, targets: &self.targets, temperature: self.temperature, masked_ids: &MASKED }
    }

    /// Gradients of the hidden rows, and of the weight added to ones.
    fn grad(&self, dev: &CpuDevice, d_log_probs: &[f32], d_entropies: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (weight, hidden) = (dev.upload(&self.weight), dev.upload(&self.hidden));
        let shape = LinearShape { n: self.vocab, k: self.dim };
        let head = dev.pack(weight.all(), shape, DType::F32, Reduction::Groups8);
        let (mut dhidden, mut dweight) = (dev.zeros(hidden.len()), dev.upload(&vec![1.0; weight.len()]));
        let forward = self.head(&head, hidden.all());
        let args = LmHeadGrad { forward, weight: weight.all(), d_log_probs, d_entropies };
        dev.lm_head_grad(args, dhidden.all_mut(), dweight.all_mut());
        (host(dev, &dhidden), host(dev, &dweight))
    }

    /// What one walk says and gives; the loss's gradients are `outputs`, and it must be asked for every row once with
    /// what [`Case::stats`] says.
    fn train(&self, dev: &CpuDevice, outputs: (&[f32], &[f32])) -> (TokenStats, Vec<f32>, Vec<f32>) {
        let (weight, hidden) = (dev.upload(&self.weight), dev.upload(&self.hidden));
        let shape = LinearShape { n: self.vocab, k: self.dim };
        let head = dev.pack(weight.all(), shape, DType::F32, Reduction::Groups8);
        let (mut dhidden, mut dweight) = (dev.upload(&self.hidden), dev.upload(&vec![1.0; weight.len()]));
        let args = LmHeadTrain { forward: self.head(&head, hidden.all()), weight: weight.all() };
        let mut asked = TokenStats::default();
        let mut loss = |rows: std::ops::Range<usize>, said: &TokenStats| {
            assert_eq!(rows.start, asked.log_probs.len(), "rows come in order");
            asked.log_probs.extend(&said.log_probs);
            asked.entropies.extend(&said.entropies);
            asked.sum_squares.extend(&said.sum_squares);
            let d_entropies = outputs.1.get(rows.clone()).unwrap_or_default().to_vec();
            RowGrads { d_log_probs: outputs.0[rows].to_vec(), d_entropies }
        };
        let stats = dev.lm_head_train(args, &mut loss, dhidden.all_mut(), dweight.all_mut());
        assert_eq!(stats, asked);
        (stats, host(dev, &dhidden), host(dev, &dweight))
    }

    /// `(log-probs of targets, entropies, sums of squares)` by definition.
    fn reference(&self, weight: &[f64], hidden: &[f64]) -> [Vec<f64>; 3] {
        let mut columns = [const { Vec::new() }; 3];
        for (row, target) in hidden.chunks(self.dim).zip(&self.targets) {
            let logit = |w: &[f64]| w.iter().zip(row).map(|(w, x)| w * x).sum::<f64>();
            let logits: Vec<f64> = weight.chunks(self.dim).map(logit).collect();
            let log_probs = reference::log_softmax(&logits, self.temperature, &MASKED);
            columns[0].push(log_probs[*target as usize]);
            columns[1].push(reference::entropy(&log_probs));
            columns[2].push(log_probs.iter().map(|l| (2.0 * l).exp()).sum());
        }
        columns
    }
}

#[test]
fn statistics_follow_their_definitions() {
    for case in [Case::new(5, 30, 8, 1.0), Case::new(3, 1000, 16, 0.7), Case::new(20, 2500, 12, 1.3)] {
        let stats = case.stats(&device(2), DType::F32);
        let [log_probs, entropies, squares] = case.reference(&wide(&case.weight), &wide(&case.hidden));
        assert_close(&stats.log_probs, &log_probs, (1e-6, 2e-6), "log-probs");
        assert_close(&stats.entropies, &entropies, (2e-6, 2e-6), "entropies");
        assert_close(&stats.sum_squares, &squares, (2e-6, 0.0), "sums of squares");
    }
}

#[test]
fn a_masked_target_has_no_mass() {
    let mut case = Case::new(2, 40, 4, 1.0);
    case.targets[0] = MASKED[1];
    let stats = case.stats(&device(1), DType::F32);
    assert_eq!(stats.log_probs[0], f32::NEG_INFINITY);
    assert!(stats.log_probs[1].is_finite() && stats.entropies.iter().all(|h| h.is_finite()));
}

#[test]
fn gradients_match_finite_differences() {
    let case = Case::new(6, 23, 5, 0.8);
    let (d_log_probs, d_entropies) = (random(6, 3, 1.0), random(6, 4, 1.0));
    let (wide_weight, wide_hidden) = (wide(&case.weight), wide(&case.hidden));
    for d_entropies in [vec![], d_entropies] {
        let (dhidden, dweight) = case.grad(&device(2), &d_log_probs, &d_entropies);
        let loss = |weight: &[f64], hidden: &[f64]| {
            let [log_probs, entropies, _] = case.reference(weight, hidden);
            dot(&log_probs, &d_log_probs) + if d_entropies.is_empty() { 0.0 } else { dot(&entropies, &d_entropies) }
        };
        let want = finite_differences(&case.hidden, |hidden| loss(&wide_weight, hidden));
        assert_close(&dhidden, &want, (1e-4, 1e-5), "dhidden");
        let want = finite_differences(&case.weight, |weight| loss(weight, &wide_hidden));
        let want: Vec<f64> = want.iter().map(|d| d + 1.0).collect();
        assert_close(&dweight, &want, (1e-4, 1e-5), "dweight");
    }
}

#[test]
fn bits_do_not_depend_on_threads_family_or_batch_mates() {
    let case = Case::new(40, 1500, 24, 0.9);
    let (d_log_probs, d_entropies) = (random(40, 5, 1.0), random(40, 6, 1.0));
    let stats = case.stats(&device(1), DType::F32);
    let (dhidden, dweight) = case.grad(&device(1), &d_log_probs, &d_entropies);
    for dev in devices() {
        let got = case.stats(&dev, DType::F32);
        assert_bits(&got.log_probs, &stats.log_probs, &format!("{dev:?}"));
        assert_bits(&got.entropies, &stats.entropies, &format!("{dev:?}"));
        assert_bits(&got.sum_squares, &stats.sum_squares, &format!("{dev:?}"));
        let got = case.grad(&dev, &d_log_probs, &d_entropies);
        assert_bits(&got.0, &dhidden, &format!("dhidden on {dev:?}"));
        assert_bits(&got.1, &dweight, &format!("dweight on {dev:?}"));
    }
    for row in [0, 17, 39] {
        let mut alone = Case::new(1, 1500, 24, 0.9);
        alone.hidden = case.hidden[row * 24..(row + 1) * 24].to_vec();
        alone.targets = vec![case.targets[row]];
        assert_bits(&alone.stats(&device(2), DType::F32).log_probs, &stats.log_probs[row..=row], "one row");
    }
}

/// More rows than a chunk of logits holds (84 at this vocabulary, so two of 48 and 42): each row as if it were alone.
#[test]
fn chunks_of_rows_do_not_reach_a_bit() {
    let case = Case::new(90, 49_152, 4, 1.0);
    let stats = case.stats(&device(2), DType::F32);
    for row in [0, 47, 48, 89] {
        let mut alone = Case::new(1, 49_152, 4, 1.0);
        alone.hidden = case.hidden[row * 4..(row + 1) * 4].to_vec();
        alone.targets = vec![case.targets[row]];
        let got = alone.stats(&device(1), DType::F32);
        assert_bits(&got.log_probs, &stats.log_probs[row..=row], "log-prob");
        assert_bits(&got.entropies, &stats.entropies[row..=row], "entropy");
    }
}

/// One walk says what the statistics say and gives what the gradient gives, bit for bit where both cut the rows alike.
#[test]
fn one_walk_equals_statistics_and_gradients() {
    for (rows, vocab, dim) in [(40, 1500, 24), (1, 30, 8), (100, 49_152, 4)] {
        let case = Case::new(rows, vocab, dim, 0.9);
        let (mut d_log_probs, d_entropies) = (random(rows, 5, 1.0), random(rows, 6, 1.0));
        let stats = case.stats(&device(1), DType::F32);
        for zeros in [false, true] {
            if zeros {
                (0..rows).filter(|row| row % 3 != 1).for_each(|row| d_log_probs[row] = 0.0);
            }
            for d_entropies in [&[][..], &d_entropies] {
                let (want_hidden, want_weight) = case.grad(&device(2), &d_log_probs, d_entropies);
                for dev in [device(1), device(2)] {
                    let (said, dhidden, dweight) = case.train(&dev, (&d_log_probs, d_entropies));
                    assert_eq!(said, stats, "{rows} rows");
                    assert_bits(&dhidden, &want_hidden, "dhidden");
                    assert_bits(&dweight, &want_weight, "dweight");
                }
            }
        }
    }
}

/// More rows with a gradient than memory holds at a time: each row as before, the weight's gradient to rounding.
#[test]
fn one_walk_gathers_rows_over_blocks() {
    let case = Case::new(1_000, 49_152, 2, 1.0);
    let mut d_log_probs = random(1_000, 5, 1.0);
    (0..1_000).filter(|row| row % 5 == 0).for_each(|row| d_log_probs[row] = 0.0);
    let (want_hidden, want_weight) = case.grad(&device(2), &d_log_probs, &[]);
    let (_, dhidden, dweight) = case.train(&device(2), (&d_log_probs, &[]));
    assert_bits(&dhidden, &want_hidden, "dhidden");
    assert_close(&dweight, &wide(&want_weight), (1e-5, 1e-5), "dweight");
}

/// Rows whose gradients are all zero: the bits of the other rows alone, and zeros.
#[test]
fn rows_without_a_gradient_take_no_part() {
    let case = Case::new(40, 1500, 24, 0.9);
    let (mut d_log_probs, mut d_entropies) = (random(40, 5, 1.0), random(40, 6, 1.0));
    for row in 0..40 {
        (d_log_probs[row], d_entropies[row]) = match row % 4 {
            0 => (0.0, -0.0),
            1 => (0.0, d_entropies[row]),
            2 => (d_log_probs[row], 0.0),
            _ => (d_log_probs[row], d_entropies[row]),
        };
    }
    for (d_entropies, counts) in [(d_entropies, [false, true, true, true]), (vec![], [false, false, true, true])] {
        let rows: Vec<usize> = (0..40).filter(|row| counts[row % 4]).collect();
        let pick = |from: &[f32]| rows.iter().filter_map(|row| from.get(*row).copied()).collect::<Vec<f32>>();
        let mut alone = Case::new(rows.len(), 1500, 24, 0.9);
        alone.hidden = rows.iter().flat_map(|row| case.hidden[row * 24..(row + 1) * 24].to_vec()).collect();
        alone.targets = rows.iter().map(|row| case.targets[*row]).collect();
        let (want_hidden, want_weight) = alone.grad(&device(2), &pick(&d_log_probs), &pick(&d_entropies));
        let (dhidden, dweight) = case.grad(&device(2), &d_log_probs, &d_entropies);
        assert_bits(&dweight, &want_weight, "dweight");
        for (row, got) in dhidden.chunks(24).enumerate() {
            let want =
                rows.iter().position(|r| *r == row).map_or(&[0.0; 24][..], |i| &want_hidden[i * 24..(i + 1) * 24]);
            assert_bits(got, want, "dhidden");
        }
    }
    let (dhidden, dweight) = case.grad(&device(2), &[0.0; 40], &[]);
    assert!(dhidden.iter().all(|d| *d == 0.0) && dweight.iter().all(|d| *d == 1.0), "no row counts");
}

/// More rows than a backward chunk holds: the weight's gradient is the sum over both chunks.
#[test]
fn gradients_add_up_over_chunks() {
    let case = Case::new(17_000, 1490, 2, 1.0);
    let (dhidden, dweight) = case.grad(&device(2), &vec![0.01; 17_000], &[]);
    let (wide_weight, wide_hidden) = (wide(&case.weight), wide(&case.hidden));
    for (row, got) in [(0, &dhidden[..2]), (16_999, &dhidden[33_998..])] {
        let mut alone = Case::new(1, 1490, 2, 1.0);
        (alone.hidden, alone.targets) = (case.hidden[2 * row..2 * row + 2].to_vec(), vec![case.targets[row]]);
        let want = finite_differences(&alone.hidden, |hidden| 0.01 * alone.reference(&wide_weight, hidden)[0][0]);
        assert_close(got, &want, (1e-4, 1e-7), "dhidden");
    }
    let mut want = vec![1.0; 2];
    for (hidden, target) in wide_hidden.chunks(2).zip(&case.targets) {
        let logits: Vec<f64> = wide_weight.chunks(2).map(|w| w[0] * hidden[0] + w[1] * hidden[1]).collect();
        let p = reference::log_softmax(&logits, 1.0, &MASKED)[100].exp();
        let factor = 0.01 * (f64::from(u8::from(*target == 100)) - p);
        want.iter_mut().zip(hidden).for_each(|(sum, x)| *sum += factor * x);
    }
    assert_close(&dweight[200..202], &want, (1e-5, 1e-5), "dweight of id 100");
}

fn sample(case: &Case, dev: &CpuDevice, dtype: DType, rows: &[SampleRow<'_>]) -> Vec<Sampled> {
    let shape = LinearShape { n: case.vocab, k: case.dim };
    let head = dev.pack(dev.upload(&case.weight).all(), shape, dtype, Reduction::Groups8);
    let mut drawn = Vec::new();
    dev.lm_head_sample(dev.upload(&case.hidden).all(), &head, &MASKED, rows, &mut drawn);
    drawn
}

/// The log-prob that the sampler reports is, bit for bit, the one that scoring computes for the drawn id.
#[test]
fn sampled_log_probs_equal_scored_ones() {
    for dtype in [DType::F32, DType::Bf16] {
        for temperature in [1.0, 0.6, 0.0] {
            let mut case = Case::new(70, 1300, 16, if temperature == 0.0 { 1.0 } else { temperature });
            let rows: Vec<SampleRow<'_>> = (0..70)
                .map(|i| SampleRow {
                    temperature,
                    top_p: if i % 3 == 0 { 0.8 } else { 1.0 },
                    top_k: if i % 5 == 0 { 30 } else { 0 },
                    min_p: 0.0,
                    repetition_penalty: if i % 7 == 0 { 1.2 } else { 1.0 },
                    presence_penalty: 0.0,
                    frequency_penalty: 0.0,
                    seen: &[(11, 1), (12, 0)],
                    logit_bias: &[],
                    allowed_ids: &[],
                    banned_ids: &[],
                    uniform: uniform53(9, i),
                })
                .collect();
            let drawn = sample(&case, &device(2), dtype, &rows);
            assert!(drawn.iter().all(|d| !MASKED.contains(&d.token_id)));
            case.targets = drawn.iter().map(|d| d.token_id).collect();
            let sampled: Vec<f32> = drawn.iter().map(|d| d.log_prob).collect();
            let scored = case.stats(&device(1), dtype).log_probs;
            assert_bits(&sampled, &scored, &format!("{dtype} at {temperature}"));
        }
    }
}

#[test]
fn raw_logits_are_products_without_mask_or_temperature() {
    let (case, dev) = (Case::new(3, 20, 6, 0.5), device(1));
    let shape = LinearShape { n: 20, k: 6 };
    let head = dev.pack(dev.upload(&case.weight).all(), shape, DType::F32, Reduction::Groups8);
    let logits = dev.lm_head_logits(dev.upload(&case.hidden).all(), &head);
    let (weight, hidden) = (wide(&case.weight), wide(&case.hidden));
    let logit = |i: usize| (0..6).map(|d| weight[i % 20 * 6 + d] * hidden[i / 20 * 6 + d]).sum();
    let want: Vec<f64> = (0..60).map(logit).collect();
    assert_close(&logits, &want, (1e-6, 1e-6), "logits");
}
