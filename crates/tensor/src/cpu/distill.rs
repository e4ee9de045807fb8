//! Divergences between the laws of a student and a teacher, fused with both LM heads: logits of both exist for a chunk
//! of rows at a time, and the student's become their gradient in place.
//!
//! # Source
//! Generalised JSD: arXiv 2306.13649. The f64 functions of `temper-algos` state the same formulas.

use super::lm_head::shifted;
use super::lm_head::{BACKWARD_LOGITS, BLOCK, Laws, Moments, PARTS, Weights, for_chunks_of, masked_logits, part_ids};
use super::math::{exp, ln, load_lanes, store_lanes};
use super::parallel::SharedMut;
use super::simd::{Kernel, Simd};
use super::{CpuDevice, gemm};
use crate::{DistillHead, DistillStats, Divergence, Store};

/// Distances to the maximum count as this at most, so that no mass times a distance stays 0 where an id is masked.
const LOWEST: f32 = -1e4;

/// Which divergence, as the kernels read it.
#[derive(Clone, Copy)]
enum Kind {
    /// KL(teacher || student).
    Forward,
    /// KL(student || teacher).
    Reverse,
    /// Both against the mixture `(1 - beta) student + beta teacher`.
    Mixture(f32),
    /// KL(teacher || student) over a few ids, whose own part is added elsewhere.
    TopK,
}

impl Kind {
    fn of(divergence: Divergence) -> Kind {
        match divergence {
            Divergence::GeneralizedJsd { beta: 0.0 } => Kind::Forward,
            Divergence::GeneralizedJsd { beta: 1.0 } => Kind::Reverse,
            Divergence::GeneralizedJsd { beta } => Kind::Mixture(beta),
            Divergence::ForwardKlTopK { .. } => Kind::TopK,
        }
    }
}

/// What turns a row's logits into log-probs.
#[derive(Clone, Copy)]
struct RowLaw {
    max: f32,
    log_total: f32,
    inv_total: f32,
}

impl RowLaw {
    fn of(laws: &Laws, row: usize) -> Self {
        let total = laws.total[row];
        RowLaw { max: laws.max[row], log_total: ln(total) as f32, inv_total: (1.0 / total) as f32 }
    }
}

/// Log-probs and probabilities of 16 ids.
///
/// # Safety
/// As every method of [`Simd`].
#[inline(always)]
unsafe fn law_of<S: Simd>(logit: S::V, inv_temperature: f32, law: RowLaw) -> (S::V, S::V) {
    // SAFETY: passed on to the caller.
    unsafe {
        let x = shifted::<S>(logit, inv_temperature, law.max);
        let p = S::mul(exp::<S>(x), S::splat(law.inv_total));
        (S::sub(S::max(S::splat(LOWEST), x), S::splat(law.log_total)), p)
    }
}

/// Log-ratios of student and of teacher to the mixture, from `t - s`.
///
/// # Safety
/// As every method of [`Simd`].
#[inline(always)]
unsafe fn to_mixture<S: Simd>(t_minus_s: S::V, beta: f32) -> (S::V, S::V) {
    let (mut gap, mut small) = ([0f32; 16], [0f32; 16]);
    let (mut student, mut teacher) = ([0f32; 16], [0f32; 16]);
    // SAFETY: the arrays hold 16 lanes.
    unsafe {
        S::store(gap.as_mut_ptr(), t_minus_s);
        let zero = S::splat(0.0);
        S::store(small.as_mut_ptr(), exp::<S>(S::min(t_minus_s, S::sub(zero, t_minus_s))));
    }
    let beta = f64::from(beta);
    for lane in 0..16 {
        // The larger of both probabilities is taken out of the sum, so that nothing overflows.
        let (own, other) = if gap[lane] <= 0.0 { (1.0 - beta, beta) } else { (beta, 1.0 - beta) };
        let larger = -ln(own + other * f64::from(small[lane]));
        let gap = f64::from(gap[lane]);
        student[lane] = (if gap <= 0.0 { larger } else { larger - gap }) as f32;
        teacher[lane] = (if gap <= 0.0 { gap + larger } else { larger }) as f32;
    }
    // SAFETY: as above.
    unsafe { (S::load(student.as_ptr()), S::load(teacher.as_ptr())) }
}

/// Lanes from `lanes` on become 0.
///
/// # Safety
/// As every method of [`Simd`].
#[inline(always)]
unsafe fn keep_lanes<S: Simd>(x: S::V, lanes: usize) -> S::V {
    if lanes >= 16 {
        return x;
    }
    let mut memory = [0f32; 16];
    // SAFETY: the array holds 16 lanes.
    unsafe {
        S::store_partial(memory.as_mut_ptr(), lanes, x);
        S::load(memory.as_ptr())
    }
}

/// Sums over each block of ids: the divergence; the mean that the gradient subtracts; KL(student || teacher).
struct Sums<'a> {
    student: (&'a [f32], RowLaw),
    teacher: (&'a [f32], RowLaw),
    inv_temperature: f32,
    kind: Kind,
    sums: &'a mut [[f32; 3]],
}

impl Kernel for Sums<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        assert_eq!(self.student.0.len(), self.teacher.0.len(), "one vocabulary");
        let blocks = self.student.0.chunks(BLOCK).zip(self.teacher.0.chunks(BLOCK));
        for ((student, teacher), out) in blocks.zip(self.sums) {
            // SAFETY: lanes stop at the blocks' end; lanes behind it are set to 0.
            unsafe {
                let mut sums = [S::splat(0.0); 3];
                for start in (0..student.len()).step_by(16) {
                    let lanes = student.len() - start;
                    let s = load_lanes::<S>(student.as_ptr().add(start), lanes);
                    let t = load_lanes::<S>(teacher.as_ptr().add(start), lanes);
                    let (s, p) = law_of::<S>(s, self.inv_temperature, self.student.1);
                    let (t, q) = law_of::<S>(t, self.inv_temperature, self.teacher.1);
                    for (sum, term) in sums.iter_mut().zip(terms::<S>(self.kind, (s, p), (t, q))) {
                        *sum = S::add(*sum, keep_lanes::<S>(term, lanes));
                    }
                }
                *out = sums.map(|sum| S::reduce_add(sum));
            }
        }
    }
}

/// The parts of 16 ids of [`Sums`].
///
/// # Safety
/// As every method of [`Simd`].
#[inline(always)]
unsafe fn terms<S: Simd>(kind: Kind, (s, p): (S::V, S::V), (t, q): (S::V, S::V)) -> [S::V; 3] {
    // SAFETY: passed on to the caller.
    unsafe {
        let (gap, zero) = (S::sub(t, s), S::splat(0.0));
        let reverse = S::mul(p, S::sub(s, t));
        match kind {
            Kind::Forward => [S::mul(q, gap), zero, reverse],
            Kind::Reverse => [reverse, reverse, reverse],
            Kind::Mixture(beta) => {
                let (student, teacher) = to_mixture::<S>(gap, beta);
                let pull = S::mul(p, student);
                let own = S::mul(S::splat(1.0 - beta), pull);
                [S::fma(S::mul(S::splat(beta), q), teacher, own), pull, reverse]
            }
            Kind::TopK => [zero, zero, reverse],
        }
    }
}

/// The student's logits become gradients with respect to them.
struct Grads<'a> {
    student: (&'a mut [f32], RowLaw),
    teacher: (&'a [f32], RowLaw),
    inv_temperature: f32,
    kind: Kind,
    /// Mean that is subtracted; for [`Kind::TopK`] the teacher's mass of its ids.
    pull: f32,
    scale: f32,
}

impl Kernel for Grads<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (student, law) = self.student;
        assert_eq!(student.len(), self.teacher.0.len(), "one vocabulary");
        for start in (0..student.len()).step_by(16) {
            let lanes = student.len() - start;
            // SAFETY: lanes stop at the end of both slices.
            unsafe {
                let ptr = student.as_mut_ptr().add(start);
                let (s, p) = law_of::<S>(load_lanes::<S>(ptr, lanes), self.inv_temperature, law);
                let t = load_lanes::<S>(self.teacher.0.as_ptr().add(start), lanes);
                let (t, q) = law_of::<S>(t, self.inv_temperature, self.teacher.1);
                let pull = S::splat(self.pull);
                let d = match self.kind {
                    Kind::Forward => S::sub(p, q),
                    Kind::Reverse => S::mul(p, S::sub(S::sub(s, t), pull)),
                    Kind::Mixture(beta) => {
                        let (student, _) = to_mixture::<S>(S::sub(t, s), beta);
                        S::mul(S::mul(S::splat(1.0 - beta), p), S::sub(student, pull))
                    }
                    Kind::TopK => S::mul(p, pull),
                };
                store_lanes::<S>(ptr, lanes, S::mul(d, S::splat(self.scale)));
            }
        }
    }
}

fn check(args: &DistillHead<'_>, dhidden: &[f32]) {
    let (student, teacher, rows) = (args.head.shape(), args.teacher_head.shape(), args.weights.len());
    assert_eq!(student.n, teacher.n, "student and teacher have one vocabulary");
    assert_eq!(args.hidden.len(), rows * student.k, "one weight per hidden row of {}", student.k);
    assert_eq!(args.teacher_hidden.len(), rows * teacher.k, "one weight per teacher row of {}", teacher.k);
    assert_eq!(dhidden.len(), args.hidden.len(), "gradient of hidden rows");
    assert!(args.temperature > 0.0, "temperature {} of a divergence is more than 0", args.temperature);
}

/// Divergences of rows; `dhidden[T, D]` is written, `dweight[V, D]` added to.
pub(crate) fn distill(
    dev: &CpuDevice,
    args: DistillHead<'_>,
    dhidden: &mut [f32],
    dweight: &mut [f32],
) -> DistillStats {
    check(&args, dhidden);
    let (shape, width, hidden) = (args.head.shape(), args.teacher_head.shape().k, args.hidden.data);
    let mut stats = DistillStats::default();
    for_chunks_of(dev, BACKWARD_LOGITS, hidden, (args.head, args.masked_ids), |first, student| {
        let rows = student.len() / shape.n;
        let teacher_rows = &args.teacher_hidden.data[first * width..(first + rows) * width];
        dev.logits.with(student.len(), |teacher| {
            masked_logits(dev, teacher_rows, args.teacher_head, args.masked_ids, teacher);
            chunk_grads(dev, &args, first, (student, teacher), &mut stats);
        });
        let span = first * shape.k..(first + rows) * shape.k;
        gemm::input_grad(dev, student, args.weight.data, args.head, (&mut dhidden[span.clone()], Store::Write));
        gemm::weight_grad(dev, (student, &hidden[span]), shape, args.head.dtype(), dweight);
    });
    stats
}

/// Take the divergences of a chunk's rows and turn the student's logits into gradients.
fn chunk_grads(
    dev: &CpuDevice,
    args: &DistillHead<'_>,
    first: usize,
    (student, teacher): (&mut [f32], &[f32]),
    stats: &mut DistillStats,
) {
    let (vocab, inv_temperature) = (args.head.shape().n, 1.0 / args.temperature);
    let (rows, kind) = (student.len() / vocab, Kind::of(args.divergence));
    let temperatures = vec![inv_temperature; rows];
    let laws = [&*student, teacher].map(|logits| Laws::new(dev, logits, &temperatures, Moments::Skip));
    let law = |row: usize| (RowLaw::of(&laws[0], row), RowLaw::of(&laws[1], row));
    let sums = row_sums(dev, (student, teacher), (vocab, inv_temperature, kind), &law);
    let picked = match args.divergence {
        Divergence::ForwardKlTopK { k } => {
            top_k_rows(dev, (student, teacher), k, &|row| (&laws[0], &laws[1], row, inv_temperature))
        }
        Divergence::GeneralizedJsd { .. } => Vec::new(),
    };
    let pull = |row: usize| picked.get(row).map_or(sums[row][1], |top| top.mass) as f32;
    let shared = SharedMut::new(student);
    dev.pool.run(rows * PARTS, &|task| {
        let (row, ids) = (task / PARTS, part_ids(vocab, task % PARTS));
        let range = row * vocab + ids.start..row * vocab + ids.end;
        // SAFETY: every (row, part) belongs to one task.
        let student = unsafe { shared.range(range.clone()) };
        let scale = args.weights[first + row] * inv_temperature;
        if scale == 0.0 {
            return student.fill(0.0);
        }
        let (own, other) = law(row);
        let (student, teacher) = ((student, own), (&teacher[range], other));
        dev.isa.run(Grads { student, teacher, inv_temperature, kind, pull: pull(row), scale });
    });
    for (row, [value, _, reverse_kl]) in sums.into_iter().enumerate() {
        let scale = args.weights[first + row] * inv_temperature;
        if let Some(top) = picked.get(row) {
            for (id, q) in &top.ids {
                student[row * vocab + *id as usize] -= scale * q;
            }
        }
        stats.divergences.push(picked.get(row).map_or(value, |top| top.value));
        stats.reverse_kls.push(reverse_kl);
    }
}

/// The sums of [`Sums`] of each row: blocks in f32, joined in f64 in ascending order.
fn row_sums(
    dev: &CpuDevice,
    (student, teacher): (&[f32], &[f32]),
    (vocab, inv_temperature, kind): (usize, f32, Kind),
    law: &(dyn Fn(usize) -> (RowLaw, RowLaw) + Sync),
) -> Vec<[f64; 3]> {
    let (rows, blocks) = (student.len() / vocab, vocab.div_ceil(BLOCK));
    let mut sums = vec![[0f32; 3]; rows * blocks];
    let shared = SharedMut::new(&mut sums);
    dev.pool.run(rows * PARTS, &|task| {
        let (row, ids) = (task / PARTS, part_ids(vocab, task % PARTS));
        let own_blocks = row * blocks + ids.start.div_ceil(BLOCK)..row * blocks + ids.end.div_ceil(BLOCK);
        // SAFETY: every (row, part) belongs to one task.
        let sums = unsafe { shared.range(own_blocks) };
        let range = row * vocab + ids.start..row * vocab + ids.end;
        let (own, other) = law(row);
        let (student, teacher) = ((&student[range.clone()], own), (&teacher[range], other));
        dev.isa.run(Sums { student, teacher, inv_temperature, kind, sums });
    });
    let join = |row: &[[f32; 3]]| std::array::from_fn(|which| row.iter().map(|sums| f64::from(sums[which])).sum());
    sums.chunks_exact(blocks).map(join).collect()
}

/// The teacher's most likely ids of a row.
#[derive(Default)]
struct TopK {
    /// Ids with the teacher's probabilities.
    ids: Vec<(u32, f32)>,
    /// The teacher's mass of them.
    mass: f64,
    /// The divergence.
    value: f64,
}

/// Student's and teacher's laws, the row within them, and the inverse temperature.
type RowLaws<'a> = (&'a Laws, &'a Laws, usize, f32);

fn top_k_rows<'a>(
    dev: &CpuDevice,
    (student, teacher): (&[f32], &[f32]),
    k: usize,
    laws: &(dyn Fn(usize) -> RowLaws<'a> + Sync),
) -> Vec<TopK> {
    let (_, first, _, _) = laws(0);
    let rows = first.max.len();
    let vocab = student.len() / rows.max(1);
    let mut out: Vec<TopK> = (0..rows).map(|_| TopK::default()).collect();
    let shared = SharedMut::new(&mut out);
    dev.pool.run(rows, &|row| {
        let range = row * vocab..(row + 1) * vocab;
        let top = top_k(dev, (&student[range.clone()], &teacher[range]), k, laws(row));
        // SAFETY: every row belongs to one task.
        let place = unsafe { shared.range(row..row + 1) };
        place[0] = top;
    });
    out
}

/// The `k` largest logits of the teacher, the lower id first among equal ones.
fn top_k(
    dev: &CpuDevice,
    (student, teacher): (&[f32], &[f32]),
    k: usize,
    (own, other, row, inv_temperature): RowLaws<'_>,
) -> TopK {
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(k + 1);
    for (id, logit) in teacher.iter().enumerate() {
        let lowest = if best.len() < k { f32::NEG_INFINITY } else { best[k - 1].0 };
        if *logit > lowest {
            let place = best.partition_point(|(kept, _)| *kept >= *logit);
            best.insert(place, (*logit, id as u32));
            best.truncate(k);
        }
    }
    let logits: Vec<f32> = best.iter().map(|(logit, _)| *logit).collect();
    let mut weights = vec![0.0; logits.len()];
    dev.isa.run(Weights { logits: &logits, inv_temperature, max: other.max[row], out: &mut weights });
    let mut top = TopK::default();
    for ((logit, id), weight) in best.iter().zip(weights) {
        let q = f64::from(weight) / other.total[row];
        let t = f64::from(other.log_prob(row, *logit, inv_temperature));
        let s = f64::from(own.log_prob(row, student[*id as usize], inv_temperature));
        top.value += q * (t - s);
        top.mass += q;
        top.ids.push((*id, q as f32));
    }
    top
}
