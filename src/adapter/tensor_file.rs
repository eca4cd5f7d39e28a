//! Tensors of a safetensors file that is held as bytes. A header is believed only where the file bears it out.

use std::collections::{BTreeMap, HashMap};

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::AdapterError;

/// Name of the weights file, for messages.
pub(super) const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// More dimensions than any adapter tensor has.
const DIMENSIONS_MAX: usize = 4;

/// The tensors of a file by key, still as bytes.
pub(super) struct TensorFile<'a> {
    views: BTreeMap<String, TensorView<'a>>,
}

impl<'a> TensorFile<'a> {
    /// Checks the header against the bytes; every tensor must have values unless it `may_be_empty`. Nothing is allocated
    /// in proportion to what the header claims.
    pub(super) fn parse(bytes: &'a [u8], may_be_empty: bool) -> Result<Self, AdapterError> {
        let malformed = |reason: String| AdapterError::Malformed { file: WEIGHTS_FILE, reason };
        if bytes.is_empty() {
            return Err(malformed("the file is missing or empty".to_owned()));
        }
        let file = SafeTensors::deserialize(bytes).map_err(|error| malformed(error.to_string()))?;
        let views: BTreeMap<_, _> = file.tensors().into_iter().collect();
        for (key, view) in &views {
            check_shape(key, view.shape(), may_be_empty)?;
        }
        Ok(Self { views })
    }

    /// All keys in alphabetical order.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.views.keys().map(String::as_str)
    }

    /// Shape of a tensor that the file has.
    pub(super) fn shape(&self, key: &str) -> Option<&[usize]> {
        self.views.get(key).map(TensorView::shape)
    }

    /// Number of tensors.
    pub(super) fn len(&self) -> usize {
        self.views.len()
    }

    /// Bytes of all tensors' data.
    pub(super) fn num_bytes(&self) -> usize {
        self.views.values().map(|view| view.data().len()).sum()
    }

    /// The tensor in f32 on the CPU, with the file's shape. Refuses integers, NaN and infinities.
    pub(super) fn read_f32(&self, key: &str) -> Result<Tensor, AdapterError> {
        let refuse = |reason: String| AdapterError::Tensor { tensor: key.to_owned(), reason };
        let view = self.views.get(key).ok_or_else(|| refuse("is missing".to_owned()))?;
        let values = floats(view.dtype(), view.data())
            .ok_or_else(|| refuse(format!("expected floating point numbers, found {:?}", view.dtype())))?;
        // Looking for the first one takes several times as long.
        if !values.iter().fold(true, |all, value| all & value.is_finite()) {
            let idx = values.iter().position(|value| !value.is_finite()).expect("one of them is not");
            return Err(refuse(format!("value {idx} is {}", values[idx])));
        }
        Ok(Tensor::from_vec(values, view.shape(), &Device::Cpu)?)
    }

    /// The tensor's values when it holds integers, in the order of the file. Floats are accepted when they are whole:
    /// some systems cannot save integers.
    pub(super) fn read_integers(&self, key: &str) -> Result<Vec<i64>, AdapterError> {
        let refuse = |reason: String| AdapterError::Tensor { tensor: key.to_owned(), reason };
        let view = self.views.get(key).ok_or_else(|| refuse("is missing".to_owned()))?;
        let data = view.data();
        Ok(match view.dtype() {
            Dtype::U8 => chunks(data, |[byte]: [u8; 1]| i64::from(byte)),
            Dtype::I8 => chunks(data, |bytes| i64::from(i8::from_le_bytes(bytes))),
            Dtype::I16 => chunks(data, |bytes| i64::from(i16::from_le_bytes(bytes))),
            Dtype::U16 => chunks(data, |bytes| i64::from(u16::from_le_bytes(bytes))),
            Dtype::I32 => chunks(data, |bytes| i64::from(i32::from_le_bytes(bytes))),
            Dtype::U32 => chunks(data, |bytes| i64::from(u32::from_le_bytes(bytes))),
            Dtype::I64 => chunks(data, i64::from_le_bytes),
            dtype => {
                let values =
                    floats(dtype, data).ok_or_else(|| refuse(format!("expected integers, found {dtype:?}")))?;
                if let Some(value) = values.iter().find(|value| value.fract() != 0.0) {
                    return Err(refuse(format!("expected integers, found the value {value}")));
                }
                values.iter().map(|value| *value as i64).collect()
            }
        })
    }
}

/// The bytes of a weights file with these tensors.
pub(super) fn write(tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>, AdapterError> {
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(tensors, Some(metadata))
        .map_err(|error| AdapterError::Malformed { file: WEIGHTS_FILE, reason: error.to_string() })
}

fn check_shape(key: &str, shape: &[usize], may_be_empty: bool) -> Result<(), AdapterError> {
    let reason = if shape.len() > DIMENSIONS_MAX {
        format!("expected at most {DIMENSIONS_MAX} dimensions, found {}", shape.len())
    } else if shape.contains(&0) && !may_be_empty {
        format!("has no values (shape {shape:?}); was it saved before its shards were gathered?")
    } else {
        return Ok(());
    };
    Err(AdapterError::Tensor { tensor: key.to_owned(), reason })
}

/// Little-endian numbers of any float format as f32; `None` for integers and packed formats.
fn floats(dtype: Dtype, data: &[u8]) -> Option<Vec<f32>> {
    let values = match dtype {
        Dtype::F64 => chunks(data, |bytes| f64::from_le_bytes(bytes) as f32),
        Dtype::F32 => chunks(data, f32::from_le_bytes),
        Dtype::F16 => chunks(data, |bytes| f16::from_le_bytes(bytes).to_f32()),
        Dtype::BF16 => chunks(data, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        Dtype::F8_E4M3 => chunks(data, |[byte]| e4m3(byte)),
        // The same as the upper byte of an f16.
        Dtype::F8_E5M2 => chunks(data, |[byte]| f16::from_bits(u16::from(byte) << 8).to_f32()),
        _ => return None,
    };
    Some(values)
}

fn chunks<const N: usize, T>(data: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    data.as_chunks::<N>().0.iter().map(|chunk| read(*chunk)).collect()
}

/// One sign bit, four exponent bits with bias 7, three of mantissa; no infinities, all ones is NaN (OCP 8-bit floating
/// point specification 1.0, section 5).
fn e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xf), f32::from(byte & 7));
    match (exponent, byte & 7) {
        (0xf, 7) => f32::NAN,
        (0, _) => sign * mantissa / 8.0 * 2f32.powi(-6),
        _ => sign * (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::serialize;

    fn file_of(dtype: Dtype, shape: &[usize], data: &[u8]) -> Vec<u8> {
        let view = TensorView::new(dtype, shape.to_vec(), data).unwrap();
        serialize([("x", view)], None).unwrap()
    }

    fn read(dtype: Dtype, data: &[u8], count: usize) -> Result<Vec<f32>, AdapterError> {
        let bytes = file_of(dtype, &[count], data);
        let tensor = TensorFile::parse(&bytes, false)?.read_f32("x")?;
        Ok(tensor.to_vec1::<f32>().unwrap())
    }

    #[test]
    fn every_float_format_is_read() {
        let f64s: Vec<u8> = [1.5f64, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let bf16s: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        let f16s: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        assert_eq!(read(Dtype::F64, &f64s, 2).unwrap(), [1.5, -2.0]);
        assert_eq!(read(Dtype::BF16, &bf16s, 2).unwrap(), [1.5, -2.0]);
        assert_eq!(read(Dtype::F16, &f16s, 2).unwrap(), [1.5, -2.0]);
        assert_eq!(read(Dtype::F8_E4M3, &[0x3c, 0xc0, 0x01, 0x7e], 4).unwrap(), [1.5, -2.0, 2f32.powi(-9), 448.0]);
        assert_eq!(read(Dtype::F8_E5M2, &[0x3e, 0xc0], 2).unwrap(), [1.5, -2.0]);
    }

    #[test]
    fn integers_and_nan_are_refused_by_name() {
        assert!(read(Dtype::I32, &[0; 8], 2).unwrap_err().to_string().contains("`x`: expected floating point"));
        assert!(read(Dtype::F8_E4M3, &[0x7f], 1).unwrap_err().to_string().contains("value 0 is NaN"));
        assert!(read(Dtype::F32, &f32::INFINITY.to_le_bytes(), 1).unwrap_err().to_string().contains("value 0 is inf"));
    }

    #[test]
    fn integers_are_read_and_fractions_refused() {
        let integers = |dtype, data: &[u8], count| {
            let bytes = file_of(dtype, &[count], data);
            TensorFile::parse(&bytes, false)?.read_integers("x")
        };
        let i32s: Vec<u8> = [70_000i32, -2].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(integers(Dtype::I32, &i32s, 2).unwrap(), [70_000, -2]);
        assert_eq!(integers(Dtype::U8, &[200, 3], 2).unwrap(), [200, 3]);
        assert_eq!(integers(Dtype::F32, &7f32.to_le_bytes(), 1).unwrap(), [7]);
        for value in [0.5, f32::NAN, f32::INFINITY] {
            assert!(
                integers(Dtype::F32, &value.to_le_bytes(), 1).unwrap_err().to_string().contains("expected integers")
            );
        }
    }

    #[test]
    fn a_lying_header_is_refused() {
        let header = |json: &str, data: usize| {
            let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
            bytes.extend(json.as_bytes());
            bytes.resize(bytes.len() + data, 0);
            bytes
        };
        let cases = [
            header(
                r#"{"x":{"dtype":"F32","shape":[1152921504606846976,1152921504606846976],"data_offsets":[0,8]}}"#,
                8,
            ),
            header(r#"{"x":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}"#, 8),
            header(
                r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                12,
            ),
            header(r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8),
            header(r#"{"x":{"dtype":"F32","shape":[0,1152921504606846976],"data_offsets":[0,0]}}"#, 0),
            header(r#"{"x":{"dtype":"F32","shape":[1,1,1,1,2],"data_offsets":[0,8]}}"#, 8),
            header(r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 9),
            u64::MAX.to_le_bytes().to_vec(),
            vec![1, 2, 3],
        ];
        for bytes in cases {
            assert!(TensorFile::parse(&bytes, false).is_err());
        }
    }
}
