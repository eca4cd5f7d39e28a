//! Arithmetic for the CPU. Unsafe code of the crate lives here, each block with its reason.

mod attention;
mod dispatch;
mod gemm;
mod isa;
mod limits;
mod linear;
mod ops;
mod packed;
mod rows;
#[cfg(test)]
mod testing;
mod tile;

pub(crate) use attention::QuerySpan;
pub use isa::Isa;
pub use limits::{dot_rate, read_bandwidth};
pub use linear::{BaseLinear, PackedDelta, PackedSlots, SlotRun};
pub use ops::linear_op;
pub(crate) use ops::{attention_op, write_cache_op};
pub use packed::{PackedMatrix, WeightFormat};
pub use rows::RowMatrix;
