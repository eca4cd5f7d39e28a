//! What happens to queries and keys between their projection and the attention: norms over heads, rotation.

use super::dispatch::dispatch;
use super::isa::Isa;
use super::norm::{Norm, norm_row};
use super::pool::for_ranges;
use super::shared::Shared;

/// Elements per task.
const GRAIN: usize = 1 << 14;

/// How the queries and keys of joint rows `[queries | keys | values]` are prepared.
#[derive(Clone, Debug)]
pub struct QkPrepare<'a> {
    /// Cosines (tokens, rotary_dim / 2).
    pub cos: &'a [f32],
    /// Sines (tokens, rotary_dim / 2).
    pub sin: &'a [f32],
    /// Half the number of rotated elements per head.
    pub half: usize,
    /// Length of one head's vectors.
    pub head_dim: usize,
    /// Query heads, then key heads.
    pub heads: (usize, usize),
    /// Norms over each query head and each key head, whose runs are of tokens.
    pub norms: (Option<Norm<'a>>, Option<Norm<'a>>),
}

/// Normalises and rotates the queries and keys of `rows` (tokens, stride) in place; a row's values are left alone.
///
/// # Panics
/// When lengths do not fit.
pub(super) fn prepare_qk(rows: &mut [f32], stride: usize, prepare: &QkPrepare<'_>) {
    let QkPrepare { cos, sin, half, head_dim, heads, norms } = prepare;
    let (tokens, width) = (rows.len() / stride, (heads.0 + heads.1) * head_dim);
    assert!(width <= stride && 2 * half <= *head_dim, "a row holds the heads, a head the rotated part");
    assert!(cos.len() == tokens * half && sin.len() == tokens * half, "one angle per token and pair");
    let rows = Shared::new(rows);
    for_ranges(tokens, GRAIN / width, |range| {
        let mut normed = vec![0.0; *head_dim];
        for token in range {
            #[expect(unsafe_code, reason = "tasks write disjoint rows")]
            // SAFETY: a task has tokens of its own.
            let row = unsafe { rows.part(token * stride..token * stride + width) };
            let (cos, sin) = (&cos[token * half..][..*half], &sin[token * half..][..*half]);
            for (head_idx, head) in row.chunks_exact_mut(*head_dim).enumerate() {
                if let Some(norm) = if head_idx < heads.0 { &norms.0 } else { &norms.1 } {
                    let (weight, shift) = norm.parameters(token);
                    norm_row(Isa::best(), head, weight, norm.eps, &mut normed);
                    if let Some(shift) = shift {
                        normed.iter_mut().zip(shift).for_each(|(y, s)| *y += s);
                    }
                    head.copy_from_slice(&normed);
                }
                rotate_head(Isa::best(), cos, sin, head);
            }
        }
    });
}

dispatch! {
    /// Rotates the first `2 * cos.len()` elements, each of the first half with its partner in the second.
    fn rotate_head(cos: &[f32], sin: &[f32], head: &mut [f32]) => rotate_head_body
}

#[inline(always)]
fn rotate_head_body<const FMA: bool>(cos: &[f32], sin: &[f32], head: &mut [f32]) {
    let (first, rest) = head.split_at_mut(cos.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::super::norm::NormRun;
    use super::*;
    use crate::kernels::cpu::testing::random;

    #[test]
    fn queries_and_keys_are_normed_and_rotated_and_values_are_not() {
        let (head_dim, half, tokens, stride) = (6, 2, 3, 6 * 4);
        let rows = random(tokens * stride, 1);
        let angles = random(tokens * half, 2);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let weight = random(head_dim, 3);
        let norm = Norm { weight: &weight, eps: 1e-6, runs: vec![NormRun { rows: 0..tokens, slots: None }] };
        let prepare = QkPrepare { cos: &cos, sin: &sin, half, head_dim, heads: (2, 1), norms: (Some(norm), None) };
        let mut found = rows.clone();
        prepare_qk(&mut found, stride, &prepare);
        for token in 0..tokens {
            for head in 0..4 {
                let at = token * stride + head * head_dim;
                let mut expected: Vec<f64> = rows[at..at + head_dim].iter().map(|v| f64::from(*v)).collect();
                if head < 2 {
                    let mean = expected.iter().map(|v| v * v).sum::<f64>() / head_dim as f64;
                    let scale = 1.0 / (mean + 1e-6).sqrt();
                    expected.iter_mut().zip(&weight).for_each(|(v, w)| *v *= scale * f64::from(*w));
                }
                if head < 3 {
                    for i in 0..half {
                        let angle = f64::from(angles[token * half + i]);
                        let (a, b) = (expected[i], expected[i + half]);
                        expected[i] = a * angle.cos() - b * angle.sin();
                        expected[i + half] = b * angle.cos() + a * angle.sin();
                    }
                }
                for (found, expected) in found[at..at + head_dim].iter().zip(&expected) {
                    assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
                }
            }
        }
    }
}
