//! What the machine can do at best: the marks that achieved speeds are compared with.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::gemm::{Target, multiply_panel};
use super::isa::Isa;
use super::packed::{PANEL, PackedMatrix, WeightFormat};
use super::tile::ROWS;
use super::words::{row_words, write_row};

/// Bytes that are read to measure the memory: more than caches hold.
const READ_BYTES: usize = 512 << 20;
/// Times everything is measured; the best counts, as whatever disturbs only slows down.
const TIMES: usize = 7;
/// How long one measurement of arithmetic takes.
const DOT_TIME: Duration = Duration::from_millis(100);
/// Steps of a panel (40 KiB) that stay in the nearest caches beside the rows.
const DOT_STEPS: usize = 160;

/// Bytes per second that all threads of the pool together read from memory: each sweeps its share of a matrix that is
/// packed like a weight, forward, once. The best of several sweeps.
///
/// # Panics
/// When 512 MiB of memory cannot be had.
pub fn read_bandwidth() -> f64 {
    let k = 4096;
    let n = READ_BYTES / (k * size_of::<half::bf16>());
    let row: Vec<half::bf16> = (0..k).map(|i| half::bf16::from_f32(i as f32)).collect();
    let matrix = PackedMatrix::from_bf16(n, k, |_| &row).expect("memory to read");
    let panels = n / PANEL;
    let threads = rayon::current_num_threads();
    let sweep = |()| {
        let start = Instant::now();
        (0..threads).into_par_iter().for_each(|thread| {
            let mut sum = 0;
            for panel_idx in thread * panels / threads..(thread + 1) * panels / threads {
                add_words(Isa::best(), matrix.panel(panel_idx), &mut sum);
            }
            black_box(sum);
        });
        READ_BYTES as f64 / start.elapsed().as_secs_f64()
    };
    std::iter::repeat_n((), TIMES).map(sweep).fold(0.0, f64::max)
}

super::dispatch::dispatch! {
    /// Adds all words to `sum`, wrapping.
    fn add_words(words: &[u32], sum: &mut u32) => add_words_body
}

#[inline(always)]
fn add_words_body<const FMA: bool>(words: &[u32], sum: &mut u32) {
    let mut lanes = [0_u32; PANEL];
    for chunk in words.chunks_exact(PANEL) {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    *sum = lanes.iter().fold(*sum, |sum, lane| sum.wrapping_add(*lane));
}

/// Floating-point operations (a multiplication and an addition are two) per second that all threads of the pool together
/// reach in the matrix product's own tile, with operands in the nearest caches. The best of several measurements.
///
/// # Panics
/// Never but for lack of memory.
pub fn dot_rate(format: WeightFormat) -> f64 {
    let k = match format {
        WeightFormat::Bf16 => 2 * DOT_STEPS,
        WeightFormat::F32 => DOT_STEPS,
    };
    let (w, x) = (vec![0.5_f32; k], vec![0.25_f32; ROWS * k]);
    let bits: Vec<half::bf16> = w.iter().map(|v| half::bf16::from_f32(*v)).collect();
    let once = |_: rayon::BroadcastContext<'_>| {
        // Every thread has operands of its own.
        let w = match format {
            WeightFormat::Bf16 => PackedMatrix::from_bf16(PANEL, k, |_| &bits),
            WeightFormat::F32 => PackedMatrix::from_f32(PANEL, k, |_| &w),
        };
        let (w, mut y) = (w.expect("a small matrix"), vec![0.0_f32; ROWS * PANEL]);
        let width = row_words(format, k);
        let mut words = vec![0; ROWS * width];
        for (row, words) in x.chunks_exact(k).zip(words.chunks_exact_mut(width)) {
            write_row(Isa::best(), format, row, words);
        }
        let (mut rounds, start) = (0_u32, Instant::now());
        while start.elapsed() < DOT_TIME {
            for _ in 0..1000 {
                let target = Target { y: y.as_mut_ptr(), stride: PANEL };
                #[expect(unsafe_code, reason = "calls the kernel")]
                // SAFETY: the output has `ROWS` rows of a panel.
                unsafe {
                    multiply_panel(black_box(&words), ROWS, &w, 0, target, Isa::best());
                }
                black_box(&y);
            }
            rounds += 1000;
        }
        f64::from(rounds) * (2 * ROWS * PANEL * k) as f64 / start.elapsed().as_secs_f64()
    };
    let all = |()| rayon::broadcast(once).into_iter().sum::<f64>();
    std::iter::repeat_n((), TIMES).map(all).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read() {
        for isa in Isa::available() {
            let words: Vec<u32> = (0..3 * PANEL as u32).map(|i| i * i).collect();
            let mut sum = 7;
            add_words(isa, &words, &mut sum);
            assert_eq!(sum, words.iter().sum::<u32>() + 7, "{isa:?}");
        }
    }
}
