//! Reading the factors of a plain LoRA, without a base model.

use std::collections::BTreeMap;

use super::super::{Options, activation};
use super::{CombineInput, Factors};
use crate::adapter::config::{Config, field_error};
use crate::adapter::tensor_file::TensorFile;
use crate::adapter::{AdapterError, keys};

/// What else than factors a LoRA can have: the field that asks for it.
const BESIDE_FACTORS: &[&str] = &["modules_to_save", "trainable_token_indices"];
/// The two forms that a module's factors have in a file.
const FORMS: [[&str; 2]; 2] = [["lora_A.weight", "lora_B.weight"], ["lora_embedding_A", "lora_embedding_B"]];

/// An adapter's factors by module path.
pub(super) struct Source {
    pub(super) base_model: Option<String>,
    pub(super) task_type: Option<String>,
    pub(super) modules: BTreeMap<String, Factors>,
}

impl Source {
    /// Reads an input; what is no plain product of two factors is refused by name.
    pub(super) fn read(input: &CombineInput<'_>) -> Result<Self, AdapterError> {
        let name = input.name.to_owned();
        Self::parse(input).map_err(|fault| AdapterError::Part { name, fault: Box::new(fault) })
    }

    fn parse(input: &CombineInput<'_>) -> Result<Self, AdapterError> {
        let config = Config::parse(&input.files.config)?;
        let (kind, found) = (&super::super::LORA, config.peft_type()?);
        if found != kind.peft_type {
            let reason = format!("only `{}` adapters can be combined, found `{found}`", kind.peft_type);
            return Err(field_error("peft_type", reason));
        }
        if let Some(fault) = config.faults(kind.fields).into_iter().next() {
            return Err(fault);
        }
        let options = Options::parse(&config)?;
        check_plain(&config, &options)?;
        let file = TensorFile::parse(&input.files.weights, false)?;
        let (places, faults) = keys::group_by_path(&file, kind);
        if let Some(fault) = faults.into_iter().next() {
            return Err(fault);
        }
        let mut modules = BTreeMap::new();
        for (path, suffixes) in places {
            let factors = module(&file, &options, &path, &suffixes)?;
            modules.insert(path, factors);
        }
        if modules.is_empty() {
            return Err(AdapterError::Empty { reason: "the file holds no tensors".to_owned() });
        }
        let text = |field| config.string(field).map(|text| text.map(str::to_owned));
        Ok(Self { base_model: text("base_model_name_or_path")?, task_type: text("task_type")?, modules })
    }
}

fn check_plain(config: &Config, options: &Options) -> Result<(), AdapterError> {
    let refused = |field: &str| Err(field_error(field, "an adapter with it is more than two factors per module"));
    if options.dora {
        return refused("use_dora");
    }
    if options.bias {
        return refused("lora_bias");
    }
    if options.start.is_some() {
        return refused("init_lora_weights");
    }
    if !options.storage.is_plain() {
        let block = config.get("use_bdlora").is_some();
        return refused(if block { "use_bdlora" } else { "use_qalora" });
    }
    if !activation::parse(config)?.is_empty() {
        return refused(activation::FIELD);
    }
    if config.string("bias")?.is_some_and(|bias| bias != "none") {
        return refused("bias");
    }
    match BESIDE_FACTORS.iter().find(|field| config.is_set(field)) {
        Some(field) => refused(field),
        None => Ok(()),
    }
}

fn module(
    file: &TensorFile<'_>,
    options: &Options,
    path: &str,
    suffixes: &BTreeMap<String, String>,
) -> Result<Factors, AdapterError> {
    let refuse = |key: &str, reason: String| AdapterError::Tensor { tensor: key.to_owned(), reason };
    let is_embedding = FORMS[1].iter().any(|suffix| suffixes.contains_key(*suffix));
    let form = FORMS[usize::from(is_embedding)];
    if let Some((_, key)) = suffixes.iter().find(|(suffix, _)| !form.contains(&suffix.as_str())) {
        return Err(refuse(key, "only the two factors of a module can be combined".to_owned()));
    }
    let key = |suffix: &str| {
        let missing = || refuse(&keys::key_of(path, suffix), "is missing".to_owned());
        suffixes.get(suffix).ok_or_else(missing)
    };
    let (key_a, key_b) = (key(form[0])?, key(form[1])?);
    let (r, scale) = options.rank_and_scale(path)?;
    let (a, b) = (file.read_f32(key_a)?, file.read_f32(key_b)?);
    for (key, tensor, axis) in [(key_a, &a, 0), (key_b, &b, 1)] {
        if tensor.rank() != 2 || tensor.dims()[axis] != r {
            let reason = format!("expected two dimensions and rank {r}, found the shape {:?}", tensor.dims());
            return Err(refuse(key, reason));
        }
    }
    Ok(Factors { a, b, scale, form })
}
