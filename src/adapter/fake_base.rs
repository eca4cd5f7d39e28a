//! A small base model for tests: every kind of site, weights from a fixed generator.

use candle_core::{Device, Result, Shape, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{BaseShape, BaseWeights, Site, SiteId, SiteKind, SiteTable};

/// One layer with a biased and an unbiased linear, a head that may be tied, norms, an embedding.
pub(super) struct FakeBase {
    sites: SiteTable,
    tied: bool,
}

/// Length of the residual stream.
pub(super) const HIDDEN: usize = 12;
/// Length of the hidden vectors of the feed-forward part.
pub(super) const INNER: usize = 18;
/// Rows of the embedding.
pub(super) const VOCAB: usize = 20;

/// Values in -1..1 that depend on the seed only.
pub(super) fn random(seed: u64, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape.elem_count()).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Whether two tensors agree up to `tolerance` times the largest value.
pub(super) fn close(x: &Tensor, y: &Tensor, tolerance: f32) -> bool {
    assert_eq!(x.dims(), y.dims());
    let most = |x: Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    most((x - y).unwrap()) <= tolerance * most(y.clone()).max(1.0)
}

impl FakeBase {
    /// The model; `tied` makes the head share the embedding's weight.
    pub(super) fn new(tied: bool) -> Self {
        let linear = |in_features, out_features, bias, output_head| SiteKind::Linear {
            in_features,
            out_features,
            bias,
            output_head,
        };
        let mut sites = SiteTable::default();
        let mut push = |path: &str, kind| sites.push(Site { path: path.to_owned(), kind });
        push("model.embed_tokens", SiteKind::Embedding { vocab: VOCAB, dim: HIDDEN });
        for layer in 0..2 {
            push(&format!("model.layers.{layer}.input_layernorm"), SiteKind::Norm { dim: HIDDEN, bias: false });
            push(&format!("model.layers.{layer}.self_attn.q_proj"), linear(HIDDEN, HIDDEN, true, false));
            push(&format!("model.layers.{layer}.self_attn.q_norm"), SiteKind::Norm { dim: 4, bias: false });
            push(&format!("model.layers.{layer}.mlp.up_proj"), linear(HIDDEN, INNER, false, false));
            push(&format!("model.layers.{layer}.mlp.down_proj"), linear(INNER, HIDDEN, false, false));
        }
        push("model.norm", SiteKind::Norm { dim: HIDDEN, bias: true });
        push("lm_head", linear(HIDDEN, VOCAB, false, true));
        Self { sites, tied }
    }

    /// The site with this path.
    pub(super) fn id(&self, path: &str) -> SiteId {
        self.sites.find(path).unwrap()
    }
}

impl BaseWeights for FakeBase {
    fn sites(&self) -> &SiteTable {
        &self.sites
    }

    fn shape(&self) -> BaseShape {
        BaseShape { hidden_size: HIDDEN, num_layers: 2, kv_width: 8 }
    }

    fn tied_embeddings(&self) -> bool {
        self.tied
    }

    fn weight(&self, site: SiteId) -> Result<Tensor> {
        let seed = 1000 + site.0 as u64;
        Ok(match self.sites.get(site).kind {
            SiteKind::Linear { output_head: true, .. } if self.tied => random(1000, (VOCAB, HIDDEN)),
            SiteKind::Linear { in_features, out_features, .. } => random(seed, (out_features, in_features)),
            SiteKind::Norm { dim, .. } => random(seed, dim),
            SiteKind::Embedding { vocab, dim } => random(seed, (vocab, dim)),
        })
    }

    fn bias(&self, site: SiteId) -> Result<Option<Tensor>> {
        let seed = 2000 + site.0 as u64;
        Ok(match self.sites.get(site).kind {
            SiteKind::Linear { out_features, bias: true, .. } => Some(random(seed, out_features)),
            SiteKind::Norm { dim, bias: true } => Some(random(seed, dim)),
            _ => None,
        })
    }
}
