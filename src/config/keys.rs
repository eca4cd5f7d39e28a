//! Which keys there are, asked of the section types themselves.

use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor};
use toml::{Table, Value};

use crate::engine::EngineConfig;
use crate::metrics::MetricsConfig;
use crate::model::ModelConfig;
use crate::server::ServerConfig;
use crate::store::StoreConfig;

use super::LogConfig;

/// One section of the settings.
pub(super) struct Section {
    /// Name in the file and in variables.
    pub(super) name: &'static str,
    /// Its keys, in the order of declaration.
    pub(super) keys: fn() -> &'static [&'static str],
    /// Whether the section's type takes this table; the error says why not.
    pub(super) accepts: fn(Table) -> Result<(), String>,
}

/// Every section, in the order of [`super::Config`]'s fields.
pub(super) const SECTIONS: &[Section] = &[
    section::<ServerConfig>("server"),
    section::<ModelConfig>("model"),
    section::<EngineConfig>("engine"),
    section::<StoreConfig>("adapters"),
    section::<MetricsConfig>("metrics"),
    section::<LogConfig>("log"),
];

const fn section<T: DeserializeOwned>(name: &'static str) -> Section {
    Section { name, keys: keys_of::<T>, accepts: accepts::<T> }
}

/// The section with this name.
pub(super) fn find(name: &str) -> Option<&'static Section> {
    SECTIONS.iter().find(|section| section.name == name)
}

/// Whether the value of this key must never be shown.
pub fn is_secret(key: &str) -> bool {
    key.ends_with("_key") || key.ends_with("_token")
}

/// Whether this key counts bytes, so that `256MiB` is a value for it.
pub(super) fn is_bytes(key: &str) -> bool {
    key.split('_').any(|word| word == "bytes")
}

/// The known name nearest to `found`, if one is near enough to be meant.
pub(super) fn nearest<'a>(found: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|name| (strsim::jaro_winkler(found, name), name))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

fn accepts<T: DeserializeOwned>(table: Table) -> Result<(), String> {
    T::deserialize(Value::Table(table)).map(drop).map_err(|e| e.message().to_owned())
}

/// The field names that `T`'s `Deserialize` asks for.
pub(super) fn keys_of<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut keys = None;
    // Always an error: the probe has no values to give.
    let _ = T::deserialize(Probe(&mut keys));
    keys.expect("a section is a struct")
}

/// A deserializer that notes the fields a struct asks for, and stops there.
struct Probe<'a>(&'a mut Option<&'static [&'static str]>);

impl<'de> Deserializer<'de> for Probe<'_> {
    type Error = serde::de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
        Err(Self::Error::custom("not a struct"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Self::Error> {
        *self.0 = Some(fields);
        Err(Self::Error::custom("the fields are noted"))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
