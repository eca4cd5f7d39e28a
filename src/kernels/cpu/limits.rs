//! What the machine can do at best: the marks that achieved speeds are compared with.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::ahead::Ahead;
use super::gemm::{Target, multiply_integer_panel, multiply_panel};
use super::integers::{IntegerMatrix, IntegerWidth, quantise_row};
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
    let width = row_words(format, k);
    let mut words = vec![0; ROWS * width];
    for (row, words) in x.chunks_exact(k).zip(words.chunks_exact_mut(width)) {
        write_row(Isa::best(), format, row, words);
    }
    tile_rate(k, || {
        let w = match format {
            WeightFormat::Bf16 => PackedMatrix::from_bf16(PANEL, k, |_| &bits),
            WeightFormat::F32 => PackedMatrix::from_f32(PANEL, k, |_| &w),
        };
        let (w, words) = (w.expect("a small matrix"), words.clone());
        move |target| {
            #[expect(unsafe_code, reason = "calls the kernel")]
            // SAFETY: the target is a tile's.
            unsafe {
                multiply_panel(black_box(&words), &w, 0, target, Isa::best(), &mut Ahead::default());
            }
        }
    })
}

/// Like [`dot_rate`] for integers.
///
/// # Panics
/// Never but for lack of memory.
pub fn integer_rate(width: IntegerWidth) -> f64 {
    let k = match width {
        IntegerWidth::Eight => 4 * DOT_STEPS,
        IntegerWidth::Sixteen => 2 * DOT_STEPS,
    };
    let mut words = vec![0; ROWS * width.row_words(k)];
    for words in words.chunks_exact_mut(width.row_words(k)) {
        quantise_row(Isa::best(), width, &vec![0.25; k], words);
    }
    tile_rate(k, || {
        let w = IntegerMatrix::new(width, WeightFormat::Bf16, (PANEL, k), |_, row| row.fill(0.5));
        let (w, words) = (w.expect("a small matrix"), words.clone());
        move |target| {
            #[expect(unsafe_code, reason = "calls the kernel")]
            // SAFETY: the target is a tile's.
            unsafe {
                multiply_integer_panel(black_box(&words), &w, 0, target, Isa::best(), &mut Ahead::default());
            }
        }
    })
}

/// Operations per second that all threads together reach when each multiplies [`ROWS`] rows of `k` elements with one panel
/// over and over, by a call of its own that `prepare` makes. Its target has room for a tile.
fn tile_rate<F: FnMut(Target)>(k: usize, prepare: impl Fn() -> F + Sync) -> f64 {
    let once = |_: rayon::BroadcastContext<'_>| {
        let (mut call, mut y) = (prepare(), vec![0.0_f32; ROWS * PANEL]);
        let (mut rounds, start) = (0_u32, Instant::now());
        while start.elapsed() < DOT_TIME {
            for _ in 0..1000 {
                call(Target { y: y.as_mut_ptr(), stride: PANEL });
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
