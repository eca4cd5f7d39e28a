//! Inputs for the kernels' tests.

/// `len` values in [-1, 1) drawn from `seed`.
pub(in crate::kernels) fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        #[expect(clippy::cast_precision_loss, reason = "24 bits fit an f32")]
        let unit = (state >> 40) as f32 / (1_u64 << 24) as f32;
        unit * 2.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}
