//! How a flat unit is cut into shards.

use std::ops::Range;

/// Shards begin at multiples of this many elements (4 KiB of f32), so that no kernel's vector crosses a boundary and
/// sums over blocks of this size do not depend on the number of shards.
pub const SHARD_ALIGNMENT: usize = 1024;

/// The shards of `len` elements, in rank order: contiguous, as equal as whole blocks of [`SHARD_ALIGNMENT`] allow, and
/// empty where there are fewer blocks than shards.
///
/// # Panics
/// If `num_shards` is 0.
pub fn shard_ranges(len: usize, num_shards: usize) -> Vec<Range<usize>> {
    assert!(num_shards > 0, "at least one shard");
    let num_blocks = len.div_ceil(SHARD_ALIGNMENT);
    let cut = |shard: usize| (num_blocks * shard / num_shards * SHARD_ALIGNMENT).min(len);
    (0..num_shards).map(|shard| cut(shard)..cut(shard + 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_cover_everything_once_and_differ_by_a_block() {
        for len in [0, 1, 1023, 1024, 1025, 5000, 100_000] {
            for num_shards in 1..=7 {
                let shards = shard_ranges(len, num_shards);
                assert_eq!(shards.len(), num_shards);
                let mut end = 0;
                for shard in &shards {
                    assert_eq!(shard.start, end);
                    assert!(shard.start % SHARD_ALIGNMENT == 0 || shard.start == len);
                    end = shard.end;
                }
                assert_eq!(end, len);
                let sizes = || shards.iter().map(ExactSizeIterator::len);
                let (most, least) = (sizes().max().unwrap_or(0), sizes().min().unwrap_or(0));
                assert!(most - least <= 2 * SHARD_ALIGNMENT, "{len} over {num_shards}: {shards:?}");
            }
        }
    }
}
