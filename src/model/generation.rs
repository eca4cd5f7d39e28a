//! generation_config.json: sampling defaults and end tokens.

use std::path::Path;

use serde_json::Value;

use super::{GenerationDefaults, ModelError};

const FILE: &str = "generation_config.json";

/// Reads the defaults of the model in `dir`; end tokens also from `config`, its config.json. A missing file is silent.
pub(super) fn read(dir: &Path, config: &Value) -> Result<GenerationDefaults, ModelError> {
    let path = dir.join(FILE);
    let file: Value = if path.is_file() {
        let text = std::fs::read(path).map_err(|error| ModelError::file(FILE, &error))?;
        serde_json::from_slice(&text).map_err(|error| ModelError::file(FILE, &error))?
    } else {
        Value::Null
    };
    parse(&file, config)
}

fn parse(file: &Value, config: &Value) -> Result<GenerationDefaults, ModelError> {
    let greedy = file.get("do_sample") == Some(&Value::Bool(false));
    let mut eos_token_ids = end_tokens(FILE, file)?;
    eos_token_ids.extend(end_tokens("config.json", config)?);
    eos_token_ids.sort_unstable();
    eos_token_ids.dedup();
    Ok(GenerationDefaults {
        temperature: if greedy { Some(0.) } else { number(file, "temperature")? },
        top_p: number(file, "top_p")?,
        top_k: match present(file, "top_k") {
            None => None,
            Some(value) => Some(value.as_u64().ok_or_else(|| wrong("top_k", "a whole number", value))? as usize),
        },
        min_p: number(file, "min_p")?,
        repetition_penalty: number(file, "repetition_penalty")?,
        eos_token_ids,
    })
}

fn present<'a>(file: &'a Value, field: &str) -> Option<&'a Value> {
    file.get(field).filter(|value| !value.is_null())
}

fn number(file: &Value, field: &str) -> Result<Option<f32>, ModelError> {
    match present(file, field) {
        None => Ok(None),
        Some(value) => Ok(Some(value.as_f64().ok_or_else(|| wrong(field, "a number", value))? as f32)),
    }
}

fn end_tokens(file_name: &'static str, file: &Value) -> Result<Vec<u32>, ModelError> {
    let token = |value: &Value| {
        value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| ModelError::Field {
            file: file_name,
            field: "eos_token_id".to_owned(),
            reason: format!("expected a token id or a list of them, found {value}"),
        })
    };
    match present(file, "eos_token_id") {
        None => Ok(Vec::new()),
        Some(Value::Array(values)) => values.iter().map(token).collect(),
        Some(value) => Ok(vec![token(value)?]),
    }
}

fn wrong(field: &str, expected: &str, found: &Value) -> ModelError {
    ModelError::Field { file: FILE, field: field.to_owned(), reason: format!("expected {expected}, found {found}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn end_tokens_come_from_both_files() {
        let defaults = parse(&json!({"eos_token_id": [7, 2], "top_k": 5}), &json!({"eos_token_id": 2})).unwrap();
        assert_eq!(defaults.eos_token_ids, [2, 7]);
        assert_eq!(defaults.top_k, Some(5));
        assert_eq!(defaults.temperature, None);
    }

    #[test]
    fn do_sample_false_means_temperature_zero() {
        let defaults = parse(&json!({"do_sample": false, "temperature": 0.7}), &Value::Null).unwrap();
        assert_eq!(defaults.temperature, Some(0.));
    }

    #[test]
    fn a_wrong_type_names_the_field() {
        let error = parse(&json!({"top_p": "high"}), &Value::Null).unwrap_err();
        insta::assert_snapshot!(error, @r#"generation_config.json: field `top_p`: expected a number, found "high""#);
    }
}
