//! Arithmetic for the CPU. Unsafe code of the crate lives here, each block with its reason.

mod gemm;
mod isa;
mod packed;
mod tile;

pub(crate) use gemm::matmul_packed;
pub use isa::Isa;
pub use packed::{PackedMatrix, WeightFormat};
