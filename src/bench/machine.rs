//! Where a measurement was made, and the limits of that machine.

use std::fs;

use serde::Serialize;

use crate::kernels::cpu::{Isa, WeightFormat, dot_rate, read_bandwidth};

/// What a reader needs to know of the machine.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's name; null where the system does not tell.
    pub cpu: Option<String>,
    /// Processors that threads can run on.
    pub cores: usize,
    /// Best instruction set that the kernels have code for.
    pub instruction_set: String,
    /// Memory in bytes; null where the system does not tell.
    pub memory_bytes: Option<u64>,
    /// Measured limits; null where they were not asked for.
    pub limits: Option<Limits>,
}

/// Measured limits of a machine, all threads together.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Limits {
    /// Reading memory forward, 10^9 bytes per second.
    pub read_gb_per_s: f64,
    /// Multiplying bf16 in cache with the kernels' own tile, 10^9 operations per second.
    pub bf16_gflop_per_s: f64,
    /// The same in f32.
    pub f32_gflop_per_s: f64,
}

impl Machine {
    /// Looks at the machine; measures its limits where asked to.
    pub(super) fn look(measure: bool) -> Self {
        Self {
            cpu: field("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            instruction_set: format!("{:?}", Isa::best()),
            memory_bytes: memory_bytes(),
            limits: measure.then(Limits::measure),
        }
    }
}

impl Limits {
    fn measure() -> Self {
        Self {
            read_gb_per_s: read_gb_per_s(),
            bf16_gflop_per_s: dot_rate(WeightFormat::Bf16) / 1e9,
            f32_gflop_per_s: dot_rate(WeightFormat::F32) / 1e9,
        }
    }
}

/// Reading memory forward, 10^9 bytes per second.
pub(super) fn read_gb_per_s() -> f64 {
    read_bandwidth() / 1e9
}

fn memory_bytes() -> Option<u64> {
    let kilobytes: u64 = field("/proc/meminfo", "MemTotal")?.strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// The first value of a `name : value` line.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
    Some(value?.trim().to_owned())
}
