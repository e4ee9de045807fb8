//! Counter-based noise: Philox4x32-10 and the derivation of seeds.
//!
//! Noise is a pure function of (key, counter); nothing here has state, so no arrival order, thread count or retry
//! reaches a number.
//!
//! # Source
//! Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; constants of the Random123 library.

const MULTIPLIER_0: u32 = 0xD251_1F53;
const MULTIPLIER_1: u32 = 0xCD9E_8D57;
const WEYL_0: u32 = 0x9E37_79B9;
const WEYL_1: u32 = 0xBB67_AE85;

/// Philox4x32 with ten rounds under a fixed 64-bit key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
}

impl Philox {
    /// Generator for the key `seed`.
    pub const fn new(seed: u64) -> Self {
        Philox { key: [seed as u32, (seed >> 32) as u32] }
    }

    /// The four 32-bit words at `counter` (low 64 bits) of stream `stream` (high 64 bits).
    pub const fn block(&self, counter: u64, stream: u64) -> [u32; 4] {
        let mut c = [counter as u32, (counter >> 32) as u32, stream as u32, (stream >> 32) as u32];
        let mut k = self.key;
        let mut round = 0;
        while round < 10 {
            let p0 = (MULTIPLIER_0 as u64) * (c[0] as u64);
            let p1 = (MULTIPLIER_1 as u64) * (c[2] as u64);
            c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
            k = [k[0].wrapping_add(WEYL_0), k[1].wrapping_add(WEYL_1)];
            round += 1;
        }
        c
    }

    /// The first two words at `counter` of stream `stream` as one 64-bit number.
    pub const fn u64(&self, counter: u64, stream: u64) -> u64 {
        let b = self.block(counter, stream);
        (b[0] as u64) | ((b[1] as u64) << 32)
    }

    /// A number in the open interval (0, 1) with 53 random bits: `(n + 0.5) / 2^53`.
    pub const fn uniform(&self, counter: u64, stream: u64) -> f64 {
        ((self.u64(counter, stream) >> 11) as f64 + 0.5) * (1.0 / (1u64 << 53) as f64)
    }

    /// A number in `0..bound`, without bias beyond 2^-64 (multiply-shift).
    ///
    /// # Panics
    /// If `bound` is 0.
    pub const fn below(&self, bound: u64, counter: u64, stream: u64) -> u64 {
        assert!(bound > 0, "an empty range has no member");
        ((self.u64(counter, stream) as u128 * bound as u128) >> 64) as u64
    }
}

/// The noise that decides the token at `slot`: a number in (0, 1) with 53 random bits.
pub const fn uniform53(seed: u64, slot: u64) -> f64 {
    Philox::new(seed).uniform(slot, 0)
}

/// Seed of one sample: `H(run seed, prompt id, sample index, epoch)`, the first 64 bits of a blake3 hash.
pub fn derive_seed(run_seed: u64, prompt_id: u64, sample_index: u32, epoch: u64) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"temper sample seed v1");
    hasher.update(&run_seed.to_le_bytes());
    hasher.update(&prompt_id.to_le_bytes());
    hasher.update(&sample_index.to_le_bytes());
    hasher.update(&epoch.to_le_bytes());
    let mut first = [0u8; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of Random123's `kat_vectors` for philox4x32 with 10 rounds.
    #[test]
    fn philox_matches_random123_known_answers() {
        assert_eq!(Philox::new(0).block(0, 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            Philox::new(u64::MAX).block(u64::MAX, u64::MAX),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn uniform_stays_inside_the_open_interval() {
        for counter in 0..10_000 {
            let u = uniform53(7, counter);
            assert!(u > 0.0 && u < 1.0);
        }
    }

    #[test]
    fn seeds_differ_in_every_argument() {
        let base = derive_seed(1, 2, 3, 4);
        for other in
            [derive_seed(0, 2, 3, 4), derive_seed(1, 0, 3, 4), derive_seed(1, 2, 0, 4), derive_seed(1, 2, 3, 0)]
        {
            assert_ne!(base, other);
        }
    }
}
