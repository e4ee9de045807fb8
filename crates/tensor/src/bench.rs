//! Speed of the CPU's matrix products and memory, as `temper bench` prints it.

use crate::cpu::{CpuDevice, peak_probe, read_probe};
use crate::{Buffer, DType, Device, LinearShape, PackedLinear, Reduction, Store, WeightFormat};
use std::time::{Duration, Instant};

/// How long one measurement lasts.
const WINDOW: Duration = Duration::from_millis(300);
const MIN_RUNS: usize = 5;
/// Weights are read in turn from copies of this many bytes together, like the layers of a model, so that no cache
/// holds them.
const COLD_BYTES: usize = 192 << 20;
const MAX_COPIES: usize = 60;

/// One of the three products of a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GemmKind {
    /// `out[m, n] = x[m, k] W^T`.
    Forward,
    /// `dx[m, k] = dy[m, n] W`.
    InputGrad,
    /// `dw[n, k] += dy[m, n]^T x[m, k]`.
    WeightGrad,
}

/// How the weights of a measured product are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GemmWeights {
    /// As numbers of the format that multiplies.
    Exact(DType),
    /// As bytes, multiplied in f32.
    Int8,
}

impl GemmWeights {
    /// What a policy in `dtype` multiplies whose weights are stored so.
    pub const fn of(dtype: DType, weights: WeightFormat) -> Self {
        match weights {
            WeightFormat::Exact => GemmWeights::Exact(dtype),
            WeightFormat::Int8 => GemmWeights::Int8,
        }
    }

    /// Format of the products.
    pub const fn dtype(self) -> DType {
        match self {
            GemmWeights::Exact(dtype) => dtype,
            GemmWeights::Int8 => DType::F32,
        }
    }

    /// Lower-case name as it stands in flags.
    pub const fn name(self) -> &'static str {
        match self {
            GemmWeights::Exact(dtype) => dtype.name(),
            GemmWeights::Int8 => WeightFormat::Int8.name(),
        }
    }

    const fn size_bytes(self) -> usize {
        match self {
            GemmWeights::Exact(dtype) => dtype.size_bytes(),
            GemmWeights::Int8 => 1,
        }
    }
}

impl From<DType> for GemmWeights {
    fn from(dtype: DType) -> GemmWeights {
        GemmWeights::Exact(dtype)
    }
}

/// The highest rate at which this device's threads multiply and add in registers.
///
/// # Units
/// GFLOP/s, a multiply-add being two operations.
pub fn measure_peak(dev: &CpuDevice, dtype: DType) -> f64 {
    let mut best = 0.0f64;
    for _ in 0..10 {
        let start = Instant::now();
        let operations = peak_probe(dev, dtype);
        best = best.max(operations as f64 / start.elapsed().as_secs_f64());
    }
    best / 1e9
}

/// The highest rate at which this device's threads together read what no cache holds.
///
/// # Units
/// Bytes a second.
pub fn measure_read_rate(dev: &CpuDevice) -> f64 {
    let memory = dev.upload(&ramp(COLD_BYTES / size_of::<f32>()));
    let mut best = 0.0f64;
    for _ in 0..10 {
        let start = Instant::now();
        read_probe(dev, memory.all());
        best = best.max(COLD_BYTES as f64 / start.elapsed().as_secs_f64());
    }
    best
}

/// The median rate of one product over runs on changing weights.
///
/// # Units
/// GFLOP/s, a multiply-add being two operations.
pub fn measure_linear(dev: &CpuDevice, dtype: DType, kind: GemmKind, m: usize, k: usize, n: usize) -> f64 {
    let seconds = linear_seconds(dev, dtype, kind, m, k, n);
    2.0 * (m * k * n) as f64 / seconds[seconds.len() / 2] / 1e9
}

/// Seconds of each run of one product, ascending. Gradients read the f32 masters, however the weight is packed.
pub fn linear_seconds(
    dev: &CpuDevice,
    weights: impl Into<GemmWeights>,
    kind: GemmKind,
    m: usize,
    k: usize,
    n: usize,
) -> Vec<f64> {
    let (shape, weights) = (LinearShape { n, k }, weights.into());
    let dtype = weights.dtype();
    let bytes = shape.len() * if kind == GemmKind::Forward { weights.size_bytes() } else { 4 };
    let num_copies = (COLD_BYTES / bytes.max(1)).clamp(1, MAX_COPIES);
    let mut copies: Vec<Layer> = (0..num_copies).map(|_| Layer::new(dev, weights, kind, shape)).collect();
    let (x, dy) = (dev.upload(&ramp(m * k)), dev.upload(&ramp(m * n)));
    let mut out = dev.zeros(m * if kind == GemmKind::Forward { n } else { k });
    let (begin, mut seconds) = (Instant::now(), Vec::new());
    for run in 0.. {
        let layer = &mut copies[run % num_copies];
        let start = Instant::now();
        match kind {
            GemmKind::Forward => dev.linear(x.all(), &layer.packed, None, out.all_mut(), Store::Write),
            GemmKind::InputGrad => {
                dev.linear_input_grad(dy.all(), layer.weight.all(), &layer.packed, out.all_mut(), Store::Write);
            }
            GemmKind::WeightGrad => dev.linear_weight_grad(dy.all(), x.all(), shape, dtype, layer.weight.all_mut()),
        }
        seconds.push(start.elapsed().as_secs_f64());
        if run >= MIN_RUNS && begin.elapsed() > WINDOW {
            break;
        }
    }
    seconds.sort_by(f64::total_cmp);
    seconds
}

/// A weight in the forms that the product reads; the others are kept small.
struct Layer {
    weight: Buffer,
    packed: PackedLinear,
}

impl Layer {
    fn new(dev: &CpuDevice, weights: GemmWeights, kind: GemmKind, shape: LinearShape) -> Layer {
        let weight = dev.upload(&ramp(shape.len()));
        let packed = match weights {
            GemmWeights::Exact(dtype) => dev.pack(weight.all(), shape, dtype, Reduction::Chain),
            GemmWeights::Int8 => dev.pack_int8(weight.all(), shape),
        };
        let weight = if kind == GemmKind::Forward { dev.zeros(0) } else { weight };
        Layer { weight, packed }
    }
}

/// Numbers in -0.5..0.5 without a pattern that a cache or a multiplier could profit from.
fn ramp(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 7 & 0xffff) as f32 / 65536.0 - 0.5).collect()
}
