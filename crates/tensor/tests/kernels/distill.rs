//! Divergences between two heads: their definitions in f64, finite differences, and bits.

use crate::reference::log_softmax;
use crate::support::{assert_bits, assert_close, device, devices, finite_differences, host, random, wide};
use temper_tensor::{CpuDevice, DType, Device, DistillHead, Divergence, LinearShape, Reduction};

const MASKED: [u32; 2] = [3, 7];

const ALL: [Divergence; 5] = [
    Divergence::GeneralizedJsd { beta: 0.0 },
    Divergence::GeneralizedJsd { beta: 1.0 },
    Divergence::GeneralizedJsd { beta: 0.5 },
    Divergence::GeneralizedJsd { beta: 0.1 },
    Divergence::ForwardKlTopK { k: 6 },
];

/// Student and teacher heads of different widths over the same rows.
struct Case {
    vocab: usize,
    dims: [usize; 2],
    temperature: f32,
    weights: [Vec<f32>; 2],
    hidden: [Vec<f32>; 2],
    row_weights: Vec<f32>,
}

struct Outcome {
    divergences: Vec<f32>,
    reverse_kls: Vec<f32>,
    dhidden: Vec<f32>,
    dweight: Vec<f32>,
}

impl Case {
    fn new(rows: usize, vocab: usize, dims: [usize; 2], temperature: f32) -> Case {
        let matrix = |side: usize, len: usize, seed: u64| random(len * dims[side], seed, 1.0);
        let weights = [matrix(0, vocab, 1), matrix(1, vocab, 2)];
        let hidden = [matrix(0, rows, 3), matrix(1, rows, 4)];
        Case { vocab, dims, temperature, weights, hidden, row_weights: random(rows, 5, 1.0) }
    }

    /// The weight's gradient is added to ones.
    fn run(&self, dev: &CpuDevice, dtype: DType, divergence: Divergence) -> Outcome {
        let weights = [0, 1].map(|side| dev.upload(&self.weights[side]));
        let pack = |side: usize| {
            let shape = LinearShape { n: self.vocab, k: self.dims[side] };
            dev.pack(weights[side].all(), shape, dtype, Reduction::Chain)
        };
        let (head, teacher_head) = (pack(0), pack(1));
        let hidden = [0, 1].map(|side| dev.upload(&self.hidden[side]));
        let (mut dhidden, mut dweight) = (dev.zeros(hidden[0].len()), dev.upload(&vec![1.0; weights[0].len()]));
        let args = DistillHead {
            hidden: hidden[0].all(),
            head: &head,
            weight: weights[0].all(),
            teacher_hidden: hidden[1].all(),
            teacher_head: &teacher_head,
            masked_ids: &MASKED,
            temperature: self.temperature,
            divergence,
            weights: &self.row_weights,
        };
        let stats = dev.lm_head_distill(args, dhidden.all_mut(), dweight.all_mut());
        let narrow = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect();
        Outcome {
            divergences: narrow(stats.divergences),
            reverse_kls: narrow(stats.reverse_kls),
            dhidden: host(dev, &dhidden),
            dweight: host(dev, &dweight),
        }
    }

    /// Divergence of each row by definition, from the student's weight and hidden rows.
    fn reference(&self, weight: &[f64], hidden: &[f64], divergence: Divergence) -> Vec<f64> {
        let (teacher_weight, teacher_hidden) = (wide(&self.weights[1]), wide(&self.hidden[1]));
        let rows = hidden.chunks(self.dims[0]).zip(teacher_hidden.chunks(self.dims[1]));
        rows.map(|(own, other)| {
            let law = |weight: &[f64], row: &[f64]| {
                let logit = |w: &[f64]| w.iter().zip(row).map(|(w, x)| w * x).sum::<f64>();
                let logits: Vec<f64> = weight.chunks(row.len()).map(logit).collect();
                log_softmax(&logits, self.temperature, &MASKED)
            };
            by_definition(&law(weight, own), &law(&teacher_weight, other), divergence)
        })
        .collect()
    }
}

fn kl(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).filter(|(p, _)| p.is_finite()).map(|(p, q)| p.exp() * (p - q)).sum()
}

fn by_definition(student: &[f64], teacher: &[f64], divergence: Divergence) -> f64 {
    match divergence {
        Divergence::GeneralizedJsd { beta: 0.0 } => kl(teacher, student),
        Divergence::GeneralizedJsd { beta: 1.0 } => kl(student, teacher),
        Divergence::GeneralizedJsd { beta } => {
            let beta = f64::from(beta);
            let mix = |(s, t): (&f64, &f64)| ((1.0 - beta) * s.exp() + beta * t.exp()).ln();
            let mixture: Vec<f64> = student.iter().zip(teacher).map(mix).collect();
            beta * kl(teacher, &mixture) + (1.0 - beta) * kl(student, &mixture)
        }
        Divergence::ForwardKlTopK { k } => {
            let mut ids: Vec<usize> = (0..teacher.len()).collect();
            ids.sort_by(|a, b| teacher[*b].total_cmp(&teacher[*a]));
            ids[..k].iter().map(|id| teacher[*id].exp() * (teacher[*id] - student[*id])).sum()
        }
    }
}

#[test]
fn divergences_follow_their_definitions() {
    for case in [Case::new(5, 30, [8, 5], 1.0), Case::new(7, 1000, [16, 24], 0.7), Case::new(3, 2500, [12, 4], 1.6)] {
        let (weight, hidden) = (wide(&case.weights[0]), wide(&case.hidden[0]));
        let reverse = case.reference(&weight, &hidden, Divergence::GeneralizedJsd { beta: 1.0 });
        for divergence in ALL {
            let got = case.run(&device(2), DType::F32, divergence);
            let want = case.reference(&weight, &hidden, divergence);
            assert_close(&got.divergences, &want, (2e-6, 2e-6), &format!("{divergence:?}"));
            assert_close(&got.reverse_kls, &reverse, (2e-6, 2e-6), "KL(student || teacher)");
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let case = Case::new(6, 23, [5, 9], 0.8);
    let (wide_weight, wide_hidden) = (wide(&case.weights[0]), wide(&case.hidden[0]));
    for divergence in ALL {
        let got = case.run(&device(2), DType::F32, divergence);
        let loss = |weight: &[f64], hidden: &[f64]| -> f64 {
            let rows = case.reference(weight, hidden, divergence);
            rows.iter().zip(&case.row_weights).map(|(row, w)| row * f64::from(*w)).sum()
        };
        let want = finite_differences(&case.hidden[0], |hidden| loss(&wide_weight, hidden));
        assert_close(&got.dhidden, &want, (1e-4, 1e-5), &format!("dhidden of {divergence:?}"));
        let want = finite_differences(&case.weights[0], |weight| loss(weight, &wide_hidden));
        let want: Vec<f64> = want.iter().map(|d| d + 1.0).collect();
        assert_close(&got.dweight, &want, (1e-4, 1e-5), &format!("dweight of {divergence:?}"));
    }
}

/// With operands that bf16 holds exactly, only the rounding of the gradients' operands is left.
#[test]
fn bf16_rounds_operands_only() {
    let round = |x: &f32| f32::from_bits(x.to_bits() & 0xffff_0000);
    let mut case = Case::new(9, 300, [16, 8], 1.0);
    for matrix in case.weights.iter_mut().chain(&mut case.hidden) {
        *matrix = matrix.iter().map(round).collect();
    }
    for divergence in ALL {
        let (exact, got) =
            (case.run(&device(2), DType::F32, divergence), case.run(&device(2), DType::Bf16, divergence));
        assert_close(&got.divergences, &wide(&exact.divergences), (1e-5, 1e-5), "divergences");
        assert_close(&got.dhidden, &wide(&exact.dhidden), (2e-2, 2e-3), "dhidden");
        assert_close(&got.dweight, &wide(&exact.dweight), (2e-2, 2e-3), "dweight");
    }
}

#[test]
fn equal_laws_diverge_by_nothing_and_a_row_of_weight_0_has_no_gradient() {
    let mut case = Case::new(4, 500, [6, 6], 1.0);
    case.row_weights = vec![1.0, 0.0, 0.0, 0.5];
    for divergence in ALL {
        let got = case.run(&device(2), DType::F32, divergence);
        assert!(got.dhidden[6..18].iter().all(|d| *d == 0.0), "{divergence:?}");
        assert!(got.dhidden[..6].iter().any(|d| *d != 0.0), "{divergence:?}");
    }
    (case.weights[1], case.hidden[1]) = (case.weights[0].clone(), case.hidden[0].clone());
    for divergence in &ALL[..4] {
        let got = case.run(&device(2), DType::F32, *divergence);
        assert!(got.divergences.iter().all(|d| d.abs() < 1e-7), "{divergence:?}: {:?}", got.divergences);
        assert!(got.dhidden.iter().all(|d| d.abs() < 1e-6), "{divergence:?}");
    }
}

#[test]
fn bits_do_not_depend_on_threads_family_or_batch_mates() {
    let case = Case::new(40, 1500, [24, 10], 0.9);
    for divergence in ALL {
        let want = case.run(&device(1), DType::F32, divergence);
        for dev in devices() {
            let got = case.run(&dev, DType::F32, divergence);
            assert_bits(&got.divergences, &want.divergences, &format!("{divergence:?} on {dev:?}"));
            assert_bits(&got.dhidden, &want.dhidden, &format!("dhidden on {dev:?}"));
            assert_bits(&got.dweight, &want.dweight, &format!("dweight on {dev:?}"));
        }
        let mut alone = Case::new(1, 1500, [24, 10], 0.9);
        alone.hidden = [case.hidden[0][17 * 24..18 * 24].to_vec(), case.hidden[1][17 * 10..18 * 10].to_vec()];
        alone.row_weights = vec![case.row_weights[17]];
        let got = alone.run(&device(2), DType::F32, divergence);
        assert_bits(&got.divergences, &want.divergences[17..18], "one row");
        assert_bits(&got.dhidden, &want.dhidden[17 * 24..18 * 24], "one row's gradient");
    }
}

/// More rows than a chunk of logits holds.
#[test]
fn chunks_of_rows_do_not_reach_a_bit() {
    let (rows, vocab) = (600, 49_152);
    let case = Case::new(rows, vocab, [4, 2], 1.0);
    let divergence = Divergence::GeneralizedJsd { beta: 0.0 };
    let got = case.run(&device(2), DType::F32, divergence);
    for row in [0, 299, 300, rows - 1] {
        let mut alone = Case::new(1, vocab, [4, 2], 1.0);
        alone.hidden = [case.hidden[0][row * 4..][..4].to_vec(), case.hidden[1][row * 2..][..2].to_vec()];
        alone.row_weights = vec![case.row_weights[row]];
        let one = alone.run(&device(2), DType::F32, divergence);
        assert_bits(&one.divergences, &got.divergences[row..=row], "divergence");
        assert_bits(&one.dhidden, &got.dhidden[row * 4..][..4], "dhidden");
    }
}
