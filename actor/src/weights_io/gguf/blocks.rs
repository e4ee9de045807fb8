//! Element and block formats, and their conversion to f32.

use half::{bf16, f16};
use std::fmt;

/// Elements of a quantised block.
const BLOCK: usize = 32;

/// Formats this crate reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum BlockType {
    F32,
    F16,
    Bf16,
    /// 4 bits an element, `d * (q - 8)`.
    Q4_0,
    /// 4 bits an element, `d * q + m`.
    Q4_1,
    /// 8 bits an element, `d * q`.
    Q8_0,
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BlockType::F32 => "F32",
            BlockType::F16 => "F16",
            BlockType::Bf16 => "BF16",
            BlockType::Q4_0 => "Q4_0",
            BlockType::Q4_1 => "Q4_1",
            BlockType::Q8_0 => "Q8_0",
        })
    }
}

impl BlockType {
    /// All formats, for error messages.
    pub(super) const SUPPORTED: &str = "F32, F16, BF16, Q8_0, Q4_0 or Q4_1";

    /// The format of a ggml type code, or the name of one that is not read.
    pub(super) fn from_code(code: u32) -> Result<Self, String> {
        match code {
            0 => Ok(BlockType::F32),
            1 => Ok(BlockType::F16),
            2 => Ok(BlockType::Q4_0),
            3 => Ok(BlockType::Q4_1),
            8 => Ok(BlockType::Q8_0),
            30 => Ok(BlockType::Bf16),
            other => Err(unsupported_name(other)),
        }
    }

    /// The ggml type code.
    pub(super) fn code(self) -> u32 {
        match self {
            BlockType::F32 => 0,
            BlockType::F16 => 1,
            BlockType::Q4_0 => 2,
            BlockType::Q4_1 => 3,
            BlockType::Q8_0 => 8,
            BlockType::Bf16 => 30,
        }
    }

    /// Elements and bytes of one block.
    fn block(self) -> (usize, usize) {
        match self {
            BlockType::F32 => (1, 4),
            BlockType::F16 | BlockType::Bf16 => (1, 2),
            BlockType::Q4_0 => (BLOCK, 18),
            BlockType::Q4_1 => (BLOCK, 20),
            BlockType::Q8_0 => (BLOCK, 34),
        }
    }

    /// Bytes of a tensor whose innermost dimension stands last; `None` where rows are not whole blocks or the size
    /// overflows.
    pub(super) fn bytes_of(self, shape: &[u64]) -> Option<u64> {
        let (elements, bytes) = self.block();
        let row = shape.last().copied().unwrap_or(1);
        let count = shape.iter().try_fold(1u64, |product, n| product.checked_mul(*n))?;
        row.is_multiple_of(elements as u64).then_some(())?;
        (count / elements as u64).checked_mul(bytes as u64)
    }

    /// Convert whole blocks; `bytes` holds exactly `out.len()` elements.
    pub(super) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        let (elements, block_bytes) = self.block();
        let decode_block = match self {
            BlockType::F32 => |b: &[u8], out: &mut [f32]| out[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            BlockType::F16 => |b: &[u8], out: &mut [f32]| out[0] = half_at(b, 0),
            BlockType::Bf16 => |b: &[u8], out: &mut [f32]| out[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            BlockType::Q4_0 => decode_q4_0,
            BlockType::Q4_1 => decode_q4_1,
            BlockType::Q8_0 => decode_q8_0,
        };
        let blocks = bytes.chunks_exact(block_bytes).zip(out.chunks_exact_mut(elements));
        blocks.for_each(|(block, out)| decode_block(block, out));
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Low nibbles are the first 16 elements, high nibbles the last 16.
fn decode_nibbles(quants: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(BLOCK / 2);
    for ((q, low), high) in quants.iter().zip(low).zip(high) {
        *low = value(q & 0x0f);
        *high = value(q >> 4);
    }
}

fn decode_q4_0(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    decode_nibbles(&block[2..], out, |q| (f32::from(q) - 8.0) * scale);
}

fn decode_q4_1(block: &[u8], out: &mut [f32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    decode_nibbles(&block[4..], out, |q| f32::from(q) * scale + minimum);
}

fn decode_q8_0(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    block[2..].iter().zip(out).for_each(|(q, out)| *out = f32::from(*q as i8) * scale);
}

fn unsupported_name(code: u32) -> String {
    let name = match code {
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        other => return format!("number {other}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::BlockType;
    use half::f16;

    fn block(header: &[f32], quants: impl Iterator<Item = u8>) -> Vec<u8> {
        header.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).chain(quants).collect()
    }

    fn check(kind: BlockType, bytes: &[u8], expected: impl Fn(usize) -> f32) {
        let mut out = [f32::NAN; 64];
        kind.decode(&[bytes, bytes].concat(), &mut out);
        out.iter().enumerate().for_each(|(i, x)| assert_eq!(*x, expected(i % 32), "{kind} element {i}"));
    }

    #[test]
    fn blocks_decode_by_their_formulas() {
        // Element i < 16 has quant i, element 16 + i has quant 15 - i.
        let nibbles = || (0..16u8).map(|i| i | (15 - i) << 4);
        let quant = |i: usize| if i < 16 { i as f32 } else { (31 - i) as f32 };
        check(BlockType::Q4_0, &block(&[0.5], nibbles()), |i| 0.5 * (quant(i) - 8.0));
        check(BlockType::Q4_1, &block(&[0.25, -3.0], nibbles()), |i| 0.25 * quant(i) - 3.0);
        let bytes = (0..32u8).map(|i| (i * 8).wrapping_sub(128));
        check(BlockType::Q8_0, &block(&[0.125], bytes), |i| 0.125 * (i as f32 * 8.0 - 128.0));
    }

    #[test]
    fn sizes_count_whole_blocks() {
        assert_eq!(BlockType::Q4_1.bytes_of(&[3, 64]), Some(120));
        assert_eq!(BlockType::Q4_1.bytes_of(&[64, 3]), None);
        assert_eq!(BlockType::F16.bytes_of(&[5]), Some(10));
        assert_eq!(BlockType::F32.bytes_of(&[u64::MAX, 4]), None);
        for kind in [0, 1, 2, 3, 8, 30] {
            assert_eq!(BlockType::from_code(kind).unwrap().code(), kind);
        }
        assert_eq!(BlockType::from_code(14).unwrap_err(), "Q6_K");
    }
}
