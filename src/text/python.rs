//! How Python prints values, for templates that were written for Jinja2.

use std::fmt::Write;

use minijinja::Value;
use minijinja::value::ValueKind;
use serde_json::Value as Json;

/// Deepest nesting that is printed; deeper values are cut off with `...`. JSON from clients never gets this deep.
const DEPTH_MAX: usize = 200;

/// A template value with the content of `json`, keys in their order.
pub(super) fn value_of(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::from(i),
            (None, Some(u)) => Value::from(u),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(s) => Value::from(s.as_str()),
        Json::Array(items) => items.iter().map(value_of).collect(),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(key, value)| (key.as_str(), value_of(value)))),
    }
}

/// Arguments of `json.dumps`.
#[derive(Clone, Debug, Default)]
pub(super) struct JsonStyle {
    /// Spaces per level; `None` writes one line.
    pub indent: Option<usize>,
    /// Between items and after keys; `None` takes Python's.
    pub separators: Option<(String, String)>,
    /// Keys in alphabetical order.
    pub sort_keys: bool,
    /// `\u` escapes for whatever is not ASCII.
    pub ensure_ascii: bool,
}

/// `json.dumps(value)`.
pub(super) fn json_dumps(value: &Value, style: &JsonStyle) -> String {
    let mut out = String::new();
    Printer { out: &mut out, style: Some(style) }.value(value, 0);
    out
}

/// `str(value)`: strings as they are, everything else as `repr` writes it.
pub(super) fn str_of(value: &Value) -> String {
    match value.kind() {
        ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            let mut out = String::new();
            Printer { out: &mut out, style: None }.value(value, 0);
            out
        }
        _ => value.to_string(),
    }
}

/// Writes JSON in a style, or Python's `repr` without one.
struct Printer<'a> {
    out: &'a mut String,
    style: Option<&'a JsonStyle>,
}

impl Printer<'_> {
    fn value(&mut self, value: &Value, depth: usize) {
        if depth > DEPTH_MAX {
            self.out.push_str("...");
            return;
        }
        let json = self.style.is_some();
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => self.out.push_str(if json { "null" } else { "None" }),
            ValueKind::Bool => self.out.push_str(match (json, value.is_true()) {
                (true, true) => "true",
                (true, false) => "false",
                (false, true) => "True",
                (false, false) => "False",
            }),
            ValueKind::Number if value.is_integer() => {
                let _ = write!(self.out, "{value}");
            }
            ValueKind::Number => match f64::try_from(value.clone()) {
                Ok(float) => self.out.push_str(&float_of(float)),
                Err(_) => {
                    let _ = write!(self.out, "{value}");
                }
            },
            ValueKind::Seq | ValueKind::Iterable => self.items(value, depth),
            ValueKind::Map => self.pairs(value, depth),
            _ => self.string(value.as_str().unwrap_or(&value.to_string())),
        }
    }

    fn items(&mut self, value: &Value, depth: usize) {
        let items: Vec<Value> = value.try_iter().map(Iterator::collect).unwrap_or_default();
        self.out.push('[');
        for (i, item) in items.iter().enumerate() {
            self.gap(i, depth + 1);
            self.value(item, depth + 1);
        }
        self.close(']', items.len(), depth);
    }

    fn pairs(&mut self, value: &Value, depth: usize) {
        let mut keys: Vec<Value> = value.try_iter().map(Iterator::collect).unwrap_or_default();
        if self.style.is_some_and(|style| style.sort_keys) {
            keys.sort_by_key(ToString::to_string);
        }
        self.out.push('{');
        for (i, key) in keys.iter().enumerate() {
            self.gap(i, depth + 1);
            match self.style {
                Some(_) => self.string(&key.to_string()),
                None => self.value(key, depth + 1),
            }
            let colon = self.style.and_then(|style| style.separators.as_ref()).map_or(": ", |(_, colon)| colon);
            self.out.push_str(colon);
            self.value(&value.get_item(key).unwrap_or_default(), depth + 1);
        }
        self.close('}', keys.len(), depth);
    }

    /// What comes before item `i`.
    fn gap(&mut self, i: usize, depth: usize) {
        let indent = self.style.and_then(|style| style.indent);
        let separators = self.style.and_then(|style| style.separators.as_ref());
        if i > 0 {
            let default = if indent.is_some() { "," } else { ", " };
            self.out.push_str(separators.map_or(default, |(comma, _)| comma));
        }
        self.line(indent, depth);
    }

    fn close(&mut self, bracket: char, num_items: usize, depth: usize) {
        if num_items > 0 {
            self.line(self.style.and_then(|style| style.indent), depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, indent: Option<usize>, depth: usize) {
        if let Some(indent) = indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, s: &str) {
        match self.style {
            Some(style) => {
                let quoted = Json::from(s).to_string();
                if style.ensure_ascii { self.ascii(&quoted) } else { self.out.push_str(&quoted) }
            }
            None => self.repr(s),
        }
    }

    fn ascii(&mut self, quoted: &str) {
        for c in quoted.chars() {
            if c.is_ascii() {
                self.out.push(c);
            } else {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(self.out, "\\u{unit:04x}");
                }
            }
        }
    }

    /// A string as Python's `repr`: single quotes unless only those occur in it.
    fn repr(&mut self, s: &str) {
        let quote = if s.contains('\'') && !s.contains('"') { '"' } else { '\'' };
        self.out.push(quote);
        for c in s.chars() {
            match c {
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\\' => self.out.push_str("\\\\"),
                c if c == quote => self.out.extend(['\\', c]),
                c if c.is_ascii_control() => {
                    let _ = write!(self.out, "\\x{:02x}", u32::from(c));
                }
                c => self.out.push(c),
            }
        }
        self.out.push(quote);
    }
}

/// A float as Python writes it: shortest digits that read back, two or more digits in the exponent, with its sign.
fn float_of(float: f64) -> String {
    if float.is_nan() {
        return "nan".to_owned();
    }
    if float.is_infinite() {
        return if float > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let text = Json::from(float).to_string();
    let Some((digits, exponent)) = text.split_once('e') else { return text };
    let (sign, exponent) = match exponent.strip_prefix('-') {
        Some(exponent) => ('-', exponent),
        None => ('+', exponent.trim_start_matches('+')),
    };
    let digits = digits.strip_suffix(".0").unwrap_or(digits);
    format!("{digits}e{sign}{exponent:0>2}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_is_written_as_python_writes_it() {
        let value = value_of(&json!({"b": [1, 2.5, true, null], "a": {"é\n": "x'y\"z"}, "e": [], "m": {}}));
        let one_line = r#"{"b": [1, 2.5, true, null], "a": {"é\n": "x'y\"z"}, "e": [], "m": {}}"#;
        assert_eq!(json_dumps(&value, &JsonStyle::default()), one_line);
        let style = JsonStyle { indent: Some(2), sort_keys: true, ensure_ascii: true, separators: None };
        let lines = "{\n  \"a\": {\n    \"\\u00e9\\n\": \"x'y\\\"z\"\n  },\n  \"b\": [\n    1,\n    2.5,\n    true,\n    \
                     null\n  ],\n  \"e\": [],\n  \"m\": {}\n}";
        assert_eq!(json_dumps(&value, &style), lines);
        let compact = JsonStyle { separators: Some((",".to_owned(), ":".to_owned())), ..JsonStyle::default() };
        assert_eq!(json_dumps(&value_of(&json!({"a": [1, 2]})), &compact), r#"{"a":[1,2]}"#);
    }

    #[test]
    fn values_are_printed_as_python_prints_them() {
        let check = |json: serde_json::Value, expected: &str| assert_eq!(str_of(&value_of(&json)), expected);
        check(json!(null), "None");
        check(json!(true), "True");
        check(json!("it's"), "it's");
        check(
            json!(["it's", "a\"b'c", "\n\u{1}", 1, {"k": false}]),
            r#"["it's", 'a"b\'c', '\n\x01', 1, {'k': False}]"#,
        );
        check(json!(1.0), "1.0");
        check(json!(1e16), "1e+16");
        check(json!(1.5e-7), "1.5e-07");
        check(json!(0.0001), "0.0001");
    }
}
