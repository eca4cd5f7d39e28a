//! Writing a model directory: the base's, with some of its tensors changed.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, View};
use serde_json::{Map, Value, json};

use super::causal_lm::{CONFIG_FILE, architecture, read_json};
use super::checkpoint::{Checkpoint, INDEX_FILE};
use super::families::{self, Family};
use super::{ModelError, locate};
use crate::adapter::MergedModel;

/// Endings of the files that a tokenizer and its templates consist of, and of texts that belong to a model.
const COPIED: &[&str] = &["json", "jinja", "model", "txt", "tiktoken", "md"];

/// The one format that all tensors of the checkpoint in `dir` are stored in; f32 where there are several.
///
/// # Errors
/// When the checkpoint cannot be read.
pub fn stored_dtype(dir: &Path) -> Result<DType, ModelError> {
    let checkpoint = Checkpoint::open(dir)?;
    let mut formats: Vec<Dtype> = checkpoint.names().filter_map(|name| Some(checkpoint.stored(name)?.dtype)).collect();
    formats.dedup();
    match formats.as_slice() {
        [only] => float_format(*only).ok_or_else(|| ModelError::file("model.safetensors", &format!("is in {only:?}"))),
        _ => Ok(DType::F32),
    }
}

/// Writes the model in `base` with the changes of `merged` into the existing directory `out`: configuration, weights in
/// the base's files and formats, and its tokenizer's files.
///
/// # Errors
/// When the architecture has no place for a new bias, when a changed tensor is none of the checkpoint's or does not fit
/// its format, or when a file cannot be read or written.
pub fn write_merged(base: &Path, merged: &MergedModel, out: &Path) -> Result<(), ModelError> {
    let mut config = read_json(base, CONFIG_FILE)?;
    let family = families::find(architecture(&config)?)?;
    let checkpoint = Checkpoint::open(base)?;
    let mut changes = Changes::new(&checkpoint, merged)?;
    for path in &merged.new_biases {
        changes.switch_biases_on(&mut config, family, path)?;
    }
    if merged.untied {
        config["tie_word_embeddings"] = Value::Bool(false);
    }
    write_json(out, CONFIG_FILE, &config)?;
    changes.write(base, out)?;
    copy_others(base, &checkpoint, out)
}

/// A checkpoint's tensors in the making.
struct Changes<'a> {
    checkpoint: &'a Checkpoint,
    /// Changed and new tensors in the format they are stored in, each with the number of its file.
    tensors: BTreeMap<String, (usize, Tensor)>,
}

impl<'a> Changes<'a> {
    fn new(checkpoint: &'a Checkpoint, merged: &MergedModel) -> Result<Self, ModelError> {
        let mut changes = Self { checkpoint, tensors: BTreeMap::new() };
        for (name, tensor) in &merged.tensors {
            let is_new = merged.new_biases.iter().any(|path| name.strip_suffix(".bias") == Some(path));
            // A head that was the embedding is stored beside any other tensor.
            let is_new = is_new || (merged.untied && checkpoint.stored(name).is_none());
            changes.put(name, tensor, is_new)?;
        }
        Ok(changes)
    }

    /// Stores a tensor where the one that it replaces was, or if it is new where its module's weight is.
    fn put(&mut self, name: &str, tensor: &Tensor, is_new: bool) -> Result<(), ModelError> {
        let sibling = name.strip_suffix(".bias").map(|path| format!("{path}.weight"));
        let model = if is_new { sibling.as_deref().or_else(|| self.checkpoint.names().next()) } else { Some(name) };
        let Some(stored) = model.and_then(|model| self.checkpoint.stored(model)) else {
            return Err(ModelError::tensor(name, "the checkpoint does not have it, so it cannot be replaced"));
        };
        if !is_new && stored.shape != tensor.dims() {
            let reason = format!("expected shape {:?}, found {:?}", stored.shape, tensor.dims());
            return Err(ModelError::tensor(name, reason));
        }
        let Some(dtype) = float_format(stored.dtype) else {
            return Err(ModelError::tensor(name, format!("expected F32, F16 or BF16, found {:?}", stored.dtype)));
        };
        let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(dtype)?.contiguous()?;
        if !is_finite(&tensor)? {
            return Err(ModelError::tensor(name, format!("a merged value is not finite in {}", dtype.as_str())));
        }
        self.tensors.insert(name.to_owned(), (stored.file, tensor));
        Ok(())
    }

    /// Sets the field that gives the linear at `path` a bias, and gives zeros to the others that it means.
    fn switch_biases_on(&mut self, config: &mut Value, family: &Family, path: &str) -> Result<(), ModelError> {
        let last = path.rsplit('.').next().unwrap_or(path);
        let Some((field, names)) = family.bias_fields.iter().find(|(_, names)| names.contains(&last)) else {
            let reason = format!("{} has no bias there, so the merged model cannot be expressed", family.architecture);
            return Err(ModelError::tensor(format!("{path}.bias"), reason));
        };
        config[*field] = Value::Bool(true);
        let weights: Vec<String> = self.checkpoint.names().map(str::to_owned).collect();
        for weight in weights {
            let Some(path) = weight.strip_suffix(".weight") else { continue };
            let bias = format!("{path}.bias");
            let is_meant = path.rsplit('.').next().is_some_and(|last| names.contains(&last));
            if !is_meant || self.checkpoint.stored(&bias).is_some() || self.tensors.contains_key(&bias) {
                continue;
            }
            let Some(&[outputs, _]) = self.checkpoint.stored(&weight).map(|stored| stored.shape) else { continue };
            self.put(&bias, &Tensor::zeros(outputs, DType::F32, &Device::Cpu)?, true)?;
        }
        Ok(())
    }

    /// Writes every file of the checkpoint, and the index where there is one.
    fn write(&self, base: &Path, out: &Path) -> Result<(), ModelError> {
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let (mut weight_map, mut total) = (BTreeMap::new(), 0);
        for (number, file) in self.checkpoint.files().iter().enumerate() {
            let kept = self.checkpoint.names().filter(|name| !self.tensors.contains_key(*name));
            let kept = kept.filter_map(|name| {
                let stored = self.checkpoint.stored(name)?;
                (stored.file == number).then_some((name, Part::Kept(stored.dtype, stored.shape, stored.bytes)))
            });
            let changed = self.tensors.iter().filter(|(_, (file, _))| *file == number);
            let changed = changed.map(|(name, (_, tensor))| (name.as_str(), Part::Changed(tensor)));
            let parts: Vec<(&str, Part<'_>)> = kept.chain(changed).collect();
            for (name, part) in &parts {
                weight_map.insert((*name).to_owned(), file);
                total += part.data_len();
            }
            safetensors::serialize_to_file(parts, Some(metadata.clone()), &out.join(file))
                .map_err(|error| ModelError::file(file, &error))?;
        }
        if !base.join(INDEX_FILE).is_file() {
            return Ok(());
        }
        let mut index = read_json(base, INDEX_FILE).unwrap_or_else(|_| Value::Object(Map::new()));
        index["metadata"]["total_size"] = json!(total);
        index["weight_map"] = json!(weight_map);
        write_json(out, INDEX_FILE, &index)
    }
}

/// A tensor of a file to be written.
enum Part<'a> {
    /// As it is in the base's file.
    Kept(Dtype, &'a [usize], &'a [u8]),
    /// Another one.
    Changed(&'a Tensor),
}

impl View for Part<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::Kept(dtype, ..) => *dtype,
            Self::Changed(tensor) => View::dtype(*tensor),
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::Kept(_, shape, _) => shape,
            Self::Changed(tensor) => View::shape(*tensor),
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Kept(_, _, bytes) => Cow::Borrowed(bytes),
            Self::Changed(tensor) => View::data(*tensor),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Self::Kept(_, _, bytes) => bytes.len(),
            Self::Changed(tensor) => View::data_len(*tensor),
        }
    }
}

fn float_format(dtype: Dtype) -> Option<DType> {
    match dtype {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// Whether every value is finite; looks at a part at a time, since a table can be large.
fn is_finite(tensor: &Tensor) -> candle_core::Result<bool> {
    const PART: usize = 1 << 20;
    let flat = tensor.flatten_all()?;
    for start in (0..flat.elem_count()).step_by(PART) {
        let part = flat.narrow(0, start, PART.min(flat.elem_count() - start))?.to_dtype(DType::F32)?;
        if part.to_vec1::<f32>()?.iter().any(|value| !value.is_finite()) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn write_json(dir: &Path, file: &str, value: &Value) -> Result<(), ModelError> {
    let text = serde_json::to_string_pretty(value).map_err(|error| ModelError::file(file, &error))?;
    std::fs::write(dir.join(file), text + "\n").map_err(|error| ModelError::file(file, &error))
}

/// Copies the tokenizer's files and texts; weights of any format are not among them.
fn copy_others(base: &Path, checkpoint: &Checkpoint, out: &Path) -> Result<(), ModelError> {
    let failed = |file: &str, error: std::io::Error| ModelError::file(file, &error);
    for entry in std::fs::read_dir(base).map_err(|error| failed(".", error))? {
        let path = entry.map_err(|error| failed(".", error))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        let is_known = COPIED.contains(&ending) || locate::FILES.contains(&name) || name == "LICENSE";
        let is_weights =
            name == CONFIG_FILE || name.ends_with(".index.json") || checkpoint.files().iter().any(|f| f == name);
        if is_known && !is_weights && path.is_file() {
            std::fs::copy(&path, out.join(name)).map_err(|error| failed(name, error))?;
        }
    }
    Ok(())
}
