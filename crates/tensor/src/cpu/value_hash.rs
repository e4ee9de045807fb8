//! xxh3-128 of f32 values as little-endian bytes, as they come: in AVX-512 registers where there are any.
//!
//! # Source
//! XXH3, 128 bits, default secret, seed 0, for inputs of more than 240 bytes (xxHash specification,
//! github.com/Cyan4973/xxHash). Departure: the number of values is known before the first one, so that nothing is held
//! back but the last block.

use super::simd::Isa;
use crate::Incoming;

/// Values of a block, after which the accumulators are scrambled: 1024 bytes.
const BLOCK: usize = 256;
/// Values of a stripe, one step of all accumulators: 64 bytes.
const STRIPE: usize = 16;

const SECRET: [u8; 192] = [
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d,
    0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0,
    0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0,
    0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b,
    0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac,
    0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51,
    0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34,
    0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49,
    0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8,
    0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b,
    0x40, 0x7e,
];

const PRIME32: [u64; 3] = [0x9E37_79B1, 0x85EB_CA77, 0xC2B2_AE3D];
const PRIME64: [u64; 5] =
    [0x9E37_79B1_85EB_CA87, 0xC2B2_AE3D_27D4_EB4F, 0x1656_67B1_9E37_79F9, 0x85EB_CA77_C2B2_AE63, 0x27D4_EB2F_1656_67C5];
const START: Lanes = [PRIME32[2], PRIME64[0], PRIME64[1], PRIME64[2], PRIME64[3], PRIME32[1], PRIME64[4], PRIME32[0]];

/// The accumulators, and everything that they are combined with.
type Lanes = [u64; 8];

/// Eight words of the secret from byte `at` on.
const fn secret(at: usize) -> Lanes {
    let mut words = [0; 8];
    let mut i = 0;
    while i < 64 {
        words[i / 8] |= (SECRET[at + i] as u64) << (8 * (i % 8));
        i += 1;
    }
    words
}

/// The secret of each stripe of a block.
const STRIPE_SECRETS: [Lanes; BLOCK / STRIPE] = {
    let mut secrets = [[0; 8]; BLOCK / STRIPE];
    let mut i = 0;
    while i < BLOCK / STRIPE {
        secrets[i] = secret(8 * i);
        i += 1;
    }
    secrets
};
const SCRAMBLE_SECRET: Lanes = secret(SECRET.len() - 64);
const LAST_SECRET: Lanes = secret(SECRET.len() - 64 - 7);
const LOW_SECRET: Lanes = secret(11);
const HIGH_SECRET: Lanes = secret(SECRET.len() - 64 - 11);

/// A stripe as words.
#[inline(always)]
fn words(stripe: &[f32; STRIPE]) -> Lanes {
    if cfg!(target_endian = "little") {
        // SAFETY: both are 64 bytes, and every bit pattern is a word.
        return unsafe { stripe.as_ptr().cast::<Lanes>().read_unaligned() };
    }
    std::array::from_fn(|i| u64::from(stripe[2 * i].to_bits()) | u64::from(stripe[2 * i + 1].to_bits()) << 32)
}

#[inline(always)]
fn accumulate(acc: &mut Lanes, stripe: &[f32; STRIPE], secret: &Lanes) {
    let data = words(stripe);
    for i in 0..8 {
        let key = data[i] ^ secret[i];
        acc[i] = acc[i].wrapping_add(data[i ^ 1]).wrapping_add((key & 0xffff_ffff).wrapping_mul(key >> 32));
    }
}

/// A block that is not the last.
fn block(acc: &mut Lanes, values: &[f32; BLOCK]) {
    for (stripe, secret) in values.as_chunks::<STRIPE>().0.iter().zip(&STRIPE_SECRETS) {
        accumulate(acc, stripe, secret);
    }
    for (lane, secret) in acc.iter_mut().zip(&SCRAMBLE_SECRET) {
        *lane = (*lane ^ (*lane >> 47) ^ secret).wrapping_mul(PRIME32[0]);
    }
}

/// What becomes of values besides being hashed.
#[cfg(target_arch = "x86_64")]
mod keep {
    /// Nothing.
    pub(super) const NOWHERE: u8 = 0;
    /// They are written.
    pub(super) const WRITE: u8 = 1;
    /// They are written past the caches, to an address that is a multiple of 64.
    pub(super) const STREAM: u8 = 2;
}

/// [`block`]s of values that are read once, with all accumulators in one register.
///
/// # Safety
/// Values can be read for `num_blocks`, and written at `to` where `KEEP` says so.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn blocks_avx512<const KEEP: u8>(acc: &mut Lanes, from: *const f32, to: *mut f32, num_blocks: usize) {
    use std::arch::x86_64::*;
    // SAFETY: eight words are 64 bytes; an unaligned load reads as many.
    let load = |words: &Lanes| unsafe { _mm512_loadu_si512(words.as_ptr().cast()) };
    let prime = _mm512_set1_epi64(PRIME32[0] as i64);
    let mut sum = load(acc);
    for block in 0..num_blocks {
        for (stripe, secret) in STRIPE_SECRETS.iter().enumerate() {
            let at = block * BLOCK + stripe * STRIPE;
            // SAFETY: a stripe is 64 bytes, and inside of the blocks.
            let data = unsafe { _mm512_loadu_si512(from.add(at).cast()) };
            // SAFETY: as above; a streaming store is told that its address is a multiple of 64.
            unsafe {
                match KEEP {
                    keep::WRITE => _mm512_storeu_si512(to.add(at).cast(), data),
                    keep::STREAM => _mm512_stream_si512(to.add(at).cast(), data),
                    _ => {}
                }
            }
            let key = _mm512_xor_si512(data, load(secret));
            let product = _mm512_mul_epu32(key, _mm512_srli_epi64::<32>(key));
            let swapped = _mm512_shuffle_epi32::<0x4e>(data);
            sum = _mm512_add_epi64(sum, _mm512_add_epi64(product, swapped));
        }
        let mixed = _mm512_xor_si512(_mm512_xor_si512(sum, _mm512_srli_epi64::<47>(sum)), load(&SCRAMBLE_SECRET));
        let high = _mm512_mul_epu32(_mm512_srli_epi64::<32>(mixed), prime);
        sum = _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), _mm512_slli_epi64::<32>(high));
    }
    if KEEP == keep::STREAM {
        // Streaming stores are seen in no order by others before this.
        _mm_sfence();
    }
    // SAFETY: eight words are 64 bytes; an unaligned store writes as many.
    unsafe { _mm512_storeu_si512(acc.as_mut_ptr().cast(), sum) }
}

fn merge(acc: &Lanes, secret: &Lanes, start: u64) -> u64 {
    let fold = |i: usize| {
        let product = u128::from(acc[i] ^ secret[i]) * u128::from(acc[i + 1] ^ secret[i + 1]);
        (product as u64) ^ ((product >> 64) as u64)
    };
    let mut sum = [0, 2, 4, 6].into_iter().fold(start, |sum, i| sum.wrapping_add(fold(i)));
    sum ^= sum >> 37;
    sum = sum.wrapping_mul(0x1656_6791_9E37_79F9);
    sum ^ (sum >> 32)
}

/// xxh3-128 of a known number of f32 values, as little-endian bytes. The digest is the same on every instruction family
/// and for every division into pieces.
#[derive(Debug, Clone)]
pub struct ValueHasher {
    isa: Isa,
    acc: Lanes,
    /// Values in all, and those that came.
    len: usize,
    taken: usize,
    /// The block under way, the first `filled` values of it.
    block: [f32; BLOCK],
    filled: usize,
    /// The last stripe of the block before.
    before: [f32; STRIPE],
}

impl ValueHasher {
    /// Fewest values: XXH3 treats up to 240 bytes otherwise.
    pub const MIN_VALUES: usize = 61;

    /// Nothing of `len` values has come.
    ///
    /// # Panics
    /// If `len` is less than [`ValueHasher::MIN_VALUES`].
    pub fn new(len: usize) -> Self {
        Self::with_isa(len, Isa::detect())
    }

    fn with_isa(len: usize, isa: Isa) -> Self {
        assert!(len >= Self::MIN_VALUES, "{len} values: expected {} or more", Self::MIN_VALUES);
        ValueHasher { isa, acc: START, len, taken: 0, block: [0.0; BLOCK], filled: 0, before: [0.0; STRIPE] }
    }

    /// The next values.
    ///
    /// # Panics
    /// If there are more than were announced.
    pub fn update(&mut self, values: &[f32]) {
        self.advance(values.into(), None);
    }

    /// The next values, copied to `to`: each is read once, so that what is hashed is what is kept.
    ///
    /// # Panics
    /// If there are more than were announced, or `to` has another length.
    pub fn copy(&mut self, from: Incoming<'_>, to: &mut [f32]) {
        assert_eq!(from.len(), to.len(), "values that are copied");
        self.advance(from, Some(to));
    }

    fn advance(&mut self, mut from: Incoming<'_>, mut to: Option<&mut [f32]>) {
        assert!(from.len() <= self.len - self.taken, "more values than were announced: {}", self.len);
        // Values of the blocks that are not the last.
        let limit = (self.len * size_of::<f32>() - 1) / (BLOCK * size_of::<f32>()) * BLOCK;
        while !from.is_empty() {
            let direct = from.len().min(limit.saturating_sub(self.taken)) / BLOCK * BLOCK;
            let is_direct = self.filled == 0 && direct > 0;
            let (now, rest) = from.split_at(if is_direct { direct } else { from.len().min(BLOCK - self.filled) });
            let kept = to.take().map(|to| to.split_at_mut(now.len()));
            let (kept, kept_later) = kept.unzip();
            (from, to) = (rest, kept_later);
            self.taken += now.len();
            if is_direct {
                self.blocks(now, kept);
                continue;
            }
            let taken = &mut self.block[self.filled..self.filled + now.len()];
            now.copy_to(taken);
            if let Some(kept) = kept {
                kept.copy_from_slice(taken);
            }
            self.filled += now.len();
            if self.filled == BLOCK && self.taken <= limit {
                let block = self.block;
                self.blocks(block[..].into(), None);
                self.filled = 0;
            }
        }
    }

    /// Whole blocks that are not the last, kept where there is a place for them.
    fn blocks(&mut self, from: Incoming<'_>, mut to: Option<&mut [f32]>) {
        let whole = from.len() - STRIPE;
        match self.isa {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the family was detected, and AVX-512 F is part of it; both places have as many values.
            Isa::Avx512 => unsafe {
                let (acc, ptr, num_blocks) = (&mut self.acc, from.as_ptr(), from.len() / BLOCK);
                match &mut to {
                    None => blocks_avx512::<{ keep::NOWHERE }>(acc, ptr, std::ptr::null_mut(), num_blocks),
                    Some(to) if to.as_ptr().addr().is_multiple_of(64) => {
                        blocks_avx512::<{ keep::STREAM }>(acc, ptr, to.as_mut_ptr(), num_blocks);
                    }
                    Some(to) => blocks_avx512::<{ keep::WRITE }>(acc, ptr, to.as_mut_ptr(), num_blocks),
                }
            },
            _ => {
                let (mut rest, mut values) = (from, [0.0; BLOCK]);
                for start in (0..from.len()).step_by(BLOCK) {
                    let (now, later) = rest.split_at(BLOCK);
                    now.copy_to(&mut values);
                    block(&mut self.acc, &values);
                    if let Some(to) = &mut to {
                        to[start..start + BLOCK].copy_from_slice(&values);
                    }
                    rest = later;
                }
            }
        }
        match to {
            Some(to) => self.before.copy_from_slice(&to[whole..]),
            None => from.split_at(whole).1.copy_to(&mut self.before),
        }
    }

    /// The digest of all values.
    ///
    /// # Panics
    /// If fewer came than were announced.
    pub fn finish(&self) -> u128 {
        assert_eq!(self.taken, self.len, "fewer values than were announced");
        let (mut acc, tail) = (self.acc, &self.block[..self.filled]);
        let num_stripes = (size_of_val(tail) - 1) / (STRIPE * size_of::<f32>());
        for (stripe, secret) in tail.as_chunks::<STRIPE>().0.iter().zip(&STRIPE_SECRETS).take(num_stripes) {
            accumulate(&mut acc, stripe, secret);
        }
        let (mut last, from_tail) = ([0.0; STRIPE], tail.len().min(STRIPE));
        last[..STRIPE - from_tail].copy_from_slice(&self.before[from_tail..]);
        last[STRIPE - from_tail..].copy_from_slice(&tail[tail.len() - from_tail..]);
        accumulate(&mut acc, &last, &LAST_SECRET);
        let num_bytes = (self.len * size_of::<f32>()) as u64;
        let low = merge(&acc, &LOW_SECRET, num_bytes.wrapping_mul(PRIME64[0]));
        let high = merge(&acc, &HIGH_SECRET, !num_bytes.wrapping_mul(PRIME64[1]));
        u128::from(high) << 64 | u128::from(low)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize) -> Vec<f32> {
        (0..len).map(|i| f32::from_bits((i as u32).wrapping_mul(0x9e37_79b9))).collect()
    }

    #[test]
    fn pieces_and_instruction_families_change_no_digest() {
        for len in [61, 64, 255, 256, 257, 272, 511, 512, 513, 768, 1000, 4096, 4097] {
            let values = values(len);
            let digest = |isa, piece: usize| {
                let mut hasher = ValueHasher::with_isa(len, isa);
                values.chunks(piece).for_each(|part| hasher.update(part));
                hasher.finish()
            };
            let expected = digest(Isa::Portable, len);
            for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.is_available()) {
                for piece in [1, 7, 16, 250, 256, 300, 1024, len] {
                    assert_eq!(digest(isa, piece), expected, "{len} values, {isa:?}, pieces of {piece}");
                }
            }
        }
    }

    #[test]
    fn a_copy_is_hashed_and_whole_wherever_it_lies() {
        for len in [61, 255, 256, 257, 700, 2048, 4097] {
            let from = values(len);
            let mut plain = ValueHasher::new(len);
            plain.update(&from);
            for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.is_available()) {
                for (piece, offset) in [(len, 0), (len, 3), (300, 0), (300, 1), (7, 0), (256, 16)] {
                    let mut room = crate::cpu::AlignedVec::zeroed(offset + len);
                    let to = &mut room[offset..];
                    let mut hasher = ValueHasher::with_isa(len, isa);
                    for (from, to) in from.chunks(piece).zip(to.chunks_mut(piece)) {
                        hasher.copy(from.into(), to);
                    }
                    let what = format!("{len} values, {isa:?}, pieces of {piece}, {offset}");
                    assert_eq!(hasher.finish(), plain.finish(), "{what}");
                    assert!(to.iter().zip(&from).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}");
                }
            }
        }
    }

    #[test]
    fn every_bit_counts() {
        let hash = |values: &[f32]| {
            let mut hasher = ValueHasher::new(values.len());
            hasher.update(values);
            hasher.finish()
        };
        let mut values = values(700);
        let expected = hash(&values);
        for index in 0..values.len() {
            let bit = 1 << (index % 32);
            values[index] = f32::from_bits(values[index].to_bits() ^ bit);
            assert_ne!(hash(&values), expected, "bit {} of value {index}", index % 32);
            values[index] = f32::from_bits(values[index].to_bits() ^ bit);
        }
    }
}
