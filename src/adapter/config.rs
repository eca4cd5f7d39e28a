//! `adapter_config.json`: reading its fields, and accounting for every one of them.

use serde_json::{Map, Value};

use super::AdapterError;

/// Name of the config file, for messages.
pub(super) const CONFIG_FILE: &str = "adapter_config.json";
/// Longest config that is read, in bytes. Real ones are below 100 kB.
const CONFIG_BYTES_MAX: usize = 4 << 20;

/// What a known config field means for serving.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rule {
    /// The kind reads it.
    Read,
    /// It concerns training or bookkeeping; any value gives the same result.
    Ignored,
    /// Only an unset value (null, false, empty) is served; the reason is for whoever set it.
    Refused(&'static str),
}

/// Fields of every PEFT config.
const COMMON_FIELDS: &[(&str, Rule)] = &[
    ("peft_type", Rule::Read),
    ("target_modules", Rule::Read),
    ("exclude_modules", Rule::Read),
    ("modules_to_save", Rule::Read),
    ("layers_to_transform", Rule::Read),
    ("layers_pattern", Rule::Read),
    ("auto_mapping", Rule::Ignored),
    ("base_model_name_or_path", Rule::Ignored),
    ("inference_mode", Rule::Ignored),
    ("peft_version", Rule::Ignored),
    ("revision", Rule::Ignored),
    ("task_type", Rule::Ignored),
    ("fan_in_fan_out", Rule::Refused("no supported base model stores its linears transposed")),
];

/// The fields of the config in the order of the file.
pub(super) struct Config {
    fields: Map<String, Value>,
}

/// The error for a field.
pub(super) fn field_error(name: &str, reason: impl Into<String>) -> AdapterError {
    AdapterError::Field { field: name.to_owned(), reason: reason.into() }
}

impl Config {
    /// Parses the file, which must be a JSON object.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, AdapterError> {
        let malformed = |reason: String| AdapterError::Malformed { file: CONFIG_FILE, reason };
        if bytes.is_empty() {
            return Err(malformed("the file is missing or empty".to_owned()));
        }
        if bytes.len() > CONFIG_BYTES_MAX {
            return Err(malformed(format!("expected at most {CONFIG_BYTES_MAX} bytes, found {}", bytes.len())));
        }
        let fields = serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
        Ok(Self { fields })
    }

    /// The file with other values for some fields; null takes a field out.
    pub(super) fn edited(&self, changes: &[(&str, Value)]) -> Result<Vec<u8>, AdapterError> {
        let mut fields = self.fields.clone();
        for (name, value) in changes {
            match value {
                // The others keep their order, which decides between patterns.
                Value::Null => drop(fields.shift_remove(*name)),
                value => drop(fields.insert((*name).to_owned(), value.clone())),
            }
        }
        write(&Value::Object(fields))
    }

    /// `peft_type`, which a config must have.
    pub(super) fn peft_type(&self) -> Result<&str, AdapterError> {
        self.string("peft_type")?.ok_or_else(|| field_error("peft_type", "is missing; is this a PEFT adapter?"))
    }

    /// Every fault of the fields' names and switches: a refused field that is set, or a set field that nobody knows.
    pub(super) fn faults(&self, kind_fields: &[(&str, Rule)]) -> Vec<AdapterError> {
        self.faults_among(&[kind_fields, COMMON_FIELDS])
    }

    /// The same where no field but these is known; the first list that has one decides.
    pub(super) fn faults_among(&self, known: &[&[(&str, Rule)]]) -> Vec<AdapterError> {
        let fault = |(name, value): (&String, &Value)| {
            if is_unset(value) {
                return None;
            }
            let rule = known.iter().copied().flatten().find(|(known, _)| known == name);
            match rule.map(|(_, rule)| *rule) {
                Some(Rule::Read | Rule::Ignored) => None,
                Some(Rule::Refused(reason)) => Some(field_error(name, reason)),
                None => Some(field_error(name, format!("is unknown, and its value {} may matter", shorten(value)))),
            }
        };
        self.fields.iter().filter_map(fault).collect()
    }

    /// The value of a field; null counts as absent.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    /// Whether a field has a value that means something: not null, false or empty.
    pub(super) fn is_set(&self, name: &str) -> bool {
        self.fields.get(name).is_some_and(|value| !is_unset(value))
    }

    /// A field that is a string.
    pub(super) fn string(&self, name: &str) -> Result<Option<&str>, AdapterError> {
        let read = |value: &'_ Value| wrong_type(name, "a string", value);
        self.get(name).map(|value| value.as_str().ok_or_else(|| read(value))).transpose()
    }

    /// A field that is true or false; false when absent.
    pub(super) fn flag(&self, name: &str) -> Result<bool, AdapterError> {
        self.get(name).map_or(Ok(false), |value| value.as_bool().ok_or_else(|| wrong_type(name, "a boolean", value)))
    }

    /// A field that is a positive integer.
    pub(super) fn positive(&self, name: &str) -> Result<Option<usize>, AdapterError> {
        self.get(name).map(|value| as_positive(name, value)).transpose()
    }

    /// A field that is an integer of at least zero.
    pub(super) fn count(&self, name: &str) -> Result<Option<usize>, AdapterError> {
        let read = |value: &Value| value.as_u64().and_then(|number| usize::try_from(number).ok());
        let count = |value| read(value).ok_or_else(|| wrong_type(name, "an integer of at least zero", value));
        self.get(name).map(count).transpose()
    }

    /// A field that is a number.
    pub(super) fn number(&self, name: &str) -> Result<Option<f64>, AdapterError> {
        self.get(name).map(|value| as_number(name, value)).transpose()
    }

    /// A field that is an object, with fields of its own.
    pub(super) fn section(&self, name: &str) -> Result<Option<Self>, AdapterError> {
        let read = |value: &Value| value.as_object().cloned().ok_or_else(|| wrong_type(name, "an object", value));
        Ok(self.get(name).map(read).transpose()?.map(|fields| Self { fields }))
    }

    /// A field that is a list of objects; empty when absent.
    pub(super) fn sections(&self, name: &str) -> Result<Vec<Self>, AdapterError> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        let items = value.as_array().ok_or_else(|| wrong_type(name, "a list of objects", value))?;
        let read = |item: &Value| item.as_object().cloned().ok_or_else(|| wrong_type(name, "an object", item));
        items.iter().map(|item| Ok(Self { fields: read(item)? })).collect()
    }

    /// A field that is an object; empty when absent. Entries keep the order of the file.
    pub(super) fn entries(&self, name: &str) -> Result<Vec<(&String, &Value)>, AdapterError> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        let object = value.as_object().ok_or_else(|| wrong_type(name, "an object", value))?;
        Ok(object.iter().collect())
    }
}

/// A config as bytes of its file.
pub(super) fn write(config: &Value) -> Result<Vec<u8>, AdapterError> {
    let malformed = |error: serde_json::Error| AdapterError::Malformed { file: CONFIG_FILE, reason: error.to_string() };
    let mut bytes = serde_json::to_vec_pretty(config).map_err(malformed)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// A list of strings.
pub(super) fn as_strings(name: &str, value: &Value) -> Result<Vec<String>, AdapterError> {
    let items = value.as_array().ok_or_else(|| wrong_type(name, "a list of strings", value))?;
    let item = |item: &Value| item.as_str().map(str::to_owned).ok_or_else(|| wrong_type(name, "a string", item));
    items.iter().map(item).collect()
}

/// A number that is an integer of at least one.
pub(super) fn as_positive(name: &str, value: &Value) -> Result<usize, AdapterError> {
    let number = value.as_u64().and_then(|number| usize::try_from(number).ok()).filter(|number| *number > 0);
    number.ok_or_else(|| wrong_type(name, "a positive integer", value))
}

/// A number.
pub(super) fn as_number(name: &str, value: &Value) -> Result<f64, AdapterError> {
    value.as_f64().ok_or_else(|| wrong_type(name, "a number", value))
}

/// The error for a value of the wrong type.
pub(super) fn wrong_type(name: &str, expected: &str, found: &Value) -> AdapterError {
    field_error(name, format!("expected {expected}, found {}", shorten(found)))
}

fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn shorten(value: &Value) -> String {
    const CHARS_MAX: usize = 60;
    let text = value.to_string();
    if text.chars().count() <= CHARS_MAX {
        return text;
    }
    text.chars().take(CHARS_MAX).chain("...".chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(json: &str) -> Vec<String> {
        let fields = [("r", Rule::Read), ("use_x", Rule::Refused("x is not served"))];
        let config = Config::parse(json.as_bytes()).unwrap();
        config.faults(&fields).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn unset_fields_are_harmless_whatever_their_name() {
        assert!(faults(r#"{"r": 3, "use_x": false, "a": null, "b": "", "c": [], "d": {}, "e": false}"#).is_empty());
    }

    #[test]
    fn set_fields_must_be_known() {
        assert_eq!(
            faults(r#"{"use_x": {"n": 1}, "mystery": 0}"#),
            [
                "adapter_config.json: field `use_x`: x is not served",
                "adapter_config.json: field `mystery`: is unknown, and its value 0 may matter",
            ]
        );
    }

    #[test]
    fn wrong_types_are_named() {
        let config = Config::parse(br#"{"r": -1, "peft_type": 3, "use_x": 1}"#).unwrap();
        assert!(config.positive("r").unwrap_err().to_string().contains("`r`: expected a positive integer, found -1"));
        assert!(config.peft_type().unwrap_err().to_string().contains("`peft_type`: expected a string, found 3"));
        assert!(config.flag("use_x").is_err());
        assert!(Config::parse(b"[]").is_err());
        assert!(Config::parse(b"").is_err());
    }
}
