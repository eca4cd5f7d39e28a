//! The input embedding with its patches.

use candle_core::{DType, Result, Tensor};

use super::Matrix;
use crate::adapter::{EmbeddingPatch, SiteId};
use crate::kernels;
use crate::model::{AdapterSegment, Batch};

/// `e = scale_t * (row_t(token) + b_t a_t[:, token]) + shift_t` for each token's adapter t; without a patch
/// `e = row(token)`.
#[derive(Clone, Debug)]
pub(in crate::model) struct Embedding {
    /// Where it stands.
    pub(in crate::model) site: SiteId,
    /// The base's table (vocab, dim).
    pub(in crate::model) table: Matrix,
    /// Format of the activations.
    pub(in crate::model) dtype: DType,
}

impl Embedding {
    /// The rows of the batch's tokens under its segments; virtual tokens are rows of their own: (tokens, dim) in the
    /// activations' format.
    pub(in crate::model) fn forward(&self, batch: &Batch) -> Result<Tensor> {
        let e = self.embed(&batch.token_ids, &batch.segments)?;
        if batch.virtual_runs.is_empty() {
            return Ok(e);
        }
        let mut pieces = Vec::with_capacity(2 * batch.virtual_runs.len() + 1);
        let mut next = 0;
        for run in &batch.virtual_runs {
            let rows = run.adapter.tensors.virtual_tokens.as_ref().expect("a virtual run's adapter has virtual tokens");
            pieces.push(e.narrow(0, next, run.start - next)?);
            pieces.push(rows.narrow(0, run.first_row, run.len)?.to_dtype(self.dtype)?);
            next = run.start + run.len;
        }
        pieces.push(e.narrow(0, next, e.dim(0)? - next)?);
        pieces.retain(|piece| piece.elem_count() > 0);
        Tensor::cat(&pieces, 0)
    }

    fn embed(&self, token_ids: &[u32], segments: &[AdapterSegment]) -> Result<Tensor> {
        let patch = |segment: &AdapterSegment| -> bool {
            segment.adapter.as_ref().is_some_and(|adapter| adapter.tensors.embeddings.contains_key(&self.site))
        };
        if !segments.iter().any(patch) {
            return self.base_rows(token_ids);
        }
        let mut pieces = Vec::with_capacity(segments.len());
        for segment in segments {
            let token_ids = &token_ids[segment.start..segment.start + segment.len];
            let patch = segment.adapter.as_ref().and_then(|adapter| adapter.tensors.embeddings.get(&self.site));
            pieces.push(match patch {
                Some(patch) => self.patched(token_ids, patch)?,
                None => self.base_rows(token_ids)?,
            });
        }
        Tensor::cat(&pieces, 0)
    }

    fn base_rows(&self, token_ids: &[u32]) -> Result<Tensor> {
        self.table.rows(token_ids)?.to_dtype(self.dtype)
    }

    /// Replaced rows go over the adapter's own table where it has both.
    fn patched(&self, token_ids: &[u32], patch: &EmbeddingPatch) -> Result<Tensor> {
        let mut e = match &patch.table {
            Some(table) => Matrix::Dense(table.clone()).rows(token_ids)?.to_dtype(self.dtype)?,
            None => self.base_rows(token_ids)?,
        }; // [tokens, dim]
        if let Some((replaced, rows)) = &patch.rows {
            e = with_replaced_rows(&e, token_ids, replaced, rows)?;
        }
        if let Some((a, b)) = &patch.low_rank {
            let ids = Tensor::new(token_ids, a.device())?;
            let columns = a.index_select(&ids, 1)?.t()?.contiguous()?; // [tokens, r]
            e = (e + product_by_row(&columns, b)?)?;
        }
        if let Some(scale) = &patch.scale {
            e = e.broadcast_mul(scale)?;
        }
        match &patch.shift {
            Some(shift) => e.broadcast_add(shift),
            None => Ok(e),
        }
    }
}

/// `x w^T`. On the CPU row by row, so that a row's bits do not depend on the rows beside it.
fn product_by_row(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return kernels::linear(x, w);
    }
    let rows = (0..x.dim(0)?).map(|row| kernels::linear(&x.narrow(0, row, 1)?, w));
    Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)
}

fn with_replaced_rows(e: &Tensor, token_ids: &[u32], replaced: &[u32], rows: &Tensor) -> Result<Tensor> {
    let mut source: Vec<u32> = Vec::with_capacity(token_ids.len());
    for (idx, token_id) in token_ids.iter().enumerate() {
        let row = match replaced.binary_search(token_id) {
            Ok(found) => token_ids.len() + found,
            Err(_) => idx,
        };
        source.push(u32::try_from(row).expect("a step's tokens and a vocabulary's rows fit in u32"));
    }
    let both = Tensor::cat(&[e, &rows.to_dtype(e.dtype())?], 0)?;
    both.index_select(&Tensor::new(source.as_slice(), e.device())?, 0)
}
