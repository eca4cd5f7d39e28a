//! Output scales as linear maps: one after the other, and backwards.

use candle_core::{DType, Result, Tensor};

use super::super::Scale;
use super::super::merge::partners;
use super::{Fault, refused};

/// The scale `second(first(y))`, in f32.
pub(super) fn then(first: &Scale, second: &Scale) -> std::result::Result<Scale, Fault> {
    Ok(match (first, second) {
        (Scale::One, scale) | (scale, Scale::One) => scale.clone(),
        (Scale::Diag(first), Scale::Diag(second)) => Scale::Diag((wide(first)? * wide(second)?)?),
        (Scale::Diag(scale), Scale::PairRot { p, q, half }) => {
            let scale = wide(scale)?;
            let (p, q) = ((wide(p)? * &scale)?, (wide(q)? * swapped(&scale, *half)?)?);
            Scale::PairRot { p, q, half: *half }
        }
        (Scale::PairRot { p, q, half }, Scale::Diag(scale)) => {
            let scale = wide(scale)?;
            Scale::PairRot { p: (wide(p)? * &scale)?, q: (wide(q)? * &scale)?, half: *half }
        }
        (Scale::BlockDiag(_), _) | (_, Scale::BlockDiag(_)) => {
            return refused("one multiplies blocks of outputs, which no other scale can be put together with");
        }
        (Scale::PairRot { .. }, Scale::PairRot { .. }) => {
            return refused("more than one of them rotates the outputs, and the order of rotations is not defined");
        }
    })
}

/// The scale that undoes this one, in f32; refused where there is none.
pub(super) fn inverse(scale: &Scale) -> std::result::Result<Scale, Fault> {
    let (inverse, divisor) = match scale {
        Scale::One => return Ok(Scale::One),
        Scale::Diag(scale) => {
            let scale = wide(scale)?;
            (Scale::Diag(scale.recip()?), scale)
        }
        Scale::PairRot { p, q, half } => {
            // Of [[p, -q], [q', p']] the inverse is [[p', q], [-q', p]] over p p' + q q'.
            let (p, q) = (wide(p)?, wide(q)?);
            let (other_p, other_q) = (swapped(&p, *half)?, swapped(&q, *half)?);
            let determinant = ((&p * &other_p)? + (&q * other_q)?)?;
            let inverse = Scale::PairRot { p: (other_p / &determinant)?, q: (q / &determinant)?.neg()?, half: *half };
            (inverse, determinant)
        }
        Scale::BlockDiag(_) => {
            return refused("one multiplies blocks of outputs, and a later one adds to them: name the later one first");
        }
    };
    if divisor.abs()?.min_all()?.to_scalar::<f32>()? == 0.0 {
        return refused("one scales some outputs by zero, and a later one adds to them: name the later one first");
    }
    Ok(inverse)
}

/// `1 + strength (g - 1)`, in f32; the same scale at strength 1.
pub(super) fn at_strength(scale: &Scale, strength: f32) -> std::result::Result<Scale, Fault> {
    Ok(match scale {
        Scale::One => Scale::One,
        same if strength == 1.0 => same.clone(),
        Scale::Diag(scale) => {
            let strength = f64::from(strength);
            Scale::Diag(wide(scale)?.affine(strength, 1.0 - strength)?)
        }
        Scale::PairRot { .. } | Scale::BlockDiag(_) => {
            return refused("a rotation of outputs has no strength but 1");
        }
    })
}

/// The vector (out) with the partners at distance `half` exchanged.
fn swapped(vector: &Tensor, half: usize) -> Result<Tensor> {
    let signs = partners(&Tensor::ones_like(vector)?, half)?;
    partners(vector, half)? * signs
}

fn wide(tensor: &Tensor) -> Result<Tensor> {
    tensor.to_dtype(DType::F32)
}
