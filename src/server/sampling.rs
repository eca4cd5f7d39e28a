//! The fields that say how to sample and when to stop, the same for completions and chats.

use serde::Deserialize;
use serde::de::{SeqAccess, Visitor};
use serde_json::{Value as Json, json};

use super::body::Fields;
use super::{ApiError, ServedModel};
use crate::engine::SamplingParams;

/// Stop strings per request at most.
const STOPS_MAX: usize = 32;
/// Bytes of a stop string at most; that much text may be held back.
const STOP_BYTES_MAX: usize = 1024;
/// Entries of `logit_bias` and `stop_token_ids` at most.
const TOKEN_LIST_MAX: usize = 1024;
/// Bytes of `cache_salt` at most.
const SALT_BYTES_MAX: usize = 256;
/// Highest temperature. Beyond it every token is as good as equally likely.
const TEMPERATURE_MAX: f32 = 100.0;
const REPETITION_PENALTY_MAX: f32 = 100.0;

/// How to sample, how often, and when to stop.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sampling {
    /// For the engine.
    pub params: SamplingParams,
    /// Answers per prompt.
    pub n: usize,
    /// Stop strings.
    pub stop: Vec<String>,
    /// Token ids that stop beside the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Go on behind the model's end tokens.
    pub ignore_eos: bool,
    /// Leave what stopped the text in it.
    pub include_stop_str_in_output: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Separates prefix-cache entries.
    pub cache_salt: Option<String>,
    /// Name tokens `token_id:<id>` in logprobs.
    pub return_tokens_as_token_ids: bool,
    /// Report token ids beside the text.
    pub return_token_ids: bool,
}

/// Fields with an effect that is not implemented, each with the values that have none.
fn unsupported() -> Vec<(&'static str, Vec<Json>)> {
    vec![
        ("response_format", vec![json!({"type": "text"})]),
        ("structured_outputs", vec![]),
        ("guided_json", vec![]),
        ("guided_regex", vec![]),
        ("guided_choice", vec![]),
        ("guided_grammar", vec![]),
        ("json_schema", vec![]),
        ("grammar", vec![json!("")]),
        ("use_beam_search", vec![json!(false)]),
        ("length_penalty", vec![json!(1), json!(1.0)]),
        ("min_tokens", vec![json!(0)]),
        ("bad_words", vec![json!([])]),
        ("allowed_token_ids", vec![]),
        ("logits_processors", vec![json!([])]),
        ("prompt_logprobs", vec![]),
        ("truncate_prompt_tokens", vec![]),
        ("thinking_token_budget", vec![]),
        ("typical_p", vec![json!(1), json!(1.0)]),
        ("kv_transfer_params", vec![]),
    ]
}

impl Sampling {
    /// Reads and checks the fields; what is absent comes from the model's own defaults.
    pub(super) fn parse(fields: &mut Fields<'_>, model: &ServedModel, vocab_size: usize) -> Result<Self, ApiError> {
        for (name, neutral) in unsupported() {
            fields.refuse(name, &neutral)?;
        }
        let params = params(fields, model, vocab_size)?;
        let n = fields.take("n")?.unwrap_or(1);
        if n == 0 {
            return Err(ApiError::bad_request("n", "`n` must be at least 1, found 0"));
        }
        let best_of: Option<usize> = fields.take("best_of")?;
        if best_of.is_some_and(|best_of| best_of != n) {
            return Err(ApiError::bad_request("best_of", "`best_of` other than `n` is not supported by this server"));
        }
        let stop_token_ids: Vec<u32> = fields.take("stop_token_ids")?.unwrap_or_default();
        bounded("stop_token_ids", stop_token_ids.len(), TOKEN_LIST_MAX)?;
        let cache_salt: Option<String> = fields.take("cache_salt")?;
        if cache_salt.as_ref().is_some_and(|salt| salt.is_empty() || salt.len() > SALT_BYTES_MAX) {
            let message = format!("`cache_salt` must have 1 to {SALT_BYTES_MAX} bytes");
            return Err(ApiError::bad_request("cache_salt", message));
        }
        Ok(Self {
            params,
            n,
            stop: stop(fields)?,
            stop_token_ids,
            ignore_eos: fields.flag("ignore_eos", false)?,
            include_stop_str_in_output: fields.flag("include_stop_str_in_output", false)?,
            skip_special_tokens: fields.flag("skip_special_tokens", true)?,
            cache_salt,
            return_tokens_as_token_ids: fields.flag("return_tokens_as_token_ids", false)?,
            return_token_ids: fields.flag("return_token_ids", false)?,
        })
    }
}

fn params(fields: &mut Fields<'_>, model: &ServedModel, vocab_size: usize) -> Result<SamplingParams, ApiError> {
    let defaults = &model.generation;
    let top_p = fields.number("top_p", 0.0..=1.0, defaults.top_p.unwrap_or(1.0))?;
    if top_p == 0.0 {
        return Err(ApiError::bad_request("top_p", "`top_p` must be above 0"));
    }
    let repetition_penalty = defaults.repetition_penalty.unwrap_or(1.0);
    let repetition_penalty = fields.number("repetition_penalty", 0.0..=REPETITION_PENALTY_MAX, repetition_penalty)?;
    if repetition_penalty == 0.0 {
        return Err(ApiError::bad_request("repetition_penalty", "`repetition_penalty` must be above 0"));
    }
    Ok(SamplingParams {
        temperature: fields.number("temperature", 0.0..=TEMPERATURE_MAX, defaults.temperature.unwrap_or(1.0))?,
        top_p,
        top_k: top_k(fields, defaults.top_k)?,
        min_p: fields.number("min_p", 0.0..=1.0, defaults.min_p.unwrap_or(0.0))?,
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0, 0.0)?,
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0, 0.0)?,
        repetition_penalty,
        logit_bias: logit_bias(fields, vocab_size)?,
        seed: seed(fields)?,
    })
}

/// -1 and 0 switch it off.
fn top_k(fields: &mut Fields<'_>, default: Option<usize>) -> Result<Option<usize>, ApiError> {
    match fields.take::<i64>("top_k")? {
        None => Ok(default.filter(|&k| k > 0)),
        Some(-1 | 0) => Ok(None),
        Some(k) => match usize::try_from(k) {
            Ok(k) => Ok(Some(k)),
            Err(_) => Err(ApiError::bad_request("top_k", format!("`top_k` must be -1, 0 or positive, found {k}"))),
        },
    }
}

/// Any 64-bit integer, with a sign or without.
fn seed(fields: &mut Fields<'_>) -> Result<Option<u64>, ApiError> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a 64-bit integer")]
    enum Seed {
        Unsigned(u64),
        Signed(i64),
    }
    Ok(fields.take("seed")?.map(|seed| match seed {
        Seed::Unsigned(seed) => seed,
        Seed::Signed(seed) => seed.cast_unsigned(),
    }))
}

fn logit_bias(fields: &mut Fields<'_>, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let map: Option<serde_json::Map<String, Json>> = fields.take("logit_bias")?;
    let map = map.unwrap_or_default();
    bounded("logit_bias", map.len(), TOKEN_LIST_MAX)?;
    let entry = |(key, value): (&String, &Json)| {
        let wrong = |message: String| ApiError::bad_request("logit_bias", format!("`logit_bias`: {message}"));
        let id: u32 = key.parse().map_err(|_| wrong(format!("`{key}` is not a token id")))?;
        if id as usize >= vocab_size {
            return Err(wrong(format!("token id {id} is not in the vocabulary of {vocab_size} tokens")));
        }
        match value.as_f64() {
            Some(bias) if (-100.0..=100.0).contains(&bias) => Ok((id, bias as f32)),
            _ => Err(wrong(format!("the bias of token {id} must be a number from -100 to 100, found {value}"))),
        }
    };
    map.iter().map(entry).collect()
}

fn stop(fields: &mut Fields<'_>) -> Result<Vec<String>, ApiError> {
    let stop = fields.take::<Strings>("stop")?.map(|strings| strings.0).unwrap_or_default();
    bounded("stop", stop.len(), STOPS_MAX)?;
    if stop.iter().any(|s| s.is_empty() || s.len() > STOP_BYTES_MAX) {
        return Err(ApiError::bad_request("stop", format!("a stop string must have 1 to {STOP_BYTES_MAX} bytes")));
    }
    Ok(stop)
}

fn bounded(field: &str, found: usize, limit: usize) -> Result<(), ApiError> {
    if found <= limit {
        return Ok(());
    }
    Err(ApiError::bad_request(field, format!("`{field}` has {found} entries, the limit is {limit}")))
}

/// A string or a list of strings.
struct Strings(Vec<String>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Strings;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E>(self, s: &str) -> Result<Strings, E> {
                Ok(Strings(vec![s.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Strings, A::Error> {
                let mut strings = Vec::new();
                while let Some(string) = seq.next_element()? {
                    strings.push(string);
                }
                Ok(Strings(strings))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::GenerationDefaults;

    fn parse(body: &Json, generation: GenerationDefaults) -> Result<Sampling, ApiError> {
        let model = ServedModel { name: "base".to_owned(), created: 0, context_tokens_max: 64, generation };
        let body = body.to_string();
        Sampling::parse(&mut Fields::parse(body.as_bytes())?, &model, 100)
    }

    #[test]
    fn defaults_come_from_the_model() {
        let generation = GenerationDefaults {
            temperature: Some(0.6),
            top_p: Some(0.9),
            top_k: Some(20),
            min_p: None,
            repetition_penalty: Some(1.1),
            eos_token_ids: vec![2],
        };
        let sampling = parse(&json!({"top_k": -1, "stop": null, "seed": null}), generation).unwrap();
        let expected =
            SamplingParams { temperature: 0.6, top_p: 0.9, repetition_penalty: 1.1, ..SamplingParams::default() };
        assert_eq!(sampling.params, expected);
        assert_eq!((sampling.n, sampling.stop.len(), sampling.skip_special_tokens), (1, 0, true));
    }

    #[test]
    fn everything_given_arrives() {
        let body = json!({
            "temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "presence_penalty": -2, "frequency_penalty": 2,
            "repetition_penalty": 1.5, "logit_bias": {"7": -100, "9": 1.5}, "seed": -1, "n": 2, "best_of": 2,
            "stop": ["a", "b"], "stop_token_ids": [5], "ignore_eos": true, "cache_salt": "s",
            "response_format": {"type": "text"}, "min_tokens": 0, "bad_words": null,
        });
        let sampling = parse(&body, GenerationDefaults::default()).unwrap();
        let expected = SamplingParams {
            temperature: 0.0,
            top_p: 0.5,
            top_k: Some(3),
            min_p: 0.1,
            presence_penalty: -2.0,
            frequency_penalty: 2.0,
            repetition_penalty: 1.5,
            logit_bias: vec![(7, -100.0), (9, 1.5)],
            seed: Some(u64::MAX),
        };
        assert_eq!(sampling.params, expected);
        assert_eq!(sampling.stop, ["a", "b"]);
        assert_eq!((sampling.n, sampling.stop_token_ids, sampling.ignore_eos), (2, vec![5], true));
        assert_eq!(parse(&json!({"stop": "x"}), GenerationDefaults::default()).unwrap().stop, ["x"]);
    }

    #[test]
    fn absurd_values_are_refused_by_name() {
        let cases = [
            ("temperature", json!(-0.1)),
            ("temperature", json!(1e30)),
            ("temperature", json!("hot")),
            ("top_p", json!(0)),
            ("top_p", json!(1.1)),
            ("top_k", json!(-2)),
            ("top_k", json!(1.5)),
            ("min_p", json!(2)),
            ("presence_penalty", json!(-2.1)),
            ("frequency_penalty", json!(3)),
            ("repetition_penalty", json!(0)),
            ("repetition_penalty", json!(-1)),
            ("seed", json!("x")),
            ("n", json!(0)),
            ("n", json!(-1)),
            ("best_of", json!(2)),
            ("stop", json!("")),
            ("stop", json!([""])),
            ("stop", json!(vec!["x"; 33])),
            ("stop[1]", json!(["x", 3])),
            ("stop", json!("x".repeat(1025))),
            ("stop_token_ids[0]", json!([-1])),
            ("logit_bias", json!({"x": 1})),
            ("logit_bias", json!({"100": 1})),
            ("logit_bias", json!({"1": 101})),
            ("logit_bias", json!([1])),
            ("ignore_eos", json!(1)),
            ("cache_salt", json!("")),
            ("response_format", json!({"type": "json_object"})),
            ("guided_json", json!({})),
            ("min_tokens", json!(3)),
            ("use_beam_search", json!(true)),
        ];
        for (param, value) in cases {
            let field = param.split('[').next().unwrap();
            let error = parse(&json!({field: value}), GenerationDefaults::default()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{field} = {value}");
            assert!(error.message.contains(field), "{}", error.message);
        }
    }
}
