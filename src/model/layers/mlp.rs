//! The gated feed-forward block.

use candle_core::{Result, Tensor};
use candle_nn::{Activation, Module};

use super::Linear;
use crate::model::AdapterSegment;

/// `y = down(act(gate(x)) * up(x))`.
#[derive(Clone, Debug)]
pub(in crate::model) struct Mlp {
    /// The gate and up projections.
    pub(in crate::model) gate_up: GateUp,
    /// The down projection.
    pub(in crate::model) down_proj: Linear,
    /// The gate's activation.
    pub(in crate::model) hidden_act: Activation,
}

/// The gate and up projections, as the checkpoint has them.
#[derive(Clone, Debug)]
pub(in crate::model) enum GateUp {
    /// Two linears.
    Split {
        /// The gate.
        gate_proj: Linear,
        /// The rest.
        up_proj: Linear,
    },
    /// One linear whose first half is the gate.
    Fused(Linear),
}

impl Mlp {
    /// Applies the block to `x` (tokens, hidden) under `segments`, which tile the tokens.
    pub(in crate::model) fn forward(&self, x: &Tensor, segments: &[AdapterSegment]) -> Result<Tensor> {
        let (gate, up) = match &self.gate_up {
            GateUp::Split { gate_proj, up_proj } => (gate_proj.forward(x, segments)?, up_proj.forward(x, segments)?),
            GateUp::Fused(gate_up_proj) => {
                let gate_up = gate_up_proj.forward(x, segments)?; // [tokens, 2 * intermediate]
                let intermediate = gate_up.dim(1)? / 2;
                (gate_up.narrow(1, 0, intermediate)?.contiguous()?, gate_up.narrow(1, intermediate, intermediate)?)
            }
        };
        self.down_proj.forward(&(self.hidden_act.forward(&gate)? * up)?, segments)
    }
}
