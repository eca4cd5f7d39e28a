//! The numbers that torch's generator draws on the CPU: a Mersenne Twister (MT19937) seeded with one integer.

use std::collections::HashMap;

/// Length of the generator's state, and the distance its recurrence reaches ahead.
const STATE: usize = 624;
const AHEAD: usize = 397;
/// From this many elements on torch permutes in another way, which is not reproduced here.
const PERMUTED_MAX: usize = u32::MAX as usize / 20;

/// What to tell about a permutation that is not reproduced.
pub(super) const NOT_PERMUTED: &str = "the weight has so many entries that torch draws the places of the coefficients in \
                                        a way that is not reproduced here; merge the adapter with PEFT";

/// torch's default generator.
pub(super) struct TorchRandom {
    state: [u32; STATE],
    next: usize,
}

impl TorchRandom {
    /// As `torch.Generator().manual_seed(seed)`; the lower 32 bits of the seed count.
    pub(super) fn new(seed: u64) -> Self {
        let mut state = [seed as u32; STATE];
        for at in 1..STATE {
            let previous = state[at - 1];
            state[at] = 1_812_433_253u32.wrapping_mul(previous ^ previous >> 30).wrapping_add(at as u32);
        }
        Self { state, next: STATE }
    }

    /// The next 32 bits.
    pub(super) fn next_u32(&mut self) -> u32 {
        if self.next == STATE {
            self.refill();
        }
        let mut bits = self.state[self.next];
        self.next += 1;
        bits ^= bits >> 11;
        bits ^= bits << 7 & 0x9d2c_5680;
        bits ^= bits << 15 & 0xefc6_0000;
        bits ^ bits >> 18
    }

    /// `torch.randn(n)` for n of at least 16; fewer are the first of 16, which torch draws in another way.
    ///
    /// Box-Muller in blocks of 16: the first half of a block's uniform numbers gives radii, the second angles. A last block
    /// that is not full overlaps the one before it and is drawn anew. torch computes logarithm and sine with other roundings
    /// where the processor has vectors.
    pub(super) fn normals(&mut self, n: usize) -> Vec<f32> {
        const BLOCK: usize = 16;
        let count = n.max(BLOCK);
        let mut uniform = || (self.next_u32() & 0x00ff_ffff) as f32 / (1 << 24) as f32;
        let mut values: Vec<f32> = (0..count).map(|_| uniform()).collect();
        let fill = |block: &mut [f32]| {
            let (radii, angles) = block.split_at_mut(BLOCK / 2);
            for (radius, angle) in radii.iter_mut().zip(angles) {
                let (r, theta) = ((-2.0 * (1.0 - *radius).ln()).sqrt(), std::f32::consts::TAU * *angle);
                (*radius, *angle) = (r * theta.cos(), r * theta.sin());
            }
        };
        values.chunks_exact_mut(BLOCK).for_each(fill);
        if !count.is_multiple_of(BLOCK) {
            let last = &mut values[count - BLOCK..];
            last.iter_mut().for_each(|value| *value = uniform());
            fill(last);
        }
        values.truncate(n);
        values
    }

    fn refill(&mut self) {
        for at in 0..STATE {
            let joined = self.state[at] & 0x8000_0000 | self.state[(at + 1) % STATE] & 0x7fff_ffff;
            let odd = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[at] = self.state[(at + AHEAD) % STATE] ^ joined >> 1 ^ odd;
        }
        self.next = 0;
    }

    /// The first `count` elements of `torch.randperm(n)`; `None` when n is so large that torch permutes in another way.
    /// Cost and memory are in proportion to `count`.
    pub(super) fn permutation(&mut self, n: usize, count: usize) -> Option<Vec<usize>> {
        if n >= PERMUTED_MAX {
            return None;
        }
        let mut moved: HashMap<usize, usize> = HashMap::new();
        let mut drawn = Vec::with_capacity(count.min(n));
        for at in 0..count.min(n) {
            // The last element is not drawn; it is what is left.
            let left = n - at;
            let step = if left == 1 { 0 } else { self.next_u32() as usize % left };
            let here = moved.get(&at).copied().unwrap_or(at);
            let there = moved.insert(at + step, here).unwrap_or(at + step);
            drawn.push(if step == 0 { here } else { there });
        }
        Some(drawn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values are torch's own (2.15, CPU).
    #[test]
    fn permutations_are_those_of_torch() {
        assert_eq!(TorchRandom::new(0).permutation(10, 10).unwrap(), PERM_0_10);
        assert_eq!(TorchRandom::new(777).permutation(1536, 6).unwrap(), PERM_777_1536);
        assert_eq!(TorchRandom::new(42).permutation(214_748_363, 3).unwrap(), [105_399_001, 199_900_638, 3_068_019]);
        assert!(TorchRandom::new(42).permutation(214_748_364, 3).is_none());
    }

    #[test]
    fn the_first_outputs_are_those_of_the_reference_generator() {
        let mut random = TorchRandom::new(5489);
        assert_eq!(
            [random.next_u32(), random.next_u32(), random.next_u32()],
            [3_499_211_612, 581_869_302, 3_890_346_734]
        );
    }

    #[test]
    fn normal_numbers_are_those_of_torch() {
        for (seed, expected) in [(0, NORMALS_0_35), (777, NORMALS_777_35)] {
            for (found, expected) in TorchRandom::new(seed).normals(35).iter().zip(expected) {
                assert!((found - expected).abs() < 1e-5, "{found} {expected}");
            }
        }
    }

    const PERM_0_10: [usize; 10] = [4, 1, 7, 5, 3, 9, 0, 8, 6, 2];
    const NORMALS_0_35: [f32; 35] = [
        -1.12584, -1.15236, -0.250579, -0.433879, 0.84871, 0.692009, -0.316013, -2.115219, 0.322275, -1.263335,
        0.349983, 0.308134, 0.119842, 1.237658, 1.116777, -0.247278, -1.352654, -1.695931, 0.566651, 0.248415,
        0.439696, 0.112411, 0.640792, 0.441156, -0.215863, -0.742548, 0.562721, 0.052507, 0.52286, 2.302205, -1.468894,
        -1.586689, 1.203224, 0.084535, -1.200139,
    ];
    const NORMALS_777_35: [f32; 35] = [
        0.18739, -0.098004, -0.381458, -0.817534, 1.597588, -1.492733, -0.150731, 1.180561, -0.368533, 1.158253,
        0.941886, -0.553984, 1.307823, -1.425018, -1.598056, -0.07558, 2.077635, 0.770822, 1.602024, 2.068354,
        1.875552, 1.423084, -1.208203, 0.211144, -0.297465, -0.985866, 1.616607, -1.373138, 0.069705, 0.226527,
        0.396131, 0.938248, 0.236175, -0.08209, -0.01053,
    ];
    const PERM_777_1536: [usize; 6] = [1127, 190, 1005, 1004, 471, 296];
}
