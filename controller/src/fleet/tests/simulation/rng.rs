//! Random numbers of one seed.

/// A stream of numbers that is a function of its seed.
#[derive(Debug, Clone)]
pub struct Rng {
    seed: u64,
    position: u64,
}

impl Rng {
    pub fn new(seed: u64) -> Self {
        Rng { seed, position: 0 }
    }

    pub fn next(&mut self) -> u64 {
        self.position += 1;
        mix(self.seed, self.position)
    }

    /// `from..=to`
    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from + 1)
    }

    /// True `per_mille` times of 1000.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        self.next() % 1000 < per_mille
    }
}

/// A number that looks random, from two.
pub fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(b).wrapping_add(0x2545_f491_4f6c_dd1d);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
