//! Attention over the paged cache, forward and backward.

use crate::reference;
use crate::support::{assert_bits, assert_close, device, devices, dot, finite_differences, host, random};
use temper_tensor::{AttentionGrad, AttnShape, CpuDevice, DType, Device, KvCache, KvCacheSpec, SeqSpan};

fn shape(num_heads: usize, num_kv_heads: usize, head_dim: usize, window: Option<usize>) -> AttnShape {
    AttnShape { num_heads, num_kv_heads, head_dim, window, scale: 1.0 / (head_dim as f32).sqrt() }
}

fn cache(dev: &CpuDevice, shape: &AttnShape, block_size: usize, num_blocks: usize, dtype: DType) -> KvCache {
    let (num_kv_heads, head_dim) = (shape.num_kv_heads, shape.head_dim);
    dev.kv_cache(KvCacheSpec { num_layers: 2, num_blocks, block_size, num_kv_heads, head_dim, dtype })
}

/// Fill every slot of every block of layer 1 with NaN, as stale memory may.
fn poison(dev: &CpuDevice, cache: &mut KvCache, shape: AttnShape) {
    let spec = *cache.spec();
    let rows = spec.num_blocks * spec.block_size;
    let blocks: Vec<u32> = (0..spec.num_blocks as u32).collect();
    let nan = dev.upload(&vec![f32::NAN; rows * shape.qkv_dim()]);
    let span = SeqSpan { row_start: 0, num_rows: rows, first_slot: 0, blocks: &blocks };
    dev.kv_append(nan.all(), shape, &[span], cache, 1);
}

/// A sequence's rows go in as pieces of these lengths, one call each; the last length repeats.
fn run_sequence(
    dev: &CpuDevice,
    qkv: &[f32],
    shape: AttnShape,
    (block_size, dtype): (usize, DType),
    pieces: &[usize],
) -> (Vec<f32>, Vec<f32>) {
    let (width, rows) = (shape.qkv_dim(), qkv.len() / shape.qkv_dim());
    let num_blocks = rows.div_ceil(block_size) + 2;
    let mut cache = cache(dev, &shape, block_size, num_blocks, dtype);
    poison(dev, &mut cache, shape);
    let blocks: Vec<u32> = (0..num_blocks as u32).rev().collect();
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    let (mut slot, mut piece) = (0, 0);
    while slot < rows {
        let count = pieces[piece.min(pieces.len() - 1)].min(rows - slot);
        let rows = dev.upload(&qkv[slot * width..(slot + count) * width]);
        let span = SeqSpan { row_start: 0, num_rows: count, first_slot: slot, blocks: &blocks };
        dev.kv_append(rows.all(), shape, &[span], &mut cache, 1);
        let (mut o, mut l) = (dev.zeros(count * shape.out_dim()), dev.zeros(count * shape.num_heads));
        dev.attention(rows.all(), (&cache, 1), shape, &[span], (o.all_mut(), Some(l.all_mut())));
        out.extend(host(dev, &o));
        lse.extend(host(dev, &l));
        (slot, piece) = (slot + count, piece + 1);
    }
    (out, lse)
}

fn rounded_kv(qkv: &[f32], shape: &AttnShape, dtype: DType) -> Vec<f64> {
    let queries = shape.num_heads * shape.head_dim;
    let round = |i: usize, x: f32| {
        let is_kv = i % shape.qkv_dim() >= queries;
        if is_kv && dtype == DType::Bf16 { half::bf16::from_f32(x).to_f32() } else { x }
    };
    qkv.iter().enumerate().map(|(i, x)| f64::from(round(i, *x))).collect()
}

#[test]
fn attention_follows_its_definition() {
    for (shape, rows) in [
        (shape(4, 2, 8, None), 37),
        (shape(3, 1, 12, Some(5)), 40),
        (shape(9, 3, 64, None), 70),
        (shape(2, 2, 16, Some(40)), 90),
        (shape(2, 1, 128, None), 33),
        (shape(30, 1, 2, None), 20),
        (shape(2, 1, 8, None), 1100),
        (shape(1, 1, 6, Some(530)), 1100),
    ] {
        for dtype in [DType::F32, DType::Bf16] {
            let qkv = random(rows * shape.qkv_dim(), 1, 1.5);
            let (want, want_lse) = reference::attention(&rounded_kv(&qkv, &shape, dtype), &shape);
            let (out, lse) = run_sequence(&device(2), &qkv, shape, (16, dtype), &[rows]);
            let what = format!("{shape:?} {dtype}");
            assert_close(&out, &want, (2e-5, 2e-6), &what);
            assert_close(&lse, &want_lse, (1e-6, 2e-6), &what);
        }
    }
}

/// Decode, chunked prefill and the training forward are one function: bits do not depend on how rows arrive, on block
/// size, threads or instruction family.
#[test]
fn bits_do_not_depend_on_pieces_blocks_threads_or_family() {
    for (shape, rows) in [(shape(6, 2, 24, None), 600), (shape(2, 1, 10, Some(33)), 560), (shape(3, 3, 64, None), 50)] {
        for dtype in [DType::F32, DType::Bf16] {
            let qkv = random(rows * shape.qkv_dim(), 2, 2.0);
            let (want, want_lse) = run_sequence(&device(1), &qkv, shape, (16, dtype), &[rows]);
            let check = |dev: &CpuDevice, block_size, pieces: &[usize]| {
                let (out, lse) = run_sequence(dev, &qkv, shape, (block_size, dtype), pieces);
                let what = format!("{dev:?} block {block_size} pieces {pieces:?} {dtype} {shape:?}");
                assert_bits(&out, &want, &what);
                assert_bits(&lse, &want_lse, &what);
            };
            check(&device(2), 32, &[1]);
            check(&device(1), 64, &[1, 17, 3, 64, 512]);
            check(&device(3), 16, &[500, 1, 1, 1, 40]);
            for dev in devices() {
                check(&dev, 32, &[100]);
            }
        }
    }
}

/// One call with many sequences of different lengths and slots gives each the bits that it has alone.
#[test]
fn bits_do_not_depend_on_batch_mates() {
    let (shape, dev) = (shape(4, 2, 16, None), device(2));
    let sequences = [(0usize, 5usize), (40, 1), (515, 1), (16, 30), (511, 3)];
    let (width, block_size) = (shape.qkv_dim(), 32);
    let mut cache = cache(&dev, &shape, block_size, 100, DType::F32);
    poison(&dev, &mut cache, shape);
    let (mut tables, mut batch, mut want, mut next) = (Vec::new(), Vec::new(), Vec::new(), 0u32);
    for (index, (first_slot, num_rows)) in sequences.iter().enumerate() {
        let total = first_slot + num_rows;
        let qkv = random(total * width, 10 + index as u64, 1.0);
        let (out, _) = run_sequence(&dev, &qkv, shape, (16, DType::F32), &[total]);
        want.extend_from_slice(&out[first_slot * shape.out_dim()..]);
        let blocks: Vec<u32> = (0..total.div_ceil(block_size) as u32).map(|i| next + i).collect();
        next += blocks.len() as u32;
        let past = SeqSpan { row_start: 0, num_rows: *first_slot, first_slot: 0, blocks: &blocks };
        dev.kv_append(dev.upload(&qkv[..first_slot * width]).all(), shape, &[past], &mut cache, 1);
        batch.extend_from_slice(&qkv[first_slot * width..]);
        tables.push(blocks);
    }
    let mut row_start = 0;
    let spans: Vec<SeqSpan<'_>> = sequences
        .iter()
        .zip(&tables)
        .map(|(&(first_slot, num_rows), blocks)| {
            row_start += num_rows;
            SeqSpan { row_start: row_start - num_rows, num_rows, first_slot, blocks }
        })
        .collect();
    let (rows, mut out) = (dev.upload(&batch), dev.zeros(row_start * shape.out_dim()));
    dev.kv_append(rows.all(), shape, &spans, &mut cache, 1);
    dev.attention(rows.all(), (&cache, 1), shape, &spans, (out.all_mut(), None));
    assert_bits(&host(&dev, &out), &want, "a batch of five sequences");
}

/// A copied block serves in place of the original, in every layer.
#[test]
fn copied_blocks_hold_the_same_keys_and_values() {
    for dtype in [DType::F32, DType::Bf16] {
        let (shape, dev) = (shape(2, 1, 8, None), device(1));
        let mut cache = cache(&dev, &shape, 16, 4, dtype);
        let qkv = dev.upload(&random(20 * shape.qkv_dim(), 30, 1.0));
        let original = SeqSpan { row_start: 0, num_rows: 20, first_slot: 0, blocks: &[0, 1] };
        let copied = SeqSpan { blocks: &[2, 3], ..original };
        for layer in 0..2 {
            dev.kv_append(qkv.all(), shape, &[original], &mut cache, layer);
        }
        dev.kv_copy_block(&mut cache, 0, 2);
        dev.kv_copy_block(&mut cache, 1, 3);
        for layer in 0..2 {
            let attend = |span| {
                let mut out = dev.zeros(20 * shape.out_dim());
                dev.attention(qkv.all(), (&cache, layer), shape, &[span], (out.all_mut(), None));
                host(&dev, &out)
            };
            assert_bits(&attend(copied), &attend(original), "copied blocks");
        }
    }
}

/// Gradient of `sum(out * dout)` for sequences of `lengths` in one batch.
fn run_grad(
    dev: &CpuDevice,
    qkv: &[f32],
    dout: &[f32],
    (shape, dtype, block_size): (AttnShape, DType, usize),
    lengths: &[usize],
) -> Vec<f32> {
    let mut cache = cache(dev, &shape, block_size, 200, dtype);
    poison(dev, &mut cache, shape);
    let (mut row_start, mut next) = (0, 0);
    let tables: Vec<Vec<u32>> = lengths
        .iter()
        .map(|len| {
            next += len.div_ceil(block_size) as u32;
            (next - len.div_ceil(block_size) as u32..next).collect()
        })
        .collect();
    let spans: Vec<SeqSpan<'_>> = lengths
        .iter()
        .zip(&tables)
        .map(|(&num_rows, blocks)| {
            row_start += num_rows;
            SeqSpan { row_start: row_start - num_rows, num_rows, first_slot: 0, blocks }
        })
        .collect();
    let (qkv, dout) = (dev.upload(qkv), dev.upload(dout));
    let (mut out, mut lse) = (dev.zeros(dout.len()), dev.zeros(row_start * shape.num_heads));
    dev.kv_append(qkv.all(), shape, &spans, &mut cache, 1);
    dev.attention(qkv.all(), (&cache, 1), shape, &spans, (out.all_mut(), Some(lse.all_mut())));
    let args = AttentionGrad {
        qkv: qkv.all(),
        out: out.all(),
        lse: lse.all(),
        dout: dout.all(),
        cache: &cache,
        layer: 1,
        spans: &spans,
        prefixes: &vec![&[][..]; spans.len()],
        shape,
    };
    let mut dqkv = dev.upload(&vec![7.0; qkv.len()]);
    dev.attention_grad(args, dqkv.all_mut());
    host(dev, &dqkv)
}

#[test]
fn gradients_match_finite_differences() {
    for (shape, rows) in [(shape(4, 2, 4, None), 19), (shape(3, 1, 6, Some(4)), 21), (shape(2, 2, 18, None), 17)] {
        let (qkv, dout) = (random(rows * shape.qkv_dim(), 40, 1.0), random(rows * shape.out_dim(), 41, 1.0));
        let want = finite_differences(&qkv, |qkv| dot(&reference::attention(qkv, &shape).0, &dout));
        let got = run_grad(&device(2), &qkv, &dout, (shape, DType::F32, 16), &[rows]);
        assert_close(&got, &want, (1e-4, 1e-5), &format!("{shape:?}"));
    }
}

/// A sequence longer than one chunk of keys; differences are taken at every 41st element.
#[test]
fn gradients_match_finite_differences_over_several_chunks() {
    let (shape, rows) = (shape(1, 1, 2, None), 300);
    let (qkv, dout) = (random(rows * shape.qkv_dim(), 46, 1.0), random(rows * shape.out_dim(), 47, 1.0));
    let got = run_grad(&device(2), &qkv, &dout, (shape, DType::F32, 16), &[rows]);
    let loss = |qkv: &[f64]| dot(&reference::attention(qkv, &shape).0, &dout);
    for index in (0..qkv.len()).step_by(41) {
        let one = finite_differences(&qkv[index..=index], |x| {
            let mut moved: Vec<f64> = qkv.iter().map(|x| f64::from(*x)).collect();
            moved[index] = x[0];
            loss(&moved)
        });
        assert_close(&got[index..=index], &one, (1e-4, 1e-5), &format!("element {index}"));
    }
}

/// In bf16 the gradient is the one at the rounded keys and values.
#[test]
fn gradients_pass_the_rounding_of_keys_and_values() {
    let (shape, rows) = (shape(2, 1, 8, None), 20);
    let (qkv, dout) = (random(rows * shape.qkv_dim(), 42, 1.0), random(rows * shape.out_dim(), 43, 1.0));
    let rounded: Vec<f32> = rounded_kv(&qkv, &shape, DType::Bf16).iter().map(|x| *x as f32).collect();
    let want = run_grad(&device(1), &rounded, &dout, (shape, DType::F32, 16), &[rows]);
    assert_bits(&run_grad(&device(1), &qkv, &dout, (shape, DType::Bf16, 16), &[rows]), &want, "straight-through");
}

#[test]
fn gradient_bits_do_not_depend_on_threads_family_blocks_or_batch_mates() {
    let lengths = [70, 1, 300, 16];
    for shape in [shape(6, 2, 20, None), shape(2, 1, 8, Some(50))] {
        let rows: usize = lengths.iter().sum();
        let (qkv, dout) = (random(rows * shape.qkv_dim(), 44, 1.0), random(rows * shape.out_dim(), 45, 1.0));
        let want = run_grad(&device(1), &qkv, &dout, (shape, DType::F32, 16), &lengths);
        for dev in devices() {
            let got = run_grad(&dev, &qkv, &dout, (shape, DType::F32, 64), &lengths);
            assert_bits(&got, &want, &format!("{dev:?}"));
        }
        let (start, end) = (71 * shape.qkv_dim(), 371 * shape.qkv_dim());
        let dout = &dout[71 * shape.out_dim()..371 * shape.out_dim()];
        let alone = run_grad(&device(2), &qkv[start..end], dout, (shape, DType::F32, 16), &[300]);
        assert_bits(&alone, &want[start..end], "the third sequence alone");
    }
}

/// Two spans after the same eleven rows: gradients of the shared keys and values come from all three.
#[test]
fn shared_rows_gain_the_gradients_of_every_span_after_them() {
    for (shape, dtype) in [(shape(4, 2, 4, None), DType::F32), (shape(3, 1, 6, Some(7)), DType::F32)] {
        let (dev, width, lens) = (device(2), shape.qkv_dim(), [11, 9, 6]);
        let rows: usize = lens.iter().sum();
        let (qkv, dout) = (random(rows * width, 48, 1.0), random(rows * shape.out_dim(), 49, 1.0));
        let mut cache = cache(&dev, &shape, 16, 5, dtype);
        poison(&dev, &mut cache, shape);
        let span = |row_start, num_rows, first_slot, blocks| SeqSpan { row_start, num_rows, first_slot, blocks };
        let spans = [span(0, 11, 0, &[4][..]), span(11, 9, 11, &[1, 3]), span(20, 6, 11, &[2, 0])];
        let (x, d) = (dev.upload(&qkv), dev.upload(&dout));
        let (mut out, mut lse) = (dev.zeros(dout.len()), dev.zeros(rows * shape.num_heads));
        let copies = [span(0, 11, 0, &[1, 3][..]), span(0, 11, 0, &[2, 0])];
        dev.kv_append(x.all(), shape, &[&spans[..], &copies].concat(), &mut cache, 1);
        dev.attention(x.all(), (&cache, 1), shape, &spans, (out.all_mut(), Some(lse.all_mut())));
        let shared: Vec<u32> = (0..11).collect();
        let (out, lse, dout_view) = (out.all(), lse.all(), d.all());
        let prefixes = &[&[][..], &shared, &shared];
        let args = AttentionGrad {
            qkv: x.all(),
            out,
            lse,
            dout: dout_view,
            cache: &cache,
            layer: 1,
            spans: &spans,
            prefixes,
            shape,
        };
        let mut got = dev.upload(&vec![7.0; qkv.len()]);
        dev.attention_grad(args, got.all_mut());
        let loss = |qkv: &[f64]| {
            let of = |own: std::ops::Range<usize>| {
                let sequence = [&qkv[..11 * width], &qkv[own.start * width..own.end * width]].concat();
                let (out, own_dout) = (reference::attention(&sequence, &shape).0, &dout[own.start * shape.out_dim()..]);
                dot(&out[11 * shape.out_dim()..], &own_dout[..own.len() * shape.out_dim()])
            };
            let prompt = reference::attention(&qkv[..11 * width], &shape).0;
            dot(&prompt, &dout[..prompt.len()]) + of(11..20) + of(20..26)
        };
        assert_close(&host(&dev, &got), &finite_differences(&qkv, loss), (1e-4, 1e-5), &format!("{shape:?}"));
    }
}
