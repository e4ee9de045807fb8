//! Seconds of single pieces of work on one place: measured on cores, a roofline on devices.

use super::calibration::look_up;
use super::cluster::{Device, Place};
use super::{Calibration, Cluster, Workload};

/// Multiply-adds count twice.
const FLOPS: f64 = 2.0;
/// A forward and backward, as a multiple of a forward.
const TRAIN: f64 = 3.0;
/// The same with every layer's forward run again.
const TRAIN_RECOMPUTE: f64 = 4.0;
/// Bytes that an update moves for a parameter: it reads gradient, master and moments, writes master, moments and
/// packed weight, in f32.
const UPDATE_BYTES: f64 = 32.0;
const F32: f64 = 4.0;

/// How fast one place works, all of it for one process at a time.
#[derive(Debug, Clone, Copy)]
pub struct Timer<'a> {
    work: &'a Workload,
    cal: &'a Calibration,
    device: Option<&'a Device>,
    /// Multiple of the measured times: fewer or slower cores.
    stretch: f64,
    /// Work of a row of this model, as a multiple of that of the measured one.
    ratio: f64,
    /// The same for what goes by parameters.
    parameters: f64,
}

impl<'a> Timer<'a> {
    /// That of a place.
    pub fn new(work: &'a Workload, cal: &'a Calibration, cluster: &'a Cluster, place: &'a Place) -> Self {
        let host = &cluster.hosts[place.host];
        let cores = match work.placement.threads {
            0 => host.cores,
            threads => threads.min(host.cores),
        };
        let weights = |m: &super::ModelSizes| m.layer_weights() + m.head_weights();
        Timer {
            work,
            cal,
            device: place.device.as_ref(),
            stretch: cal.cores as f64 / (cores as f64 * host.core_speed),
            ratio: weights(&work.model) / weights(&cal.model),
            parameters: work.model.parameters() / cal.model.parameters(),
        }
    }

    fn measured(&self, table: &[super::Point], size: f64) -> f64 {
        look_up(table, size) * self.stretch * self.ratio
    }

    /// From submitting `samples` samples to the first token of the last.
    pub fn start(&self, samples: f64) -> f64 {
        match self.device {
            None => {
                let by_length = self.work.expected.prompt_tokens / self.cal.prompt_tokens.max(1) as f64;
                self.measured(&self.cal.start, samples) * by_length.max(1.0)
            }
            Some(device) => {
                let tokens = samples / self.work.samples as f64 * self.work.expected.prompt_tokens;
                self.roofline(device, (tokens, samples), 1.0)
            }
        }
    }

    /// A step of the engine with `rows` sequences.
    pub fn decode(&self, rows: f64) -> f64 {
        match self.device {
            None => self.measured(&self.cal.decode, rows),
            Some(device) => {
                let context = self.work.expected.prompt_tokens + self.work.expected.response_tokens / 2.0;
                let cache = rows * context * self.kv_row_bytes() / device.memory_bytes_per_second;
                self.roofline(device, (rows, rows), 1.0) + cache
            }
        }
    }

    /// A forward over `tokens` that keeps nothing.
    pub fn forward(&self, tokens: f64) -> f64 {
        match self.device {
            None => self.measured(&self.cal.forward, tokens),
            Some(device) => self.roofline(device, (tokens, tokens), 1.0),
        }
    }

    /// A forward and backward of a micro-batch.
    pub fn train(&self, tokens: f64, recompute: bool) -> f64 {
        match (self.device, recompute) {
            (None, false) => self.measured(&self.cal.train, tokens),
            (None, true) => self.measured(&self.cal.train_recompute, tokens),
            (Some(device), false) => self.roofline(device, (tokens, tokens), TRAIN),
            (Some(device), true) => self.roofline(device, (tokens, tokens), TRAIN_RECOMPUTE),
        }
    }

    /// Norm, AdamW and packing, where a rank moves `share` of the model's parameters. Packing is of all of them: it is
    /// taken for half of the measured time.
    pub fn update(&self, share: f64) -> f64 {
        let share = 0.5 + 0.5 * share;
        match self.device {
            None => self.cal.update_seconds * self.stretch * self.parameters * share,
            Some(device) => self.work.model.parameters() * UPDATE_BYTES * share / device.memory_bytes_per_second,
        }
    }

    /// Hashing the masters.
    pub fn hash(&self) -> f64 {
        match self.device {
            None => self.cal.hash_seconds * self.stretch * self.parameters,
            Some(device) => F32 * self.work.model.parameters() / device.memory_bytes_per_second,
        }
    }

    /// What an engine does to serve new weights, but for another host's network.
    pub fn pull(&self) -> f64 {
        match self.device {
            None => self.cal.pull_seconds * self.stretch * self.parameters,
            Some(device) => F32 * self.work.model.parameters() / device.link_bytes_per_second + self.hash(),
        }
    }

    /// Bytes of keys and values of a row, all layers.
    fn kv_row_bytes(&self) -> f64 {
        let model = &self.work.model;
        let numbers = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim;
        (numbers * self.work.dtype.size_bytes()) as f64
    }

    /// The slower of computing and reading the weights once.
    fn roofline(&self, device: &Device, (rows, head_rows): (f64, f64), times: f64) -> f64 {
        let model = &self.work.model;
        let flops = FLOPS * (rows * model.layer_weights() + head_rows * model.head_weights()) * times;
        let bytes = (model.layer_weights() + model.head_weights()) * self.work.dtype.size_bytes() as f64 * times;
        (flops / device.flops).max(bytes / device.memory_bytes_per_second)
    }
}
