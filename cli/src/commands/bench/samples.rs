//! Medians and spreads of timings, and token ids that stand for no text.

use crate::usage;
use anyhow::Result;
use temper_types::Philox;

/// Ids at both ends of the vocabulary that benchmarks leave out: special tokens stand there.
const MARGIN: u32 = 10;

/// The median; the mean of the middle two where their number is even; 0 of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => 0.0,
        (n, middle) if n % 2 == 1 => sorted[middle],
        (_, middle) => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

/// Largest over smallest; 1 of nothing.
pub fn spread(values: &[f64]) -> f64 {
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let min = values.iter().copied().fold(f64::INFINITY, f64::min);
    if values.is_empty() { 1.0 } else { max / min }
}

/// Rounded to three places, for the eye.
pub fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// `len` pseudo-random ids; `stream` tells sequences apart.
pub fn random_ids(vocab_size: usize, len: usize, stream: u64) -> Vec<u32> {
    let vocab_size = vocab_size as u32;
    let margin = if vocab_size > 4 * MARGIN { MARGIN } else { 0 };
    let noise = Philox::new(0);
    let id = |slot| margin + noise.below(u64::from(vocab_size - 2 * margin), slot, stream) as u32;
    (0..len as u64).map(id).collect()
}

/// Peak memory so far in MiB; null where the system does not tell.
pub fn peak_rss_mb() -> Option<u64> {
    crate::commands::common::compute::peak_rss_bytes().map(|bytes| bytes >> 20)
}

/// Refuse a count of 0.
///
/// # Errors
/// Exit code 2, naming the flag.
pub fn at_least_one(flags: &[(&str, usize)]) -> Result<()> {
    match flags.iter().find(|(_, value)| *value == 0) {
        Some((flag, _)) => Err(usage(format!("{flag} 0: expected 1 or more"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spreads() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!((median(&[]), spread(&[])), (0.0, 1.0));
        assert_eq!(spread(&[2.0, 1.0, 3.0]), 3.0);
    }

    #[test]
    fn ids_stay_inside_the_vocabulary_and_differ_between_streams() {
        for vocab_size in [7, 100, 49152] {
            let ids = random_ids(vocab_size, 500, 1);
            assert!(ids.iter().all(|id| (*id as usize) < vocab_size));
            assert_ne!(ids, random_ids(vocab_size, 500, 2));
        }
    }
}
