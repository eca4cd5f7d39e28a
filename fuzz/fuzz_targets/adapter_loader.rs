//! Throws bytes at the adapter loader. Whatever they are, it must answer, and not take memory for what a header claims.
//!
//! Run with `cargo +nightly fuzz run adapter_loader -- -rss_limit_mb=512`. The input is two bytes with the length of
//! `adapter_config.json`, then that file, then `adapter_model.safetensors`. A file of the corpus is made of an adapter
//! directory `$d` with:
//! `python3 -c "import sys; c, w = (open(p, 'rb').read() for p in sys.argv[1:]); sys.stdout.buffer.write(len(c).to_bytes(2, 'little') + c + w)" $d/adapter_config.json $d/adapter_model.safetensors`

#![no_main]

use std::sync::LazyLock;

use candle_core::{DType, Device, Result, Tensor};
use libfuzzer_sys::fuzz_target;
use patchbay::adapter::{
    AdapterFiles, BaseShape, BaseWeights, Formats, LowerOptions, Site, SiteId, SiteKind, SiteTable, digest, inspect, lower,
};

static BASE: LazyLock<Base> = LazyLock::new(Base::new);

fuzz_target!(|data: &[u8]| {
    let [low, high, rest @ ..] = data else { return };
    let (config, weights) = rest.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(rest.len()));
    let files = AdapterFiles::new(config.to_vec(), weights.to_vec());
    let _ = inspect(&files);
    for merge in [false, true] {
        let options = LowerOptions { merge, formats: Formats::uniform(DType::BF16), own_bytes_max: 1 << 16 };
        let _ = digest(&files, &options);
        let _ = lower(&files, &*BASE, &options);
    }
});

/// The sites of the `llama` fixture, whose adapters are a good corpus; every weight is one half.
struct Base {
    sites: SiteTable,
}

impl Base {
    fn new() -> Self {
        let linear = |in_features, out_features| SiteKind::Linear {
            in_features,
            out_features,
            bias: in_features != out_features,
            output_head: out_features == 128,
        };
        let norm = SiteKind::Norm { dim: 32, bias: false };
        let mut sites = SiteTable::default();
        let mut push = |path: String, kind| sites.push(Site { path, kind });
        push("model.embed_tokens".to_owned(), SiteKind::Embedding { vocab: 128, dim: 32 });
        for layer in 0..2 {
            let at = |name: &str| format!("model.layers.{layer}.{name}");
            push(at("input_layernorm"), norm);
            push(at("self_attn.q_proj"), linear(32, 32));
            push(at("self_attn.k_proj"), linear(32, 16));
            push(at("self_attn.v_proj"), linear(32, 16));
            push(at("self_attn.o_proj"), linear(32, 32));
            push(at("post_attention_layernorm"), norm);
            push(at("mlp.gate_proj"), linear(32, 48));
            push(at("mlp.up_proj"), linear(32, 48));
            push(at("mlp.down_proj"), linear(48, 32));
        }
        push("model.norm".to_owned(), norm);
        push("lm_head".to_owned(), linear(32, 128));
        Self { sites }
    }
}

impl BaseWeights for Base {
    fn sites(&self) -> &SiteTable {
        &self.sites
    }

    fn shape(&self) -> BaseShape {
        BaseShape { hidden_size: 32, num_layers: 2, kv_width: 16 }
    }

    fn tied_embeddings(&self) -> bool {
        true
    }

    fn weight(&self, site: SiteId) -> Result<Tensor> {
        match self.sites.get(site).kind {
            SiteKind::Linear { in_features, out_features, .. } => half(&[out_features, in_features]),
            SiteKind::Norm { dim, .. } => half(&[dim]),
            SiteKind::Embedding { vocab, dim } => half(&[vocab, dim]),
        }
    }

    fn bias(&self, site: SiteId) -> Result<Option<Tensor>> {
        match self.sites.get(site).kind {
            SiteKind::Linear { out_features, bias: true, .. } => half(&[out_features]).map(Some),
            _ => Ok(None),
        }
    }
}

fn half(shape: &[usize]) -> Result<Tensor> {
    Tensor::full(0.5f32, shape, &Device::Cpu)
}
