//! Argument structs of the kernels. Shape letters: T rows, D model, H query heads, G key/value heads, K head dim,
//! V vocabulary.

use crate::{KvCache, PackedLinear, View};

/// What a device is, for logs, reports and the resolution of `auto`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct DeviceInfo {
    /// `cpu` or `cuda:0`.
    pub name: String,
    /// Instruction family that the kernels use, for example `avx512f`.
    pub instruction_set: String,
    /// Threads of the compute pool.
    pub num_threads: usize,
    /// True where the device multiplies bf16 natively.
    pub native_bf16: bool,
}

/// Rows of a batch that belong to one sequence: rows `row_start..row_start + num_rows` of the batch stand at slots
/// `first_slot..first_slot + num_rows` of the sequence whose K/V live in `blocks`.
#[derive(Debug, Clone, Copy)]
pub struct SeqSpan<'a> {
    /// First row of the span in the batch.
    pub row_start: usize,
    /// Number of consecutive rows.
    pub num_rows: usize,
    /// Slot of the first row in its sequence.
    pub first_slot: usize,
    /// Block table: block `i` holds slots `i * block_size..(i + 1) * block_size`. Covers at least every slot up to
    /// the last row's.
    pub blocks: &'a [u32],
}

/// Shape of attention. A fused projection row is `[H*K query | G*K key | G*K value]`, [`AttnShape::qkv_dim`] wide.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttnShape {
    /// H, number of query heads; a multiple of `num_kv_heads`.
    pub num_heads: usize,
    /// G, number of key/value heads.
    pub num_kv_heads: usize,
    /// K, width of a head; even.
    pub head_dim: usize,
    /// Sliding window: a row at slot t sees slots `t - window + 1..=t`; `None` sees all up to t.
    pub window: Option<usize>,
    /// Factor on the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl AttnShape {
    /// Width of a fused projection row, `(H + 2 G) K`.
    pub const fn qkv_dim(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// Width of the attention output, `H K`.
    pub const fn out_dim(&self) -> usize {
        self.num_heads * self.head_dim
    }
}

/// Shape and epsilon of an RMS norm over rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormShape {
    /// T, number of rows.
    pub rows: usize,
    /// D, width of a row.
    pub dim: usize,
    /// Added to the mean square under the root.
    pub eps: f32,
}

/// Inputs of the backward of an RMS norm.
#[derive(Debug, Clone, Copy)]
pub struct NormGrad<'a> {
    /// The forward's input, `[T, D]`.
    pub x: View<'a>,
    /// The norm's weight, `[D]`.
    pub weight: View<'a>,
    /// Reciprocal root mean squares that the forward returned, `[T]`.
    pub rstd: View<'a>,
    /// Gradient of the output, `[T, D]`.
    pub dy: View<'a>,
    /// Shape.
    pub shape: NormShape,
}

/// Per-head RMS norm of queries and keys (Qwen3), before RoPE.
#[derive(Debug, Clone, Copy)]
pub struct HeadNorm<'a> {
    /// Fused projection rows, `[T, qkv_dim]`.
    pub qkv: View<'a>,
    /// Query norm weight, `[K]`.
    pub q_weight: View<'a>,
    /// Key norm weight, `[K]`.
    pub k_weight: View<'a>,
    /// Shape of the heads.
    pub shape: AttnShape,
    /// T, number of rows.
    pub rows: usize,
    /// Added to the mean square under the root.
    pub eps: f32,
}

/// Outputs of the backward of [`HeadNorm`], written into views given apart.
#[derive(Debug)]
pub struct HeadNormGrad<'a> {
    /// In: gradient of the normed rows; out: gradient of the input rows (the value part passes unchanged).
    pub dqkv: crate::ViewMut<'a>,
    /// Gradient of the query norm weight, added to, `[K]`.
    pub dq_weight: crate::ViewMut<'a>,
    /// Gradient of the key norm weight, added to, `[K]`.
    pub dk_weight: crate::ViewMut<'a>,
}

/// Inputs of the backward of attention.
#[derive(Debug, Clone, Copy)]
pub struct AttentionGrad<'a> {
    /// Fused projection rows after norm and RoPE, of which only the query part is read (K/V come from the cache),
    /// `[T, qkv_dim]`.
    pub qkv: View<'a>,
    /// The forward's output, `[T, H*K]`.
    pub out: View<'a>,
    /// The forward's log-sum-exp, `[T, H]`.
    pub lse: View<'a>,
    /// Gradient of the output, `[T, H*K]`.
    pub dout: View<'a>,
    /// Cache that the forward read.
    pub cache: &'a KvCache,
    /// Layer within the cache.
    pub layer: usize,
    /// The sequences, each row in one span.
    pub spans: &'a [SeqSpan<'a>],
    /// Of every span, the rows of the batch that stand at its slots `0..first_slot`, ascending; a row may do so for
    /// many spans, and its keys and values gain the gradients of all of them.
    pub prefixes: &'a [&'a [u32]],
    /// Shape.
    pub shape: AttnShape,
}

/// The LM head over a set of rows, each with one target token.
#[derive(Debug, Clone, Copy)]
pub struct LmHead<'a> {
    /// Final hidden rows, `[T, D]`.
    pub hidden: View<'a>,
    /// Packed head, `[V, D]`.
    pub head: &'a PackedLinear,
    /// One target id per row.
    pub targets: &'a [u32],
    /// Divides the logits; more than 0.
    pub temperature: f32,
    /// Ids that are never drawn and get no mass (ascending).
    pub masked_ids: &'a [u32],
}

/// What the LM head says of each row's target.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TokenStats {
    /// log softmax(logits / temperature) at the target.
    pub log_probs: Vec<f32>,
    /// Entropy of the law, in nats.
    pub entropies: Vec<f32>,
    /// Sum of squared probabilities.
    pub sum_squares: Vec<f32>,
}

/// Inputs of the backward of [`LmHead`].
#[derive(Debug, Clone, Copy)]
pub struct LmHeadGrad<'a> {
    /// The forward.
    pub forward: LmHead<'a>,
    /// f32 master weight of the head, `[V, D]`.
    pub weight: View<'a>,
    /// d loss / d log_prob of each row.
    pub d_log_probs: &'a [f32],
    /// d loss / d entropy of each row; empty for none.
    pub d_entropies: &'a [f32],
}

/// Inputs of the LM head's forward and backward in one.
#[derive(Debug, Clone, Copy)]
pub struct LmHeadTrain<'a> {
    /// The forward.
    pub forward: LmHead<'a>,
    /// f32 master weight of the head, `[V, D]`.
    pub weight: View<'a>,
}

/// What a loss says of some rows.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RowGrads {
    /// d loss / d log_prob of each row.
    pub d_log_probs: Vec<f32>,
    /// d loss / d entropy of each row; empty for none.
    pub d_entropies: Vec<f32>,
}

/// A loss whose gradient at a row depends on no other row's output: given a range of rows and what the head says of
/// them, their gradients.
pub type RowLoss<'a> = dyn FnMut(std::ops::Range<usize>, &TokenStats) -> RowGrads + 'a;

/// Between the laws of a student and a teacher at one position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Divergence {
    /// `beta` 0: KL(teacher || student); 1: KL(student || teacher); between: `beta KL(t || m) + (1 - beta) KL(s || m)`
    /// with `m = (1 - beta) s + beta t`.
    GeneralizedJsd {
        /// From 0 to 1.
        beta: f32,
    },
    /// `sum t (ln t - ln s)` over the teacher's most likely ids (the lower id on ties), nothing renormalised.
    ForwardKlTopK {
        /// How many; more than 0.
        k: usize,
    },
}

/// The LM heads of a student and a frozen teacher over the same rows.
#[derive(Debug, Clone, Copy)]
pub struct DistillHead<'a> {
    /// The student's final hidden rows, `[T, D]`.
    pub hidden: View<'a>,
    /// The student's packed head, `[V, D]`.
    pub head: &'a PackedLinear,
    /// f32 master weight of the student's head, `[V, D]`.
    pub weight: View<'a>,
    /// The teacher's final hidden rows, `[T, E]`.
    pub teacher_hidden: View<'a>,
    /// The teacher's packed head, `[V, E]`.
    pub teacher_head: &'a PackedLinear,
    /// Ids that get no mass from either (ascending).
    pub masked_ids: &'a [u32],
    /// Divides the logits of both; more than 0.
    pub temperature: f32,
    /// What is measured.
    pub divergence: Divergence,
    /// Factor of each row's divergence in the loss; at 0 the row has no gradient.
    pub weights: &'a [f32],
}

/// What [`DistillHead`] says of each row.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DistillStats {
    /// The divergence, before its weight.
    pub divergences: Vec<f64>,
    /// KL(student || teacher) over the whole vocabulary.
    pub reverse_kls: Vec<f64>,
}

/// How the token of one row is drawn.
#[derive(Debug, Clone, Copy)]
pub struct SampleRow<'a> {
    /// Divides the logits; 0 takes the most likely id (lowest on ties).
    pub temperature: f32,
    /// Nucleus mass; 1 keeps all.
    pub top_p: f32,
    /// Most likely ids kept; 0 keeps all.
    pub top_k: u32,
    /// Relative floor; 0 keeps all.
    pub min_p: f32,
    /// Repetition penalty; 1 is off.
    pub repetition_penalty: f32,
    /// Presence penalty; 0 is off.
    pub presence_penalty: f32,
    /// Frequency penalty; 0 is off.
    pub frequency_penalty: f32,
    /// Ids seen in prompt and response with their number of occurrences in the response; only read with penalties.
    pub seen: &'a [(u32, u32)],
    /// Added to the raw logits of these ids, each of which stands once.
    pub logit_bias: &'a [(u32, f32)],
    /// The only ids that may be drawn, ascending, each once; empty allows all.
    pub allowed_ids: &'a [u32],
    /// Ids that may not be drawn here although the law gives them mass (stop ids before `min_new_tokens`, ids that
    /// would complete a bad word).
    pub banned_ids: &'a [u32],
    /// Noise in (0, 1) with 53 random bits.
    pub uniform: f64,
}

impl SampleRow<'_> {
    /// A draw from the whole law at `temperature` by `uniform`, without penalties, biases or bans.
    pub const fn plain(temperature: f32, uniform: f64) -> Self {
        SampleRow {
            temperature,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seen: &[],
            logit_bias: &[],
            allowed_ids: &[],
            banned_ids: &[],
            uniform,
        }
    }
}

/// A drawn token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// The id.
    pub token_id: u32,
    /// log softmax(logits / T) at the id after the vocabulary mask, never truncated (T = 1 where T = 0 was asked).
    pub log_prob: f32,
    /// Log-prob under the law that the id was drawn from; equal to `log_prob` where nothing was truncated.
    pub sampled_log_prob: f32,
    /// Mass of the untruncated law that survived truncation; 1 where nothing was truncated.
    pub surviving_mass: f32,
}

/// One AdamW step over a flat range (Loshchilov and Hutter, 2019).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the corrected second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// 1-based number of the step, for bias correction.
    pub step: u64,
    /// Factor on the gradient before use (global-norm clipping).
    pub grad_scale: f32,
}
