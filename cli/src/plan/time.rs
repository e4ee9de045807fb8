//! Seconds of single pieces of work on one place: measured on cores, a roofline on devices.

use super::calibration::look_up;
use super::cluster::{Device, Host, Place};
use super::{Calibration, Cluster, Link, ModelSizes, Workload};

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

/// What the tensor-parallel ranks of an engine are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RankKind {
    /// Threads that share the process's compute threads.
    Threads,
    /// Processes with compute threads of their own.
    Processes,
}

/// How fast one place works, all of it for one process at a time.
#[derive(Debug, Clone, Copy)]
pub struct Timer<'a> {
    work: &'a Workload,
    cal: &'a Calibration,
    device: Option<&'a Device>,
    /// Multiple of the measured times: fewer or slower cores.
    stretch: f64,
    /// Tensor-parallel ranks that the model is divided over, and what joins them.
    ranks: usize,
    link: Link,
    /// Times that all layers of a row take on all ranks together, and its logits on the one rank that computes them, as
    /// multiples of what the measured model's layers and logits took.
    layers: f64,
    head: f64,
    /// The same for what goes by parameters.
    parameters: f64,
}

impl<'a> Timer<'a> {
    /// That of a place.
    pub fn new(work: &'a Workload, cal: &'a Calibration, cluster: &'a Cluster, place: &'a Place) -> Self {
        let stretch = stretch(work, cal, &cluster.hosts[place.host], 1);
        let measured = cal.model.layer_weights() + cal.model.head_weights();
        Timer {
            work,
            cal,
            device: place.device.as_ref(),
            stretch,
            ranks: 1,
            link: cal.tensor_threads,
            layers: stretch * work.model.layer_weights() / measured,
            head: stretch * work.model.head_weights() / measured,
            parameters: work.model.parameters() / cal.model.parameters(),
        }
    }

    /// That of an engine over so many tensor-parallel ranks, which are processes of the host or threads of one process.
    /// Ranks divide the layers; the logits are rank 0's, while the others wait.
    pub fn over_ranks(self, (ranks, kind): (usize, RankKind), (host, link): (&Host, Link)) -> Self {
        let per_rank = match kind {
            RankKind::Threads => 1,
            RankKind::Processes => ranks,
        };
        let faster = stretch(self.work, self.cal, host, per_rank) / self.stretch;
        Timer { ranks, link, layers: self.layers * faster, ..self }
    }

    fn measured(&self, table: &[super::Point], size: f64) -> f64 {
        look_up(table, size) * (self.layers + self.head)
    }

    /// What the ranks of an engine exchange in `steps` steps of `rows` rows together.
    fn exchange(&self, rows: f64, steps: f64) -> f64 {
        let (bytes, messages) = tensor_exchange(&self.work.model, self.ranks, (rows, steps));
        self.link.seconds(bytes * pairs(self.ranks), messages)
    }

    /// From submitting `samples` samples to the first token of the last.
    pub fn start(&self, samples: f64) -> f64 {
        let tokens = samples / self.work.samples as f64 * self.work.expected.prompt_tokens;
        let seconds = match self.device {
            None => {
                let by_length = self.work.expected.prompt_tokens / self.cal.prompt_tokens.max(1) as f64;
                self.measured(&self.cal.start, samples) * by_length.max(1.0)
            }
            Some(device) => self.roofline(device, (tokens, samples), 1.0),
        };
        seconds + self.exchange(tokens, (tokens / self.work.engine.max_batch_tokens as f64).ceil())
    }

    /// A step of the engine with `rows` sequences.
    pub fn decode(&self, rows: f64) -> f64 {
        let seconds = match self.device {
            None => self.measured(&self.cal.decode, rows),
            Some(device) => {
                let context = self.work.expected.prompt_tokens + self.work.expected.response_tokens / 2.0;
                let cache = rows * context * self.kv_row_bytes() / device.memory_bytes_per_second;
                self.roofline(device, (rows, rows), 1.0) + cache
            }
        };
        seconds + self.exchange(rows, 1.0)
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

    /// Computing the logits of a micro-batch's targets once more.
    pub fn logits(&self, tokens: f64) -> f64 {
        let rows = tokens * self.work.target_share();
        match self.device {
            None => {
                let share = rows * self.head / (rows * self.head + tokens * self.layers);
                self.measured(&self.cal.forward, tokens) * share
            }
            Some(device) => {
                let weights = self.work.model.head_weights();
                let bytes = weights * self.work.dtype.size_bytes() as f64;
                (FLOPS * rows * weights / device.flops).max(bytes / device.memory_bytes_per_second)
            }
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

    /// What an engine does to serve new weights, but for another host's network: rank 0 proves them, then sends each
    /// other rank its part of the layers, and the embedding, over `link`.
    pub fn pull(&self, link: Link) -> f64 {
        let (model, others) = (&self.work.model, (self.ranks - 1) as f64);
        let bytes = F32 * others * (model.layer_weights() / self.ranks as f64 + model.head_weights());
        let units = others * (model.num_hidden_layers + 2) as f64;
        self.whole_pull() + link.seconds(bytes, units)
    }

    fn whole_pull(&self) -> f64 {
        match self.device {
            None => self.cal.pull_seconds * self.stretch * self.parameters,
            Some(device) => F32 * self.work.model.parameters() / device.link_bytes_per_second + self.hash(),
        }
    }

    /// Bytes of keys and values of a row on a rank, all layers.
    fn kv_row_bytes(&self) -> f64 {
        let model = &self.work.model;
        let numbers = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim;
        (numbers * self.work.dtype.size_bytes() / self.ranks) as f64
    }

    /// The slower of computing and reading the weights once, on rank 0.
    fn roofline(&self, device: &Device, (rows, head_rows): (f64, f64), times: f64) -> f64 {
        let model = &self.work.model;
        let layers = model.layer_weights() / self.ranks as f64;
        let flops = FLOPS * (rows * layers + head_rows * model.head_weights()) * times;
        let bytes = (layers + model.head_weights()) * self.work.dtype.size_bytes() as f64 * times;
        (flops / device.flops).max(bytes / device.memory_bytes_per_second)
    }
}

/// Time of `processes` processes that divide some work on the cores of a host, as a multiple of that on the measured
/// machine: each has as many threads as the recipe says, all of them at most the cores.
fn stretch(work: &Workload, cal: &Calibration, host: &Host, processes: usize) -> f64 {
    let cores = match work.placement.threads {
        0 => host.cores,
        threads => threads.saturating_mul(processes).min(host.cores),
    };
    cal.cores as f64 / (cores as f64 * host.core_speed)
}

/// Bytes and messages that leave one of `ranks` tensor-parallel ranks in `steps` steps of `rows` rows together: the
/// rows, then after every output and every down projection its sums, to every other rank.
pub fn tensor_exchange(model: &ModelSizes, ranks: usize, (rows, steps): (f64, f64)) -> (f64, f64) {
    let (rounds, others) = (2.0 * model.num_hidden_layers as f64, (ranks - 1) as f64);
    (rounds * F32 * rows * model.hidden_size as f64 * others, (rounds + 1.0) * steps * others)
}

/// How many pairs of `ranks` ranks exchange at once: a link is measured with one.
pub fn pairs(ranks: usize) -> f64 {
    (ranks as f64 / 2.0).max(1.0)
}
