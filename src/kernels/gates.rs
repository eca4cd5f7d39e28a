//! Gates of rows: what a small network makes of their hidden states, for terms that are weighed token by token.

use candle_core::{DType, Result, Tensor};

use super::stream::Factor;

/// A network whose outputs, in groups of equal length, are the gates of a row.
#[derive(Clone, Debug)]
pub struct GateTerm<'a> {
    /// Weight (out, in) and bias (out) of each layer; between layers negative values become zero.
    pub layers: Vec<(Factor<'a>, &'a Tensor)>,
    /// Gates of a group.
    pub group: usize,
    /// What becomes of every group.
    pub rule: GateRule,
}

/// What becomes of the gates of a group, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GateRule {
    /// They become the softmax of themselves over this.
    pub temperature: Option<f32>,
    /// Only those that are at least the k-th largest stay; the others become zero.
    pub top_k: Option<usize>,
    /// Those that are not zero become the softmax of themselves.
    pub softmax_of_kept: bool,
}

/// The gates of each row of `hidden` (rows, in): (rows, outputs of the last layer) in f32. A row's gates depend on that row
/// only, and with packed factors to the bit.
///
/// # Errors
/// When the shapes do not fit or the device fails.
pub fn gates(hidden: &Tensor, term: &GateTerm<'_>) -> Result<Tensor> {
    let mut x = hidden.contiguous()?;
    for (number, (weight, bias)) in term.layers.iter().enumerate() {
        if number > 0 {
            x = x.relu()?;
        }
        x = weight.times(&x)?.broadcast_add(bias)?;
    }
    let (rows, width) = x.dims2()?;
    let groups = x.to_dtype(DType::F32)?.reshape((rows * width / term.group, term.group))?;
    apply(&groups, term.rule)?.reshape((rows, width))
}

/// The rule for every row of `gates` (groups, gates of a group), f32.
fn apply(gates: &Tensor, rule: GateRule) -> Result<Tensor> {
    let mut gates = gates.clone();
    if let Some(temperature) = rule.temperature {
        gates = candle_nn::ops::softmax_last_dim(&(gates / f64::from(temperature))?)?;
    }
    if let Some(k) = rule.top_k {
        let (sorted, _) = gates.contiguous()?.sort_last_dim(false)?;
        let kept = gates.broadcast_ge(&sorted.narrow(1, k - 1, 1)?)?;
        gates = kept.where_cond(&gates, &gates.zeros_like()?)?;
    }
    if rule.softmax_of_kept {
        let kept = gates.ne(0f32)?;
        // Where nothing is kept there is nothing to divide, and the zeros stay.
        let never = Tensor::full(f32::MIN, gates.shape(), gates.device())?;
        let softmax = candle_nn::ops::softmax_last_dim(&kept.where_cond(&gates, &never)?)?;
        gates = kept.where_cond(&softmax, &gates)?;
    }
    Ok(gates)
}

#[cfg(test)]
mod tests {
    use super::super::cpu::PackedMatrix;
    use super::super::cpu::testing::random;
    use super::*;
    use candle_core::Device;

    fn ruled(gates: &[f32], rule: GateRule) -> Vec<f32> {
        let row = Tensor::from_slice(gates, (1, gates.len()), &Device::Cpu).unwrap();
        apply(&row, rule).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[track_caller]
    fn check(found: &[f32], expected: &[f32]) {
        let near = found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-6);
        assert!(near && found.len() == expected.len(), "{found:?} {expected:?}");
    }

    #[test]
    fn rules_act_in_their_order() {
        let plain = GateRule::default();
        let raw = [1.0, -2.0, 0.5, 3.0];
        check(&ruled(&raw, plain), &raw);
        check(&ruled(&raw, GateRule { top_k: Some(2), ..plain }), &[1.0, 0.0, 0.0, 3.0]);
        let halves = raw.map(|gate| (gate / 2.0f32).exp());
        let sum: f32 = halves.iter().sum();
        check(&ruled(&raw, GateRule { temperature: Some(2.0), ..plain }), &halves.map(|half| half / sum));
        let kept = [1f32.exp(), 3f32.exp()].map(|gate| gate / (1f32.exp() + 3f32.exp()));
        let both = GateRule { top_k: Some(2), softmax_of_kept: true, ..plain };
        check(&ruled(&raw, both), &[kept[0], 0.0, 0.0, kept[1]]);
    }

    #[test]
    fn a_group_of_zeros_stays_zero() {
        check(&ruled(&[0.0; 3], GateRule { softmax_of_kept: true, ..GateRule::default() }), &[0.0; 3]);
    }

    #[test]
    fn packed_and_dense_layers_follow_the_formula_and_rows_stand_alone() {
        const WIDTHS: [usize; 3] = [70, 9, 6];
        const ROWS: usize = 7;
        let tensor = |seed, shape: &[usize]| {
            Tensor::from_vec(random(shape.iter().product(), seed), shape, &Device::Cpu).unwrap()
        };
        let x = tensor(1, &[ROWS, WIDTHS[0]]);
        let layers: Vec<_> = (0..2)
            .map(|i| (tensor(2 + i as u64, &[WIDTHS[i + 1], WIDTHS[i]]), tensor(9 + i as u64, &[WIDTHS[i + 1]])))
            .collect();
        let packed: Vec<_> = layers
            .iter()
            .map(|(w, _)| {
                let (rows, k) = (w.to_vec2::<f32>().unwrap(), w.dim(1).unwrap());
                PackedMatrix::from_f32(rows.len(), k, |row| &rows[row]).unwrap()
            })
            .collect();
        let rule = GateRule { temperature: Some(0.7), top_k: Some(2), softmax_of_kept: true };
        let term = |layers| GateTerm { layers, group: 3, rule };
        let dense = term(layers.iter().map(|(w, b)| (Factor::Dense(w), b)).collect());
        let fast = term(packed.iter().zip(&layers).map(|(w, (_, b))| (Factor::Packed(w), b)).collect());
        let found = gates(&x, &fast).unwrap().to_vec2::<f32>().unwrap();
        let plain = gates(&x, &dense).unwrap().to_vec2::<f32>().unwrap();
        for (row, input) in x.to_vec2::<f32>().unwrap().into_iter().enumerate() {
            let mut values = input;
            for (number, (w, b)) in layers.iter().enumerate() {
                values.iter_mut().filter(|_| number > 0).for_each(|value| *value = value.max(0.0));
                let rows = w.to_vec2::<f32>().unwrap().into_iter().zip(b.to_vec1::<f32>().unwrap());
                values = rows.map(|(w, b)| w.iter().zip(&values).map(|(w, x)| w * x).sum::<f32>() + b).collect();
            }
            let expected: Vec<f32> = values.chunks(3).flat_map(|group| ruled(group, rule)).collect();
            check(&found[row], &expected);
            check(&plain[row], &expected);
            let alone = gates(&x.narrow(0, row, 1).unwrap(), &fast).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(alone[0], found[row]);
        }
    }
}
