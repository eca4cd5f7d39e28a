//! Writing keys and values into their slots.

use candle_core::{Device, Result, Tensor};

/// The index that [`write_kv`] scatters with: `slots[t]` in every column of row t, (tokens, width) in u32.
///
/// # Errors
/// When the device fails.
pub(super) fn slot_index(slots: &[u32], width: usize, device: &Device) -> Result<Tensor> {
    let column = Tensor::from_slice(slots, (slots.len(), 1), device)?;
    column.broadcast_as((slots.len(), width))?.contiguous()
}

/// `cache[slots[t], :] = rows[t, :]` in place.
///
/// `cache` is (slots, width), `rows` (tokens, width) in the same format, `index` from [`slot_index`]. Slots not named
/// keep their content; nothing else is copied.
///
/// # Errors
/// When a slot lies outside the cache or the device fails.
pub(super) fn write_kv(cache: &Tensor, index: &Tensor, rows: &Tensor) -> Result<()> {
    cache.scatter_set(index, &rows.contiguous()?, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    #[test]
    fn rows_land_in_their_slots_and_nowhere_else() {
        let cache = Tensor::zeros((4, 2), DType::F32, &Device::Cpu).unwrap();
        let rows = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu).unwrap();
        let index = slot_index(&[3, 1], 2, &Device::Cpu).unwrap();
        write_kv(&cache, &index, &rows).unwrap();
        assert_eq!(cache.to_vec2::<f32>().unwrap(), [[0., 0.], [3., 4.], [0., 0.], [1., 2.]]);
    }
}
