//! Logarithm, exponential and normal quantile in f64 from basic arithmetic alone.
//!
//! The platform's mathematical library differs between systems in the last bits; what is computed here enters weights
//! and rotary frequencies, which must not. Only `+ - * /` and `sqrt`, which IEEE 754 rounds correctly, are used.

const LN_2_HI: f64 = 0.693_147_180_369_123_8;
const LN_2_LO: f64 = 1.908_214_929_270_587_7e-10;

/// Natural logarithm of a positive, finite, normal number, to within 2 units in the last place.
///
/// # Source
/// `x = 2^k m` with `m` in [sqrt(1/2), sqrt(2)), then `ln m = 2 atanh((m - 1) / (m + 1))` as a series.
pub(crate) fn ln(x: f64) -> f64 {
    debug_assert!(x.is_normal() && x > 0.0, "ln is for positive normal numbers");
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) & 0x7ff) as i64 - 1023;
    let mut mantissa = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | (1023 << 52));
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let z = (mantissa - 1.0) / (mantissa + 1.0);
    let square = z * z;
    // |z| < 0.1716, so the term z^25 / 25 is below 1e-20.
    let series = (1..=12).rev().fold(0.0, |sum, n| (sum + 1.0 / f64::from(2 * n + 1)) * square);
    let k = exponent as f64;
    k * LN_2_HI + (2.0 * z + (2.0 * z * series + k * LN_2_LO))
}

/// Exponential of `x` in [-700, 700], to within a few units in the last place.
pub(crate) fn exp(x: f64) -> f64 {
    debug_assert!(x.abs() <= 700.0, "exp is for numbers whose exponential is normal");
    let k = (x * std::f64::consts::LOG2_E).round();
    let r = (x - k * LN_2_HI) - k * LN_2_LO;
    // |r| < 0.3466, so the term r^17 / 17! is below 1e-22.
    let series = (1..=17).rev().fold(1.0, |sum, n| 1.0 + sum * r / f64::from(n));
    series * f64::from_bits(((k as i64 + 1023) as u64) << 52)
}

/// The number below which a standard normal variable falls with probability `p` in (0, 1), to about 1e-16 relative.
///
/// # Source
/// M. J. Wichura, "Algorithm AS 241: the percentage points of the normal distribution", Applied Statistics 37 (1988),
/// PPND16.
pub(crate) fn normal_quantile(p: f64) -> f64 {
    debug_assert!(p > 0.0 && p < 1.0, "a probability strictly between 0 and 1");
    let q = p - 0.5;
    if q.abs() <= 0.425 {
        let r = 0.180_625 - q * q;
        return q * rational(&CENTRE, r);
    }
    let tail = if q < 0.0 { p } else { 1.0 - p };
    let r = (-ln(tail)).sqrt();
    let magnitude = if r <= 5.0 { rational(&MIDDLE, r - 1.6) } else { rational(&FAR, r - 5.0) };
    if q < 0.0 { -magnitude } else { magnitude }
}

/// Quotient of two polynomials, coefficients from the constant term upwards.
fn rational(coefficients: &[[f64; 8]; 2], x: f64) -> f64 {
    let [numerator, denominator] = coefficients.map(|c| c.iter().rev().fold(0.0, |sum, a| sum * x + a));
    numerator / denominator
}

const CENTRE: [[f64; 8]; 2] = [
    [
        3.387_132_872_796_366_5,
        1.331_416_678_917_843_8e2,
        1.971_590_950_306_551_3e3,
        1.373_169_376_550_946e4,
        4.592_195_393_154_987e4,
        6.726_577_092_700_87e4,
        3.343_057_558_358_813e4,
        2.509_080_928_730_122_7e3,
    ],
    [
        1.0,
        4.231_333_070_160_091e1,
        6.871_870_074_920_579e2,
        5.394_196_021_424_751e3,
        2.121_379_430_158_659_7e4,
        3.930_789_580_009_271e4,
        2.872_908_573_572_194_3e4,
        5.226_495_278_852_545e3,
    ],
];

const MIDDLE: [[f64; 8]; 2] = [
    [
        1.423_437_110_749_683_5,
        4.630_337_846_156_546,
        5.769_497_221_460_691,
        3.647_848_324_763_204_5,
        1.270_458_252_452_368_4,
        2.417_807_251_774_506e-1,
        2.272_384_498_926_918_4e-2,
        7.745_450_142_783_414e-4,
    ],
    [
        1.0,
        2.053_191_626_637_759,
        1.676_384_830_183_803_8,
        6.897_673_349_851e-1,
        1.481_039_764_274_800_8e-1,
        1.519_866_656_361_645_7e-2,
        5.475_938_084_995_345e-4,
        1.050_750_071_644_416_9e-9,
    ],
];

const FAR: [[f64; 8]; 2] = [
    [
        6.657_904_643_501_103,
        5.463_784_911_164_114,
        1.784_826_539_917_291_3,
        2.965_605_718_285_048_7e-1,
        2.653_218_952_657_612_4e-2,
        1.242_660_947_388_078_4e-3,
        2.711_555_568_743_487_6e-5,
        2.010_334_399_292_288_1e-7,
    ],
    [
        1.0,
        5.998_322_065_558_88e-1,
        1.369_298_809_227_358e-1,
        1.487_536_129_085_061_5e-2,
        7.868_691_311_456_133e-4,
        1.846_318_317_510_054_8e-5,
        1.421_511_758_316_446e-7,
        2.044_263_103_389_939_8e-15,
    ],
];

#[cfg(test)]
mod tests {
    use super::{exp, ln, normal_quantile};

    #[test]
    fn ln_and_exp_agree_with_the_platform() {
        for i in 1..20_000 {
            let x = f64::from(i) * 0.37 - 3700.0;
            let e = x / 10.0;
            assert!((exp(e) / e.exp() - 1.0).abs() < 2e-15, "exp({e})");
            let positive = f64::from(i) * 1.7e-3;
            assert!((ln(positive) - positive.ln()).abs() <= 1e-15 * positive.ln().abs().max(0.1), "ln({positive})");
        }
    }

    /// Quantiles from tables of the normal distribution.
    #[test]
    fn quantiles_match_tables() {
        for (p, z) in [
            (0.5, 0.0),
            (0.975, 1.959_963_984_540_054),
            (0.8, 0.841_621_233_572_914_3),
            (1e-3, -3.090_232_306_167_813_6),
            (1e-10, -6.361_340_902_404_056),
            (1e-15, -7.941_345_326_170_998),
        ] {
            assert!((normal_quantile(p) - z).abs() < 1e-13, "{p}: {}", normal_quantile(p));
        }
    }
}
