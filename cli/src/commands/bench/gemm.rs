//! `temper bench gemm`: matrix products against the measured peak.

use super::samples::{at_least_one, median, round, spread};
use crate::commands::common::output::print;
use crate::usage;
use anyhow::Result;
use clap::ValueEnum;
use serde_json::{Value, json};
use std::fmt::Write;
use temper_tensor::bench::{GemmKind, GemmWeights, linear_seconds, measure_peak};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_types::DType;

/// One product of a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// The layer's output.
    Forward,
    /// The gradient of its input.
    InputGrad,
    /// The gradient of its weight.
    WeightGrad,
}

impl From<Kind> for GemmKind {
    fn from(kind: Kind) -> GemmKind {
        match kind {
            Kind::Forward => GemmKind::Forward,
            Kind::InputGrad => GemmKind::InputGrad,
            Kind::WeightGrad => GemmKind::WeightGrad,
        }
    }
}

/// GFLOP/s of a linear layer with K inputs and N outputs over M rows, and the share of the peak that this machine
/// reaches in registers. Weights are read from memory, as in a model of many layers.
#[derive(clap::Args)]
pub struct Gemm {
    /// Weights as KxN.
    #[arg(long, value_name = "KxN", value_delimiter = ',', default_value = "576x1536,1536x576,576x576,576x49152")]
    shapes: Vec<String>,
    /// Numbers of rows.
    #[arg(long, value_name = "M", value_delimiter = ',', default_value = "1,8,32,64,256,1024")]
    rows: Vec<usize>,
    /// Number formats of the weights: f32, bf16, or int8, which is multiplied in f32 and has no gradients.
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16")]
    dtype: Vec<String>,
    /// Which product.
    #[arg(long, value_enum, default_value_t = Kind::Forward)]
    kind: Kind,
    /// Threads; 0 takes one per core.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
    /// Print as JSON, every sample included.
    #[arg(long)]
    json: bool,
}

/// One measured product.
struct Row {
    weights: GemmWeights,
    m: usize,
    k: usize,
    n: usize,
    seconds: Vec<f64>,
    peak: f64,
}

impl Row {
    fn gflops(&self) -> f64 {
        2.0 * self.m as f64 * self.k as f64 * self.n as f64 / median(&self.seconds) / 1e9
    }

    fn to_json(&self) -> Value {
        json!({
            "dtype": self.weights.name(), "M": self.m, "K": self.k, "N": self.n, "gflops": round(self.gflops()),
            "share_of_peak": round(self.gflops() / self.peak), "spread": round(spread(&self.seconds)),
            "samples_s": self.seconds,
        })
    }
}

impl Gemm {
    pub(super) fn run(self) -> Result<()> {
        let shapes = self.shapes.iter().map(|shape| parse_shape(shape)).collect::<Result<Vec<_>>>()?;
        let dtypes = self.dtype.iter().map(|name| parse_dtype(name)).collect::<Result<Vec<_>>>()?;
        if self.kind != Kind::Forward && dtypes.contains(&GemmWeights::Int8) {
            return Err(usage("--dtype int8: expected --kind forward, for gradients are those of exact weights"));
        }
        self.rows.iter().try_for_each(|m| at_least_one(&[("--rows", *m)]))?;
        let device = CpuDevice::new(CpuConfig { num_threads: self.threads, isa: None });
        let (mut peaks, mut rows) = (Vec::new(), Vec::new());
        for weights in dtypes {
            let peak = measure_peak(&device, weights.dtype());
            peaks.push((weights, peak));
            for (k, n) in &shapes {
                for m in &self.rows {
                    let seconds = linear_seconds(&device, weights, self.kind.into(), *m, *k, *n);
                    rows.push(Row { weights, m: *m, k: *k, n: *n, seconds, peak });
                }
            }
        }
        self.report(&device, &peaks, &rows)
    }

    fn report(&self, device: &CpuDevice, peaks: &[(GemmWeights, f64)], rows: &[Row]) -> Result<()> {
        let info = device.info();
        if self.json {
            let peak =
                |(weights, peak): &(GemmWeights, f64)| json!({"dtype": weights.name(), "peak_gflops": round(*peak)});
            let peaks: Vec<Value> = peaks.iter().map(peak).collect();
            let rows: Vec<Value> = rows.iter().map(Row::to_json).collect();
            let kind = self.kind.to_possible_value().map(|v| v.get_name().to_owned());
            let object = json!({"bench": "gemm", "kind": kind, "device": info, "peaks": peaks, "rows": rows});
            return print(&format!("{object}\n"));
        }
        let mut text = format!("{} ({}), {} threads\n", info.name, info.instruction_set, info.num_threads);
        for (weights, peak) in peaks {
            writeln!(text, "peak {}: {peak:.0} GFLOP/s", weights.name())?;
        }
        writeln!(text, "{:>5} {:>6} {:>6} {:>6} {:>9} {:>6}", "dtype", "K", "N", "M", "GFLOP/s", "share")?;
        for row in rows {
            let (gflops, share) = (row.gflops(), 100.0 * row.gflops() / row.peak);
            let Row { weights, m, k, n, .. } = row;
            writeln!(text, "{:>5} {k:>6} {n:>6} {m:>6} {gflops:>9.1} {share:>5.0}%", weights.name())?;
        }
        print(&text)
    }
}

fn parse_shape(text: &str) -> Result<(usize, usize)> {
    let fail = || usage(format!("--shapes {text}: expected KxN, as in 576x1536"));
    let (k, n) = text.split_once('x').ok_or_else(fail)?;
    match (k.parse(), n.parse()) {
        (Ok(k), Ok(n)) if k > 0 && n > 0 => Ok((k, n)),
        _ => Err(fail()),
    }
}

fn parse_dtype(name: &str) -> Result<GemmWeights> {
    match name {
        "f32" => Ok(DType::F32.into()),
        "bf16" => Ok(DType::Bf16.into()),
        "int8" => Ok(GemmWeights::Int8),
        other => Err(usage(format!("--dtype {other}: expected f32, bf16 or int8"))),
    }
}
