//! The CPU device: its pool, its instruction family, and the table of its kernels.

use super::expected::Expected;
use super::simd::Isa;
use super::{
    activation, adamw, attention, attention_grad, distill, elementwise, embed, gemm, join, kv, lm_head, norm, rope,
    sample,
};
use super::{aligned::AlignedVec, pool::Pool};
use crate::{
    AdamWStep, AttentionGrad, AttnShape, Buffer, Device, DeviceInfo, DistillHead, DistillStats, HeadNorm, HeadNormGrad,
    Incoming, KvCache, KvCacheSpec, LinearShape, LmHead, LmHeadGrad, LmHeadTrain, NormGrad, NormShape, PackedLinear,
    Reduction, RopeTable, RowLoss, SampleRow, Sampled, SeqSpan, SharedBuffers, Store, TokenStats, ValueHasher, View,
    ViewMut,
};
use temper_types::DType;

/// How a CPU device is made. `Default` takes every core and the best instruction family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuConfig {
    /// Threads of the compute pool; 0 takes one per core.
    pub num_threads: usize,
    /// Instruction family; `None` takes the best that the CPU has.
    pub isa: Option<Isa>,
}

/// The CPU as a device. Holds the one compute pool of the process.
pub struct CpuDevice {
    pub(crate) pool: Pool,
    pub(crate) isa: Isa,
    /// True where bf16 products run on `vdpbf16ps`.
    pub(crate) native_bf16: bool,
    /// What attention reads next.
    pub(crate) expected: Expected,
    /// Memory for chunks of logits, kept between calls.
    pub(crate) logits: lm_head::LogitsMemory,
}

impl CpuDevice {
    /// Start the pool.
    ///
    /// # Panics
    /// If `config.isa` names a family that this CPU lacks; ask [`Isa::is_available`] first.
    pub fn new(config: CpuConfig) -> Self {
        let isa = config.isa.unwrap_or_else(Isa::detect);
        assert!(isa.is_available(), "this CPU has no {isa:?}");
        let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let num_threads = if config.num_threads == 0 { cores() } else { config.num_threads };
        let native_bf16 = isa == Isa::Avx512 && Isa::has_native_bf16();
        CpuDevice {
            pool: Pool::new(num_threads),
            isa,
            native_bf16,
            expected: Expected::new(),
            logits: lm_head::LogitsMemory::default(),
        }
    }
}

impl std::fmt::Debug for CpuDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CpuDevice({:?}, {} threads)", self.isa, self.pool.num_threads())
    }
}

impl Device for CpuDevice {
    fn info(&self) -> DeviceInfo {
        let family = match (self.isa, self.native_bf16) {
            (Isa::Avx512, true) => "avx512+bf16",
            (Isa::Avx512, false) => "avx512",
            (Isa::Avx2, _) => "avx2",
            (Isa::Portable, _) => "portable",
        };
        DeviceInfo {
            name: "cpu".to_owned(),
            instruction_set: family.to_owned(),
            num_threads: self.pool.num_threads(),
            native_bf16: self.native_bf16,
        }
    }

    fn zeros(&self, len: usize) -> Buffer {
        Buffer { data: AlignedVec::zeroed(len) }
    }

    fn upload(&self, data: &[f32]) -> Buffer {
        Buffer { data: AlignedVec::from_slice(data) }
    }

    fn shared_zeros(&self, lens: &[usize]) -> std::io::Result<SharedBuffers> {
        crate::shared::zeros(lens)
    }

    fn write(&self, dst: ViewMut<'_>, src: &[f32]) {
        dst.data.copy_from_slice(src);
    }

    fn receive(&self, src: Incoming<'_>, dst: ViewMut<'_>, hasher: Option<&mut ValueHasher>) {
        match hasher {
            Some(hasher) => hasher.copy(src, dst.data),
            None => src.copy_to(dst.data),
        }
    }

    fn read(&self, src: View<'_>, dst: &mut [f32]) {
        dst.copy_from_slice(src.data);
    }

    fn fill(&self, dst: ViewMut<'_>, value: f32) {
        dst.data.fill(value);
    }

    fn copy(&self, src: View<'_>, dst: ViewMut<'_>) {
        dst.data.copy_from_slice(src.data);
    }

    fn add(&self, src: View<'_>, dst: ViewMut<'_>) {
        elementwise::add(self, src.data, dst.data);
    }

    fn lerp(&self, src: View<'_>, decay: f32, dst: ViewMut<'_>) {
        elementwise::lerp(self, src.data, decay, dst.data);
    }

    fn sum_squares(&self, x: View<'_>) -> f64 {
        elementwise::sum_squares(self, x.data)
    }

    fn gather_rows(&self, src: View<'_>, rows: &[u32], dim: usize, dst: ViewMut<'_>) {
        embed::gather_rows(src.data, rows, dim, dst.data);
    }

    fn scatter_add_rows(&self, src: View<'_>, rows: &[u32], dim: usize, dst: ViewMut<'_>) {
        embed::scatter_add_rows(self, src.data, rows, dim, dst.data);
    }

    fn pack(&self, weight: View<'_>, shape: LinearShape, dtype: DType, reduction: Reduction) -> PackedLinear {
        let panels = gemm::pack(self, weight.data, shape, dtype);
        PackedLinear { shape, dtype, reduction, panels }
    }

    fn pack_int8(&self, weight: View<'_>, shape: LinearShape) -> PackedLinear {
        let panels = gemm::pack_int8(self, weight.data, shape);
        PackedLinear { shape, dtype: DType::F32, reduction: Reduction::Chain, panels }
    }

    fn repack(&self, weight: View<'_>, packed: &mut PackedLinear) {
        gemm::repack(self, weight.data, packed);
    }

    fn linear(&self, x: View<'_>, w: &PackedLinear, bias: Option<View<'_>>, out: ViewMut<'_>, store: Store) {
        gemm::linear(self, x.data, w, bias.map(|b| b.data), (out.data, store));
    }

    fn add_joined(&self, parts: &[View<'_>], bias: Option<View<'_>>, out: ViewMut<'_>) {
        let parts: Vec<&[f32]> = parts.iter().map(|part| part.data).collect();
        join::add_joined(self, &parts, bias.map(|bias| bias.data), out.data);
    }

    fn linear_input_grad(&self, dy: View<'_>, weight: View<'_>, packed: &PackedLinear, dx: ViewMut<'_>, store: Store) {
        gemm::input_grad(self, dy.data, weight.data, packed, (dx.data, store));
    }

    fn linear_weight_grad(&self, dy: View<'_>, x: View<'_>, shape: LinearShape, dtype: DType, dw: ViewMut<'_>) {
        gemm::weight_grad(self, (dy.data, x.data), shape, dtype, dw.data);
    }

    fn bias_grad(&self, dy: View<'_>, db: ViewMut<'_>) {
        elementwise::column_sums(self, dy.data, db.data);
    }

    fn embed(&self, ids: &[u32], table: View<'_>, dtype: DType, out: ViewMut<'_>) {
        embed::embed(ids, table.data, dtype, out.data);
    }

    fn embed_grad(&self, ids: &[u32], dout: View<'_>, dtable: ViewMut<'_>) {
        let dim = dout.len().checked_div(ids.len()).unwrap_or(0);
        embed::scatter_add_rows(self, dout.data, ids, dim, dtable.data);
    }

    fn rms_norm(&self, x: View<'_>, weight: View<'_>, shape: NormShape, out: ViewMut<'_>, rstd: Option<ViewMut<'_>>) {
        norm::rms_norm(self, (x.data, weight.data), shape, out.data, rstd.map(|r| r.data));
    }

    fn rms_norm_grad(&self, args: NormGrad<'_>, dx: ViewMut<'_>, dweight: ViewMut<'_>) {
        norm::rms_norm_grad(self, args, dx.data, dweight.data);
    }

    fn head_norm(&self, args: HeadNorm<'_>, out: ViewMut<'_>, rstd: Option<ViewMut<'_>>) {
        norm::head_norm(self, args, out.data, rstd.map(|r| r.data));
    }

    fn head_norm_grad(&self, args: HeadNorm<'_>, rstd: View<'_>, grad: HeadNormGrad<'_>) {
        norm::head_norm_grad(self, args, rstd.data, grad);
    }

    fn swiglu(&self, gate_up: View<'_>, ffn_dim: usize, out: ViewMut<'_>) {
        activation::swiglu(self, gate_up.data, ffn_dim, out.data);
    }

    fn linear_swiglu(
        &self,
        x: View<'_>,
        w: &PackedLinear,
        bias: Option<View<'_>>,
        gate_up: ViewMut<'_>,
        out: ViewMut<'_>,
    ) {
        let bias = bias.map(|b| b.data);
        if gemm::fuses_swiglu(w) {
            return gemm::linear_swiglu(self, x.data, w, bias, out.data);
        }
        gemm::linear(self, x.data, w, bias, (&mut *gate_up.data, Store::Write));
        activation::swiglu(self, gate_up.data, w.shape().n / 2, out.data);
    }

    fn swiglu_grad(&self, gate_up: View<'_>, ffn_dim: usize, dout: View<'_>, dgate_up: ViewMut<'_>) {
        activation::swiglu_grad(self, gate_up.data, ffn_dim, dout.data, dgate_up.data);
    }

    fn rope_table(&self, inv_frequencies: &[f32], num_positions: usize, attention_scaling: f32) -> RopeTable {
        RopeTable { table: rope::CpuRopeTable::new(inv_frequencies, num_positions, attention_scaling) }
    }

    fn rope(&self, qkv: ViewMut<'_>, positions: &[u32], table: &RopeTable, shape: AttnShape) {
        rope::rotate(self, qkv.data, positions, &table.table, (shape, rope::Direction::Forward));
    }

    fn rope_grad(&self, dqkv: ViewMut<'_>, positions: &[u32], table: &RopeTable, shape: AttnShape) {
        rope::rotate(self, dqkv.data, positions, &table.table, (shape, rope::Direction::Inverse));
    }

    fn kv_cache(&self, spec: KvCacheSpec) -> KvCache {
        KvCache { pool: kv::CpuKvPool::new(&spec), spec }
    }

    fn kv_append(&self, qkv: View<'_>, shape: AttnShape, spans: &[SeqSpan<'_>], cache: &mut KvCache, layer: usize) {
        kv::append(self, qkv.data, shape, spans, (cache, layer));
    }

    fn kv_copy_block(&self, cache: &mut KvCache, from: u32, to: u32) {
        kv::copy_block(cache, from, to);
    }

    fn expect_attention(&self, kv: (&KvCache, usize), spans: &[SeqSpan<'_>]) {
        if gemm::asks_for_expected(spans.iter().map(|span| span.num_rows).sum()) {
            kv::expect(self, kv, spans);
        }
    }

    fn attention(
        &self,
        qkv: View<'_>,
        kv: (&KvCache, usize),
        shape: AttnShape,
        spans: &[SeqSpan<'_>],
        out: (ViewMut<'_>, Option<ViewMut<'_>>),
    ) {
        attention::attention(self, qkv.data, kv, shape, spans, (out.0.data, out.1.map(|lse| lse.data)));
    }

    fn attention_grad(&self, args: AttentionGrad<'_>, dqkv: ViewMut<'_>) {
        attention_grad::attention_grad(self, args, dqkv.data);
    }

    fn lm_head_stats(&self, args: LmHead<'_>) -> TokenStats {
        lm_head::stats(self, args)
    }

    fn lm_head_grad(&self, args: LmHeadGrad<'_>, dhidden: ViewMut<'_>, dweight: ViewMut<'_>) {
        lm_head::grad(self, args, dhidden.data, dweight.data);
    }

    fn lm_head_train(
        &self,
        args: LmHeadTrain<'_>,
        loss: &mut RowLoss<'_>,
        dhidden: ViewMut<'_>,
        dweight: ViewMut<'_>,
    ) -> TokenStats {
        lm_head::train(self, args, loss, (dhidden.data, dweight.data))
    }

    fn lm_head_distill(&self, args: DistillHead<'_>, dhidden: ViewMut<'_>, dweight: ViewMut<'_>) -> DistillStats {
        distill::distill(self, args, dhidden.data, dweight.data)
    }

    fn lm_head_sample(
        &self,
        hidden: View<'_>,
        head: &PackedLinear,
        masked_ids: &[u32],
        rows: &[SampleRow<'_>],
        drawn: &mut Vec<Sampled>,
    ) {
        sample::sample_rows(self, hidden.data, (head, masked_ids), rows, drawn);
    }

    fn lm_head_logits(&self, hidden: View<'_>, head: &PackedLinear) -> Vec<f32> {
        let rows = hidden.len() / head.shape().k;
        let mut logits = vec![0.0; rows * head.shape().n];
        gemm::linear(self, hidden.data, head, None, (&mut logits, Store::Write));
        logits
    }

    fn adamw(&self, step: AdamWStep, grad: View<'_>, param: ViewMut<'_>, moments: (ViewMut<'_>, ViewMut<'_>)) {
        adamw::step(self, step, grad.data, param.data, (moments.0.data, moments.1.data));
    }
}
