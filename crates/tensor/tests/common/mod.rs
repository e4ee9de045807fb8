//! What the tests of matrix products share.

use temper_tensor::{Buffer, CpuConfig, CpuDevice, Device, Isa};

/// Numbers in -1..1 from a seed.
pub fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// A device of two threads for every instruction family that this CPU has.
pub fn devices() -> Vec<CpuDevice> {
    [Isa::Avx512, Isa::Avx2, Isa::Portable]
        .into_iter()
        .filter(|isa| isa.is_available())
        .map(|isa| CpuDevice::new(CpuConfig { num_threads: 2, isa: Some(isa) }))
        .collect()
}

/// The numbers of a buffer.
pub fn host(dev: &CpuDevice, buffer: &Buffer) -> Vec<f32> {
    let mut data = vec![0.0; buffer.len()];
    dev.read(buffer.all(), &mut data);
    data
}

/// Numbers as their bits.
pub fn bits(data: &[f32]) -> Vec<u32> {
    data.iter().map(|x| x.to_bits()).collect()
}

/// Equal to the bit, or the first element that is not.
pub fn assert_bits(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: element {i} is {a}, the reference says {b}");
    }
}
