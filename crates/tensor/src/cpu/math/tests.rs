use super::super::simd::{Isa, Kernel, Simd};
use super::*;

struct ExpAll<'a>(&'a [f32], &'a mut [f32]);

impl Kernel for ExpAll<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for start in (0..self.0.len()).step_by(16) {
            let lanes = self.0.len() - start;
            // SAFETY: lanes stop at the end of both slices.
            unsafe {
                let y = exp::<S>(load_lanes::<S>(self.0.as_ptr().add(start), lanes));
                store_lanes::<S>(self.1.as_mut_ptr().add(start), lanes, y);
            }
        }
    }
}

fn families() -> Vec<Isa> {
    [Isa::Avx512, Isa::Avx2, Isa::Portable].into_iter().filter(|isa| isa.is_available()).collect()
}

fn exp_on(isa: Isa, x: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    isa.run(ExpAll(x, &mut y));
    y
}

#[test]
fn exp_is_within_two_ulp_and_equal_on_every_family() {
    let x: Vec<f32> = (0..400_000).map(|i| -87.3 + i as f32 * (175.2 / 400_000.0)).collect();
    let first = exp_on(families()[0], &x);
    for (x, y) in x.iter().zip(&first) {
        let want = f64::from(*x).exp();
        let ulp = f64::from(f32::from_bits((want as f32).to_bits() + 1)) - f64::from(want as f32);
        assert!((f64::from(*y) - want).abs() <= 2.0 * ulp, "exp({x}) = {y}, want {want}");
    }
    for isa in families() {
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&exp_on(isa, &x)), bits(&first), "{isa:?}");
    }
}

#[test]
fn exp_is_exact_at_its_edges() {
    for isa in families() {
        let x = [0.0, -0.0, -87.34, -1e30, f32::NEG_INFINITY, f32::NAN, 1e30, f32::INFINITY];
        let y = exp_on(isa, &x);
        assert_eq!(y[..5], [1.0, 1.0, 0.0, 0.0, 0.0], "{isa:?}");
        assert!(y[5].is_nan() && y[6].is_finite() && y[6] > 1e38 && y[7] == y[6], "{isa:?}: {y:?}");
    }
}

#[test]
fn ln_agrees_with_the_reference() {
    for i in 0..200_000 {
        let x = f64::from(i).mul_add(0.01, 1e-9);
        let error = (ln(x) - x.ln()).abs();
        assert!(error <= 4e-16 * x.ln().abs().max(0.25), "ln({x}) is off by {error}");
    }
    for exponent in -1020..1023 {
        let x = 1.3 * 2f64.powi(exponent);
        assert!((ln(x) / x.ln() - 1.0).abs() < 4e-16, "ln({x})");
    }
    for subnormal in (0..52).map(|shift| f64::from_bits(1 << shift)) {
        assert!((ln(subnormal) / subnormal.ln() - 1.0).abs() < 4e-16, "ln({subnormal})");
    }
    assert_eq!((ln(1.0), ln(0.0), ln(f64::INFINITY)), (0.0, f64::NEG_INFINITY, f64::INFINITY));
    assert!(ln(-1.0).is_nan() && ln(f64::NAN).is_nan());
}

#[test]
fn sine_and_cosine_agree_with_the_reference() {
    for i in 0..400_000 {
        let x = f64::from(i) * 2.5 + f64::from(i % 1000) * 1e-3;
        let (sin, cos) = sin_cos(x);
        assert!((sin - x.sin()).abs() < 1e-12 && (cos - x.cos()).abs() < 1e-12, "at {x}");
    }
    let (sin, cos) = sin_cos(-2.0);
    assert!((sin - (-2f64).sin()).abs() < 1e-15 && (cos - (-2f64).cos()).abs() < 1e-15);
}
