//! Transforms of a linear's input: what a run's rows become before they meet the weight.

use super::blocks::Blocks;

/// A transform of the rows of `x`, each by itself, in the CPU's form.
#[derive(Debug)]
pub enum PackedPre {
    /// Elementwise product, (k).
    Diag(Vec<f32>),
    /// Each block of inputs times a matrix, as a row. The blocks tile the inputs, or are one that all inputs share.
    BlockDiag(Blocks),
    /// Factors in the order in which they act: a permutation of the inputs, (k), and blocks. The inputs in that order are
    /// multiplied, and the results go back to where they came from.
    Butterfly(Vec<(Vec<u32>, Blocks)>),
}

impl PackedPre {
    /// Transforms one row in place.
    pub(super) fn apply(&self, row: &mut [f32]) {
        match self {
            Self::Diag(scale) => {
                assert_eq!(row.len(), scale.len(), "the transform is of the length of x");
                row.iter_mut().zip(scale).for_each(|(x, scale)| *x *= scale);
            }
            Self::BlockDiag(blocks) => {
                assert!(row.len().is_multiple_of(blocks.s), "the blocks tile x");
                blocks.multiply(0, row);
            }
            Self::Butterfly(factors) => {
                let mut moved = vec![0.0; row.len()];
                for (places, blocks) in factors {
                    moved.iter_mut().zip(places).for_each(|(to, from)| *to = row[*from as usize]);
                    blocks.multiply(0, &mut moved);
                    moved.iter().zip(places).for_each(|(from, to)| row[*to as usize] = *from);
                }
            }
        }
    }
}
