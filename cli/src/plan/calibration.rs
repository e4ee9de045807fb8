//! What a machine was measured to do: seconds by size, with the model and the sizes that they hold for.

use serde::{Deserialize, Serialize};
use std::path::Path;
use temper_actor::ModelConfig;
use temper_types::DType;

/// Format of calibration files that this binary reads and writes.
pub const FORMAT: u32 = 2;

/// Seconds that something of a size took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// Rows, samples or tokens, as the table says.
    pub size: f64,
    /// Seconds.
    pub seconds: f64,
}

/// How fast bytes move between two ends.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Bytes in a second.
    pub bytes_per_second: f64,
    /// Seconds of the smallest message.
    pub latency_seconds: f64,
}

impl Link {
    /// Seconds of `bytes` in `messages` messages.
    pub fn seconds(&self, bytes: f64, messages: f64) -> f64 {
        bytes / self.bytes_per_second + messages * self.latency_seconds
    }
}

/// What decides how long a pass takes. Two models with equal sizes take equal time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSizes {
    /// D.
    pub hidden_size: usize,
    /// F.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Ids.
    pub vocab_size: usize,
    /// Whether the LM head is the embedding.
    pub tie_word_embeddings: bool,
}

impl ModelSizes {
    /// Those of a model.
    pub fn of(config: &ModelConfig) -> Self {
        ModelSizes {
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            vocab_size: config.vocab_size,
            tie_word_embeddings: config.tie_word_embeddings,
        }
    }

    /// Elements of the matrices that every row is multiplied with.
    pub fn layer_weights(&self) -> f64 {
        let (d, heads) =
            (self.hidden_size, (2 * self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim);
        (self.num_hidden_layers * d * (heads + 3 * self.intermediate_size)) as f64
    }

    /// Elements of the LM head, which rows with a target or a draw are multiplied with.
    pub fn head_weights(&self) -> f64 {
        (self.hidden_size * self.vocab_size) as f64
    }

    /// Parameters, but for norms and biases.
    pub fn parameters(&self) -> f64 {
        let tables = if self.tie_word_embeddings { 1.0 } else { 2.0 };
        self.layer_weights() + tables * self.head_weights()
    }
}

/// What a machine was measured to do with one model. Every table is in ascending order of sizes, and its seconds never
/// fall ([`Calibration::check`] sees to both).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// [`FORMAT`].
    pub format: u32,
    /// What it was measured on, in words.
    pub machine: String,
    /// Cores that computed.
    pub cores: usize,
    /// Number format of matrix products.
    pub dtype: DType,
    /// The model.
    pub model: ModelSizes,
    /// Samples of a prompt.
    pub group_size: usize,
    /// Tokens of a prompt.
    pub prompt_tokens: usize,
    /// Tokens of a response.
    pub response_tokens: usize,
    /// 10^9 floating-point operations in a second out of registers, all cores.
    pub peak_gflops: f64,
    /// Bytes in a second that all cores read from memory.
    pub memory_bytes_per_second: f64,
    /// Bytes that a process has beside models and activations.
    pub process_bytes: u64,
    /// Seconds from submitting so many samples to the first token of the last of them.
    pub start: Vec<Point>,
    /// Seconds of a step of the engine with so many rows.
    pub decode: Vec<Point>,
    /// Seconds of a forward over so many tokens that keeps nothing.
    pub forward: Vec<Point>,
    /// Seconds of a forward and backward of a micro-batch of so many tokens.
    pub train: Vec<Point>,
    /// The same, activations recomputed.
    pub train_recompute: Vec<Point>,
    /// Seconds of what an update does once: norm, AdamW, and packing the new weights.
    pub update_seconds: f64,
    /// Seconds of hashing all masters.
    pub hash_seconds: f64,
    /// Seconds until an engine in another process of this machine serves new weights.
    pub pull_seconds: f64,
    /// Seconds of the loop for a sample: its text and score.
    pub sample_seconds: f64,
    /// The same where rewards are in another process, which is called for every prompt.
    pub remote_sample_seconds: f64,
    /// Seconds of telling another process a sample, or a row of a mini-batch.
    pub message_seconds: f64,
    /// Between trainer ranks in one process.
    pub threads: Link,
    /// Between trainer ranks in processes of this machine.
    pub sockets: Link,
    /// Between the tensor-parallel ranks of an engine that are threads of one process: what a step over two ranks takes
    /// longer than on one, by the rounds and bytes of its exchanges.
    pub tensor_threads: Link,
    /// The same of ranks in processes of this machine.
    pub tensor_sockets: Link,
    /// Time that two engines take together on all cores, as a multiple of what they take one after the other.
    pub engine_crowding: f64,
    /// The same of two trainers in processes of their own.
    pub trainer_crowding: f64,
    /// The same of two trainers that share the compute threads of one process.
    pub thread_crowding: f64,
}

impl Calibration {
    /// Read a file.
    ///
    /// # Errors
    /// A file that cannot be read, is of another format, or says what cannot be: by key.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        // A file of another format has other keys: it is refused before they are.
        if let Ok(Head { format }) = serde_json::from_str(&text)
            && format != FORMAT
        {
            return Err(format!("{}: `format`: {}", path.display(), wrong_format(format)));
        }
        let mut reader = serde_json::Deserializer::from_str(&text);
        let fail = |key: &str, problem: String| format!("{}: `{key}`: {problem}", path.display());
        let parsed: Result<Calibration, _> = serde_path_to_error::deserialize(&mut reader);
        let mut calibration = parsed.map_err(|e| match e.path().to_string().as_str() {
            "." => format!("{}: {}", path.display(), e.inner()),
            key => fail(key, e.inner().to_string()),
        })?;
        calibration.check().map_err(|(key, problem)| fail(key, problem))?;
        Ok(calibration)
    }

    /// Check every number, and make seconds that fall where sizes grow (the noise of a measurement) stay instead.
    ///
    /// # Errors
    /// The first key that cannot be, and why.
    pub fn check(&mut self) -> Result<(), (&'static str, String)> {
        if self.format != FORMAT {
            return Err(("format", wrong_format(self.format)));
        }
        let positive = [
            ("peak_gflops", self.peak_gflops),
            ("memory_bytes_per_second", self.memory_bytes_per_second),
            ("threads.bytes_per_second", self.threads.bytes_per_second),
            ("sockets.bytes_per_second", self.sockets.bytes_per_second),
            ("tensor_threads.bytes_per_second", self.tensor_threads.bytes_per_second),
            ("tensor_sockets.bytes_per_second", self.tensor_sockets.bytes_per_second),
            ("engine_crowding", self.engine_crowding),
            ("trainer_crowding", self.trainer_crowding),
            ("thread_crowding", self.thread_crowding),
            ("cores", self.cores as f64),
            ("group_size", self.group_size as f64),
        ];
        if let Some((key, value)) = positive.into_iter().find(|(_, value)| !(*value > 0.0 && value.is_finite())) {
            return Err((key, format!("{value} is out of range: expected more than 0")));
        }
        let seconds = [
            ("update_seconds", self.update_seconds),
            ("hash_seconds", self.hash_seconds),
            ("pull_seconds", self.pull_seconds),
            ("sample_seconds", self.sample_seconds),
            ("remote_sample_seconds", self.remote_sample_seconds),
            ("message_seconds", self.message_seconds),
            ("threads.latency_seconds", self.threads.latency_seconds),
            ("sockets.latency_seconds", self.sockets.latency_seconds),
            ("tensor_threads.latency_seconds", self.tensor_threads.latency_seconds),
            ("tensor_sockets.latency_seconds", self.tensor_sockets.latency_seconds),
        ];
        if let Some((key, value)) = seconds.into_iter().find(|(_, value)| !(*value >= 0.0 && value.is_finite())) {
            return Err((key, format!("{value} is out of range: expected 0 or more")));
        }
        check_table("start", &mut self.start)?;
        check_table("decode", &mut self.decode)?;
        check_table("forward", &mut self.forward)?;
        check_table("train", &mut self.train)?;
        check_table("train_recompute", &mut self.train_recompute)
    }
}

/// The key that every format has.
#[derive(Deserialize)]
struct Head {
    format: u32,
}

fn wrong_format(format: u32) -> String {
    format!("{format}: this binary reads {FORMAT}; measure again")
}

fn check_table(key: &'static str, table: &mut [Point]) -> Result<(), (&'static str, String)> {
    let mut last = Point { size: 0.0, seconds: 0.0 };
    if table.is_empty() {
        return Err((key, "is empty: expected at least one measurement".to_owned()));
    }
    for point in table {
        if !(point.size > last.size && point.size.is_finite()) {
            return Err((key, format!("size {} follows {}: expected ascending sizes", point.size, last.size)));
        }
        if !(point.seconds > 0.0 && point.seconds.is_finite()) {
            return Err((key, format!("{} seconds at size {}: expected more than 0", point.seconds, point.size)));
        }
        point.seconds = point.seconds.max(last.seconds);
        last = *point;
    }
    Ok(())
}

/// Seconds of `size` by a checked table: that of the smallest measurement below it, straight lines between two
/// measurements, and in proportion beyond the largest. Never falls as `size` grows.
pub fn look_up(table: &[Point], size: f64) -> f64 {
    let (Some(first), Some(last)) = (table.first(), table.last()) else { return 0.0 };
    if size <= first.size {
        return first.seconds;
    }
    match table.windows(2).find(|pair| size <= pair[1].size) {
        Some(pair) => {
            let share = (size - pair[0].size) / (pair[1].size - pair[0].size);
            pair[0].seconds + share * (pair[1].seconds - pair[0].seconds)
        }
        None => last.seconds * size / last.size,
    }
}
