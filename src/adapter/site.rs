//! Sites: the places of a base model that an adapter can change, named by Hugging Face module path.

use std::collections::HashMap;

use candle_core::{Result, Tensor};

/// Index of a [`Site`] in its [`SiteTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SiteId(pub usize);

/// What stands at a site, with its logical sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SiteKind {
    /// `y = W x + b`, `W` of shape (out_features, in_features). The output head is one of these.
    Linear {
        /// Length of `x`.
        in_features: usize,
        /// Length of `y`.
        out_features: usize,
        /// Whether the base model has a bias here.
        bias: bool,
        /// Whether this is the output head (`lm_head`).
        output_head: bool,
    },
    /// A normalisation whose weight has length `dim`.
    Norm {
        /// Length of the weight.
        dim: usize,
        /// Whether the base model's norm has a shift.
        bias: bool,
    },
    /// A table of `vocab` rows of length `dim`.
    Embedding {
        /// Number of rows.
        vocab: usize,
        /// Length of a row.
        dim: usize,
    },
}

impl SiteKind {
    /// Number of elements of its weight.
    pub(super) fn num_elements(&self) -> usize {
        match *self {
            Self::Linear { in_features, out_features, .. } => in_features.saturating_mul(out_features),
            Self::Norm { dim, .. } => dim,
            Self::Embedding { vocab, dim } => vocab.saturating_mul(dim),
        }
    }

    /// What stands there, in words.
    pub(super) fn noun(&self) -> &'static str {
        match self {
            Self::Linear { .. } => "a linear",
            Self::Norm { .. } => "a norm",
            Self::Embedding { .. } => "an embedding",
        }
    }
}

/// One place of the base model that an adapter can change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Hugging Face module path, for example `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// What stands there.
    pub kind: SiteKind,
}

/// Every site of a base model, linears in the order in which transformers declares them.
#[derive(Clone, Debug, Default)]
pub struct SiteTable {
    sites: Vec<Site>,
    by_path: HashMap<String, SiteId>,
}

impl SiteTable {
    /// Adds a site and returns its id. A path occurs once.
    pub fn push(&mut self, site: Site) -> SiteId {
        let id = SiteId(self.sites.len());
        let previous = self.by_path.insert(site.path.clone(), id);
        assert!(previous.is_none(), "site {} is declared twice", site.path);
        self.sites.push(site);
        id
    }

    /// The site with this id.
    pub fn get(&self, id: SiteId) -> &Site {
        &self.sites[id.0]
    }

    /// The site with this module path.
    pub fn find(&self, path: &str) -> Option<SiteId> {
        self.by_path.get(path).copied()
    }

    /// All sites in their order.
    pub fn iter(&self) -> impl Iterator<Item = (SiteId, &Site)> {
        self.sites.iter().enumerate().map(|(idx, site)| (SiteId(idx), site))
    }

    /// Number of sites.
    pub fn len(&self) -> usize {
        self.sites.len()
    }

    /// Whether there is no site.
    pub fn is_empty(&self) -> bool {
        self.sites.is_empty()
    }
}

/// Sizes of a base model beside its sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseShape {
    /// Length of the residual stream's vectors.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Elements of one token's keys in one layer (kv heads * head_dim), and of its values.
    pub kv_width: usize,
}

/// The base model as lowering sees it: its sites and, where a formula needs them, its weights.
///
/// Every tensor is returned in f32 on the CPU and is the value that the forward pass really uses: for a quantised
/// base the dequantised weight.
pub trait BaseWeights: Send + Sync {
    /// The sites.
    fn sites(&self) -> &SiteTable;

    /// Its sizes.
    fn shape(&self) -> BaseShape;

    /// Whether the output head shares its weight with the input embedding.
    fn tied_embeddings(&self) -> bool;

    /// Weight of a site: (out, in) for a linear, (dim) for a norm, (vocab, dim) for an embedding.
    ///
    /// # Errors
    /// When the tensor cannot be copied or dequantised.
    fn weight(&self, site: SiteId) -> Result<Tensor>;

    /// Whether the base's weight at `site` is quantised and `weight`, in f32, is one that quantising may have made it of. A
    /// file's copy of the base's weight is known by it.
    ///
    /// # Errors
    /// When the tensor cannot be read.
    fn may_be_quantised_from(&self, _site: SiteId, _weight: &Tensor) -> Result<bool> {
        Ok(false)
    }

    /// Bias of a linear (out) or shift of a norm (dim); `None` where the base has none.
    ///
    /// # Errors
    /// When the tensor cannot be copied.
    fn bias(&self, site: SiteId) -> Result<Option<Tensor>>;
}
