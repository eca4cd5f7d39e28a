//! Which instructions the running processor has.

use std::sync::OnceLock;

/// Instruction sets that the kernels have code for, best last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the build target guarantees.
    Portable,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// AVX-512 F, BW and VL.
    Avx512,
    /// AVX-512 with the dot products of bf16 and of bytes.
    Avx512Bf16,
}

impl Isa {
    /// The best set of the running processor; found once.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().into_iter().next_back().unwrap_or(Self::Portable))
    }

    /// Every set the running processor can execute, best last.
    pub fn available() -> Vec<Self> {
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                found.push(Self::Avx2);
            }
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl");
            if avx512 {
                found.push(Self::Avx512);
            }
            if avx512 && is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni") {
                found.push(Self::Avx512Bf16);
            }
        }
        found
    }
}
