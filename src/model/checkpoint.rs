//! A checkpoint's tensors: memory-mapped safetensors, in one file or in several with an index.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Component, Path};

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::SafeTensors;
use serde::Deserialize;

use super::ModelError;

const SINGLE_FILE: &str = "model.safetensors";
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";

/// The tensors of a checkpoint by name. Nothing is read before it is asked for.
pub(super) struct Checkpoint {
    /// File names, and the mapped files.
    files: Vec<String>,
    shards: Vec<Mmap>,
    tensors: BTreeMap<String, Entry>,
}

struct Entry {
    shard: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
    used: bool,
}

/// A tensor of a checkpoint as it is stored.
#[derive(Clone, Copy)]
pub(super) struct Stored<'a> {
    /// Number of its file.
    pub(super) file: usize,
    /// Its format.
    pub(super) dtype: safetensors::Dtype,
    /// Its shape.
    pub(super) shape: &'a [usize],
    /// Its values.
    pub(super) bytes: &'a [u8],
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Maps the safetensors files of `dir` and checks their headers.
    pub(super) fn open(dir: &Path) -> Result<Self, ModelError> {
        let mut checkpoint = Self { files: Vec::new(), shards: Vec::new(), tensors: BTreeMap::new() };
        if dir.join(SINGLE_FILE).is_file() {
            checkpoint.add_shard(dir, SINGLE_FILE)?;
        } else if dir.join(INDEX_FILE).is_file() {
            checkpoint.add_indexed_shards(dir)?;
        } else {
            let reason = format!("neither it nor {INDEX_FILE} exists; other weight formats are not read");
            return Err(ModelError::file(SINGLE_FILE, &reason));
        }
        Ok(checkpoint)
    }

    fn add_indexed_shards(&mut self, dir: &Path) -> Result<(), ModelError> {
        let text = std::fs::read(dir.join(INDEX_FILE)).map_err(|error| ModelError::file(INDEX_FILE, &error))?;
        let index: Index = serde_json::from_slice(&text).map_err(|error| ModelError::file(INDEX_FILE, &error))?;
        let mut files: Vec<&String> = index.weight_map.values().collect();
        files.sort();
        files.dedup();
        for file in files {
            let mut components = Path::new(file).components();
            let plain = matches!(components.next(), Some(Component::Normal(_))) && components.next().is_none();
            if !plain {
                return Err(ModelError::file(
                    INDEX_FILE,
                    &format!("{file:?} is not a file name in the model directory"),
                ));
            }
            self.add_shard(dir, file)?;
        }
        for (tensor, file) in &index.weight_map {
            if !self.tensors.contains_key(tensor) {
                return Err(ModelError::tensor(tensor, format!("{INDEX_FILE} says it is in {file}, but it is not")));
            }
        }
        Ok(())
    }

    #[expect(unsafe_code, reason = "mapping a file is unsafe in itself")]
    fn add_shard(&mut self, dir: &Path, file: &str) -> Result<(), ModelError> {
        let handle = File::open(dir.join(file)).map_err(|error| ModelError::file(file, &error))?;
        // SAFETY: the map is read only. Model files are not changed in place while the server loads them; if one
        // were truncated meanwhile the process would stop with SIGBUS, as any reader of a mapped model does.
        let map = unsafe { Mmap::map(&handle) }.map_err(|error| ModelError::file(file, &error))?;
        let (header_len, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| ModelError::file(file, &error))?;
        let data_start = header_len + 8;
        for (name, info) in metadata.tensors() {
            let bytes = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
            let shard = self.shards.len();
            let entry = Entry { shard, dtype: info.dtype, shape: info.shape.clone(), bytes, used: false };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(ModelError::tensor(name, "it occurs in two files"));
            }
        }
        self.files.push(file.to_owned());
        self.shards.push(map);
        Ok(())
    }

    /// Copies a tensor to `device` in format `dtype`.
    pub(super) fn load(
        &mut self,
        name: &str,
        shape: &[usize],
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor, ModelError> {
        let (stored, bytes) = self.stored_bytes(name, shape)?;
        let tensor = Tensor::from_raw_buffer(bytes, stored, shape, device)?;
        Ok(tensor.to_dtype(dtype)?)
    }

    /// A tensor's format and bytes as they are in the file, in little-endian order.
    pub(super) fn stored_bytes(&mut self, name: &str, shape: &[usize]) -> Result<(DType, &[u8]), ModelError> {
        let Some(entry) = self.tensors.get_mut(name) else {
            return Err(ModelError::tensor(name, "the checkpoint does not have it"));
        };
        if entry.shape != shape {
            let reason = format!("expected shape {shape:?}, found {:?}", entry.shape);
            return Err(ModelError::tensor(name, reason));
        }
        let stored = match entry.dtype {
            safetensors::Dtype::F32 => DType::F32,
            safetensors::Dtype::F16 => DType::F16,
            safetensors::Dtype::BF16 => DType::BF16,
            other => {
                return Err(ModelError::tensor(name, format!("expected F32, F16 or BF16, found {other:?}")));
            }
        };
        entry.used = true;
        Ok((stored, &self.shards[entry.shard][entry.bytes.clone()]))
    }

    /// The names of its files; [`Stored::file`] counts them.
    pub(super) fn files(&self) -> &[String] {
        &self.files
    }

    /// A tensor as it is stored.
    pub(super) fn stored(&self, name: &str) -> Option<Stored<'_>> {
        let entry = self.tensors.get(name)?;
        let bytes = &self.shards[entry.shard][entry.bytes.clone()];
        Some(Stored { file: entry.shard, dtype: entry.dtype, shape: &entry.shape, bytes })
    }

    /// The names of all tensors, in alphabetical order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Tensors that no part of the model asked for.
    pub(super) fn unused(&self) -> Vec<&str> {
        self.tensors.iter().filter(|(_, entry)| !entry.used).map(|(name, _)| name.as_str()).collect()
    }

    /// Format of the first floating-point tensor, for checkpoints whose config names none.
    pub(super) fn first_dtype(&self) -> Option<DType> {
        self.tensors.values().find_map(|entry| match entry.dtype {
            safetensors::Dtype::F32 => Some(DType::F32),
            safetensors::Dtype::F16 => Some(DType::F16),
            safetensors::Dtype::BF16 => Some(DType::BF16),
            _ => None,
        })
    }
}
