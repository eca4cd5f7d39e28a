//! The normal form written as a plain PEFT LoRA: `W' = W + B A` with scale 1, biases as differences (`lora_bias`), whole
//! tensors as `modules_to_save`, token rows as `trainable_token_indices`.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Result, Tensor};
use serde_json::{Map, Value, json};

use crate::adapter::keys::key_of;
use crate::adapter::lowering::Lowering;
use crate::adapter::{
    AdapterError, AdapterFiles, Delta, EmbeddingPatch, LinearSlots, LoweredAdapter, NormOverride, Pre, Scale, SiteId,
    SiteKind, Spectral, Weight, merge, replace, tensor_file,
};
use crate::adapter::{block_product, config};

/// The files in the making.
struct Writer<'a> {
    lowering: &'a Lowering<'a>,
    tensors: BTreeMap<String, Tensor>,
    /// Rank by module.
    ranks: BTreeMap<SiteId, usize>,
    /// What biases gain, for modules whose bias changes.
    biases: BTreeMap<SiteId, Tensor>,
    saved: Vec<String>,
    rows: Map<String, Value>,
}

/// The files of a LoRA that does what `lowering` found, which has kept its terms apart.
pub(super) fn to_lora(lowering: &Lowering<'_>) -> std::result::Result<AdapterFiles, AdapterError> {
    // Taken apart in full, so that a further slot cannot be forgotten here.
    let LoweredAdapter {
        linears,
        norms,
        embeddings,
        layers,
        virtual_tokens,
        kv_prefix,
        invocation_tokens: _,
        gates: _,
    } = &lowering.out;
    if !layers.is_empty() {
        return refuse("layers", "functions inside a layer are not linear, so no low-rank term says the same");
    }
    if virtual_tokens.is_some() || kv_prefix.is_some() {
        return refuse("num_virtual_tokens", "what stands before the prompt adds nothing to a weight");
    }
    let mut writer = Writer {
        lowering,
        tensors: BTreeMap::new(),
        ranks: BTreeMap::new(),
        biases: BTreeMap::new(),
        saved: Vec::new(),
        rows: Map::new(),
    };
    for (id, slots) in linears {
        writer.linear(*id, slots)?;
    }
    for (id, norm) in norms {
        writer.norm(*id, norm)?;
    }
    for (id, patch) in embeddings {
        writer.embedding(*id, patch)?;
    }
    writer.finish()
}

fn refuse<T>(place: &str, reason: impl Into<String>) -> std::result::Result<T, AdapterError> {
    Err(AdapterError::NotConvertible { place: place.to_owned(), reason: reason.into() })
}

impl<'a> Writer<'a> {
    fn path(&self, id: SiteId) -> &'a str {
        &self.lowering.site(id).path
    }

    fn insert(&mut self, id: SiteId, suffix: &str, tensor: Tensor) {
        self.tensors.insert(key_of(self.path(id), suffix), tensor);
    }

    fn linear(&mut self, id: SiteId, slots: &LinearSlots) -> std::result::Result<(), AdapterError> {
        let path = self.path(id);
        let SiteKind::Linear { in_features, out_features, bias, .. } = self.lowering.site(id).kind else {
            return Ok(());
        };
        match (&slots.pre, &slots.scale) {
            (Pre::Identity, Scale::One) => {}
            (Pre::Identity, _) => {
                return refuse(path, "its output is scaled or rotated, which no low-rank term can do");
            }
            (_, _) => return refuse(path, "its input is scaled or rotated, which no low-rank term can do"),
        }
        if let Weight::Own(weight) = &slots.weight {
            self.check_saved(id, !slots.deltas.is_empty() || slots.rows.is_some())?;
            self.saved.push(path.to_owned());
            self.insert(id, "weight", weight.to_dtype(DType::F32)?);
            let own_bias = slots.c.clone().map_or_else(|| self.lowering.base.bias(id), |c| Ok(Some(c)))?;
            if let Some(own_bias) = own_bias.filter(|_| bias) {
                self.insert(id, "bias", own_bias);
            }
            return Ok(());
        }
        if let Some(rows) = &slots.rows {
            if !slots.deltas.is_empty() {
                return refuse(path, "some of its rows are replaced, and it is adapted as well");
            }
            self.token_rows(id, rows)?;
        }
        if let Some(c) = &slots.c {
            let gained = self.lowering.base.bias(id)?.map_or_else(|| Ok(c.clone()), |bias| c - bias)?;
            if !is_zero(&gained)? {
                self.biases.insert(id, gained);
            }
        }
        if slots.deltas.is_empty() && !self.biases.contains_key(&id) {
            return Ok(());
        }
        if let Some(reason) = slots.deltas.iter().find_map(without_factors) {
            return refuse(path, reason);
        }
        let (a, b) = stacked(&slots.deltas, in_features, out_features)?;
        self.add_factors(id, (in_features, out_features), a.dim(0)?)?;
        self.insert(id, "lora_A.weight", a);
        self.insert(id, "lora_B.weight", b);
        Ok(())
    }

    /// A rank above the smaller side of the matrix says the same with more numbers.
    fn add_factors(
        &mut self,
        id: SiteId,
        (inputs, outputs): (usize, usize),
        rank: usize,
    ) -> std::result::Result<(), AdapterError> {
        let limit = inputs.min(outputs);
        if rank > limit {
            return refuse(self.path(id), format!("it would take rank {rank}, and its weight has {limit}"));
        }
        self.ranks.insert(id, rank);
        Ok(())
    }

    /// A weight that the file replaces as a whole can stay so; one that a formula made cannot be called a LoRA.
    fn check_saved(&self, id: SiteId, is_adapted: bool) -> std::result::Result<(), AdapterError> {
        match self.lowering.own_reason(id) {
            Some(replace::REPLACED) | None if !is_adapted => Ok(()),
            Some(replace::REPLACED) | None => refuse(self.path(id), "its weight is replaced, and adapted as well"),
            Some(reason) => refuse(self.path(id), format!("{reason}, so no low-rank term says the same")),
        }
    }

    fn norm(&mut self, id: SiteId, norm: &NormOverride) -> std::result::Result<(), AdapterError> {
        let SiteKind::Norm { bias, .. } = self.lowering.site(id).kind else { return Ok(()) };
        let base = self.lowering.base;
        let shift = norm.shift.clone().map_or_else(|| base.bias(id), |shift| Ok(Some(shift)))?;
        if let Some(shift) = &shift
            && !bias
            && !is_zero(shift)?
        {
            return refuse(self.path(id), "it gains a shift, which the base model's norm does not have");
        }
        let weight = norm.weight.clone().map_or_else(|| base.weight(id), Ok)?;
        self.saved.push(self.path(id).to_owned());
        self.insert(id, "weight", weight);
        if let Some(shift) = shift.filter(|_| bias) {
            self.insert(id, "bias", shift);
        }
        Ok(())
    }

    fn embedding(&mut self, id: SiteId, patch: &EmbeddingPatch) -> std::result::Result<(), AdapterError> {
        let SiteKind::Embedding { vocab, dim } = self.lowering.site(id).kind else { return Ok(()) };
        if patch.scale.is_some() || patch.shift.is_some() {
            return refuse(self.path(id), "its rows are scaled or shifted, which no low-rank term can do");
        }
        if let Some(table) = &patch.table {
            self.check_saved(id, patch.low_rank.is_some() || patch.rows.is_some())?;
            self.saved.push(self.path(id).to_owned());
            self.insert(id, "weight", table.to_dtype(DType::F32)?);
        }
        if let Some(rows) = &patch.rows {
            if patch.low_rank.is_some() {
                return refuse(self.path(id), "some of its rows are replaced, and it is adapted as well");
            }
            self.token_rows(id, rows)?;
        }
        if let Some((a, b)) = &patch.low_rank {
            self.add_factors(id, (vocab, dim), a.dim(0)?)?;
            self.insert(id, "lora_embedding_A", a.clone());
            self.insert(id, "lora_embedding_B", b.clone());
        }
        Ok(())
    }

    /// Replaced rows, once for an embedding and the head that shares its weight.
    fn token_rows(&mut self, id: SiteId, (tokens, rows): &(Vec<u32>, Tensor)) -> Result<()> {
        let embedded = self.lowering.out.embeddings.values().any(|patch| patch.rows.is_some());
        if embedded && self.lowering.tied_head() == Some(id) {
            return Ok(());
        }
        self.rows.insert(self.path(id).to_owned(), json!(tokens));
        self.insert(id, "token_adapter.trainable_tokens_delta", rows.clone());
        Ok(())
    }

    fn finish(mut self) -> std::result::Result<AdapterFiles, AdapterError> {
        if self.ranks.is_empty() {
            return refuse(
                "target_modules",
                "nothing is added to a linear or an embedding, so there is no LoRA to write",
            );
        }
        if !self.biases.is_empty() {
            let linears: Vec<SiteId> = self.ranks.keys().copied().collect();
            for id in linears {
                if let SiteKind::Linear { out_features, .. } = self.lowering.site(id).kind {
                    let zeros = Tensor::zeros(out_features, DType::F32, &Device::Cpu);
                    let gained = self.biases.remove(&id).map_or(zeros, Ok)?;
                    self.insert(id, "lora_B.bias", gained);
                }
            }
            self.biases.clear();
            return self.files(true);
        }
        self.files(false)
    }

    fn files(&self, with_biases: bool) -> std::result::Result<AdapterFiles, AdapterError> {
        let (r, patterns) = self.rank_fields();
        let source = &self.lowering.config;
        let kept = |name: &str| source.get(name).cloned().unwrap_or_default();
        let invocation = &self.lowering.out.invocation_tokens;
        let config = json!({
            "peft_type": "LORA",
            "task_type": source.get("task_type").cloned().unwrap_or_else(|| "CAUSAL_LM".into()),
            "base_model_name_or_path": kept("base_model_name_or_path"),
            "revision": kept("revision"),
            "inference_mode": true,
            "r": r,
            "lora_alpha": r,
            "rank_pattern": patterns,
            "alpha_pattern": patterns,
            "target_modules": self.target_modules(),
            "modules_to_save": if self.saved.is_empty() { Value::Null } else { json!(self.saved) },
            "trainable_token_indices": if self.rows.is_empty() { Value::Null } else { json!(self.rows) },
            "alora_invocation_tokens": if invocation.is_empty() { Value::Null } else { json!(invocation) },
            "lora_bias": with_biases,
            "bias": "none",
            "init_lora_weights": true,
            "use_rslora": false,
            "use_dora": false,
            "lora_dropout": 0.0,
            "fan_in_fan_out": false,
        });
        Ok(AdapterFiles::new(config::write(&config)?, tensor_file::write(&self.tensors)?))
    }

    /// Names of the adapted modules: their last components where these mean no other module, else whole paths.
    fn target_modules(&self) -> Vec<String> {
        let names: BTreeSet<&str> = self.ranks.keys().map(|id| last(self.path(*id))).collect();
        let sites = self.lowering.base.sites();
        let only_those =
            sites.iter().all(|(id, site)| !names.contains(last(&site.path)) || self.ranks.contains_key(&id));
        if only_those {
            return names.into_iter().map(str::to_owned).collect();
        }
        self.ranks.keys().map(|id| self.path(*id).to_owned()).collect()
    }

    /// The commonest rank, and a pattern for each module or group of equally named ones that has another.
    fn rank_fields(&self) -> (usize, Map<String, Value>) {
        let (mut counts, mut by_name) = (BTreeMap::new(), BTreeMap::<&str, BTreeSet<usize>>::new());
        for (id, rank) in &self.ranks {
            *counts.entry(*rank).or_insert(0) += 1;
            by_name.entry(last(self.path(*id))).or_default().insert(*rank);
        }
        let common = counts.iter().max_by_key(|(_, count)| **count).map_or(1, |(rank, _)| *rank);
        let mut patterns = Map::new();
        for (id, rank) in self.ranks.iter().filter(|(_, rank)| **rank != common) {
            let path = self.path(*id);
            let name = if by_name[last(path)].len() == 1 { last(path).to_owned() } else { path.replace('.', r"\.") };
            patterns.insert(name, json!(rank));
        }
        (common, patterns)
    }
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

fn is_zero(tensor: &Tensor) -> Result<bool> {
    Ok(tensor.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?.iter().all(|value| *value == 0.0))
}

/// All deltas as one pair of factors a: (r, in), b: (out, r) in f32; rank one and zero when there are none.
fn stacked(deltas: &[Delta], in_features: usize, out_features: usize) -> Result<(Tensor, Tensor)> {
    let pairs = deltas.iter().map(|delta| factors(delta, in_features, out_features)).collect::<Result<Vec<_>>>()?;
    let (a, b): (Vec<Tensor>, Vec<Tensor>) = pairs.into_iter().unzip();
    if a.is_empty() {
        let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        return Ok((zeros((1, in_features))?, zeros((out_features, 1))?));
    }
    Ok((Tensor::cat(&a, 0)?.to_dtype(DType::F32)?, Tensor::cat(&b, 1)?.to_dtype(DType::F32)?))
}

/// Why a delta is no product of two smaller matrices.
fn without_factors(delta: &Delta) -> Option<&'static str> {
    match delta {
        Delta::LowRank { .. }
        | Delta::ShardSum { .. }
        | Delta::Sparse { .. }
        | Delta::BlockProduct { .. }
        | Delta::Spectral { .. }
        | Delta::SharedLowRank { .. } => None,
        Delta::Routed { .. } | Delta::Gated { .. } => {
            Some("every token chooses among experts, which no low-rank term can do")
        }
        Delta::Circulant { .. } => Some("circulant blocks have full rank, so no low-rank term says the same"),
    }
}

/// One delta that has factors as a: (r, in), b: (out, r), f32.
fn factors(delta: &Delta, in_features: usize, out_features: usize) -> Result<(Tensor, Tensor)> {
    match delta {
        Delta::LowRank { a, b } => Ok((a.clone(), b.clone())),
        Delta::Spectral { basis, shape, rows, columns, values } => {
            Spectral { basis, shape: *shape, rows, columns, values }.factors()
        }
        Delta::SharedLowRank { a, b, d, g } => merge::shared_factors((a, b), (d, g)),
        Delta::ShardSum { m } => {
            let (r, q) = m.dims2()?;
            let sums: Vec<f32> =
                (0..r * in_features).map(|at| f32::from(u8::from(at % in_features % r == at / in_features))).collect();
            let a = Tensor::from_vec(sums, (r, in_features), m.device())?;
            Ok((a, m.t()?.contiguous()?.repeat((out_features / q, 1))?))
        }
        Delta::Sparse { rows, columns, values } => {
            let (rows, columns) = (rows.to_vec1::<u32>()?, columns.to_vec1::<u32>()?);
            let values = values.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            sparse_factors((&rows, &columns, &values), in_features, out_features)
        }
        Delta::BlockProduct { a, mix, b } => block_product::factors((a, mix, b.as_ref())),
        Delta::Circulant { .. } | Delta::Routed { .. } | Delta::Gated { .. } => unreachable!("it was refused"),
    }
}

/// A row of the matrix for each row that has entries, and where it goes; or the same by columns if there are fewer.
fn sparse_factors(
    (rows, columns, values): (&[u32], &[u32], &[f32]),
    in_features: usize,
    out_features: usize,
) -> Result<(Tensor, Tensor)> {
    let distinct = |ids: &[u32]| ids.iter().copied().collect::<BTreeSet<u32>>().into_iter().collect::<Vec<u32>>();
    let (used_rows, used_columns) = (distinct(rows), distinct(columns));
    let by_row = used_rows.len() <= used_columns.len();
    let used = if by_row { used_rows } else { used_columns };
    let r = used.len();
    let (mut a, mut b) = (vec![0f32; r * in_features], vec![0f32; out_features * r]);
    for (k, id) in used.iter().enumerate() {
        if by_row {
            b[*id as usize * r + k] = 1.0;
        } else {
            a[k * in_features + *id as usize] = 1.0;
        }
    }
    for ((row, column), value) in rows.iter().zip(columns).zip(values) {
        let key = if by_row { row } else { column };
        let Ok(k) = used.binary_search(key) else { continue };
        if by_row {
            a[k * in_features + *column as usize] += value;
        } else {
            b[*row as usize * r + k] += value;
        }
    }
    let device = &Device::Cpu;
    Ok((Tensor::from_vec(a, (r, in_features), device)?, Tensor::from_vec(b, (out_features, r), device)?))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::adapter::SharedMatrix;
    use crate::adapter::fake_base::{close, random};

    #[test]
    fn every_delta_is_the_product_of_its_factors() {
        let index = |values: &[u32]| Tensor::new(values, &Device::Cpu).unwrap();
        let matrix = |seed, shape: (usize, usize)| Arc::new(SharedMatrix::new(&random(seed, shape)).unwrap());
        let deltas = [
            Delta::LowRank { a: random(1, (3, 10)), b: random(2, (12, 3)) },
            Delta::ShardSum { m: random(3, (4, 12)) },
            Delta::ShardSum { m: random(4, (3, 4)) },
            Delta::Sparse { rows: index(&[0, 0, 5]), columns: index(&[2, 9, 0]), values: random(5, 3) },
            Delta::Sparse { rows: index(&[0, 3, 5]), columns: index(&[2, 2, 2]), values: random(6, 3) },
            Delta::SharedLowRank { a: matrix(7, (2, 10)), b: matrix(8, (12, 2)), d: random(9, 2), g: random(10, 12) },
        ];
        for (product, rank) in block_product::tests::every_form() {
            let (a, b) = factors(&product, 10, 12).unwrap();
            assert_eq!(a.dim(0).unwrap(), rank);
            assert!(close(&b.matmul(&a).unwrap(), &merge::dense(&product, 12, 10).unwrap(), 1e-6), "{product:?}");
        }
        for delta in &deltas {
            let (a, b) = factors(delta, 10, 12).unwrap();
            assert!(close(&b.matmul(&a).unwrap(), &merge::dense(delta, 12, 10).unwrap(), 1e-6), "{delta:?}");
        }
        assert_eq!(factors(&deltas[4], 10, 12).unwrap().0.dims(), [1, 10]);
        let (a, b) = stacked(&deltas, 10, 12).unwrap();
        let sum = deltas.iter().map(|delta| merge::dense(delta, 12, 10).unwrap()).reduce(|x, y| (x + y).unwrap());
        assert!(close(&b.matmul(&a).unwrap(), &sum.unwrap(), 1e-6));
    }
}
