//! How keys and values lie in their blocks for the CPU's kernels.
//!
//! Keys are stored transposed inside their block, `[blocks][kv_heads][head_dim][block_tokens]`, so that the scores of
//! neighbouring positions are neighbouring lanes; values as they come, `[blocks][kv_heads][block_tokens][head_dim]`.

#![expect(unsafe_code, reason = "vector loads through raw pointers")]

use half::bf16;

use super::lanes::Lanes;
use super::words::bf16_bits;
use crate::kernels::AttentionShape;

/// A number that keys and values are kept as.
pub(super) trait KvElement: Copy + Send + Sync {
    /// The nearest number of this format; ties go to even.
    fn narrow(value: f32) -> Self;
    /// The same number.
    fn widen(self) -> f32;
    /// Neighbouring numbers.
    ///
    /// # Safety
    /// As for [`Lanes`].
    unsafe fn lanes<L: Lanes>(from: *const Self) -> L;
}

impl KvElement for f32 {
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load(from) }
    }
}

impl KvElement for bf16 {
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self::from_bits(bf16_bits(value) as u16)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_bf16(from) }
    }
}

/// Keys and values of one layer, in f32 or bf16.
#[derive(Clone, Copy, Debug)]
pub(super) struct CacheView<'a, T> {
    /// `[blocks][kv_heads][head_dim][block_tokens]`.
    pub keys: &'a [T],
    /// `[blocks][kv_heads][block_tokens][head_dim]`.
    pub values: &'a [T],
    /// Positions per block.
    pub block_tokens: usize,
}

/// Rows of a matrix that need not adjoin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows<'a> {
    /// From the first row's first element on.
    pub values: &'a [f32],
    /// Elements between the beginnings of rows.
    pub stride: usize,
}

/// Writes keys `k` (tokens, kv_heads, head_dim) to their slots of `keys`, `[blocks][kv_heads][head_dim][block_tokens]`.
///
/// # Panics
/// When lengths do not fit.
pub(super) fn write_keys<T: KvElement>(
    k: Rows<'_>,
    slots: &[u32],
    shape: AttentionShape,
    block_tokens: usize,
    keys: &mut [T],
) {
    for_each_head(k, slots, shape, block_tokens, |base, offset, k| {
        for (d, value) in k.iter().enumerate() {
            keys[base + d * block_tokens + offset] = T::narrow(*value);
        }
    });
}

/// Writes values `v` (tokens, kv_heads, head_dim) to their slots of `values`,
/// `[blocks][kv_heads][block_tokens][head_dim]`.
///
/// # Panics
/// When lengths do not fit.
pub(super) fn write_values<T: KvElement>(
    v: Rows<'_>,
    slots: &[u32],
    shape: AttentionShape,
    block_tokens: usize,
    values: &mut [T],
) {
    for_each_head(v, slots, shape, block_tokens, |base, offset, v| {
        for (kept, value) in values[base + offset * v.len()..].iter_mut().zip(v) {
            *kept = T::narrow(*value);
        }
    });
}

/// Calls `f(start of the head in its block, offset in the block, the head's vector)` for every token and head.
fn for_each_head(
    rows: Rows<'_>,
    slots: &[u32],
    shape: AttentionShape,
    block_tokens: usize,
    mut f: impl FnMut(usize, usize, &[f32]),
) {
    let AttentionShape { num_kv_heads, head_dim, .. } = shape;
    for (token, slot) in slots.iter().enumerate() {
        let (block, offset) = (*slot as usize / block_tokens, *slot as usize % block_tokens);
        for head in 0..num_kv_heads {
            let base = (block * num_kv_heads + head) * head_dim * block_tokens;
            f(base, offset, &rows.values[token * rows.stride + head * head_dim..][..head_dim]);
        }
    }
}
