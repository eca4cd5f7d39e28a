//! Arithmetic for the CPU. Unsafe code of the crate lives here, each block with its reason.

mod attention;
mod dispatch;
mod gemm;
mod isa;
mod linear;
mod packed;
mod rows;
#[cfg(test)]
mod testing;
mod tile;

pub(crate) use attention::{CacheView, QuerySpan, paged_attention, write_keys, write_values};
pub(crate) use gemm::matmul_packed;
pub use isa::Isa;
pub(crate) use linear::linear_packed;
pub use linear::{BaseLinear, PackedDelta, PackedSlots, SlotRun};
pub use packed::{PackedMatrix, WeightFormat};
pub use rows::RowMatrix;
