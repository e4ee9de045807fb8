//! Sums of tensor-parallel ranks, joined as one device joins the parts of a row-parallel product.

use super::CpuDevice;
use super::parallel::{SharedMut, for_ranges, rows_per_task};

/// Elements that are joined at once, on the stack.
const BLOCK: usize = 256;

/// `out += tree(parts) + bias`, one rounding a sum. `bias` is as wide as a row.
pub(crate) fn add_joined(dev: &CpuDevice, parts: &[&[f32]], bias: Option<&[f32]>, out: &mut [f32]) {
    let len = out.len();
    assert!(parts.len().is_power_of_two(), "add_joined: {} parts: expected a power of two", parts.len());
    assert!(parts.iter().all(|part| part.len() == len), "add_joined: parts of other lengths than {len}");
    let width = bias.map_or(BLOCK, <[f32]>::len);
    assert!(width > 0 && (bias.is_none() || len.is_multiple_of(width)), "add_joined: {len} sums, a bias for {width}");
    let out = SharedMut::new(out);
    for_ranges(dev, len.div_ceil(width), rows_per_task(width), |rows| {
        let range = rows.start * width..(rows.end * width).min(len);
        // SAFETY: the ranges of different tasks are disjoint.
        let out = unsafe { out.range(range.clone()) };
        for (row, out) in out.chunks_mut(width).enumerate() {
            add_row(parts, bias, range.start + row * width, out);
        }
    });
}

/// The elements from `start` on, which are one row where there is a bias.
fn add_row(parts: &[&[f32]], bias: Option<&[f32]>, start: usize, out: &mut [f32]) {
    for (block, out) in out.chunks_mut(BLOCK).enumerate() {
        let mut sums = [0.0; BLOCK];
        let sums = &mut sums[..out.len()];
        join(parts, start + block * BLOCK, sums);
        if let Some(bias) = bias {
            sums.iter_mut().zip(&bias[block * BLOCK..]).for_each(|(sum, bias)| *sum += bias);
        }
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += *sum);
    }
}

/// The sums of `parts` from element `start` on: those of the first half, plus those of the second.
fn join(parts: &[&[f32]], start: usize, sums: &mut [f32]) {
    if let [part] = parts {
        sums.copy_from_slice(&part[start..start + sums.len()]);
        return;
    }
    let (left, right) = parts.split_at(parts.len() / 2);
    let mut other = [0.0; BLOCK];
    let other = &mut other[..sums.len()];
    join(left, start, sums);
    join(right, start, other);
    sums.iter_mut().zip(other).for_each(|(sum, other)| *sum += *other);
}
