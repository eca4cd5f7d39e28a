//! The arithmetic that candle does not have, each function with its plain reference.

pub mod cpu;
mod matrix;

pub use matrix::Matrix;
