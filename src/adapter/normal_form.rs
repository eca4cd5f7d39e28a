//! The closed normal form that every adapter kind is lowered to.
//!
//! For one linear with frozen weight `W` (out, in), a token that uses adapter `t` computes
//!
//! ```text
//! y = scale_t * ( W_t pre_t(x) + sum_j delta_{t,j}(x) ) + c_t
//! ```
//!
//! The product with the shared `W` is bias-free and runs once for all tokens of a step. Only that product reads
//! `pre_t(x)`; the deltas read `x` itself. `c` is the bias when an adapter says nothing about it. All slots default to
//! neutral.
//!
//! Inside a decoder layer an adapter can take the place of the sums that close its sublayers ([`LayerSlots`]).
//!
//! Beside the slots an adapter can stand before the prompt: first entries of the KV cache, then virtual tokens. Both take
//! positions, from 0 on, and the prompt follows. It can also be asleep until its invocation tokens occur in the prompt.
//!
//! Terms can be weighed by gates that each token gets from what the bare base makes of the same context ([`GateNetwork`]).
//! Whoever runs such an adapter computes, and caches, that context of the bare base too.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use candle_core::Tensor;

use super::{GateNetwork, LayerSlots, SharedMatrix, SiteId};

pub use crate::kernels::{Band, Basis, BlockMix, ButterflyFactor, Spectral};

/// An adapter in normal form. Sites that do not occur are untouched.
#[derive(Clone, Debug, Default)]
pub struct LoweredAdapter {
    /// Slots per linear.
    pub linears: BTreeMap<SiteId, LinearSlots>,
    /// Replacements per norm.
    pub norms: BTreeMap<SiteId, NormOverride>,
    /// Patches per embedding.
    pub embeddings: BTreeMap<SiteId, EmbeddingPatch>,
    /// Slots per decoder layer, by its number.
    pub layers: BTreeMap<usize, LayerSlots>,
    /// Rows (n, hidden) that stand before every prompt as if they were embedded tokens.
    pub virtual_tokens: Option<Tensor>,
    /// Keys and values that stand before every context.
    pub kv_prefix: Option<KvPrefix>,
    /// Tokens that switch the adapter on: it acts from the first of their last occurrence in the prompt on, and not at all
    /// on a prompt without them. Empty where it always acts. Not together with what stands before the prompt.
    pub invocation_tokens: Vec<u32>,
    /// What gives every token the gates that gated terms are weighed by. Not together with what stands before the prompt,
    /// nor with invocation tokens.
    pub gates: Option<GateNetwork>,
}

/// Entries of the KV cache, at least one, in the form that the cache holds them: keys are normed and rotated already.
#[derive(Clone, Debug)]
pub struct KvPrefix {
    /// Keys and values of each layer of the base model, both (entries, kv heads * head_dim).
    pub layers: Vec<(Tensor, Tensor)>,
}

/// What an adapter does to one linear.
#[derive(Clone, Debug, Default)]
pub struct LinearSlots {
    /// What becomes of the input before it meets the weight (replaced rows included); deltas read the input as it is.
    pub pre: Pre,
    /// The weight to multiply with.
    pub weight: Weight,
    /// Replaced rows of the weight: output indexes in ascending order, and their rows (n, in).
    pub rows: Option<(Vec<u32>, Tensor)>,
    /// Additive terms.
    pub deltas: Vec<Delta>,
    /// Output scale; applies to the product and the deltas, not to `c`.
    pub scale: Scale,
    /// The vector added last, (out). `None` means the base bias, or nothing where the base has none.
    pub c: Option<Tensor>,
}

/// What becomes of a linear's input before it meets the weight.
#[derive(Clone, Debug, Default)]
pub enum Pre {
    /// Nothing.
    #[default]
    Identity,
    /// Elementwise product, (in).
    Diag(Tensor),
    /// Each block of consecutive inputs times a matrix: `x'[k*s + j] = sum_i x[k*s + i] m_k[i, j]`, blocks (n, s, s) with
    /// n s inputs, or (1, s, s) when all blocks of the input share one.
    BlockDiag(Tensor),
    /// Block-diagonal factors under permutations, in the order in which they act on the input.
    Butterfly(Vec<ButterflyFactor>),
}

/// The weight a linear multiplies with.
#[derive(Clone, Debug, Default)]
pub enum Weight {
    /// The shared base weight.
    #[default]
    Base,
    /// A dense copy of the adapter's own, (out, in).
    Own(Tensor),
}

/// One additive term of a linear.
#[derive(Clone, Debug)]
pub enum Delta {
    /// `b (a x)`, a: (r, in), b: (out, r). Any scale factor is folded into `b`.
    LowRank {
        /// Down projection (r, in).
        a: Tensor,
        /// Up projection (out, r).
        b: Tensor,
    },
    /// `y[k*q + j] += sum_i m[i, j] * s[i]`, where `s` (r) is the sum of the width-r shards of `x`, zero-padded on the
    /// right, m: (r, q) and q divides out.
    ShardSum {
        /// Block matrix (r, q).
        m: Tensor,
    },
    /// `sum_e g_e b_e (a_e x)` over experts of equal rank, whose factors lie one after the other. Each token has gates of
    /// its own: the softmax of `|prototypes x| / temperature` over the `top_k` experts with the largest magnitudes, and zero
    /// for the others.
    Routed {
        /// Down projections (experts r, in).
        a: Tensor,
        /// Up projections (out, experts r). Any scale factor is folded in.
        b: Tensor,
        /// What inputs are compared with, (experts, in) in f32.
        prototypes: Tensor,
        /// Experts of a token, at most as many as there are.
        top_k: usize,
        /// Divides the magnitudes.
        temperature: f32,
    },
    /// `b (g * (a x))`, a: (r, in), b: (out, r), where g takes its r numbers from the token's gates, which the adapter's
    /// [`GateNetwork`] gives: `g[j] = gates[places[j]]`.
    Gated {
        /// Down projection (r, in).
        a: Tensor,
        /// Up projection (out, r). Any scale factor is folded in.
        b: Tensor,
        /// Which gate goes with each number of `a x`, (r) of 32-bit integers.
        places: Tensor,
    },
    /// `y[rows[i]] += values[i] * x[columns[i]]` for each entry i. The entries are sorted by row, and no place occurs
    /// twice.
    Sparse {
        /// Output indexes, (entries) of 32-bit integers.
        rows: Tensor,
        /// Input indexes, (entries) of 32-bit integers.
        columns: Tensor,
        /// Values, (entries).
        values: Tensor,
    },
    /// `y[m*b + t] += sum_n sum_j kernel[m, n, (j - t) mod b] * x[n*b + j]`: a matrix of circulant blocks.
    Circulant {
        /// First row of each block, (out / b, in / b, b).
        kernel: Tensor,
    },
    /// Blocks of inputs times matrices, `g[j, s] = sum_c a[j, s, c] x[j*d + c]`, mixed to `h[i, s]` ([`BlockMix`]) and, as
    /// blocks of outputs, `y[i*q + t] += sum_s b[i, t, s] h[i, s]`. Any scale factor is folded in.
    BlockProduct {
        /// Matrices of the blocks of inputs, (n, r, d) with `in = n d`; (1, r, d) when all share one.
        a: Tensor,
        /// From n to p blocks.
        mix: BlockMix,
        /// Matrices of the blocks of outputs, (p, q, r) with `out = p q`; (1, q, r) when all share one. `None` when the
        /// mixed blocks are the outputs, `out = p r`.
        b: Option<Tensor>,
    },
    /// `T_out^T S T_in x` with the transforms of a basis and a matrix S that is zero but for some entries. They are sorted by
    /// row; several at one place add up.
    Spectral {
        /// The transforms.
        basis: Basis,
        /// Outputs and inputs.
        shape: (usize, usize),
        /// Output coefficients, (entries) of 32-bit integers.
        rows: Tensor,
        /// Input coefficients, (entries) of 32-bit integers.
        columns: Tensor,
        /// Values, (entries).
        values: Tensor,
    },
    /// `g * (b (d * (a x)))` with matrices that other linears and other adapters read too.
    SharedLowRank {
        /// Down projection (r, in).
        a: Arc<SharedMatrix>,
        /// Up projection (out, r).
        b: Arc<SharedMatrix>,
        /// Scales the numbers between them, (r).
        d: Tensor,
        /// Scales the outputs, (out). Any scale factor is folded in.
        g: Tensor,
    },
}

/// Output scale of a linear.
#[derive(Clone, Debug, Default)]
pub enum Scale {
    /// No scale.
    #[default]
    One,
    /// Elementwise, (out).
    Diag(Tensor),
    /// Pairs of outputs are mixed. The outputs are in groups of `2 half`; for j below `half`, `a = y[j]` and
    /// `b = y[half + j]` of a group become `p[j] a - q[j] b` and `p[half + j] b + q[half + j] a`.
    PairRot {
        /// What each output keeps of itself, (out).
        p: Tensor,
        /// What it takes of its partner, (out).
        q: Tensor,
        /// Distance of the partners.
        half: usize,
    },
    /// Each block of consecutive outputs, as a row, times a matrix of blocks (n, s, s). The last block may reach beyond
    /// the outputs; what is beyond counts as zero, and is dropped.
    BlockDiag(Tensor),
}

/// Replacement of a norm's parameters: `y = weight * normalised(x) + shift`.
#[derive(Clone, Debug, Default)]
pub struct NormOverride {
    /// Complete weight (dim); `None` means the base weight.
    pub weight: Option<Tensor>,
    /// Complete shift (dim); `None` means the base shift, or nothing where the base has none.
    pub shift: Option<Tensor>,
}

/// What an adapter does to an embedding:
/// `e = scale * ( row(token) + b a[:, token] ) + shift`, where `row` reads `table`, then `rows`, then the base.
#[derive(Clone, Debug, Default)]
pub struct EmbeddingPatch {
    /// Complete table (vocab, dim) instead of the base's.
    pub table: Option<Tensor>,
    /// Replaced rows: token ids in ascending order, and their rows (n, dim).
    pub rows: Option<(Vec<u32>, Tensor)>,
    /// Low-rank addition a: (r, vocab), b: (dim, r); any scale factor is folded into `b`.
    pub low_rank: Option<(Tensor, Tensor)>,
    /// Elementwise scale (dim).
    pub scale: Option<Tensor>,
    /// Shift (dim).
    pub shift: Option<Tensor>,
}

impl Pre {
    /// Every tensor of the transform, but for indexes.
    pub fn tensors(&self) -> Vec<&Tensor> {
        match self {
            Self::Identity => Vec::new(),
            Self::Diag(tensor) | Self::BlockDiag(tensor) => vec![tensor],
            Self::Butterfly(factors) => factors.iter().map(|factor| &factor.blocks).collect(),
        }
    }

    /// Tensors of indexes, whose format never changes.
    pub fn indexes(&self) -> Vec<&Tensor> {
        match self {
            Self::Identity | Self::Diag(_) | Self::BlockDiag(_) => Vec::new(),
            Self::Butterfly(factors) => factors.iter().map(|factor| &factor.places).collect(),
        }
    }

    /// Every tensor of the transform but for indexes, to be replaced in place.
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        match self {
            Self::Identity => Vec::new(),
            Self::Diag(tensor) | Self::BlockDiag(tensor) => vec![tensor],
            Self::Butterfly(factors) => factors.iter_mut().map(|factor| &mut factor.blocks).collect(),
        }
    }
}

impl Delta {
    /// The matrices that others read too.
    pub fn shared(&self) -> impl Iterator<Item = &Arc<SharedMatrix>> {
        let shared = if let Self::SharedLowRank { a, b, .. } = self { Some([a, b]) } else { None };
        shared.into_iter().flatten()
    }

    /// The same, to be replaced in place.
    pub fn shared_mut(&mut self) -> impl Iterator<Item = &mut Arc<SharedMatrix>> {
        let shared = if let Self::SharedLowRank { a, b, .. } = self { Some([a, b]) } else { None };
        shared.into_iter().flatten()
    }

    /// Tensors whose format never changes: indexes, and what tokens are compared with.
    pub fn indexes(&self) -> Vec<&Tensor> {
        match self {
            Self::LowRank { .. }
            | Self::ShardSum { .. }
            | Self::Circulant { .. }
            | Self::BlockProduct { .. }
            | Self::SharedLowRank { .. } => Vec::new(),
            Self::Routed { prototypes, .. } => vec![prototypes],
            Self::Gated { places, .. } => vec![places],
            Self::Sparse { rows, columns, .. } | Self::Spectral { rows, columns, .. } => vec![rows, columns],
        }
    }
}

impl LinearSlots {
    /// Every tensor of the slots, but for indexes and matrices that others read too.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let mut tensors = self.pre.tensors();
        if let Weight::Own(w) = &self.weight {
            tensors.push(w);
        }
        tensors.extend(self.rows.iter().map(|(_, rows)| rows));
        for delta in &self.deltas {
            match delta {
                Delta::LowRank { a, b } | Delta::Routed { a, b, .. } | Delta::Gated { a, b, .. } => {
                    tensors.extend([a, b]);
                }
                Delta::ShardSum { m } => tensors.push(m),
                Delta::Sparse { values, .. } | Delta::Spectral { values, .. } => tensors.push(values),
                Delta::Circulant { kernel } => tensors.push(kernel),
                Delta::BlockProduct { a, mix, b } => tensors.extend(mix.matrix().into_iter().chain([a]).chain(b)),
                Delta::SharedLowRank { d, g, .. } => tensors.extend([d, g]),
            }
        }
        match &self.scale {
            Scale::One => {}
            Scale::Diag(g) | Scale::BlockDiag(g) => tensors.push(g),
            Scale::PairRot { p, q, .. } => tensors.extend([p, q]),
        }
        tensors.extend(&self.c);
        tensors
    }
}

impl EmbeddingPatch {
    /// Every tensor of the patch.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let mut tensors: Vec<&Tensor> = self.table.iter().chain(&self.scale).chain(&self.shift).collect();
        tensors.extend(self.rows.iter().map(|(_, rows)| rows));
        tensors.extend(self.low_rank.iter().flat_map(|(a, b)| [a, b]));
        tensors
    }
}

impl KvPrefix {
    /// How many positions the entries take.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, |(keys, _)| keys.dims()[0])
    }

    /// Whether there are none, which a base model without layers would need.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl LoweredAdapter {
    /// Virtual tokens before every prompt.
    pub fn num_virtual_tokens(&self) -> usize {
        self.virtual_tokens.as_ref().map_or(0, |rows| rows.dims()[0])
    }

    /// Entries of the KV cache before every context.
    pub fn num_prefix_entries(&self) -> usize {
        self.kv_prefix.as_ref().map_or(0, KvPrefix::len)
    }

    /// Positions it takes before every prompt.
    pub fn num_leading(&self) -> usize {
        self.num_prefix_entries() + self.num_virtual_tokens()
    }

    /// Contexts that a sequence with the adapter needs: its own, and that of the bare base where gates come from it.
    pub fn num_contexts(&self) -> usize {
        1 + usize::from(self.gates.is_some())
    }

    /// The token of a prompt from which on the adapter acts, generated ones included; `None` when it never does.
    pub fn active_from(&self, prompt: &[u32]) -> Option<usize> {
        let invocation = self.invocation_tokens.as_slice();
        if invocation.is_empty() {
            return Some(0);
        }
        prompt.windows(invocation.len()).rposition(|window| window == invocation)
    }

    /// Every tensor of the adapter, but for indexes and matrices that others read too.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let linears = self.linears.values().flat_map(LinearSlots::tensors);
        let norms = self.norms.values().flat_map(|norm| norm.weight.iter().chain(&norm.shift));
        let embeddings = self.embeddings.values().flat_map(EmbeddingPatch::tensors);
        let layers = self.layers.values().flat_map(LayerSlots::tensors);
        let gates = self.gates.iter().flat_map(GateNetwork::tensors);
        linears.chain(norms).chain(embeddings).chain(layers).chain(gates).chain(self.leading_tensors()).collect()
    }

    /// Every tensor of what stands before the prompt.
    pub fn leading_tensors(&self) -> impl Iterator<Item = &Tensor> {
        let prefix = self.kv_prefix.iter().flat_map(|prefix| &prefix.layers).flat_map(|(keys, values)| [keys, values]);
        self.virtual_tokens.iter().chain(prefix)
    }

    /// Every tensor of the adapter, but for indexes, to be replaced in place, and whether it is one of the
    /// [`Formats::matrices`](super::Formats::matrices).
    pub fn tensors_mut(&mut self) -> Vec<(&mut Tensor, bool)> {
        let (mut matrices, mut values) = (Vec::new(), Vec::new());
        for slots in self.linears.values_mut() {
            values.extend(slots.pre.tensors_mut());
            if let Weight::Own(w) = &mut slots.weight {
                matrices.push(w);
            }
            matrices.extend(slots.rows.iter_mut().map(|(_, rows)| rows));
            for delta in &mut slots.deltas {
                match delta {
                    Delta::LowRank { a, b } | Delta::Routed { a, b, .. } | Delta::Gated { a, b, .. } => {
                        matrices.extend([a, b]);
                    }
                    Delta::ShardSum { m } => matrices.push(m),
                    Delta::Sparse { values, .. } => matrices.push(values),
                    Delta::Circulant { kernel } => values.push(kernel),
                    Delta::BlockProduct { a, mix, b } => {
                        matrices.extend(std::iter::once(a).chain(b));
                        values.extend(mix.matrix_mut());
                    }
                    Delta::Spectral { values: coefficients, .. } => values.push(coefficients),
                    Delta::SharedLowRank { d, g, .. } => values.extend([d, g]),
                }
            }
            match &mut slots.scale {
                Scale::One => {}
                Scale::Diag(g) | Scale::BlockDiag(g) => values.push(g),
                Scale::PairRot { p, q, .. } => values.extend([p, q]),
            }
            values.extend(&mut slots.c);
        }
        for norm in self.norms.values_mut() {
            values.extend(norm.weight.iter_mut().chain(&mut norm.shift));
        }
        for patch in self.embeddings.values_mut() {
            matrices.extend(&mut patch.table);
            values.extend(patch.scale.iter_mut().chain(&mut patch.shift));
            values.extend(patch.rows.iter_mut().map(|(_, rows)| rows));
            values.extend(patch.low_rank.iter_mut().flat_map(|(a, b)| [a, b]));
        }
        values.extend(self.layers.values_mut().flat_map(LayerSlots::tensors_mut));
        values.extend(self.gates.iter_mut().flat_map(GateNetwork::tensors_mut));
        values.extend(&mut self.virtual_tokens);
        for (keys, of_keys) in self.kv_prefix.iter_mut().flat_map(|prefix| &mut prefix.layers) {
            values.extend([keys, of_keys]);
        }
        let matrices = matrices.into_iter().map(|tensor| (tensor, true));
        matrices.chain(values.into_iter().map(|tensor| (tensor, false))).collect()
    }

    /// Bytes of dense weight copies and tables among the tensors.
    pub fn own_bytes(&self) -> usize {
        let weights = self.linears.values().filter_map(|slots| match &slots.weight {
            Weight::Own(weight) => Some(weight),
            Weight::Base => None,
        });
        let tables = self.embeddings.values().filter_map(|patch| patch.table.as_ref());
        weights.chain(tables).map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }

    /// Bytes of all tensors, each counted once however many linears read it. What other adapters read too counts in full:
    /// the sum over adapters is then more than they take, and stays right whichever of them leaves.
    pub fn bytes(&self) -> usize {
        self.bytes_beside(std::iter::empty())
    }

    /// Bytes of the tensors that it does not share with `others`.
    pub fn bytes_beside<'a>(&self, others: impl Iterator<Item = &'a Self>) -> usize {
        let mut counted: HashSet<_> = others.flat_map(Self::all_tensors).map(Tensor::id).collect();
        let own = self.all_tensors().filter(|tensor| counted.insert(tensor.id()));
        own.map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }

    /// Every additive term.
    pub fn deltas(&self) -> impl Iterator<Item = &Delta> {
        self.linears.values().flat_map(|slots| &slots.deltas)
    }

    /// Every tensor, whether it is served in its format or not, and whoever else reads it.
    fn all_tensors(&self) -> impl Iterator<Item = &Tensor> {
        let of_pre = self.linears.values().flat_map(|slots| slots.pre.indexes());
        let indexes = self.deltas().flat_map(Delta::indexes).chain(of_pre);
        let shared = self.deltas().flat_map(Delta::shared).map(|matrix| matrix.tensor());
        self.tensors().into_iter().chain(indexes).chain(shared)
    }
}
