//! Where the arithmetic runs and in which formats.

use candle_core::{DType, Device};

use super::{DeviceChoice, ModelError};

/// Opens the chosen device.
///
/// # Errors
/// When this build has no support for it or the driver refuses.
pub fn open_device(choice: DeviceChoice) -> Result<Device, ModelError> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Cuda if !cfg!(feature = "cuda") => Err(ModelError::Device {
            device: "cuda",
            reason: "this build has no CUDA support; build with `--features cuda`".to_owned(),
        }),
        DeviceChoice::Cuda => {
            Device::new_cuda(0).map_err(|error| ModelError::Device { device: "cuda", reason: error.to_string() })
        }
    }
}

/// Format of activations and adapters' vectors for weights in `weights` on `device`.
///
/// On the CPU it is always f32: candle has no bf16 product there, and f32 activations over exactly converted weights
/// are more accurate and no slower. Elsewhere it is the weights' own format.
pub(super) fn activation_dtype(device: &Device, weights: DType) -> DType {
    if device.is_cpu() { DType::F32 } else { weights }
}
