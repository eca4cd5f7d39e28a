//! The gated feed-forward block.

use candle_core::{Result, Tensor};
use candle_nn::{Activation, Module};

use super::Linear;
use crate::kernels::cpu::silu_mul_op;
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
    /// What the down projection reads of `x` (tokens, hidden) under `segments`, which tile the tokens:
    /// `act(gate(x)) * up(x)`, (tokens, intermediate).
    pub(in crate::model) fn gated(&self, x: &Tensor, segments: &[AdapterSegment]) -> Result<Tensor> {
        let is_silu = matches!(self.hidden_act, Activation::Silu | Activation::Swish);
        match &self.gate_up {
            GateUp::Split { gate_proj, up_proj } => {
                if is_silu && let Some(y) = Linear::forward_gated(gate_proj, up_proj, x, segments)? {
                    return Ok(y);
                }
                self.hidden_act.forward(&gate_proj.forward(x, segments)?)? * up_proj.forward(x, segments)?
            }
            GateUp::Fused(gate_up_proj) => {
                let gate_up = gate_up_proj.forward(x, segments)?; // [tokens, 2 * intermediate]
                if is_silu && gate_up_proj.is_packed() {
                    return silu_mul_op(&gate_up);
                }
                let intermediate = gate_up.dim(1)? / 2;
                let gate = gate_up.narrow(1, 0, intermediate)?.contiguous()?;
                self.hidden_act.forward(&gate)? * gate_up.narrow(1, intermediate, intermediate)?
            }
        }
    }
}
