//! Rows picked from and added to tables.

use super::CpuDevice;
use super::parallel::{ELEMENTS_PER_TASK, SharedMut, for_ranges};
use super::simd::round_bf16;
use temper_types::DType;

/// Columns that one task of [`scatter_add_rows`] handles.
const COLUMN_STRIP: usize = 64;

fn row(index: u32, dim: usize) -> std::ops::Range<usize> {
    index as usize * dim..(index as usize + 1) * dim
}

/// Row `i` of `dst` becomes row `rows[i]` of `src`.
pub(crate) fn gather_rows(src: &[f32], rows: &[u32], dim: usize, dst: &mut [f32]) {
    assert_eq!(dst.len(), rows.len() * dim, "destination of {} rows of {dim}", rows.len());
    for (index, out) in rows.iter().zip(dst.chunks_exact_mut(dim.max(1))) {
        out.copy_from_slice(&src[row(*index, dim)]);
    }
}

/// Row `rows[i]` of `dst` gains row `i` of `src`, in ascending `i`; strips of columns are independent.
pub(crate) fn scatter_add_rows(dev: &CpuDevice, src: &[f32], rows: &[u32], dim: usize, dst: &mut [f32]) {
    assert_eq!(src.len(), rows.len() * dim, "source of {} rows of {dim}", rows.len());
    assert!(rows.iter().all(|&index| (index as usize + 1) * dim <= dst.len()), "a row lies behind the table");
    let grain = if src.len() < 2 * ELEMENTS_PER_TASK { dim } else { COLUMN_STRIP };
    let dst = SharedMut::new(dst);
    for_ranges(dev, dim, grain, |columns| {
        for (index, source) in rows.iter().zip(src.chunks_exact(dim)) {
            let start = *index as usize * dim;
            // SAFETY: tasks write different columns.
            let sums = unsafe { dst.range(start + columns.start..start + columns.end) };
            for (sum, x) in sums.iter_mut().zip(&source[columns.clone()]) {
                *sum += x;
            }
        }
    });
}

/// Rows `ids` of the table, rounded to `dtype`.
pub(crate) fn embed(ids: &[u32], table: &[f32], dtype: DType, out: &mut [f32]) {
    let dim = out.len().checked_div(ids.len()).unwrap_or(0);
    gather_rows(table, ids, dim, out);
    if dtype == DType::Bf16 {
        out.iter_mut().for_each(|x| *x = round_bf16(*x));
    }
}
