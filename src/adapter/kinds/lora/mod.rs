//! LoRA: low-rank additions `s * B A`, with every option and variant of PEFT's `LoraConfig` that serving can honour.
//! `s = alpha / r`, or `alpha / sqrt(r)` with `use_rslora` (PEFT 0.21 `tuners/lora`).

mod activation;
mod combine;
mod dora;
mod kasa;
mod start;
mod tokens;
mod variants;

use candle_core::Tensor;
use serde_json::Value;

pub use self::combine::{CombineInput, CombineMode, CombineOptions, combine};
use self::start::Start;
use self::variants::{Storage, Stored};
use super::Kind;
use crate::adapter::config::{Config, Rule, as_number, as_positive, field_error};
use crate::adapter::lowering::Lowering;
use crate::adapter::matching::{Matcher, Patterns, is_saved, modules_to_save};
use crate::adapter::{AdapterError, Delta, Scale, SiteId, SiteKind, replace};

/// The row of the table of kinds.
pub(super) const LORA: Kind = Kind {
    peft_type: "LORA",
    title: "LoRA, DoRA, activated LoRA",
    served_as: "low-rank delta; with DoRA also a diagonal output scale; embeddings and token rows patched; activated LoRA \
                from its invocation tokens on",
    merged_as: "W + s B A; with DoRA diag(g) (W + s B A)",
    suffixes: &[
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
        "lora_embedding_A",
        "lora_embedding_B",
        MAGNITUDE,
        MAGNITUDE_OLD,
        tokens::SUFFIX,
        kasa::DIAG,
        VELORA,
        MONTECLORA[0],
        MONTECLORA[1],
        MONTECLORA[2],
        MONTECLORA[3],
    ],
    pairs: &[("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")],
    fields: FIELDS,
    rank: |suffix, shape| match (suffix, shape) {
        ("lora_A.weight" | "lora_embedding_A", [r, _])
        | ("lora_B.weight" | "lora_embedding_B", [_, r])
        | (kasa::DIAG, [r]) => Some(*r),
        _ => None,
    },
    shows_parts: |config| config.get("use_bdlora").is_some(),
    check,
    lower,
    ..Kind::PLAIN
};

const MAGNITUDE: &str = "lora_magnitude_vector";
/// The spelling of some releases.
const MAGNITUDE_OLD: &str = "lora_magnitude_vector.weight";
/// A buffer that only training reads.
const VELORA: &str = "lora_velora_embed";
/// A sampler that only training reads.
const MONTECLORA: [&str; 4] = [
    "lora_monteclora_sampler.expert_weights",
    "lora_monteclora_sampler.expert_weights_prior",
    "lora_monteclora_sampler.gaussian_var_prior",
    "lora_monteclora_sampler.std_prior",
];

const FIELDS: &[(&str, Rule)] = &[
    ("r", Rule::Read),
    ("lora_alpha", Rule::Read),
    ("use_rslora", Rule::Read),
    ("rank_pattern", Rule::Read),
    ("alpha_pattern", Rule::Read),
    ("use_dora", Rule::Read),
    ("lora_bias", Rule::Read),
    ("bias", Rule::Read),
    ("init_lora_weights", Rule::Read),
    ("trainable_token_indices", Rule::Read),
    ("ensure_weight_tying", Rule::Read),
    (activation::FIELD, Rule::Read),
    ("lora_dropout", Rule::Ignored),
    ("megatron_config", Rule::Ignored),
    ("megatron_core", Rule::Ignored),
    ("loftq_config", Rule::Ignored),
    ("eva_config", Rule::Ignored),
    ("corda_config", Rule::Ignored),
    ("lora_ga_config", Rule::Ignored),
    ("velora_config", Rule::Ignored),
    ("runtime_config", Rule::Ignored),
    ("ephemeral_gpu_offload", Rule::Ignored),
    ("monteclora_config", Rule::Ignored),
    ("qalora_group_size", Rule::Read),
    ("use_qalora", Rule::Read),
    ("use_bdlora", Rule::Read),
    ("unsloth_fixed", Rule::Ignored),
    ("alora_invocation_tokens", Rule::Refused("activated LoRA is not served")),
    (kasa::FIELD, Rule::Read),
    (
        "arrow_config",
        Rule::Refused("this is the router of an Arrow model, without its experts; collect them with tools/arrow.py"),
    ),
    ("layer_replication", Rule::Refused("a rebuilt layer stack is not served")),
    ("target_parameters", Rule::Refused("adapters on bare parameters are not served")),
];

/// Initialisations that start from the unchanged base weight. All others that PEFT knows subtract something from it;
/// [`Start`] has those for which the base weight tells what.
const PLAIN_INITS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// What the config says for all modules.
struct Options {
    alpha: f64,
    r: usize,
    ranks: Patterns,
    alphas: Patterns,
    rslora: bool,
    dora: bool,
    bias: bool,
    start: Option<Start>,
    kasa: bool,
    storage: Storage,
}

fn check(config: &Config) -> Result<(), AdapterError> {
    activation::parse(config)?;
    let options = Options::parse(config)?;
    let invocation = activation::parse(config)?;
    if (options.start.is_some() || options.kasa) && !invocation.is_empty() {
        let reason = "a changed base weight would change tokens before the invocation too, which is not served";
        return Err(field_error(activation::FIELD, reason));
    }
    Matcher::parse(config, "target_modules").map(drop)
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let options = Options::parse(&lowering.config)?;
    let tied = lowering.config.flag("ensure_weight_tying")?;
    let tied_head = if tied { lowering.tied_head() } else { None };
    let names = modules_to_save(&lowering.config)?;
    let embedding_saved = lowering.embeddings().iter().any(|id| is_saved(&names, &lowering.site(*id).path));
    replace::saved_modules(lowering, tied_head.filter(|_| embedding_saved))?;
    replace::biases(lowering)?;
    replace::base_layers(lowering)?;
    let patched = tokens::lower(lowering)?;

    let matcher = Matcher::parse(&lowering.config, "target_modules")?;
    let targets = lowering.targets(&matcher, |kind| !matches!(kind, SiteKind::Norm { .. }))?;
    let embedding_targeted = lowering.embeddings().iter().any(|id| targets.contains(id));
    for id in lowering.unread_sites() {
        lowering.discard(id, VELORA);
        for suffix in MONTECLORA {
            lowering.discard(id, suffix);
        }
        let Some(suffix) = lowering.kind_suffixes(id).first().map(|suffix| (*suffix).to_owned()) else { continue };
        let follows = embedding_targeted && tied_head == Some(id);
        if !targets.contains(&id) && !matcher.is_unset() && !follows {
            return Err(lowering.refuse(id, &suffix, "`target_modules` does not name its module"));
        }
        if patched.contains(&id) {
            let reason = "its module has `trainable_token_indices` as well, which together are not served";
            return Err(lowering.refuse(id, &suffix, reason));
        }
        for suffix in [MAGNITUDE, MAGNITUDE_OLD] {
            if !options.dora && lowering.has(id, suffix) {
                return Err(lowering.refuse(id, suffix, "is in the file, but `use_dora` is false"));
            }
        }
        match lowering.site(id).kind {
            SiteKind::Linear { in_features, out_features, .. } => {
                linear(lowering, &options, id, (in_features, out_features))?;
            }
            SiteKind::Embedding { vocab, dim } => embedding(lowering, &options, id, (vocab, dim))?,
            SiteKind::Norm { .. } => return Err(lowering.refuse(id, &suffix, "its module is a norm")),
        }
    }
    activation::lower(lowering)
}

/// Unconverted files of initialisations that change the base weight make sense only where the change can be told.
fn start(config: &Config) -> Result<Option<Start>, AdapterError> {
    let field = "init_lora_weights";
    match config.get(field) {
        None | Some(Value::Bool(_)) => Ok(None),
        Some(Value::String(init)) if PLAIN_INITS.contains(&init.to_ascii_lowercase().as_str()) => Ok(None),
        Some(Value::String(init)) if init == "pissa" => Ok(Some(Start::Pissa)),
        Some(Value::String(init)) if init == "olora" => Ok(Some(Start::Olora)),
        Some(value) => Err(field_error(field, format!("{value} {}", start::unknown_reason(value)))),
    }
}

impl Options {
    fn parse(config: &Config) -> Result<Self, AdapterError> {
        let options = Self {
            alpha: config.number("lora_alpha")?.unwrap_or(8.0),
            r: config.positive("r")?.unwrap_or(8),
            ranks: Patterns::parse(config, "rank_pattern")?,
            alphas: Patterns::parse(config, "alpha_pattern")?,
            rslora: config.flag("use_rslora")?,
            dora: config.flag("use_dora")?,
            bias: config.flag("lora_bias")?,
            start: start(config)?,
            kasa: kasa::parse(config)?,
            storage: Storage::parse(config)?,
        };
        if options.kasa && (options.dora || options.start.is_some() || !options.storage.is_plain()) {
            let reason = "is not combined with `use_dora`, `use_qalora`, `use_bdlora` or another changed base weight";
            return Err(field_error(kasa::FIELD, reason));
        }
        if options.dora && !options.storage.is_plain() {
            return Err(field_error("use_dora", "PEFT does not combine it with `use_qalora` or `use_bdlora`"));
        }
        if options.dora && options.bias {
            return Err(field_error("lora_bias", "PEFT does not combine it with `use_dora`"));
        }
        Ok(options)
    }

    /// Rank and scale of a module.
    fn rank_and_scale(&self, path: &str) -> Result<(usize, f64), AdapterError> {
        let r = self.ranks.get(path)?.map_or(Ok(self.r), |value| as_positive("rank_pattern", value))?;
        let alpha = self.alphas.get(path)?.map_or(Ok(self.alpha), |value| as_number("alpha_pattern", value))?;
        let divisor = if self.rslora { (r as f64).sqrt() } else { r as f64 };
        Ok((r, alpha / divisor))
    }
}

/// Two factors, their scale, and the DoRA magnitude if there is one.
struct Factors {
    a: Tensor,
    b: Tensor,
    scale: f64,
    magnitude: Option<Tensor>,
}

/// Takes the factors a: (r, inputs) and b: (outputs, r) of a module, stored in the form that `stored` says for its rank;
/// `inputs` of an embedding is the vocabulary.
fn factors(
    lowering: &mut Lowering<'_>,
    options: &Options,
    id: SiteId,
    (name_a, name_b): (&str, &str),
    (inputs, outputs): (usize, usize),
) -> Result<Factors, AdapterError> {
    let (r, scale) = options.rank_and_scale(&lowering.site(id).path)?;
    let stored = match lowering.site(id).kind {
        SiteKind::Linear { .. } => options.storage.of(&lowering.site(id).path, r, (inputs, outputs))?,
        SiteKind::Norm { .. } | SiteKind::Embedding { .. } => Stored::Plain,
    };
    let (shape_a, shape_b) = (stored.shape_a(r, inputs), stored.shape_b(r, outputs));
    for (name, axis, expected) in [(name_a, 0, shape_a[0]), (name_b, 1, shape_b[1])] {
        let found = lowering.shape(id, name).and_then(|shape| (shape.len() == 2).then(|| shape[axis]));
        if let Some(found) = found.filter(|found| *found != expected) {
            let reason = format!("expected rank {expected} (`r`, `rank_pattern`), found {found}");
            return Err(lowering.refuse(id, name, reason));
        }
    }
    let a = lowering.require(id, name_a, &shape_a)?;
    let b = lowering.require(id, name_b, &shape_b)?;
    let (a, b) = stored.expand(a, b)?;
    let has_old = lowering.has(id, MAGNITUDE_OLD) && !lowering.has(id, MAGNITUDE);
    let name = if has_old { MAGNITUDE_OLD } else { MAGNITUDE };
    let magnitude = if options.dora { Some(lowering.require(id, name, &[outputs])?) } else { None };
    lowering.ranks.insert(r);
    Ok(Factors { a, b, scale, magnitude })
}

/// `y = W x + b + s B (A x) + s bias_B`, less what the initialisation or KaSA took from W; with DoRA the product and the
/// delta are scaled by `m / |W + s B A|`.
fn linear(
    lowering: &mut Lowering<'_>,
    options: &Options,
    id: SiteId,
    (in_features, out_features): (usize, usize),
) -> Result<(), AdapterError> {
    let names = ("lora_A.weight", "lora_B.weight");
    let factors = factors(lowering, options, id, names, (in_features, out_features))?;
    let (mut a, mut b) = (factors.a, (factors.b * factors.scale)?);
    if options.kasa {
        (a, b) = kasa::factors(lowering, id, (a, b))?;
    }
    if let Some(start) = options.start {
        let r = a.dim(0)?;
        let start = if r > in_features.min(out_features) {
            None
        } else {
            start.subtracted(&lowering.weight(id)?, r, factors.scale)?
        };
        let Some((start_b, start_a)) = start else {
            let path = &lowering.site(id).path;
            let reason =
                format!("what it subtracted from the weight of `{path}` cannot be told; convert the file with PEFT");
            return Err(field_error("init_lora_weights", reason));
        };
        (a, b) = (Tensor::cat(&[&a, &start_a], 0)?, Tensor::cat(&[&b, &start_b.neg()?], 1)?);
    }
    if let Some(magnitude) = factors.magnitude {
        let norm = dora::row_norms(&lowering.weight(id)?, &a, &b)?;
        lowering.out.linears.entry(id).or_default().scale = Scale::Diag((magnitude / norm)?);
    }
    if options.bias {
        let bias = (lowering.require(id, "lora_B.bias", &[out_features])? * factors.scale)?;
        let c = lowering.bias(id)?.map_or_else(|| Ok(bias.clone()), |c| c + &bias)?;
        lowering.out.linears.entry(id).or_default().c = Some(c);
    }
    let delta = Delta::LowRank { a, b };
    lowering.out.linears.entry(id).or_default().deltas.push(delta);
    Ok(())
}

/// `e = row(token) + s B A[:, token]`; with DoRA the sum is scaled by `m / |E + s (B A)^T|` over the vocabulary.
fn embedding(
    lowering: &mut Lowering<'_>,
    options: &Options,
    id: SiteId,
    (vocab, dim): (usize, usize),
) -> Result<(), AdapterError> {
    let changes_base = [("init_lora_weights", options.start.is_some()), (kasa::FIELD, options.kasa)];
    if let Some((field, _)) = changes_base.iter().find(|(_, is_set)| *is_set) {
        let reason = format!("is not served for `{}`, which is an embedding", lowering.site(id).path);
        return Err(field_error(field, reason));
    }
    let names = ("lora_embedding_A", "lora_embedding_B");
    let factors = factors(lowering, options, id, names, (vocab, dim))?;
    let b = (&factors.b * factors.scale)?;
    let mut scale = None;
    if let Some(magnitude) = factors.magnitude {
        let own = lowering.out.embeddings.get(&id).and_then(|patch| patch.table.clone());
        let table = own.map_or_else(|| lowering.base.weight(id), |own| own.to_dtype(candle_core::DType::F32))?;
        let norm = dora::column_norms(&table, &factors.a, &b)?;
        scale = Some((magnitude / norm)?);
    }
    let patch = lowering.out.embeddings.entry(id).or_default();
    (patch.low_rank, patch.scale) = (Some((factors.a, b)), scale);
    Ok(())
}
