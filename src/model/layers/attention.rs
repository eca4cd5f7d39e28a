//! Self-attention over the paged cache.

use candle_core::{Result, Tensor};

use super::{Linear, RmsNorm, Rotation};
use crate::kernels::cpu::{QkPrepare, prepare_qk_op};
use crate::kernels::{AttentionShape, PagedKv};
use crate::model::AdapterSegment;
use crate::model::step::Step;

/// `attention(rope(norm(q(x))), rope(norm(k(x))), v(x))`, grouped-query, causal; then the output projection.
#[derive(Clone, Debug)]
pub(in crate::model) struct Attention {
    /// The query, key and value projections.
    pub(in crate::model) qkv: Qkv,
    /// Norm over each query head, where the family has one.
    pub(in crate::model) q_norm: Option<RmsNorm>,
    /// Norm over each key head, where the family has one.
    pub(in crate::model) k_norm: Option<RmsNorm>,
    /// The output projection.
    pub(in crate::model) o_proj: Linear,
    /// Sizes of the heads.
    pub(in crate::model) heads: Heads,
    /// Sliding window in tokens, the token itself included.
    pub(in crate::model) window: Option<usize>,
}

/// Numbers and length of the heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::model) struct Heads {
    /// Query heads.
    pub(in crate::model) num_heads: usize,
    /// Key and value heads.
    pub(in crate::model) num_kv_heads: usize,
    /// Length of one head's vectors.
    pub(in crate::model) head_dim: usize,
}

/// The query, key and value projections, as the checkpoint has them.
#[derive(Clone, Debug)]
pub(in crate::model) enum Qkv {
    /// Three linears.
    Split {
        /// Queries.
        q_proj: Linear,
        /// Keys.
        k_proj: Linear,
        /// Values.
        v_proj: Linear,
    },
    /// One linear: queries, then keys, then values.
    Fused(Linear),
}

impl Heads {
    /// Length of all queries of a token.
    pub(in crate::model) fn q_size(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Length of all keys (or values) of a token.
    pub(in crate::model) fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }
}

impl Attention {
    /// Writes the keys and values of `x` (tokens, hidden) into `cache` and attends: what the output projection reads,
    /// (tokens, heads * head_dim). `layer` is the number of the decoder layer.
    pub(in crate::model) fn attend(
        &self,
        layer: usize,
        x: &Tensor,
        step: &Step<'_>,
        cache: &PagedKv,
    ) -> Result<Tensor> {
        let Heads { num_heads, num_kv_heads, head_dim } = self.heads;
        let (q, k, v) = match &step.rope {
            Rotation::Host { cos, sin } => self.project_joined(x, step, (cos, sin))?,
            Rotation::Device { .. } => self.project(x, step)?,
        };
        let shape = AttentionShape {
            num_heads,
            num_kv_heads,
            head_dim,
            scale: 1. / (head_dim as f64).sqrt(),
            window: self.window,
        };
        cache.write(&step.attention, &k, &v, &shape)?;
        let y = cache.attend(&q, &step.attention, &shape)?;
        add_branches(y, &q, (layer, step.segments), &shape)
    }

    /// Queries, keys and values, (tokens, heads * head_dim) each, ready for attention: with the CPU's kernels.
    fn project_joined(
        &self,
        x: &Tensor,
        step: &Step<'_>,
        (cos, sin): (&[f32], &[f32]),
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let qkv = match &self.qkv {
            Qkv::Split { q_proj, k_proj, v_proj } => {
                Linear::forward_joined(&[q_proj, k_proj, v_proj], x, step.segments)?
            }
            Qkv::Fused(qkv_proj) => qkv_proj.forward(x, step.segments)?,
        };
        let prepare = QkPrepare {
            cos,
            sin,
            half: cos.len() / x.dim(0)?,
            head_dim: self.heads.head_dim,
            heads: (self.heads.num_heads, self.heads.num_kv_heads),
            norms: (
                self.q_norm.as_ref().and_then(|norm| norm.packed(step.segments)),
                self.k_norm.as_ref().and_then(|norm| norm.packed(step.segments)),
            ),
        };
        prepare_qk_op(&qkv, &prepare)?;
        let (q_size, kv_size) = (self.heads.q_size(), self.heads.kv_size());
        Ok((qkv.narrow(1, 0, q_size)?, qkv.narrow(1, q_size, kv_size)?, qkv.narrow(1, q_size + kv_size, kv_size)?))
    }

    /// The same on any device.
    fn project(&self, x: &Tensor, step: &Step<'_>) -> Result<(Tensor, Tensor, Tensor)> {
        let Heads { num_heads, num_kv_heads, head_dim } = self.heads;
        let (q_size, kv_size) = (self.heads.q_size(), self.heads.kv_size());
        let (q, k, v) = match &self.qkv {
            Qkv::Split { q_proj, k_proj, v_proj } => (
                q_proj.forward(x, step.segments)?,
                k_proj.forward(x, step.segments)?,
                v_proj.forward(x, step.segments)?,
            ),
            Qkv::Fused(qkv_proj) => {
                let qkv = qkv_proj.forward(x, step.segments)?;
                (
                    qkv.narrow(1, 0, q_size)?.contiguous()?,
                    qkv.narrow(1, q_size, kv_size)?.contiguous()?,
                    qkv.narrow(1, q_size + kv_size, kv_size)?.contiguous()?,
                )
            }
        };
        let tokens = x.dim(0)?;
        let q = q.reshape((tokens, num_heads, head_dim))?;
        let k = k.reshape((tokens, num_kv_heads, head_dim))?;
        let q = step.rope.apply(&normed(self.q_norm.as_ref(), q, step)?)?;
        let k = step.rope.apply(&normed(self.k_norm.as_ref(), k, step)?)?;
        Ok((q.reshape((tokens, q_size))?, k.reshape((tokens, kv_size))?, v))
    }
}

/// Adds what each segment's queries find beside the context; y and q: (tokens, heads * head_dim).
fn add_branches(
    y: Tensor,
    q: &Tensor,
    (layer, segments): (usize, &[AdapterSegment]),
    shape: &AttentionShape,
) -> Result<Tensor> {
    let branches: Vec<Option<&PagedKv>> = segments.iter().map(|segment| branch(segment, layer)).collect();
    if branches.iter().all(Option::is_none) {
        return Ok(y);
    }
    let pieces = segments.iter().zip(branches).map(|(segment, branch)| {
        let y = y.narrow(0, segment.start, segment.len)?;
        match branch {
            Some(branch) => y + branch.attend_entries(&q.narrow(0, segment.start, segment.len)?, shape)?,
            None => Ok(y),
        }
    });
    Tensor::cat(&pieces.collect::<Result<Vec<_>>>()?, 0)
}

fn branch(segment: &AdapterSegment, layer: usize) -> Option<&PagedKv> {
    segment.adapter.as_ref()?.layers.get(&layer)?.branch.as_ref()
}

fn normed(norm: Option<&RmsNorm>, x: Tensor, step: &Step<'_>) -> Result<Tensor> {
    match norm {
        Some(norm) => norm.forward(&x, step.segments),
        None => Ok(x),
    }
}
