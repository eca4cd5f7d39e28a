//! Arithmetic for the CPU. Unsafe code of the crate lives here, each block with its reason.

mod attention;
mod dispatch;
mod gemm;
mod isa;
mod linear;
mod ops;
mod packed;
mod pre;
mod rows;
mod scale;
mod sparse;
#[cfg(test)]
mod testing;
mod tile;

pub(crate) use attention::QuerySpan;
pub use isa::Isa;
pub use linear::{BaseLinear, PackedDelta, PackedSlots, SlotRun};
pub(crate) use ops::{attention_op, linear_op, write_cache_op};
pub use packed::{PackedMatrix, WeightFormat};
pub use pre::PackedPre;
pub use rows::RowMatrix;
pub use scale::PackedScale;
pub use sparse::SparseRows;
