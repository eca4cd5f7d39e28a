//! Bottleneck adapters in the format of AdapterHub (`adapters` 1.3): a small network behind a sublayer,
//! `f(h) = scaling (up act(down h + b) + b')`, beside or within the residual connection.
//!
//! A config of that library has no `peft_type`; it has the adapter's `name` and an object `config`. The decoders that
//! the library supports natively have their norms before the sublayers, so none stands behind one: the options that ask
//! for the norm there add the stream only.

use candle_core::Tensor;
use serde_json::Value;

use super::Kind;
use crate::adapter::activation;
use crate::adapter::config::{Config, Rule, as_positive, field_error, wrong_type};
use crate::adapter::lowering::Lowering;
use crate::adapter::{Activation, AdapterError, LayerSlots, Mix, StreamFunction};

/// The row of the table of kinds.
pub(super) const BOTTLENECK: Kind = Kind {
    peft_type: "BOTTLENECK",
    claims,
    title: "AdapterHub bottleneck (Pfeiffer, Houlsby, parallel)",
    served_as: "a small network behind attention or feed-forward",
    merged_as: "nothing to merge",
    shared: &[LAYERS, BARE_LAYERS],
    fields: &[
        ("config", Rule::Read),
        ("name", Rule::Read),
        ("hidden_size", Rule::Read),
        ("version", Rule::Read),
        ("model_type", Rule::Ignored),
        ("model_name", Rule::Ignored),
        ("model_class", Rule::Ignored),
        ("type", Rule::Ignored),
        ("label2id", Rule::Ignored),
        ("target_modules", Rule::Refused("AdapterHub's bottlenecks have no such field")),
        ("modules_to_save", Rule::Refused("AdapterHub's bottlenecks have no such field")),
    ],
    check: |config| Options::read(config).map(drop),
    lower,
    ..Kind::PLAIN
};

/// Where the layers are in keys of a model with a head.
const LAYERS: &str = "model.layers";
/// Where they are in keys of a model without one.
const BARE_LAYERS: &str = "layers";

/// Fields of `config`.
const FIELDS: &[(&str, Rule)] = &[
    ("mh_adapter", Rule::Read),
    ("output_adapter", Rule::Read),
    ("reduction_factor", Rule::Read),
    ("non_linearity", Rule::Read),
    ("original_ln_before", Rule::Read),
    ("original_ln_after", Rule::Read),
    ("residual_before_ln", Rule::Read),
    ("adapter_residual_before_ln", Rule::Read),
    ("ln_before", Rule::Read),
    ("ln_after", Rule::Read),
    ("is_parallel", Rule::Read),
    ("scaling", Rule::Read),
    ("leave_out", Rule::Read),
    ("use_gating", Rule::Refused("its gate is a mean over all tokens, so that a token depends on those after it")),
    ("inv_adapter", Rule::Refused("invertible adapters at the embedding are not served")),
    ("phm_layer", Rule::Refused("the hypercomplex layers of Compacter are not served")),
    ("inv_adapter_reduction_factor", Rule::Ignored),
    ("cross_adapter", Rule::Ignored),
    ("dropout", Rule::Ignored),
    ("stochastic_depth", Rule::Ignored),
    ("init_weights", Rule::Ignored),
    ("init_weights_seed", Rule::Ignored),
    ("phm_dim", Rule::Ignored),
    ("phm_rank", Rule::Ignored),
    ("phm_bias", Rule::Ignored),
    ("phm_c_init", Rule::Ignored),
    ("phm_init_range", Rule::Ignored),
    ("factorized_phm_W", Rule::Ignored),
    ("factorized_phm_rule", Rule::Ignored),
    ("shared_W_phm", Rule::Ignored),
    ("shared_phm_rule", Rule::Ignored),
    ("learn_phm", Rule::Ignored),
    ("hypercomplex_nonlinearity", Rule::Ignored),
];

fn claims(config: &Config) -> bool {
    config.get("config").is_some_and(Value::is_object) && config.get("name").is_some()
}

/// What the config says.
struct Options {
    /// The adapter's name, a component of each key.
    name: String,
    inner: Config,
    places: [(&'static str, bool); 2],
    activation: Activation,
    scaling: Scaling,
    flow: Flow,
    norms: (bool, bool),
    leave_out: Vec<u64>,
}

enum Scaling {
    Number(f64),
    /// A tensor of this length; none is the length of the stream.
    Learned(Option<usize>),
}

/// What the network reads, and what is added to it before and after its last norm.
#[derive(Clone, Copy)]
struct Flow {
    input: Mix,
    inner: Mix,
    outer: Mix,
}

impl Options {
    fn read(config: &Config) -> Result<Self, AdapterError> {
        let inner = config.section("config")?.ok_or_else(|| field_error("config", "is missing"))?;
        if let Some(architecture) = inner.string("architecture")? {
            let reason = format!("`{architecture}` of AdapterHub is not served, only bottlenecks are; PEFT has it too");
            return Err(field_error("architecture", reason));
        }
        if let Some(fault) = inner.faults_among(&[FIELDS]).into_iter().next() {
            return Err(fault);
        }
        let name = config.string("name")?.ok_or_else(|| field_error("name", "is missing"))?;
        let norms = (inner.flag("ln_before")?, inner.flag("ln_after")?);
        let options = Self {
            name: name.to_owned(),
            places: [
                ("attention_adapters", inner.flag("mh_adapter")?),
                ("output_adapters", inner.flag("output_adapter")?),
            ],
            activation: activation_of(config, &inner)?,
            scaling: scaling(&inner)?,
            flow: flow(&inner, norms.1)?,
            norms,
            leave_out: layer_numbers(&inner)?,
            inner,
        };
        options.width(1, 0)?;
        Ok(options)
    }

    /// Width of the bottleneck in a layer, for a stream of `hidden` numbers.
    fn width(&self, hidden: usize, layer: usize) -> Result<usize, AdapterError> {
        let field = "reduction_factor";
        let value = self.inner.get(field).ok_or_else(|| field_error(field, "is missing"))?;
        let value = match value {
            Value::Object(by_layer) => by_layer
                .get(&layer.to_string())
                .or_else(|| by_layer.get("default"))
                .ok_or_else(|| field_error(field, format!("has neither layer {layer} nor `default`")))?,
            value => value,
        };
        let factor = value.as_f64().filter(|factor| *factor > 0.0);
        let factor = factor.ok_or_else(|| wrong_type(field, "a positive number", value))?;
        Ok(((hidden as f64 / factor).floor() as usize).max(1))
    }
}

/// Files of the library's predecessors, which have no `version`, name two functions otherwise.
fn activation_of(config: &Config, inner: &Config) -> Result<Activation, AdapterError> {
    let field = "non_linearity";
    let name = inner.string(field)?.ok_or_else(|| field_error(field, "is missing"))?.to_lowercase();
    let is_old = config.string("version")?.is_none();
    let name = match name.as_str() {
        "leakyrelu" => "leaky_relu",
        "gelu" if is_old => "gelu_new",
        "gelu_orig" if is_old => "gelu",
        name => name,
    };
    activation::named(field, name)
}

fn scaling(inner: &Config) -> Result<Scaling, AdapterError> {
    match inner.get("scaling") {
        None => Ok(Scaling::Number(1.0)),
        Some(Value::String(text)) if text == "learned" => Ok(Scaling::Learned(Some(1))),
        Some(Value::String(text)) if text == "channel" => Ok(Scaling::Learned(None)),
        Some(value) => {
            let number = value.as_f64().ok_or_else(|| wrong_type("scaling", "a number, learned or channel", value))?;
            Ok(Scaling::Number(number))
        }
    }
}

fn layer_numbers(inner: &Config) -> Result<Vec<u64>, AdapterError> {
    let field = "leave_out";
    let Some(value) = inner.get(field) else { return Ok(Vec::new()) };
    let items = value.as_array().ok_or_else(|| wrong_type(field, "a list of layer numbers", value))?;
    items.iter().map(|item| item.as_u64().ok_or_else(|| wrong_type(field, "a layer number", item))).collect()
}

/// The paths around the network (`Adapter.pre_forward`, `.forward`, `.post_forward`, and those of `ParallelAdapter`).
fn flow(inner: &Config, norm_after: bool) -> Result<Flow, AdapterError> {
    const NONE: Mix = Mix { stream: 0.0, output: 0.0 };
    const STREAM: Mix = Mix { stream: 1.0, output: 0.0 };
    const OUTPUT: Mix = Mix { stream: 0.0, output: 1.0 };
    let or = |name: &str, default: bool| if inner.get(name).is_some() { inner.flag(name) } else { Ok(default) };
    let after = if or("original_ln_after", true)? { STREAM } else { NONE };
    if inner.flag("is_parallel")? {
        return Ok(Flow { input: STREAM, inner: NONE, outer: OUTPUT.plus(after) });
    }
    let input = if inner.flag("original_ln_before")? { STREAM.plus(OUTPUT) } else { OUTPUT };
    if inner.get("residual_before_ln").is_some_and(Value::is_string) {
        return Err(field_error(
            "residual_before_ln",
            "`post_add` needs a norm behind the sublayer, and there is none",
        ));
    }
    let residual = if or("residual_before_ln", true)? { OUTPUT } else { input };
    Ok(match norm_after && inner.flag("adapter_residual_before_ln")? {
        true => Flow { input, inner: residual, outer: after },
        false => Flow { input, inner: NONE, outer: residual.plus(after) },
    })
}

fn lower(lowering: &mut Lowering<'_>) -> Result<(), AdapterError> {
    let options = Options::read(&lowering.config)?;
    let shape = lowering.base.shape();
    if let Some(value) = lowering.config.get("hidden_size") {
        let hidden = as_positive("hidden_size", value)?;
        if hidden != shape.hidden_size {
            return Err(field_error("hidden_size", format!("expected {}, found {hidden}", shape.hidden_size)));
        }
    }
    let prefix = if lowering.has_shared_below(LAYERS) { LAYERS } else { BARE_LAYERS };
    for layer in 0..shape.num_layers {
        if options.leave_out.contains(&(layer as u64)) {
            continue;
        }
        let width = options.width(shape.hidden_size, layer)?;
        let mut functions = [None, None];
        for ((place, is_there), function) in options.places.iter().zip(&mut functions) {
            if *is_there {
                let path = path_of(&[prefix, &layer.to_string(), place, "adapters", &options.name]);
                *function = Some(read_function(lowering, &options, &path, (shape.hidden_size, width))?);
            }
        }
        let [after_attention, after_mlp] = functions;
        let slots = LayerSlots { after_attention, after_mlp, branch: None };
        if !slots.is_empty() {
            lowering.out.layers.insert(layer, slots);
        }
    }
    Ok(())
}

/// A path as the names of shared tensors have it: without components `default`.
fn path_of(components: &[&str]) -> String {
    let kept: Vec<&str> = components.iter().copied().filter(|component| *component != "default").collect();
    kept.join(".")
}

fn read_function(
    lowering: &mut Lowering<'_>,
    options: &Options,
    path: &str,
    (hidden, width): (usize, usize),
) -> Result<StreamFunction, AdapterError> {
    let (before, after) = options.norms;
    // With a norm in front the linear is the second module of its sequence.
    let linear = format!("{path}.adapter_down.{}", usize::from(before));
    let norm_before = if before { Some(norm_before(lowering, path, hidden)?) } else { None };
    let norm_after = if after { Some(pair(lowering, &format!("{path}.adapter_norm_after"), hidden)?) } else { None };
    let down = (
        lowering.require_shared(&format!("{linear}.weight"), &[width, hidden])?,
        lowering.require_shared(&format!("{linear}.bias"), &[width])?,
    );
    let up = (
        lowering.require_shared(&format!("{path}.adapter_up.weight"), &[hidden, width])?,
        lowering.require_shared(&format!("{path}.adapter_up.bias"), &[hidden])?,
    );
    let up = match &options.scaling {
        Scaling::Number(factor) => ((up.0 * *factor)?, (up.1 * *factor)?),
        Scaling::Learned(length) => {
            let factor = lowering.require_shared(&format!("{path}.scaling"), &[length.unwrap_or(hidden)])?;
            (up.0.broadcast_mul(&factor.unsqueeze(1)?)?, up.1.broadcast_mul(&factor)?)
        }
    };
    let Flow { input, inner, outer } = options.flow;
    Ok(StreamFunction { input, norm_before, down, activation: options.activation, up, inner, norm_after, outer })
}

/// Weight and shift of a norm.
fn pair(lowering: &mut Lowering<'_>, path: &str, hidden: usize) -> Result<(Tensor, Tensor), AdapterError> {
    let mut part = |suffix: &str| lowering.require_shared(&format!("{path}.{suffix}"), &[hidden]);
    Ok((part("weight")?, part("bias")?))
}

/// The norm in front has two names in the library's model; a file may have either, or both with equal values.
fn norm_before(lowering: &mut Lowering<'_>, path: &str, hidden: usize) -> Result<(Tensor, Tensor), AdapterError> {
    let names = [format!("{path}.adapter_norm_before"), format!("{path}.adapter_down.0")];
    let [first, second] = names.each_ref().map(|name| lowering.shared_shape(&format!("{name}.weight")).is_some());
    if !(first && second) {
        return pair(lowering, &names[usize::from(second)], hidden);
    }
    let (one, other) = (pair(lowering, &names[0], hidden)?, pair(lowering, &names[1], hidden)?);
    let values = |pair: &(Tensor, Tensor)| Ok::<_, AdapterError>((pair.0.to_vec1::<f32>()?, pair.1.to_vec1::<f32>()?));
    if values(&one)? != values(&other)? {
        let reason = format!("differs from `{}`, which is the same norm", names[0]);
        return Err(AdapterError::Tensor { tensor: names[1].clone(), reason });
    }
    Ok(one)
}
