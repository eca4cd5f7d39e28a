//! Arithmetic for the CPU. Unsafe code of the crate lives here, each block with its reason.

mod ahead;
mod attention;
mod base;
mod block_product;
mod blocks;
mod circulant;
mod dispatch;
#[cfg(target_arch = "x86_64")]
mod dot_avx2;
mod exp;
mod expand;
mod gemm;
mod integers;
mod isa;
mod joint;
mod kv;
mod lanes;
mod limits;
mod linear;
mod memory;
mod norm;
mod ops;
mod packed;
mod pool;
mod pre;
mod rotate;
mod route;
mod rows;
mod scale;
mod shared;
mod shrink;
mod silu;
mod slots;
mod sparse;
mod spectral;
#[cfg(test)]
pub(super) mod testing;
mod tile;
#[cfg(target_arch = "x86_64")]
mod tile_avx2;
#[cfg(target_arch = "x86_64")]
mod tile_avx512;
#[cfg(target_arch = "x86_64")]
mod tile_int16;
#[cfg(target_arch = "x86_64")]
mod tile_int8;
mod tile_integers;
mod vector;
mod words;

pub(crate) use attention::QuerySpan;
pub use base::{BaseMatrix, OwnMatrix, RowForm};
pub use block_product::{BlockProduct, Matrices, PackedMix};
pub use blocks::Blocks;
pub use circulant::Circulant;
pub use integers::{IntegerMatrix, IntegerWidth};
pub use isa::Isa;
pub use joint::JointLowRank;
pub use limits::{dot_rate, integer_rate, read_bandwidth};
pub use linear::SweepLinear;
pub use norm::{Norm, NormRun, NormSlots};
pub use ops::join_op;
pub(crate) use ops::{add_op, attention_op, gated_op, norm_op, prepare_qk_op, silu_mul_op, write_cache_op};
pub use packed::{PackedMatrix, WeightFormat};
pub use pre::PackedPre;
pub use rotate::QkPrepare;
pub use route::Router;
pub use rows::RowMatrix;
pub use scale::PackedScale;
pub use slots::{PackedDelta, PackedSlots, RowGates, SlotRun};
pub use sparse::SparseRows;
pub use spectral::SpectralRows;
pub use vector::PackedVector;
