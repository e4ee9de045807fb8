//! Changes of weights as they travel: byte planes, compressed.
//!
//! An update moves most weights by their last bits. By exclusive or with what they were, the first bytes of nearly all
//! are zero: side by side they take no room.

use std::io;

/// Elements of one message at most: 1 MiB.
pub(crate) const MAX_ELEMENTS: usize = 1 << 18;
/// The fastest level that is not a special case: what is left after the zeros has no pattern.
const LEVEL: i32 = 1;
/// Bytes of an element.
const WIDTH: usize = size_of::<f32>();

/// The byte planes of `values`, compressed.
pub(crate) fn encode(values: &[f32]) -> io::Result<Vec<u8>> {
    let mut planes = vec![0; values.len() * WIDTH];
    for (index, plane) in planes.chunks_exact_mut(values.len().max(1)).enumerate() {
        plane.iter_mut().zip(values).for_each(|(byte, value)| *byte = value.to_le_bytes()[index]);
    }
    zstd::bulk::compress(&planes, LEVEL)
}

/// The values of which these are the planes.
///
/// # Errors
/// What is no such frame, or one of other than `num_elements` elements, or of more than a message has.
pub(crate) fn decode(planes: &[u8], num_elements: usize) -> io::Result<Vec<f32>> {
    let damaged = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("changes of weights: {what}"));
    if num_elements > MAX_ELEMENTS {
        return Err(damaged("more elements than a message has"));
    }
    let bytes = zstd::bulk::decompress(planes, num_elements * WIDTH)?;
    if bytes.len() != num_elements * WIDTH {
        return Err(damaged("planes of another length"));
    }
    let value = |i: usize| f32::from_le_bytes(std::array::from_fn(|plane| bytes[plane * num_elements + i]));
    Ok((0..num_elements).map(value).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_come_back_to_the_bit_and_small_changes_are_small() {
        for len in [0usize, 1, 7, 1000, MAX_ELEMENTS] {
            let values: Vec<f32> =
                (0..len).map(|i| f32::from_bits((i as u32).wrapping_mul(0x9e37_79b9) >> 20)).collect();
            let frame = encode(&values).unwrap();
            let back = decode(&frame, len).unwrap();
            assert!(back.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()) && back.len() == len);
            assert!(len < 1000 || frame.len() < len * 2, "{len} elements of 12 bits take {} bytes", frame.len());
        }
    }

    #[test]
    fn what_is_no_frame_of_so_many_elements_is_refused() {
        let frame = encode(&[1.0, 2.0, 3.0]).unwrap();
        for (bytes, num_elements) in [(&frame[..], 2), (&frame, 4), (&frame[..frame.len() - 1], 3), (b"changes", 1)] {
            decode(bytes, num_elements).unwrap_err();
        }
        assert!(decode(&frame, MAX_ELEMENTS + 1).unwrap_err().to_string().contains("more elements"));
    }
}
