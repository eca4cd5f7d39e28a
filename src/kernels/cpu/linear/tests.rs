use proptest::prelude::*;

use super::super::integers::{IntegerMatrix, IntegerWidth};
use super::super::isa::Isa;
use super::super::packed::{PackedMatrix, WeightFormat};
use super::super::rows::RowMatrix;
use super::super::scale::PackedScale;
use super::super::silu::silu_mul;
use super::super::slots::{PackedDelta, PackedSlots, SlotRun};
use super::plain::{Plain, gates_of, row_gates};
use super::{Finish, SweepLinear, sweep};
use crate::kernels::cpu::testing::random;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_row_equals_the_plain_formula_and_itself_alone(
        n in 1_usize..150, k in 1_usize..90, lens in proptest::collection::vec(1_usize..5, 1..5), seed: u64,
    ) {
        let m: usize = lens.iter().sum();
        let (x, w, bias) = (random(m * k, seed), random(n * k, seed ^ 1), random(n, seed ^ 2));
        let packed = PackedMatrix::from_f32(n, k, |i| &w[i * k..][..k]).expect("w");
        let linear = |runs| SweepLinear { weight: (&packed).into(), bias: Some(&bias), runs };
        let adapters: Vec<Plain> = (0..lens.len()).map(|i| Plain::random((n, k), seed.rotate_left(11 * i as u32))).collect();
        let slots: Vec<PackedSlots> = adapters.iter().map(|a| a.pack((n, k), None)).collect();
        let gates = row_gates(&x, k);
        let mut from = 0;
        let runs: Vec<SlotRun<'_>> = lens.iter().zip(&slots).map(|(len, slots)| {
            from += len;
            SlotRun { rows: from - len..from, slots: Some(slots), gates: gates_of(&gates, from - len..from) }
        }).collect();
                let y = sweep(&x, &[linear(runs.clone())], Finish::Join);
        for (run, plain) in runs.iter().zip(&adapters) {
            for row in run.rows.clone() {
                let x = &x[row * k..][..k];
                                let runs = vec![SlotRun { rows: 0..1, slots: run.slots, gates: gates_of(&gates, row..row + 1) }];
                let alone = sweep(x, &[linear(runs)], Finish::Join);
                prop_assert_eq!(&alone[..], &y[row * n..][..n]);
                for (o, found) in alone.iter().enumerate() {
                    let expected = plain.output(x, &w, &bias, o);
                    // Chained f32 sums of at most 90, 20, 8 and 70 products in [-1, 1]; three factors and a block of 70
                    // outputs let a value grow to some thousands.
                    let bound = 6e-4 * expected.abs().max(1.0);
                    prop_assert!((f64::from(*found) - expected).abs() < bound, "{found} {expected}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn adapters_over_integers_equal_the_plain_formula_and_a_row_itself_alone(
        n in 1_usize..150, k in 1_usize..150, lens in proptest::collection::vec(1_usize..5, 1..5), sixteen: bool, seed: u64,
    ) {
        let m: usize = lens.iter().sum();
        let (width, largest) =
            if sixteen { (IntegerWidth::Sixteen, 8191.0) } else { (IntegerWidth::Eight, 127.0) };
        // Multiples of a unit, the largest of every group 1: quantising them changes nothing but the last bit.
        let mut x: Vec<f32> = random(m * k, seed).iter().map(|v| (v * largest).round() / largest).collect();
        x.chunks_exact_mut(k).for_each(|row| row.chunks_mut(64).for_each(|group| group[0] = 1.0));
        let (w, bias) = (random(n * k, seed ^ 1), random(n, seed ^ 2));
        let packed = IntegerMatrix::new(width, WeightFormat::F32, (n, k), |i, row| row.copy_from_slice(&w[i * k..][..k])).expect("w");
        let w = packed.unpack();
        let linear = |runs| SweepLinear { weight: (&packed).into(), bias: Some(&bias), runs };
        let adapters: Vec<Plain> = (0..lens.len()).map(|i| Plain::random((n, k), seed.rotate_left(11 * i as u32))).collect();
        let slots: Vec<PackedSlots> = adapters.iter().map(|a| a.pack((n, k), Some(width))).collect();
        let gates = row_gates(&x, k);
        let mut from = 0;
        let runs: Vec<SlotRun<'_>> = lens.iter().zip(&slots).enumerate().map(|(i, (len, slots))| {
            from += len;
            SlotRun {
                rows: from - len..from,
                slots: (i != 1).then_some(slots),
                gates: gates_of(&gates, from - len..from),
            }
        }).collect();
                let y = sweep(&x, &[linear(runs.clone())], Finish::Join);
        for (run, plain) in runs.iter().zip(&adapters) {
            for row in run.rows.clone() {
                let x = &x[row * k..][..k];
                                let runs = vec![SlotRun { rows: 0..1, slots: run.slots, gates: gates_of(&gates, row..row + 1) }];
                let alone = sweep(x, &[linear(runs)], Finish::Join);
                prop_assert_eq!(&alone[..], &y[row * n..][..n]);
                let bare = Plain::default();
                let plain = if run.slots.is_some() { plain } else { &bare };
                let scales = match &plain.scale {
                    Some(PackedScale::BlockDiag(blocks)) => blocks.s as f64,
                    _ => 2.0,
                };
                for (o, found) in alone.iter().enumerate() {
                    let expected = plain.output(x, &w, &bias, o);
                    // Transformed rows are quantised after the transform: half a unit of a group's largest, which each
                    // factor lets grow to 8 times as much, for each of 150 inputs that meet weights up to 1 and scales
                    // that add up.
                    let bound = if plain.pre.is_empty() || (plain.own.is_some() && !sixteen) {
                        6e-4 * expected.abs().max(1.0)
                    } else {
                        8f64.powi(plain.pre.len() as i32) / (2.0 * f64::from(largest)) * 150.0 * scales
                    };
                    prop_assert!((f64::from(*found) - expected).abs() < bound, "{found} {expected}");
                }
            }
        }
    }
}

#[test]
fn bf16_terms_are_exact_on_bf16_values() {
    let (n, k, r) = (70, 40, 3);
    let round = |v: Vec<f32>| v.into_iter().map(|v| half::bf16::from_f32(v).to_f32()).collect::<Vec<_>>();
    let (x, a, b) = (round(random(2 * k, 1)), round(random(r * k, 2)), round(random(n * r, 3)));
    let bits: Vec<half::bf16> = b.iter().map(|v| half::bf16::from_f32(*v)).collect();
    let up = |format| match format {
        WeightFormat::F32 => PackedMatrix::from_f32(n, r, |i| &b[i * r..][..r]),
        WeightFormat::Bf16 => PackedMatrix::from_bf16(n, r, |i| &bits[i * r..][..r]),
    };
    let run = |format| {
        let zeros = vec![half::bf16::ZERO; k];
        let weight = match format {
            WeightFormat::F32 => PackedMatrix::from_f32(n, k, |_| &[0.0; 40]),
            WeightFormat::Bf16 => PackedMatrix::from_bf16(n, k, |_| &zeros),
        };
        let weight = weight.expect("weight");
        let b = up(format).expect("b");
        let deltas = vec![PackedDelta::LowRank { a: RowMatrix::new(format, &a, r, k), b }];
        let slots = PackedSlots { deltas, ..PackedSlots::default() };
        let runs = vec![SlotRun { rows: 0..2, slots: Some(&slots), gates: None }];
        sweep(&x, &[SweepLinear { weight: (&weight).into(), bias: None, runs }], Finish::Join)
    };
    for (a, b) in run(WeightFormat::F32).iter().zip(run(WeightFormat::Bf16)) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
}

#[test]
fn joined_added_and_gated_outputs_are_those_of_the_linears_alone() {
    let (k, widths, m) = (37, [70, 130, 70], 5);
    let x = random(m * k, 1);
    let weights: Vec<PackedMatrix> = widths
        .iter()
        .map(|n| {
            let w = random(n * k, *n as u64 + 7);
            PackedMatrix::from_f32(*n, k, |i| &w[i * k..][..k]).expect("w")
        })
        .collect();
    let mut plain: Vec<Plain> = (0..3).map(|i| Plain::random((widths[i], k), 0x1234_5678_9abc_0f1b << i)).collect();
    plain[1].scale = Some(PackedScale::PairRot { p: random(130, 3), q: random(130, 4), half: 65 });
    let slots: Vec<PackedSlots> = (0..3).map(|i| plain[i].pack((widths[i], k), None)).collect();
    let gates = row_gates(&x, k);
    let linear = |i: usize| SweepLinear {
        weight: (&weights[i]).into(),
        bias: None,
        runs: vec![SlotRun::bare(0..2), SlotRun { rows: 2..5, slots: Some(&slots[i]), gates: gates_of(&gates, 2..5) }],
    };
    let alone: Vec<Vec<f32>> = (0..3).map(|i| sweep(&x, &[linear(i)], Finish::Join)).collect();
    let joined = sweep(&x, &[linear(0), linear(1), linear(2)], Finish::Join);
    for row in 0..m {
        let expected: Vec<f32> = (0..3).flat_map(|i| alone[i][row * widths[i]..][..widths[i]].to_vec()).collect();
        assert_eq!(joined[row * 270..][..270], expected);
    }
    let residual = random(m * 130, 5);
    let added = sweep(&x, &[linear(1)], Finish::Add(&residual));
    assert!(added.iter().zip(&alone[1]).zip(&residual).all(|((found, y), r)| *found == y + r));
    let gated = sweep(&x, &[linear(0), linear(2)], Finish::SiluMul);
    let mut expected = vec![0.0; m * 70];
    silu_mul(Isa::best(), &alone[0], &alone[2], &mut expected);
    assert_eq!(gated, expected);
}
