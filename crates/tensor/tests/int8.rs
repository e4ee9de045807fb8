//! Products with int8 weights against a slow scalar reference, bit for bit, and against f64.
//!
//! The reference spells out how a weight is quantised and in which order a sum runs (docs/numerics.md); the kernels
//! must give its bits on every instruction family, for every number of rows and threads.

mod common;

use common::{assert_bits, bits, devices, host, numbers};
use temper_tensor::{CpuConfig, CpuDevice, DType, Device, Isa, LinearShape, PackedLinear, Store, WeightFormat};

/// Inputs that share a scale.
const GROUP: usize = 64;

/// The bytes of a group as numbers, and its scale.
fn quantized(group: &[f32]) -> (Vec<f32>, f32) {
    let largest = group.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    if group.iter().any(|x| !x.is_finite()) {
        return (vec![0.0; group.len()], f32::NAN);
    }
    if !(127.0 / largest).is_finite() {
        return (vec![0.0; group.len()], 0.0);
    }
    (group.iter().map(|x| (x * (127.0 / largest)).round_ties_even()).collect(), largest / 127.0)
}

/// The order in which the sums of groups are added.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    /// The one that the kernels promise.
    Promised,
    /// A planted fault: the last group first.
    Descending,
    /// A planted fault: numbers are scaled before they are summed.
    ScaledFirst,
}

fn dot(x: &[f32], w: &[f32], order: Order) -> f32 {
    let mut groups: Vec<(&[f32], &[f32])> = x.chunks(GROUP).zip(w.chunks(GROUP)).collect();
    if order == Order::Descending {
        groups.reverse();
    }
    let mut total: Option<f32> = None;
    for (x, w) in groups {
        let (bytes, scale) = quantized(w);
        if order == Order::ScaledFirst {
            total = Some(x.iter().zip(&bytes).fold(total.unwrap_or(0.0), |sum, (x, b)| x.mul_add(b * scale, sum)));
            continue;
        }
        let sum = x.iter().zip(&bytes).fold(0.0f32, |sum, (x, byte)| x.mul_add(*byte, sum));
        total = Some(total.map_or(sum * scale, |total| sum.mul_add(scale, total)));
    }
    total.unwrap_or(0.0)
}

struct Case {
    shape: LinearShape,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
    /// What an output is added to.
    before: Vec<f32>,
}

impl Case {
    fn new(m: usize, n: usize, k: usize) -> Case {
        let seed = (m * 1_000_003 + n * 1009 + k) as u64;
        let (x, w) = (numbers(m * k, seed), numbers(n * k, seed + 1));
        Case { shape: LinearShape { n, k }, x, w, bias: numbers(n, seed + 2), before: numbers(m * n, seed + 3) }
    }

    fn reference(&self, order: Order) -> Vec<f32> {
        let LinearShape { n, k } = self.shape;
        let row = |x: &[f32]| (0..n).map(|j| dot(x, &self.w[j * k..(j + 1) * k], order) + self.bias[j]).collect();
        self.x.chunks(k).flat_map(|x| -> Vec<f32> { row(x) }).collect()
    }

    fn packed(&self, dev: &CpuDevice) -> PackedLinear {
        dev.pack_int8(dev.upload(&self.w).all(), self.shape)
    }
}

fn device(num_threads: usize, isa: Option<Isa>) -> CpuDevice {
    CpuDevice::new(CpuConfig { num_threads, isa })
}

/// `x W^T + bias`, on top of `before` where it is given.
fn linear(dev: &CpuDevice, x: &[f32], packed: &PackedLinear, bias: Option<&[f32]>, before: Option<&[f32]>) -> Vec<f32> {
    let len = x.len() / packed.shape().k * packed.shape().n;
    let mut out = before.map_or_else(|| dev.zeros(len), |before| dev.upload(before));
    let store = if before.is_some() { Store::Add } else { Store::Write };
    let bias = bias.map(|b| dev.upload(b));
    dev.linear(dev.upload(x).all(), packed, bias.as_ref().map(temper_tensor::Buffer::all), out.all_mut(), store);
    host(dev, &out)
}

#[test]
fn a_product_has_the_bits_of_the_scalar_reference_on_every_family() {
    // Every number of rows that has a tile of its own, groups and panels that are full and that are not.
    let shapes = [(1, 1, 1), (2, 3, 5), (3, 64, 64), (4, 65, 65), (5, 130, 199), (6, 48, 128), (13, 70, 33)];
    let tall = (7..=12).map(|m| (m, 80 + m, 130));
    for (m, n, k) in shapes.into_iter().chain(tall).chain([(25, 33, 401), (31, 67, 64), (500, 66, 70)]) {
        let case = Case::new(m, n, k);
        let want = case.reference(Order::Promised);
        for dev in devices() {
            let packed = case.packed(&dev);
            let what = format!("{m}x{n}x{k} {dev:?}");
            assert_bits(&linear(&dev, &case.x, &packed, Some(&case.bias), None), &want, &what);
            let added: Vec<f32> = case.before.iter().zip(&want).map(|(before, x)| before + x).collect();
            let got = linear(&dev, &case.x, &packed, Some(&case.bias), Some(&case.before));
            assert_bits(&got, &added, &format!("{what}, added"));
        }
    }
}

#[test]
fn planted_faults_change_bits() {
    let case = Case::new(8, 64, 200);
    let dev = device(2, None);
    let got = bits(&linear(&dev, &case.x, &case.packed(&dev), Some(&case.bias), None));
    assert_eq!(bits(&case.reference(Order::Promised)), got);
    assert_ne!(bits(&case.reference(Order::Descending)), got, "another order of groups would go unseen");
    assert_ne!(bits(&case.reference(Order::ScaledFirst)), got, "scaling before the sum would go unseen");
}

#[test]
fn a_rows_bits_depend_on_no_other_row_and_on_no_thread() {
    let (m, n, k) = (64, 200, 300);
    let case = Case::new(m, n, k);
    let mut first: Option<Vec<f32>> = None;
    for num_threads in [1, 2, 3] {
        let dev = device(num_threads, None);
        let packed = case.packed(&dev);
        let whole = linear(&dev, &case.x, &packed, None, None);
        for rows in [1, 2, 5, 8, 13, 24, 32] {
            for start in (0..m - rows).step_by(rows + 2) {
                let part = linear(&dev, &case.x[start * k..(start + rows) * k], &packed, None, None);
                let what = format!("rows {start}..{} {num_threads} threads", start + rows);
                assert_bits(&part, &whole[start * n..(start + rows) * n], &what);
            }
        }
        assert_bits(&whole, first.get_or_insert(whole.clone()), "threads");
    }
}

#[test]
fn the_error_is_that_of_eight_bits() {
    let (m, n, k) = (33, 200, 577);
    let case = Case::new(m, n, k);
    let dev = device(2, None);
    let got = linear(&dev, &case.x, &case.packed(&dev), None, None);
    // A byte is off by at most half a step, a step being 1/127 of the group's largest; of k terms the errors' squares
    // add up.
    let half_step = 0.5 / 127.0;
    let expected = half_step / 3f64.sqrt() * (k as f64 / 3.0).sqrt();
    let mut squares = 0.0;
    for (e, got) in got.iter().enumerate() {
        let (i, j) = (e / n, e % n);
        let exact: f64 = (0..k).map(|q| f64::from(case.x[i * k + q]) * f64::from(case.w[j * k + q])).sum();
        squares += (exact - f64::from(*got)).powi(2);
    }
    let root_mean_square = (squares / (m * n) as f64).sqrt();
    assert!((0.8..1.1).contains(&(root_mean_square / expected)), "{root_mean_square}, expected about {expected}");
}

#[test]
fn numbers_that_bytes_hold_are_exact() {
    // The largest of every group is 127 steps of 2^-7.
    let (n, k) = (70, 130);
    let mut case = Case::new(9, n, k);
    for (i, w) in case.w.iter_mut().enumerate() {
        *w = if (i % k).is_multiple_of(GROUP) { 127.0 } else { (*w * 127.0).round() } / 128.0;
    }
    let dev = device(2, None);
    let exact = dev.pack(dev.upload(&case.w).all(), case.shape, DType::F32, temper_tensor::Reduction::Chain);
    let (got, want) =
        (linear(&dev, &case.x, &case.packed(&dev), None, None), linear(&dev, &case.x, &exact, None, None));
    let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 2e-5, "only the order of sums differs: {worst}");
}

#[test]
fn weights_that_no_scale_fits_are_zero_or_no_number() {
    let k = 3 * GROUP;
    for (value, is_number) in [(0.0, true), (1e-45, true), (f32::INFINITY, false), (f32::NAN, false)] {
        let mut w = vec![0.5f32; 2 * k];
        w[GROUP..2 * GROUP].fill(0.0);
        w[GROUP + 7] = value;
        for dev in devices() {
            let packed = dev.pack_int8(dev.upload(&w).all(), LinearShape { n: 2, k });
            let out = linear(&dev, &vec![1.0; k], &packed, None, None);
            assert_eq!(out[0].is_nan(), !is_number, "{value}: {out:?}");
            assert!((out[1] - 0.5 * k as f32).abs() < 1e-3, "the other output is untouched: {out:?}");
            assert!(!is_number || (out[0] - GROUP as f32).abs() < 1e-3, "{value}: {out:?}");
        }
    }
}

#[test]
fn repacking_equals_packing() {
    let (a, b) = (Case::new(4, 70, 135), Case::new(5, 70, 135));
    for dev in devices() {
        let mut packed = a.packed(&dev);
        assert_eq!((packed.weights(), packed.dtype()), (WeightFormat::Int8, DType::F32));
        dev.repack(dev.upload(&b.w).all(), &mut packed);
        let fresh = linear(&dev, &a.x, &b.packed(&dev), None, None);
        assert_bits(&linear(&dev, &a.x, &packed, None, None), &fresh, "repack");
    }
}

#[test]
fn no_rows_are_no_work() {
    let dev = device(1, None);
    let packed = dev.pack_int8(dev.upload(&numbers(15, 1)).all(), LinearShape { n: 5, k: 3 });
    assert!(linear(&dev, &[], &packed, None, None).is_empty());
}
