//! What stands behind a sublayer: the sum of the residual connection, or an adapter's function of it.

use candle_core::{Result, Tensor};

use super::Linear;
use crate::adapter::Mix;
use crate::kernels::{Factor, StreamTerm, stream_function};
use crate::model::AdapterSegment;
use crate::model::device_adapter::DeviceFunction;

/// The sublayers of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sublayer {
    /// Attention.
    Attention,
    /// The feed-forward block.
    Mlp,
}

/// `x + last(input)` behind a sublayer of layer `layer`, or what a segment's adapter has in its place. `x` (tokens, hidden) is
/// the stream that the sublayer read, `input` what its last linear reads. The segments tile the tokens.
pub(super) fn close(
    x: &Tensor,
    (last, input): (&Linear, &Tensor),
    (layer, sublayer): (usize, Sublayer),
    segments: &[AdapterSegment],
) -> Result<Tensor> {
    let functions: Vec<_> = segments.iter().map(|segment| function(segment, layer, sublayer)).collect();
    if functions.iter().all(Option::is_none) {
        return last.forward_add(input, segments, x);
    }
    let output = last.forward(input, segments)?;
    let pieces = segments.iter().zip(functions).map(|(segment, function)| {
        let (x, output) = (x.narrow(0, segment.start, segment.len)?, output.narrow(0, segment.start, segment.len)?);
        match function {
            Some(function) => stream_function(&x, &output, &term(function)),
            None => x + output,
        }
    });
    Tensor::cat(&pieces.collect::<Result<Vec<_>>>()?, 0)
}

fn function(segment: &AdapterSegment, layer: usize, sublayer: Sublayer) -> Option<&DeviceFunction> {
    let slots = segment.adapter.as_ref()?.layers.get(&layer)?;
    match sublayer {
        Sublayer::Attention => slots.after_attention.as_ref(),
        Sublayer::Mlp => slots.after_mlp.as_ref(),
    }
}

fn term(function: &DeviceFunction) -> StreamTerm<'_> {
    let f = &function.function;
    let mix = |mix: Mix| (mix.stream, mix.output);
    let (down, up) = match &function.packed {
        Some((down, up)) => (Factor::Packed(down), Factor::Packed(up)),
        None => (Factor::Dense(&f.down.0), Factor::Dense(&f.up.0)),
    };
    StreamTerm {
        input: mix(f.input),
        norm_before: f.norm_before.as_ref().map(|(weight, shift)| (weight, shift)),
        down: (down, &f.down.1),
        activation: f.activation,
        up: (up, &f.up.1),
        inner: mix(f.inner),
        norm_after: f.norm_after.as_ref().map(|(weight, shift)| (weight, shift)),
        outer: mix(f.outer),
    }
}
