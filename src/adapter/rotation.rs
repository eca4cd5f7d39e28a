//! Rotations from skew-symmetric matrices, block by block. Blocks are row-major f64, one after the other.

use candle_core::{DType, Device, Tensor};

use super::{AdapterError, linalg};

/// How a rotation is made from a skew-symmetric Q.
#[derive(Clone, Copy, Debug)]
pub(super) enum Map {
    /// `(I - Q) (I + Q)^-1`.
    Cayley,
    /// `I + 2 Q + 2 Q^2 + ... + 2 Q^(n-2) + Q^(n-1)` for n terms: the series of `(I + Q) (I - Q)^-1`, cut off.
    Neumann(usize),
}

/// `(m - m^T) / 2` of each block (s, s).
pub(super) fn skew_part(blocks: &[f64], s: usize) -> Vec<f64> {
    let entry = |at: usize| {
        let (block, row, column) = (at / (s * s) * s * s, at / s % s, at % s);
        0.5 * (blocks[at] - blocks[block + column * s + row])
    };
    (0..blocks.len()).map(entry).collect()
}

/// Skew-symmetric blocks (s, s) from their strict upper triangles, each row by row.
pub(super) fn from_upper(triangles: &[f64], s: usize) -> Vec<f64> {
    let count = s * (s - 1) / 2;
    let mut blocks = vec![0.0; triangles.len() / count * s * s];
    for (block, triangle) in blocks.chunks_exact_mut(s * s).zip(triangles.chunks_exact(count)) {
        let places = (0..s).flat_map(|row| (row + 1..s).map(move |column| (row, column)));
        for ((row, column), value) in places.zip(triangle) {
            block[row * s + column] = *value;
            block[column * s + row] = -value;
        }
    }
    blocks
}

/// The strict upper triangles of blocks (s, s), each row by row.
pub(super) fn upper(blocks: &[f64], s: usize) -> Vec<f64> {
    let places = |block| (0..s).flat_map(move |row| (row + 1..s).map(move |column| block * s * s + row * s + column));
    (0..blocks.len() / (s * s)).flat_map(places).map(|at| blocks[at]).collect()
}

/// Shrinks each block to a Frobenius norm of at most `norm_max`.
pub(super) fn limit_norm(blocks: &mut [f64], s: usize, norm_max: f64) {
    for block in blocks.chunks_exact_mut(s * s) {
        let norm = block.iter().map(|value| value * value).sum::<f64>().sqrt();
        if norm > norm_max {
            block.iter_mut().for_each(|value| *value *= norm_max / norm);
        }
    }
}

/// The rotations of skew-symmetric blocks, (blocks, s, s) in f32.
pub(super) fn rotations(skew: &[f64], s: usize, map: Map) -> Result<Tensor, AdapterError> {
    let identity = Tensor::eye(s, DType::F64, &Device::Cpu)?;
    let rotation = |block: &[f64]| -> Result<Tensor, AdapterError> {
        let q = linalg::matrix(block.to_vec(), (s, s))?;
        match map {
            // I + Q has an inverse for every real skew-symmetric Q; only an overflow can hide it.
            Map::Cayley => match linalg::inverse(&(&identity + &q)?)? {
                Some(inverse) => Ok((&identity - &q)?.matmul(&inverse)?),
                None => Ok((&identity * f64::NAN)?),
            },
            Map::Neumann(terms) => {
                let (mut sum, mut power) = (identity.clone(), q.clone());
                if terms == 2 {
                    return Ok((sum + (q * 2.0)?)?);
                }
                for _ in 1..terms.saturating_sub(1) {
                    sum = (sum + (&power * 2.0)?)?;
                    power = power.matmul(&q)?;
                }
                match terms {
                    0 | 1 => Ok(sum),
                    // PEFT adds the square before it looks whether the series ends there.
                    3 => Ok(((sum + (&power * 2.0)?)? + power.matmul(&q)?)?),
                    _ => Ok((sum + power)?),
                }
            }
        }
    };
    let blocks = skew.chunks_exact(s * s).map(rotation).collect::<Result<Vec<_>, _>>()?;
    Ok(Tensor::stack(&blocks, 0)?.to_dtype(DType::F32)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::fake_base::{close, random};

    fn skew(s: usize) -> Vec<f64> {
        let values = linalg::values(&random(1, (2, s * (s - 1) / 2))).unwrap();
        from_upper(&values.iter().map(|value| 0.1 * value).collect::<Vec<_>>(), s)
    }

    #[test]
    fn cayley_rotates_and_neumann_approaches_its_transpose() {
        let exact = rotations(&skew(4), 4, Map::Cayley).unwrap();
        let product = exact.matmul(&exact.transpose(1, 2).unwrap().contiguous().unwrap()).unwrap();
        let identity = Tensor::eye(4, DType::F32, &Device::Cpu).unwrap().broadcast_as((2, 4, 4)).unwrap();
        assert!(close(&product, &identity, 1e-6));
        let series = rotations(&skew(4), 4, Map::Neumann(30)).unwrap();
        assert!(close(&series.transpose(1, 2).unwrap(), &exact, 1e-6));
    }

    #[test]
    fn few_terms_are_those_of_peft() {
        let q = linalg::matrix(skew(3)[..9].to_vec(), (3, 3)).unwrap();
        let power =
            |n: usize| (0..n).fold(Tensor::eye(3, DType::F64, &Device::Cpu).unwrap(), |m, _| m.matmul(&q).unwrap());
        let sum = |factors: &[f64]| {
            let terms = factors.iter().enumerate().map(|(n, factor)| (power(n) * *factor).unwrap());
            terms.reduce(|a, b| (a + b).unwrap()).unwrap().to_dtype(DType::F32).unwrap()
        };
        let expected: [&[f64]; 6] =
            [&[1.], &[1., 2.], &[1., 2., 2., 1.], &[1., 2., 2., 1.], &[1., 2., 2., 2., 1.], &[1., 2., 2., 2., 2., 1.]];
        for (terms, factors) in (1..).zip(expected) {
            let found = rotations(&skew(3)[..9], 3, Map::Neumann(terms)).unwrap().squeeze(0).unwrap();
            assert!(close(&found, &sum(factors), 1e-6), "{terms}");
        }
    }

    #[test]
    fn upper_triangles_and_skew_parts_agree() {
        let blocks = skew(4);
        assert_eq!(skew_part(&blocks, 4), blocks);
        let mut limited = blocks.clone();
        limit_norm(&mut limited, 4, 0.01);
        let norm = limited[..16].iter().map(|value| value * value).sum::<f64>().sqrt();
        assert!((norm - 0.01).abs() < 1e-12);
    }
}
