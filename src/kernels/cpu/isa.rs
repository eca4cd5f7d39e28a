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
    /// AVX-512 with the dot product of bytes.
    Avx512Vnni,
    /// AVX-512 with the dot products of bytes and of bf16.
    Avx512Bf16,
}

impl Isa {
    /// The best set of the running processor; found once.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().into_iter().next_back().unwrap_or(Self::Portable))
    }

    /// Whether it multiplies pairs of 16-bit integers faster than what it has for bf16.
    pub fn prefers_integers(self) -> bool {
        match self {
            // A product and an addition of twice as many numbers as a fused multiply-add takes; with VNNI they are one.
            Self::Avx2 | Self::Avx512Vnni => true,
            // There the additions share the units of the products.
            Self::Avx512 => false,
            Self::Portable | Self::Avx512Bf16 => false,
        }
    }

    /// Every set the running processor can execute, best last.
    pub fn available() -> Vec<Self> {
        let mut found = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            // To the compiler AVX-512 means AVX2, fused multiply-add and half-precision conversion too.
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("f16c")
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl");
            let vnni = avx512 && is_x86_feature_detected!("avx512vnni");
            let bf16 = vnni && is_x86_feature_detected!("avx512bf16");
            let sets = [(avx2, Self::Avx2), (avx512, Self::Avx512), (vnni, Self::Avx512Vnni), (bf16, Self::Avx512Bf16)];
            found.extend(sets.into_iter().filter(|(has, _)| *has).map(|(_, set)| set));
        }
        found
    }
}
