//! What an adapter does inside a decoder layer, beside the layer's linears and norms.

use candle_core::{Result, Tensor};

/// What an adapter does inside one decoder layer.
#[derive(Clone, Debug, Default)]
pub struct LayerSlots {
    /// What takes the place of the sum behind the attention.
    pub after_attention: Option<StreamFunction>,
    /// What takes the place of the sum behind the feed-forward block.
    pub after_mlp: Option<StreamFunction>,
    /// What the queries attend to beside the context.
    pub branch: Option<AttentionBranch>,
}

/// Keys and values of no position, at least one, beside the context. Every query of the layer attends to all of them in a
/// softmax of their own; what that gives is added to the attention's result, before the output projection:
/// `softmax(q K^T / sqrt(head_dim)) V`, grouped-query as the attention itself, with the queries as it uses them.
#[derive(Clone, Debug)]
pub struct AttentionBranch {
    /// (entries, kv heads * head_dim), ready to be multiplied with queries.
    pub keys: Tensor,
    /// (entries, kv heads * head_dim); any factor is folded in.
    pub values: Tensor,
}

/// A function of the residual stream. Where the base adds a sublayer's output o to the stream s that the sublayer read
/// (before its norm), a token gets instead
///
/// ```text
/// outer(s, o) + norm_after( inner(s, o) + up act( down norm_before( input(s, o) ) + b ) + b' )
/// ```
///
/// The base itself is `outer` alone, with both weights one.
#[derive(Clone, Debug)]
pub struct StreamFunction {
    /// What the bottleneck reads.
    pub input: Mix,
    /// Weight and shift (hidden) of a layer norm on that.
    pub norm_before: Option<(Tensor, Tensor)>,
    /// Weight (width, hidden) and bias (width) of the way down.
    pub down: (Tensor, Tensor),
    /// What is applied to each element in the bottleneck.
    pub activation: Activation,
    /// Weight (hidden, width) and bias (hidden) of the way up; any scale factor is folded into both.
    pub up: (Tensor, Tensor),
    /// What is added before `norm_after`.
    pub inner: Mix,
    /// Weight and shift (hidden) of a layer norm on the result.
    pub norm_after: Option<(Tensor, Tensor)>,
    /// What is added last.
    pub outer: Mix,
}

/// Weights of a stream and of the output that a sublayer adds to it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mix {
    /// Of the stream as the sublayer found it.
    pub stream: f32,
    /// Of the sublayer's output.
    pub output: f32,
}

/// An elementwise function of an f32 tensor.
pub type Activation = fn(&Tensor) -> Result<Tensor>;

impl Mix {
    /// The sums of the weights.
    pub fn plus(self, other: Self) -> Self {
        Self { stream: self.stream + other.stream, output: self.output + other.output }
    }
}

impl StreamFunction {
    /// Every tensor of the function.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let pairs = [Some(&self.down), Some(&self.up), self.norm_before.as_ref(), self.norm_after.as_ref()];
        pairs.into_iter().flatten().flat_map(|(weight, shift)| [weight, shift]).collect()
    }

    /// Every tensor of the function, to be replaced in place.
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let pairs = [Some(&mut self.down), Some(&mut self.up), self.norm_before.as_mut(), self.norm_after.as_mut()];
        pairs.into_iter().flatten().flat_map(|(weight, shift)| [weight, shift]).collect()
    }
}

impl LayerSlots {
    /// The functions of the stream.
    pub fn functions(&self) -> impl Iterator<Item = &StreamFunction> {
        self.after_attention.iter().chain(&self.after_mlp)
    }

    /// How many parts of the layer are changed.
    pub fn len(&self) -> usize {
        self.functions().count() + usize::from(self.branch.is_some())
    }

    /// Whether nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every tensor of the slots.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let branch = self.branch.iter().flat_map(|branch| [&branch.keys, &branch.values]);
        self.functions().flat_map(StreamFunction::tensors).chain(branch).collect()
    }

    /// Every tensor of the slots, to be replaced in place.
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let functions = self.after_attention.iter_mut().chain(&mut self.after_mlp);
        let branch = self.branch.iter_mut().flat_map(|branch| [&mut branch.keys, &mut branch.values]);
        functions.flat_map(StreamFunction::tensors_mut).chain(branch).collect()
    }
}
