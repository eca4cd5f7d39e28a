//! Where the gates of gated terms come from.

use candle_core::Tensor;

pub use crate::kernels::GateRule;

/// A small network that reads a token's last hidden state, after the final norm, in the bare base that is given the same
/// tokens. Its outputs, in groups of equal length, are the token's gates.
#[derive(Clone, Debug)]
pub struct GateNetwork {
    /// Weight (out, in) and bias (out) of each layer, at least one; between layers negative values become zero. The first
    /// reads the hidden state.
    pub layers: Vec<(Tensor, Tensor)>,
    /// Gates of a group; they are what the rule puts in proportion.
    pub group: usize,
    /// What becomes of the outputs.
    pub rule: GateRule,
}

impl GateNetwork {
    /// Every tensor of the network.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.layers.iter().flat_map(|(weight, bias)| [weight, bias])
    }

    /// The same, to be replaced in place.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        self.layers.iter_mut().flat_map(|(weight, bias)| [weight, bias])
    }
}
