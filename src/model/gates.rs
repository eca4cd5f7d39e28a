//! Gates on the model's device: the network that gives them, and those of a step's tokens.

use candle_core::{Result, Tensor};

use crate::adapter::GateNetwork;
use crate::kernels::cpu::{PackedMatrix, RowGates};
use crate::kernels::{Factor, GateTerm, gates};

/// An adapter's gate network.
#[derive(Debug)]
pub(super) struct DeviceGates {
    pub(super) network: GateNetwork,
    /// The layers' weights, where the CPU's kernels run the model's layers; they read these then.
    pub(super) packed: Option<Vec<PackedMatrix>>,
}

/// Gates of consecutive tokens.
#[derive(Clone, Debug)]
pub(super) struct TokenGates {
    /// (tokens, gates) in f32.
    pub(super) rows: Tensor,
    /// The same on the host, where the CPU's kernels read them.
    values: Option<Vec<f32>>,
}

impl DeviceGates {
    /// The gates of tokens whose last hidden states in the bare base are `hidden` (tokens, hidden).
    pub(super) fn of(&self, hidden: &Tensor) -> Result<TokenGates> {
        let bias = |number: usize| &self.network.layers[number].1;
        let layers = match &self.packed {
            Some(packed) => packed.iter().enumerate().map(|(n, weight)| (Factor::Packed(weight), bias(n))).collect(),
            None => self.network.layers.iter().map(|(weight, bias)| (Factor::Dense(weight), bias)).collect(),
        };
        let rows = gates(hidden, &GateTerm { layers, group: self.network.group, rule: self.network.rule })?;
        TokenGates::new(rows, self.packed.is_some())
    }
}

impl TokenGates {
    fn new(rows: Tensor, on_host: bool) -> Result<Self> {
        let values = if on_host { Some(rows.flatten_all()?.to_vec1()?) } else { None };
        Ok(Self { rows, values })
    }

    /// Those of some of the tokens.
    pub(super) fn select(&self, tokens: &[u32]) -> Result<Self> {
        let index = Tensor::new(tokens, self.rows.device())?;
        Self::new(self.rows.index_select(&index, 0)?, self.values.is_some())
    }

    /// As the CPU's kernels take them.
    pub(super) fn for_kernels(&self) -> Option<RowGates<'_>> {
        let values = self.values.as_deref()?;
        Some(RowGates { values, width: self.rows.dims()[1] })
    }
}
