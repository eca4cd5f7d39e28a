//! Adapters at rest: blobs, generations, names. The one module that reads adapter bytes.
//!
//! Adapters come in as bytes or as a path inside the configured roots, are lowered once, and then stored: content under
//! its digest, and a numbered record that says what the name means now. What a name means is the fold of its records,
//! so nothing is ever updated in place: a crash leaves the old state or the new one, and several processes may share
//! one root. A plain directory `<root>/<name>` with PEFT's two files is served as it lies; it is only read.
//!
//! A directory's generations are counted by the process that serves it, from 1, one more whenever its content was found
//! changed. Every request looks at the files' sizes and modification times; files that were written within the last
//! two seconds are read again, since a further change might not show yet. Publishing under the name of a directory
//! goes on counting where the directory stopped, and hides it from then on; removing the name hides it as well.

mod admission;
mod catalog;
mod combine;
mod compose;
mod config;
mod error;
mod load;
mod local;
mod memory;
mod name;
mod numbers;
mod objects;
mod publish;
mod record;
mod unpack;
mod workers;

pub use admission::{Admission, Permit};
pub use catalog::{AdapterStatus, PublishOptions, Store};
pub use config::StoreConfig;
pub use error::StoreError;
pub use local::AdapterDirectory;
pub use objects::WEIGHTS_FILES;
pub use publish::UploadSlot;
pub use unpack::unpack_tar;
