//! Matrix products against a slow scalar reference, bit for bit, and against f64.
//!
//! The reference spells out the order of every sum (docs/numerics.md); the fast kernels must give its bits on every
//! instruction family, for every number of rows and threads.

mod common;

use common::{assert_bits, bits, devices, host, numbers};
use temper_tensor::{
    CpuConfig, CpuDevice, DType, Device, Isa, KvCacheSpec, LinearShape, PackedLinear, Reduction, SeqSpan, Store,
};

/// Nearest bf16, subnormals flushed.
fn rounded(x: f32) -> f32 {
    let y = half::bf16::from_f32(x).to_f32();
    if y.is_subnormal() { 0.0f32.copysign(y) } else { y }
}

/// The order in which a chain multiplies.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    /// The one that the kernels promise.
    Promised,
    /// A planted fault: the last number first.
    Descending,
    /// A planted fault: the even number of each bf16 pair first.
    EvenFirst,
}

/// A dot product over `range` as one chain from zero, numbers behind `len` being zero.
fn chain(dtype: DType, order: Order, range: std::ops::Range<usize>, product: &dyn Fn(usize) -> (f32, f32)) -> f32 {
    let mut indices: Vec<usize> = range.collect();
    if dtype == DType::Bf16 && order != Order::EvenFirst {
        indices.chunks_mut(2).for_each(<[usize]>::reverse);
    }
    if order == Order::Descending {
        indices.reverse();
    }
    indices.into_iter().fold(0.0, |sum, i| {
        let (a, b) = product(i);
        if dtype == DType::Bf16 { rounded(a).mul_add(rounded(b), sum) } else { a.mul_add(b, sum) }
    })
}

/// A dot product of `k` numbers in the order of a linear layer.
fn dot((dtype, reduction, order): (DType, Reduction, Order), k: usize, product: &dyn Fn(usize) -> (f32, f32)) -> f32 {
    let padded = if dtype == DType::Bf16 { k.next_multiple_of(2) } else { k };
    let product = |i: usize| if i < k { product(i) } else { (0.0, 0.0) };
    if reduction == Reduction::Chain {
        return chain(dtype, order, 0..padded, &product);
    }
    let part = k.div_ceil(8).next_multiple_of(2);
    let p: Vec<f32> =
        (0..8).map(|i| chain(dtype, order, (i * part).min(padded)..((i + 1) * part).min(padded), &product)).collect();
    ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]))
}

struct Case {
    m: usize,
    shape: LinearShape,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
    dy: Vec<f32>,
}

impl Case {
    fn new(m: usize, n: usize, k: usize) -> Case {
        let seed = (m * 1_000_003 + n * 1009 + k) as u64;
        Case {
            m,
            shape: LinearShape { n, k },
            x: numbers(m * k, seed),
            w: numbers(n * k, seed + 1),
            bias: numbers(n, seed + 2),
            dy: numbers(m * n, seed + 3),
        }
    }

    fn reference(&self, setup: (DType, Reduction, Order)) -> Vec<f32> {
        let LinearShape { n, k } = self.shape;
        let at = |i: usize, j: usize| dot(setup, k, &|q| (self.x[i * k + q], self.w[j * k + q])) + self.bias[j];
        (0..self.m * n).map(|e| at(e / n, e % n)).collect()
    }

    fn reference_input_grad(&self, dtype: DType) -> Vec<f32> {
        let LinearShape { n, k } = self.shape;
        let setup = (dtype, Reduction::Chain, Order::Promised);
        let at = |i: usize, j: usize| dot(setup, n, &|q| (self.dy[i * n + q], self.w[q * k + j]));
        (0..self.m * k).map(|e| at(e / k, e % k)).collect()
    }

    /// Added to the weight itself, so that the addition is tested too.
    fn reference_weight_grad(&self, dtype: DType) -> Vec<f32> {
        let LinearShape { n, k } = self.shape;
        let setup = (dtype, Reduction::Chain, Order::Promised);
        let at = |i: usize, j: usize| dot(setup, self.m, &|q| (self.dy[q * n + i], self.x[q * k + j]));
        (0..n * k).map(|e| self.w[e] + at(e / k, e % k)).collect()
    }
}

fn pack(dev: &CpuDevice, w: &[f32], shape: LinearShape, how: (DType, Reduction)) -> PackedLinear {
    dev.pack(dev.upload(w).all(), shape, how.0, how.1)
}

fn linear(dev: &CpuDevice, x: &[f32], packed: &PackedLinear, bias: Option<&[f32]>) -> Vec<f32> {
    let rows = x.len() / packed.shape().k;
    let mut out = dev.zeros(rows * packed.shape().n);
    let bias = bias.map(|b| dev.upload(b));
    let bias = bias.as_ref().map(temper_tensor::Buffer::all);
    dev.linear(dev.upload(x).all(), packed, bias, out.all_mut(), Store::Write);
    host(dev, &out)
}

const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (2, 3, 5),
    (7, 64, 16),
    (6, 65, 17),
    (13, 70, 33),
    (5, 130, 199),
    (25, 48, 401),
    (3, 16, 1030),
    (31, 67, 64),
];
const DTYPES: [DType; 2] = [DType::F32, DType::Bf16];
const REDUCTIONS: [Reduction; 2] = [Reduction::Chain, Reduction::Groups8];

#[test]
fn a_linear_layer_has_the_bits_of_the_scalar_reference_on_every_family() {
    for (m, n, k) in SHAPES {
        let case = Case::new(m, n, k);
        for how in DTYPES.into_iter().flat_map(|d| REDUCTIONS.map(|r| (d, r))) {
            let want = case.reference((how.0, how.1, Order::Promised));
            for dev in devices() {
                let packed = pack(&dev, &case.w, case.shape, how);
                let got = linear(&dev, &case.x, &packed, Some(&case.bias));
                assert_bits(&got, &want, &format!("linear {m}x{n}x{k} {how:?} {dev:?}"));
            }
        }
    }
}

/// Weights of which every number is one of bf16, as those of a model that was published in it.
fn published(w: &[f32]) -> Vec<f32> {
    w.iter().map(|x| rounded(*x)).collect()
}

/// Blocks that widen the weights in registers, and ones that share words widened once, in one and in many segments.
#[test]
fn f32_weights_that_bf16_holds_take_half_the_memory_and_keep_every_bit() {
    for (m, n, k) in [(1, 1, 2), (7, 64, 16), (13, 70, 34), (31, 130, 200), (70, 33, 66), (65, 5, 2600), (300, 3, 18)] {
        let mut case = Case::new(m, n, k);
        let full = pack(&devices()[0], &case.w, case.shape, (DType::F32, Reduction::Chain)).size_bytes();
        case.w = published(&case.w);
        for reduction in REDUCTIONS {
            let how = (DType::F32, reduction);
            let want = case.reference((how.0, how.1, Order::Promised));
            for dev in devices() {
                let packed = pack(&dev, &case.w, case.shape, how);
                assert_eq!(packed.size_bytes() * 2, full, "{m}x{n}x{k} {dev:?}");
                let got = linear(&dev, &case.x, &packed, Some(&case.bias));
                assert_bits(&got, &want, &format!("linear {m}x{n}x{k} {reduction:?} {dev:?}"));
            }
        }
    }
}

/// A number that rounding to bf16 would change, if only by flushing it, keeps the whole weight as it was given.
#[test]
fn an_f32_weight_with_one_number_that_bf16_lacks_is_kept_whole() {
    let (m, n, k) = (9, 65, 48);
    let case = Case::new(m, n, k);
    for odd_one in [1.0 + f32::EPSILON, f32::from_bits(1 << 16), f32::MIN_POSITIVE / 2.0] {
        let mut case =
            Case { w: published(&case.w), x: case.x.clone(), bias: case.bias.clone(), dy: Vec::new(), ..case };
        case.w[n * k - 2] = odd_one;
        let want = case.reference((DType::F32, Reduction::Chain, Order::Promised));
        for dev in devices() {
            let packed = pack(&dev, &case.w, case.shape, (DType::F32, Reduction::Chain));
            assert_eq!(packed.size_bytes(), n.next_multiple_of(32) * k * size_of::<f32>());
            assert_bits(&linear(&dev, &case.x, &packed, Some(&case.bias)), &want, &format!("{odd_one:e} {dev:?}"));
        }
    }
}

#[test]
fn a_packed_weight_takes_the_memory_of_the_values_that_it_is_given_anew() {
    let (m, n, k) = (5, 70, 48);
    let trained = Case::new(m, n, k);
    let published = Case { w: published(&trained.w), ..Case::new(m, n, k) };
    for dev in devices() {
        let how = (DType::F32, Reduction::Groups8);
        let mut packed = pack(&dev, &published.w, published.shape, how);
        for case in [&trained, &published, &trained] {
            dev.repack(dev.upload(&case.w).all(), &mut packed);
            let fresh = pack(&dev, &case.w, case.shape, how);
            assert_eq!(packed.size_bytes(), fresh.size_bytes());
            let want = case.reference((how.0, how.1, Order::Promised));
            assert_bits(&linear(&dev, &case.x, &packed, Some(&case.bias)), &want, &format!("{dev:?}"));
        }
    }
}

#[test]
fn gradients_have_the_bits_of_the_scalar_reference_on_every_family() {
    for (m, n, k) in SHAPES {
        let case = Case::new(m, n, k);
        for dtype in DTYPES {
            let (want_dx, want_dw) = (case.reference_input_grad(dtype), case.reference_weight_grad(dtype));
            for dev in devices() {
                let what = format!("{m}x{n}x{k} {dtype} {dev:?}");
                let packed = pack(&dev, &case.w, case.shape, (dtype, Reduction::Chain));
                let (w, x, dy) = (dev.upload(&case.w), dev.upload(&case.x), dev.upload(&case.dy));
                let (mut dx, mut dw) = (dev.upload(&case.x), dev.upload(&case.w));
                dev.linear_input_grad(dy.all(), w.all(), &packed, dx.all_mut(), Store::Write);
                assert_bits(&host(&dev, &dx), &want_dx, &format!("input_grad {what}"));
                dev.linear_weight_grad(dy.all(), x.all(), case.shape, dtype, dw.all_mut());
                assert_bits(&host(&dev, &dw), &want_dw, &format!("weight_grad {what}"));
            }
        }
    }
}

#[test]
fn sums_longer_than_a_segment_keep_their_order() {
    for (m, n, k) in [(14, 20, 2500), (3, 7, 16_500), (700, 9, 5)] {
        let case = Case::new(m, n, k);
        let dev = CpuDevice::new(CpuConfig::default());
        for dtype in DTYPES {
            for reduction in REDUCTIONS {
                let packed = pack(&dev, &case.w, case.shape, (dtype, reduction));
                let want = case.reference((dtype, reduction, Order::Promised));
                let what = format!("linear {m}x{n}x{k} {dtype} {reduction:?}");
                assert_bits(&linear(&dev, &case.x, &packed, Some(&case.bias)), &want, &what);
            }
            let (x, dy) = (dev.upload(&case.x), dev.upload(&case.dy));
            let mut dw = dev.upload(&case.w);
            dev.linear_weight_grad(dy.all(), x.all(), case.shape, dtype, dw.all_mut());
            assert_bits(&host(&dev, &dw), &case.reference_weight_grad(dtype), "weight_grad over many rows");
        }
    }
    // Outputs whose gradients are read in place, and more, which are laid out.
    for (m, n, k) in [(4, 1500, 70), (50, 8300, 70)] {
        let case = Case::new(m, n, k);
        for (dtype, num_threads) in DTYPES.into_iter().flat_map(|dtype| [1, 2, 3].map(|threads| (dtype, threads))) {
            let dev = CpuDevice::new(CpuConfig { num_threads, isa: None });
            let packed = pack(&dev, &case.w, case.shape, (dtype, Reduction::Chain));
            let (w, dy) = (dev.upload(&case.w), dev.upload(&case.dy));
            let mut dx = dev.zeros(case.x.len());
            dev.linear_input_grad(dy.all(), w.all(), &packed, dx.all_mut(), Store::Write);
            assert_bits(&host(&dev, &dx), &case.reference_input_grad(dtype), "input_grad over many outputs");
        }
    }
}

#[test]
fn store_add_rounds_the_sum_once_after_the_bias() {
    let case = Case::new(9, 70, 50);
    for dev in devices() {
        for dtype in DTYPES {
            let packed = pack(&dev, &case.w, case.shape, (dtype, Reduction::Groups8));
            let plain = linear(&dev, &case.x, &packed, Some(&case.bias));
            let mut out = dev.upload(&case.dy);
            let (x, bias) = (dev.upload(&case.x), dev.upload(&case.bias));
            dev.linear(x.all(), &packed, Some(bias.all()), out.all_mut(), Store::Add);
            let want: Vec<f32> = case.dy.iter().zip(&plain).map(|(a, b)| a + b).collect();
            assert_bits(&host(&dev, &out), &want, "linear with Store::Add");

            let (dy, w) = (dev.upload(&case.dy), dev.upload(&case.w));
            let mut dx = dev.upload(&case.x);
            dev.linear_input_grad(dy.all(), w.all(), &packed, dx.all_mut(), Store::Add);
            let grad = case.reference_input_grad(dtype);
            let want: Vec<f32> = case.x.iter().zip(&grad).map(|(a, b)| a + b).collect();
            assert_bits(&host(&dev, &dx), &want, "input_grad with Store::Add");
        }
    }
}

#[test]
fn errors_against_f64_are_those_of_the_format() {
    let case = Case::new(33, 200, 577);
    let LinearShape { n, k } = case.shape;
    let dev = CpuDevice::new(CpuConfig::default());
    for (dtype, bound) in [(DType::F32, 6e-5), (DType::Bf16, 0.3)] {
        let packed = pack(&dev, &case.w, case.shape, (dtype, Reduction::Chain));
        let got = linear(&dev, &case.x, &packed, None);
        let mut worst = 0.0f64;
        for (e, got) in got.iter().enumerate() {
            let (i, j) = (e / n, e % n);
            let exact: f64 = (0..k).map(|q| f64::from(case.x[i * k + q]) * f64::from(case.w[j * k + q])).sum();
            worst = worst.max((exact - f64::from(*got)).abs());
        }
        assert!(worst < bound, "{dtype}: {worst} from f64");
        assert!(worst > 0.0, "rounding shows");
    }
}

#[test]
fn a_rows_bits_depend_on_no_other_row_and_on_no_thread() {
    let (m, n, k) = (64, 200, 300);
    let case = Case::new(m, n, k);
    for how in DTYPES.into_iter().flat_map(|d| REDUCTIONS.map(|r| (d, r))) {
        let mut first: Option<Vec<f32>> = None;
        for num_threads in [1, 2, 3] {
            let dev = CpuDevice::new(CpuConfig { num_threads, isa: None });
            let packed = pack(&dev, &case.w, case.shape, how);
            let whole = linear(&dev, &case.x, &packed, None);
            for rows in [1, 2, 5, 8, 13, 24, 32] {
                for start in (0..m - rows).step_by(rows + 2) {
                    let part = linear(&dev, &case.x[start * k..(start + rows) * k], &packed, None);
                    let what = format!("rows {start}..{} {how:?} {num_threads} threads", start + rows);
                    assert_bits(&part, &whole[start * n..(start + rows) * n], &what);
                }
            }
            assert_bits(&whole, first.get_or_insert(whole.clone()), "threads");
        }
    }
}

#[test]
fn more_rows_than_a_block_change_no_bit() {
    let (m, n, k) = (500, 66, 40);
    let case = Case::new(m, n, k);
    for dtype in DTYPES {
        let want = case.reference((dtype, Reduction::Chain, Order::Promised));
        let (want_dx, want_dw) = (case.reference_input_grad(dtype), case.reference_weight_grad(dtype));
        for num_threads in [1, 2, 3] {
            let dev = CpuDevice::new(CpuConfig { num_threads, isa: None });
            let packed = pack(&dev, &case.w, case.shape, (dtype, Reduction::Chain));
            assert_bits(&linear(&dev, &case.x, &packed, Some(&case.bias)), &want, "linear");
            let (w, x, dy) = (dev.upload(&case.w), dev.upload(&case.x), dev.upload(&case.dy));
            let (mut dx, mut dw) = (dev.zeros(m * k), dev.upload(&case.w));
            dev.linear_input_grad(dy.all(), w.all(), &packed, dx.all_mut(), Store::Write);
            assert_bits(&host(&dev, &dx), &want_dx, "input_grad");
            dev.linear_weight_grad(dy.all(), x.all(), case.shape, dtype, dw.all_mut());
            assert_bits(&host(&dev, &dw), &want_dw, "weight_grad");
        }
    }
}

/// Columns `range` of a row-major matrix.
fn columns(data: &[f32], width: usize, range: std::ops::Range<usize>) -> Vec<f32> {
    data.chunks(width).flat_map(|row| row[range.clone()].to_vec()).collect()
}

/// Sum equal-length parts by a binary tree.
fn tree(mut parts: Vec<Vec<f32>>) -> Vec<f32> {
    while parts.len() > 1 {
        parts = parts.chunks(2).map(|p| p[0].iter().zip(&p[1]).map(|(a, b)| a + b).collect()).collect();
    }
    parts.remove(0)
}

#[test]
fn eight_groups_give_the_bits_of_2_4_and_8_tensor_parallel_ranks() {
    let (m, n, k) = (11, 80, 8 * 24);
    let case = Case::new(m, n, k);
    let dev = CpuDevice::new(CpuConfig::default());
    for dtype in DTYPES {
        let whole = linear(&dev, &case.x, &pack(&dev, &case.w, case.shape, (dtype, Reduction::Groups8)), None);
        for ranks in [1, 2, 4, 8] {
            let rank = |r: usize| {
                let groups = (r * 8 / ranks..(r + 1) * 8 / ranks).map(|g| {
                    let range = g * k / 8..(g + 1) * k / 8;
                    let shape = LinearShape { n, k: range.len() };
                    let w = columns(&case.w, k, range.clone());
                    let packed = pack(&dev, &w, shape, (dtype, Reduction::Chain));
                    linear(&dev, &columns(&case.x, k, range), &packed, None)
                });
                tree(groups.collect())
            };
            assert_bits(&tree((0..ranks).map(rank).collect()), &whole, &format!("{dtype} {ranks} ranks"));
        }
    }
}

/// What each of `ranks` ranks sums of a product, and all of it joined onto `onto`, the parts in the order of `order`.
fn joined(dev: &CpuDevice, case: &Case, dtype: DType, order: &[usize], onto: &[f32]) -> Vec<f32> {
    let (ranks, LinearShape { n, k }) = (order.len(), case.shape);
    let reduction = Reduction::of_rank(ranks).expect("ranks that divide eight parts");
    let part = |rank: &usize| {
        let range = rank * k / ranks..(rank + 1) * k / ranks;
        let shape = LinearShape { n, k: range.len() };
        let packed = pack(dev, &columns(&case.w, k, range.clone()), shape, (dtype, reduction));
        dev.upload(&linear(dev, &columns(&case.x, k, range), &packed, None))
    };
    let parts: Vec<_> = order.iter().map(part).collect();
    let views: Vec<_> = parts.iter().map(temper_tensor::Buffer::all).collect();
    let (bias, mut out) = (dev.upload(&case.bias), dev.upload(onto));
    dev.add_joined(&views, Some(bias.all()), out.all_mut());
    host(dev, &out)
}

#[test]
fn what_ranks_sum_is_joined_to_the_bits_of_the_whole_product() {
    // One row and many, blocks of the join that are full and that are not, sums that run whole and in segments.
    for (m, n, k) in [(1, 80, 16), (11, 300, 8 * 24), (70, 65, 16 * 33), (3, 20, 16 * 400)] {
        let case = Case::new(m, n, k);
        for dev in devices() {
            for dtype in DTYPES {
                let packed = pack(&dev, &case.w, case.shape, (dtype, Reduction::Groups8));
                let (x, bias, mut whole) = (dev.upload(&case.x), dev.upload(&case.bias), dev.upload(&case.dy));
                dev.linear(x.all(), &packed, Some(bias.all()), whole.all_mut(), Store::Add);
                let whole = host(&dev, &whole);
                for ranks in [1, 2, 4, 8] {
                    let order: Vec<usize> = (0..ranks).collect();
                    let got = joined(&dev, &case, dtype, &order, &case.dy);
                    assert_bits(&got, &whole, &format!("{m}x{n}x{k} {dtype} {ranks} ranks {dev:?}"));
                }
                let wrong = joined(&dev, &case, dtype, &[0, 2, 1, 3], &case.dy);
                assert!(m == 1 || bits(&wrong) != bits(&whole), "{dtype}: another order of ranks would go unseen");
            }
        }
    }
    assert_eq!([0, 3, 5, 6, 7, 16].map(Reduction::of_rank), [None; 6]);
}

#[test]
fn planted_faults_change_bits() {
    let case = Case::new(8, 64, 200);
    let dev = CpuDevice::new(CpuConfig::default());
    for dtype in DTYPES {
        let got = linear(&dev, &case.x, &pack(&dev, &case.w, case.shape, (dtype, Reduction::Chain)), Some(&case.bias));
        let different = |reduction, order| bits(&case.reference((dtype, reduction, order))) != bits(&got);
        assert!(!different(Reduction::Chain, Order::Promised));
        assert!(different(Reduction::Chain, Order::Descending), "{dtype}: a descending chain would go unseen");
        assert!(different(Reduction::Groups8, Order::Promised), "{dtype}: another grouping would go unseen");
        if dtype == DType::Bf16 {
            assert!(different(Reduction::Chain, Order::EvenFirst), "the order within pairs would go unseen");
        }
        let mut w = case.w.clone();
        w[0] = f32::from_bits(w[0].to_bits() + if dtype == DType::F32 { 1 } else { 1 << 16 });
        let nudged = linear(&dev, &case.x, &pack(&dev, &w, case.shape, (dtype, Reduction::Chain)), Some(&case.bias));
        assert_ne!(bits(&nudged), bits(&got), "{dtype}: a weight off by one unit shows");
    }
}

#[test]
fn repacking_equals_packing() {
    let (a, b) = (Case::new(4, 70, 35), Case::new(5, 70, 35));
    for dev in devices() {
        for dtype in DTYPES {
            let mut packed = pack(&dev, &a.w, a.shape, (dtype, Reduction::Chain));
            dev.repack(dev.upload(&b.w).all(), &mut packed);
            let fresh = pack(&dev, &b.w, b.shape, (dtype, Reduction::Chain));
            assert_bits(&linear(&dev, &a.x, &packed, None), &linear(&dev, &a.x, &fresh, None), "repack");
        }
    }
}

#[test]
fn no_rows_are_no_work() {
    let dev = CpuDevice::new(CpuConfig::default());
    let shape = LinearShape { n: 5, k: 3 };
    let w = numbers(15, 1);
    let packed = pack(&dev, &w, shape, (DType::F32, Reduction::Chain));
    assert!(linear(&dev, &[], &packed, None).is_empty());
    let mut dw = dev.upload(&w);
    dev.linear_weight_grad(dev.zeros(0).all(), dev.zeros(0).all(), shape, DType::F32, dw.all_mut());
    assert_bits(&host(&dev, &dw), &w, "no rows add nothing");
}

#[test]
fn native_bf16_is_tested_where_the_cpu_has_it() {
    if !Isa::has_native_bf16() {
        println!("skipped: this CPU has no avx512_bf16; the widened path was tested instead");
        return;
    }
    let case = Case::new(37, 130, 577);
    let (native, widened) = (
        CpuDevice::new(CpuConfig { num_threads: 2, isa: Some(Isa::Avx512) }),
        CpuDevice::new(CpuConfig { num_threads: 2, isa: Some(Isa::Avx2) }),
    );
    for reduction in REDUCTIONS {
        let run = |dev: &CpuDevice| {
            linear(dev, &case.x, &pack(dev, &case.w, case.shape, (DType::Bf16, reduction)), Some(&case.bias))
        };
        assert_bits(&run(&native), &run(&widened), "vdpbf16ps against two fused multiply-adds");
    }
}

#[test]
fn rates_are_measured_for_every_product() {
    use temper_tensor::bench::{GemmKind, measure_linear, measure_peak};
    let dev = CpuDevice::new(CpuConfig::default());
    for dtype in DTYPES {
        assert!(measure_peak(&dev, dtype) > 0.0);
        for kind in [GemmKind::Forward, GemmKind::InputGrad, GemmKind::WeightGrad] {
            let rate = measure_linear(&dev, dtype, kind, 16, 64, 64);
            assert!(rate.is_finite() && rate > 0.0, "{dtype} {kind:?}: {rate}");
        }
    }
}

/// Widths that panels divide and ones that they do not, blocks of few and many rows, with and without biases.
#[test]
fn a_fused_activation_has_the_bits_of_a_layer_and_an_activation() {
    for (m, ffn, k) in [(1, 32, 18), (7, 64, 33), (13, 70, 34), (31, 96, 130), (250, 32, 40), (3, 64, 1030)] {
        let case = Case::new(m, 2 * ffn, k);
        for dev in devices() {
            let mut forms = Vec::from(DTYPES.map(|dtype| pack(&dev, &case.w, case.shape, (dtype, Reduction::Chain))));
            forms.push(dev.pack_int8(dev.upload(&case.w).all(), case.shape));
            for packed in forms {
                for bias in [None, Some(&case.bias[..])] {
                    let rows = linear(&dev, &case.x, &packed, bias);
                    let (mut want, mut got) = (dev.zeros(m * ffn), dev.zeros(m * ffn));
                    dev.swiglu(dev.upload(&rows).all(), ffn, want.all_mut());
                    let (bias, mut room) = (bias.map(|b| dev.upload(b)), dev.zeros(rows.len()));
                    let bias = bias.as_ref().map(temper_tensor::Buffer::all);
                    dev.linear_swiglu(dev.upload(&case.x).all(), &packed, bias, room.all_mut(), got.all_mut());
                    assert_bits(&host(&dev, &got), &host(&dev, &want), &format!("{m}x{ffn}x{k} {packed:?} {dev:?}"));
                }
            }
        }
    }
}

/// Numbers of rows that fetch what attention will read, and ones that do not; of memory that is there, and is gone.
#[test]
fn fetching_for_attention_changes_no_bit_of_a_product() {
    let spec =
        KvCacheSpec { num_layers: 2, num_blocks: 9, block_size: 32, num_kv_heads: 2, head_dim: 24, dtype: DType::F32 };
    let blocks = [7, 2, 3, 5];
    for (m, n, k) in [(12, 64, 64), (25, 70, 34), (32, 256, 130), (61, 33, 1030), (96, 64, 18), (97, 64, 18)] {
        let case = Case::new(m, n, k);
        for dev in devices() {
            let spans: Vec<SeqSpan<'_>> = (0..m)
                .map(|row| SeqSpan { row_start: row, num_rows: 1, first_slot: 3 * row.min(40), blocks: &blocks })
                .collect();
            for dtype in DTYPES {
                let packed = pack(&dev, &case.w, case.shape, (dtype, Reduction::Groups8));
                let want = linear(&dev, &case.x, &packed, None);
                for gone in [false, true] {
                    let mut cache = Some(dev.kv_cache(spec));
                    dev.expect_attention((cache.as_ref().expect("a cache"), 1), &spans);
                    cache.take_if(|_| gone);
                    for what in ["the product that fetches", "the one behind it"] {
                        let got = linear(&dev, &case.x, &packed, None);
                        assert_bits(&got, &want, &format!("{m}x{n}x{k} {packed:?} {dev:?} {what}"));
                    }
                }
            }
        }
    }
}
