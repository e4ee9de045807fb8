//! The kernel trait: every operation that runs on a device.

use crate::{
    AdamWStep, AttentionGrad, AttnShape, Buffer, DeviceInfo, DistillHead, DistillStats, HeadNorm, HeadNormGrad,
    Incoming, KvCache, KvCacheSpec, LinearShape, LmHead, LmHeadGrad, LmHeadTrain, NormGrad, NormShape, PackedLinear,
    Reduction, RopeTable, RowLoss, SampleRow, Sampled, SeqSpan, SharedBuffers, Store, TokenStats, ValueHasher, View,
    ViewMut,
};
use std::io;
use temper_types::DType;

/// A device and its kernels. Rows are independent in every forward operation (see the crate's row contract); every
/// backward is deterministic for a given shape. Wrong shapes panic.
pub trait Device: Send + Sync + std::fmt::Debug {
    /// What this device is.
    fn info(&self) -> DeviceInfo;

    // ---- memory -------------------------------------------------------------------------------------------------

    /// New memory, all zero.
    fn zeros(&self, len: usize) -> Buffer;
    /// New memory with the host's values.
    fn upload(&self, data: &[f32]) -> Buffer;
    /// New memory of so many elements each, all zero, which other processes of the host can read in place.
    ///
    /// # Errors
    /// Where the device computes in memory of its own, or the system has no such memory, or too little of it.
    fn shared_zeros(&self, lens: &[usize]) -> io::Result<SharedBuffers> {
        let problem = format!("{} buffers of device {} would not be in host memory", lens.len(), self.info().name);
        Err(io::Error::new(io::ErrorKind::Unsupported, problem))
    }
    /// Copy host values into `dst`; equal lengths.
    fn write(&self, dst: ViewMut<'_>, src: &[f32]);
    /// Copy what comes in into `dst`, and take it into `hasher` where there is one: each number is read once, so that
    /// what is hashed is what is kept. Equal lengths. What is written is not expected to be read soon.
    fn receive(&self, src: Incoming<'_>, dst: ViewMut<'_>, hasher: Option<&mut ValueHasher>);
    /// Copy device values to the host; equal lengths.
    fn read(&self, src: View<'_>, dst: &mut [f32]);
    /// Set every element.
    fn fill(&self, dst: ViewMut<'_>, value: f32);
    /// `dst = src`.
    fn copy(&self, src: View<'_>, dst: ViewMut<'_>);
    /// `dst += src`.
    fn add(&self, src: View<'_>, dst: ViewMut<'_>);
    /// `dst = decay * dst + (1 - decay) * src` (reference policies by moving average).
    fn lerp(&self, src: View<'_>, decay: f32, dst: ViewMut<'_>);
    /// Sum of squares in f64, in one order fixed by the length.
    fn sum_squares(&self, x: View<'_>) -> f64;
    /// Copy rows `rows[i]` (each `dim` wide) of `src` to row `i` of `dst`.
    fn gather_rows(&self, src: View<'_>, rows: &[u32], dim: usize, dst: ViewMut<'_>);
    /// Add row `i` of `src` to row `rows[i]` of `dst`, in ascending `i`.
    fn scatter_add_rows(&self, src: View<'_>, rows: &[u32], dim: usize, dst: ViewMut<'_>);

    // ---- linear layers ------------------------------------------------------------------------------------------

    /// Pack an f32 weight `[n, k]` (row-major) for [`Device::linear`].
    fn pack(&self, weight: View<'_>, shape: LinearShape, dtype: DType, reduction: Reduction) -> PackedLinear;
    /// Quantise an f32 weight `[n, k]` (row-major) for [`Device::linear`] to signed bytes with one scale for every 64
    /// inputs of an output. Inputs of its products stay f32; they are summed in one order, whatever the reduction.
    fn pack_int8(&self, weight: View<'_>, shape: LinearShape) -> PackedLinear;
    /// Pack new values into the memory of an existing packed weight of the same shape.
    fn repack(&self, weight: View<'_>, packed: &mut PackedLinear);
    /// `out[T, n] (=|+=) x[T, k] W^T + bias`. T is `x.len() / k`.
    fn linear(&self, x: View<'_>, w: &PackedLinear, bias: Option<View<'_>>, out: ViewMut<'_>, store: Store);
    /// `out[T, n] += (sum of parts[T, n]) + bias`: the rest of a [`crate::Reduction::Groups8`] whose subtrees are in
    /// `parts`, in the order of the ranks. They are joined by a binary tree, and the sum to `out` is rounded once. The
    /// number of parts is a power of two.
    fn add_joined(&self, parts: &[View<'_>], bias: Option<View<'_>>, out: ViewMut<'_>);
    /// `dx[T, k] (=|+=) dy[T, n] W`, from the f32 master `[n, k]`, operands rounded to `packed.dtype()`. `packed` is
    /// the packed form of the same weight, for shape and dtype.
    fn linear_input_grad(&self, dy: View<'_>, weight: View<'_>, packed: &PackedLinear, dx: ViewMut<'_>, store: Store);
    /// `dw[n, k] += dy[T, n]^T x[T, k]`, operands rounded to `dtype`.
    fn linear_weight_grad(&self, dy: View<'_>, x: View<'_>, shape: LinearShape, dtype: DType, dw: ViewMut<'_>);
    /// `db[n] += sum over rows of dy[T, n]`.
    fn bias_grad(&self, dy: View<'_>, db: ViewMut<'_>);

    // ---- embedding, norms, activations --------------------------------------------------------------------------

    /// `out[T, D] = table[ids, D]`, rounded to `dtype`.
    fn embed(&self, ids: &[u32], table: View<'_>, dtype: DType, out: ViewMut<'_>);
    /// `dtable[ids] += dout`, in ascending row order.
    fn embed_grad(&self, ids: &[u32], dout: View<'_>, dtable: ViewMut<'_>);
    /// `out = x / sqrt(mean(x^2) + eps) * weight`; `rstd[T]` is written where asked for.
    fn rms_norm(&self, x: View<'_>, weight: View<'_>, shape: NormShape, out: ViewMut<'_>, rstd: Option<ViewMut<'_>>);
    /// `dx += ...`, `dweight += ...`.
    fn rms_norm_grad(&self, args: NormGrad<'_>, dx: ViewMut<'_>, dweight: ViewMut<'_>);
    /// Norm every query and key head of fused rows into `out` (values are copied); `rstd` is `[T, H + G]`.
    fn head_norm(&self, args: HeadNorm<'_>, out: ViewMut<'_>, rstd: Option<ViewMut<'_>>);
    /// Backward of [`Device::head_norm`]; `args.qkv` is the forward's input.
    fn head_norm_grad(&self, args: HeadNorm<'_>, rstd: View<'_>, grad: HeadNormGrad<'_>);
    /// `out[T, F] = silu(gate) * up` of rows `[gate F | up F]`.
    fn swiglu(&self, gate_up: View<'_>, ffn_dim: usize, out: ViewMut<'_>);
    /// [`Device::swiglu`] of the rows that a linear layer gives, to the same bits: `out[T, F] = silu(gate) * up` of
    /// `[gate F | up F] = x[T, k] W^T + bias`. `gate_up[T, 2F]` is room for them; what it holds then is arbitrary.
    fn linear_swiglu(
        &self,
        x: View<'_>,
        w: &PackedLinear,
        bias: Option<View<'_>>,
        gate_up: ViewMut<'_>,
        out: ViewMut<'_>,
    );
    /// Gradient of [`Device::swiglu`] with respect to the fused rows, written.
    fn swiglu_grad(&self, gate_up: View<'_>, ffn_dim: usize, dout: View<'_>, dgate_up: ViewMut<'_>);

    // ---- positions and attention --------------------------------------------------------------------------------

    /// Table of `cos(p f)`, `sin(p f)` for positions `0..num_positions` and the given inverse frequencies `[K/2]`,
    /// times `attention_scaling`.
    fn rope_table(&self, inv_frequencies: &[f32], num_positions: usize, attention_scaling: f32) -> RopeTable;
    /// Rotate queries and keys of fused rows in place (halves convention: pairs are `(i, i + K/2)`).
    fn rope(&self, qkv: ViewMut<'_>, positions: &[u32], table: &RopeTable, shape: AttnShape);
    /// The inverse rotation, in place: backward of [`Device::rope`] on a gradient.
    fn rope_grad(&self, dqkv: ViewMut<'_>, positions: &[u32], table: &RopeTable, shape: AttnShape);
    /// New cache, all zero.
    fn kv_cache(&self, spec: KvCacheSpec) -> KvCache;
    /// Store keys and values of fused rows at their slots, rounded to the cache's dtype.
    fn kv_append(&self, qkv: View<'_>, shape: AttnShape, spans: &[SeqSpan<'_>], cache: &mut KvCache, layer: usize);
    /// Copy a block, all layers.
    fn kv_copy_block(&self, cache: &mut KvCache, from: u32, to: u32);
    /// Attention over this layer and these spans comes after the next products, which may fetch what it will read while
    /// they leave the memory idle. A hint: it reaches no number, and is worth nothing before other operations.
    fn expect_attention(&self, kv: (&KvCache, usize), spans: &[SeqSpan<'_>]);
    /// Causal attention of query rows over the cache: `out[T, H*K]`; `lse[T, H]` is written where asked for.
    fn attention(
        &self,
        qkv: View<'_>,
        kv: (&KvCache, usize),
        shape: AttnShape,
        spans: &[SeqSpan<'_>],
        out: (ViewMut<'_>, Option<ViewMut<'_>>),
    );
    /// Gradient with respect to the fused rows (queries, keys and values, after RoPE), written: `[T, qkv_dim]`.
    fn attention_grad(&self, args: AttentionGrad<'_>, dqkv: ViewMut<'_>);

    // ---- LM head ------------------------------------------------------------------------------------------------

    /// Log-probs and entropies of targets, over row chunks; `[T, V]` is never in memory at once.
    fn lm_head_stats(&self, args: LmHead<'_>) -> TokenStats;
    /// Backward: `dhidden[T, D]` is written, `dweight[V, D]` is added to. Logits are recomputed by row chunks. Rows
    /// whose gradients are all zero are left out: they get zeros, and the others the bits they have without them.
    fn lm_head_grad(&self, args: LmHeadGrad<'_>, dhidden: ViewMut<'_>, dweight: ViewMut<'_>);
    /// [`Device::lm_head_stats`], the loss, and [`Device::lm_head_grad`] in one walk that computes every logit once.
    /// `loss` is asked for each range of rows, ascending. Rows without a gradient get zeros and add nothing; the others
    /// may be cut into other chunks than there, so the weight's gradient agrees to rounding.
    fn lm_head_train(
        &self,
        args: LmHeadTrain<'_>,
        loss: &mut RowLoss<'_>,
        dhidden: ViewMut<'_>,
        dweight: ViewMut<'_>,
    ) -> TokenStats;
    /// Divergences between the laws of student and teacher, and their weighted sum's gradient: `dhidden[T, D]` is
    /// written, `dweight[V, D]` is added to. Logits of both are computed by row chunks.
    fn lm_head_distill(&self, args: DistillHead<'_>, dhidden: ViewMut<'_>, dweight: ViewMut<'_>) -> DistillStats;
    /// Draw one token per row of `hidden[T, D]` into `drawn`, which is overwritten; `rows.len()` is T. The log-prob
    /// bits equal [`Device::lm_head_stats`]' for the same hidden row, id and temperature.
    fn lm_head_sample(
        &self,
        hidden: View<'_>,
        head: &PackedLinear,
        masked_ids: &[u32],
        rows: &[SampleRow<'_>],
        drawn: &mut Vec<Sampled>,
    );
    /// Raw logits of rows, `[T, V]` on the host: for tests, evaluation and distillation.
    fn lm_head_logits(&self, hidden: View<'_>, head: &PackedLinear) -> Vec<f32>;

    // ---- optimizer ----------------------------------------------------------------------------------------------

    /// One AdamW step in place over a flat range; all four have equal lengths.
    fn adamw(&self, step: AdamWStep, grad: View<'_>, param: ViewMut<'_>, moments: (ViewMut<'_>, ViewMut<'_>));
}
