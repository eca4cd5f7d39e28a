//! The exponential function.

use super::dispatch::fma;

/// `e^x` for `x <= 0` to about 2 units in the last place; exactly 1 at 0 and exactly 0 below -87.
///
/// Splits `x = n ln 2 + f` with |f| <= ln 2 / 2 and sums the Taylor series of `e^f`; plain arithmetic, so that it
/// vectorises.
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding and subtracting it rounds to an integer.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.max(-87.5);
    let shifted = fma::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let f = fma::<FMA>(n, -LN2_LOW, fma::<FMA>(n, -LN2_HIGH, clamped));
    let mut series = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = fma::<FMA>(series, f, coefficient);
    }
    // The integer sits in the low mantissa bits of `shifted`; moved into the exponent it is 2^n.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    if x < -87.0 { 0.0 } else { series * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_where_it_must_be_and_close_elsewhere() {
        for exp in [exp::<true>, exp::<false>] {
            assert_eq!(exp(0.0).to_bits(), 1.0_f32.to_bits());
            assert_eq!(exp(f32::NEG_INFINITY), 0.0);
            for i in 0..87_000_u32 {
                let x = -(i as f32) / 1000.0;
                let expected = f64::from(x).exp();
                assert!((f64::from(exp(x)) - expected).abs() <= expected * 4e-7, "{x}");
            }
        }
    }
}
