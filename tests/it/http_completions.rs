//! `POST /v1/completions`.

#![allow(clippy::unwrap_used, reason = "a test stops at any surprise")]

use axum::http::StatusCode;
use serde_json::{Value as Json, json};

use super::http_support::{END, Service};

const PATH: &str = "/v1/completions";

fn text(answer: &Json) -> Vec<&str> {
    answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn the_answer_has_openais_shape() {
    let service = Service::start().await;
    let answer = service.ok(PATH, &json!({"model": "base", "prompt": "a", "max_tokens": 3})).await;
    insta::assert_json_snapshot!(answer, @r#"
    {
      "id": "cmpl",
      "object": "text_completion",
      "created": 0,
      "model": "base",
      "choices": [
        {
          "index": 0,
          "text": "bcd",
          "logprobs": null,
          "finish_reason": "length",
          "stop_reason": null
        }
      ],
      "usage": {
        "prompt_tokens": 2,
        "total_tokens": 5,
        "completion_tokens": 3,
        "prompt_tokens_details": {
          "cached_tokens": 0
        }
      }
    }
    "#);
}

#[tokio::test]
async fn every_form_of_prompt_is_answered() {
    let service = Service::start().await;
    let check = async |prompt: Json, expected: &[&str]| {
        let answer = service.ok(PATH, &json!({"prompt": prompt, "max_tokens": 2})).await;
        assert_eq!(text(&answer), expected, "{prompt}");
    };
    check(json!("a"), &["bc"]).await;
    check(json!(["a", "m"]), &["bc", "no"]).await;
    check(json!([97]), &["bc"]).await;
    check(json!([[97], [109, 110]]), &["bc", "op"]).await;
    check(json!(""), &["\u{4}\u{5}"]).await;
}

#[tokio::test]
async fn the_default_length_is_sixteen_and_gives_way_to_the_context() {
    let service = Service::start().await;
    let answer = service.ok(PATH, &json!({"prompt": [1]})).await;
    assert_eq!(answer["usage"]["completion_tokens"], 16);
    let answer = service.ok(PATH, &json!({"prompt": vec![1; 60]})).await;
    assert_eq!(answer["usage"]["completion_tokens"], 4);
}

#[tokio::test]
async fn the_end_token_ends_without_text() {
    let service = Service::start().await;
    let body = json!({"prompt": "x", "max_tokens": 9, "return_token_ids": true});
    let choice = service.ok(PATH, &body).await["choices"][0].clone();
    assert_eq!(choice["text"], "yz");
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &Json::Null));
    assert_eq!(choice["token_ids"], json!([121, 122, END]));
    assert_eq!(choice["prompt_token_ids"], json!([259, 120]));
    let shown = json!({"prompt": "x", "max_tokens": 9, "skip_special_tokens": false,
        "include_stop_str_in_output": true});
    assert_eq!(text(&service.ok(PATH, &shown).await), ["yz<|end|>"]);
    let ignored = json!({"prompt": "x", "max_tokens": 4, "ignore_eos": true});
    let answer = service.ok(PATH, &ignored).await;
    assert_eq!((text(&answer), answer["usage"]["completion_tokens"].as_u64()), (vec!["yz\u{3}"], Some(4)));
}

#[tokio::test]
async fn stop_strings_and_stop_tokens_cut_the_text() {
    let service = Service::start().await;
    let check = async |extra: Json, expected: &str, reason: Json| {
        let mut body = json!({"prompt": "a", "max_tokens": 9});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let choice = service.ok(PATH, &body).await["choices"][0].clone();
        assert_eq!((&choice["text"], &choice["stop_reason"]), (&json!(expected), &reason), "{extra}");
        let finish = if reason.is_null() { "length" } else { "stop" };
        assert_eq!(choice["finish_reason"], finish, "{extra}");
    };
    check(json!({"stop": "ef"}), "bcd", json!("ef")).await;
    check(json!({"stop": ["zz", "e"]}), "bcd", json!("e")).await;
    check(json!({"stop": ["ef"], "include_stop_str_in_output": true}), "bcdef", json!("ef")).await;
    check(json!({"stop_token_ids": [101]}), "bcd", json!(101)).await;
    check(json!({"stop_token_ids": [101], "ignore_eos": true}), "bcd", json!(101)).await;
    check(json!({"stop": "jk"}), "bcdefghij", Json::Null).await;
    check(json!({"stop": null}), "bcdefghij", Json::Null).await;
}

#[tokio::test]
async fn a_stop_string_leaves_a_finished_request_with_its_cached_tokens() {
    let service = Service::start().await;
    let prompt = "a".repeat(40);
    let body = json!({"prompt": prompt, "max_tokens": 9, "stop": "ef"});
    let first = service.ok(PATH, &body).await;
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let second = service.ok(PATH, &body).await;
    assert_eq!(text(&second), ["bcd"]);
    assert!(second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() > Some(0), "{second}");
}

#[tokio::test]
async fn n_answers_are_numbered_over_all_prompts() {
    let service = Service::start().await;
    let answer = service.ok(PATH, &json!({"prompt": ["a", "m"], "n": 2, "max_tokens": 1})).await;
    assert_eq!(text(&answer), ["b", "b", "n", "n"]);
    let indexes: Vec<u64> =
        answer["choices"].as_array().unwrap().iter().map(|choice| choice["index"].as_u64().unwrap()).collect();
    assert_eq!(indexes, [0, 1, 2, 3]);
    assert_eq!(answer["usage"]["prompt_tokens"], 4);
    assert_eq!(answer["usage"]["completion_tokens"], 4);
}

#[tokio::test]
async fn a_seed_repeats_and_answers_of_one_request_differ() {
    let service = Service::start().await;
    let body = json!({"prompt": "a", "n": 2, "max_tokens": 20, "temperature": 5, "seed": 7, "ignore_eos": true,
        "return_token_ids": true});
    let first = service.ok(PATH, &body).await;
    let second = service.ok(PATH, &body).await;
    assert_eq!(first["choices"], second["choices"]);
    assert_ne!(first["choices"][0]["token_ids"], first["choices"][1]["token_ids"]);
}

#[tokio::test]
async fn logprobs_are_reported_as_completions_have_them() {
    let service = Service::start().await;
    let answer = service.ok(PATH, &json!({"prompt": "a", "max_tokens": 2, "logprobs": 1})).await;
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["b", "c"]));
    assert_eq!(logprobs["text_offset"], json!([0, 1]));
    let first = logprobs["token_logprobs"][0].as_f64().unwrap();
    assert!(first < 0.0 && first > -0.2, "{first}");
    assert_eq!(logprobs["top_logprobs"][0]["b"], logprobs["token_logprobs"][0]);
    assert_eq!(logprobs["top_logprobs"][0].as_object().unwrap().len(), 1);
    let two = service.ok(PATH, &json!({"prompt": "a", "max_tokens": 1, "logprobs": 2})).await;
    let top = two["choices"][0]["logprobs"]["top_logprobs"][0].as_object().unwrap().clone();
    assert_eq!(top.keys().collect::<Vec<_>>(), ["b", "c"]);
    let named = json!({"prompt": "a", "max_tokens": 1, "logprobs": 0, "return_tokens_as_token_ids": true});
    assert_eq!(service.ok(PATH, &named).await["choices"][0]["logprobs"]["tokens"], json!(["token_id:98"]));
}

#[tokio::test]
async fn echo_repeats_the_prompt_and_scores_it() {
    let service = Service::start().await;
    let plain = service.ok(PATH, &json!({"prompt": "am", "max_tokens": 1, "echo": true})).await;
    assert_eq!(text(&plain), ["amn"]);
    let ids = service.ok(PATH, &json!({"prompt": [97, 109], "max_tokens": 1, "echo": true})).await;
    assert_eq!(text(&ids), ["amn"]);
    for max_tokens in [0, 1] {
        let body = json!({"prompt": "mn", "max_tokens": max_tokens, "echo": true, "logprobs": 1});
        let answer = service.ok(PATH, &body).await;
        let choice = &answer["choices"][0];
        let generated = ["", "o"][max_tokens];
        assert_eq!(choice["text"], format!("mn{generated}"));
        let logprobs = &choice["logprobs"];
        let tokens = ["<|start|>", "m", "n", "o"];
        assert_eq!(logprobs["tokens"], json!(tokens[..3 + max_tokens]));
        assert_eq!(logprobs["token_logprobs"][0], Json::Null);
        assert_eq!(logprobs["top_logprobs"][0], Json::Null);
        // `n` is what the model expects behind `m`; `m` is not what it expects behind the start.
        assert!(logprobs["token_logprobs"][2].as_f64().unwrap() > -0.2);
        assert!(logprobs["token_logprobs"][1].as_f64().unwrap() < -5.0);
        assert_eq!(choice["finish_reason"], "length");
        assert_eq!(answer["usage"]["completion_tokens"], max_tokens);
        let streamed = service.stream(PATH, &body).await;
        let joined: String = streamed.iter().flat_map(|chunk| text(chunk)).collect();
        assert_eq!(joined, format!("mn{generated}"));
        let names: Vec<&Json> = streamed
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["logprobs"]["tokens"].as_array())
            .flatten()
            .collect();
        assert_eq!(names, tokens[..3 + max_tokens].to_vec());
    }
}

#[tokio::test]
async fn adapters_are_chosen_by_every_name_and_never_the_base_by_mistake() {
    let service = Service::start().await;
    let check = async |selector: Json, expected: &str| {
        let mut body = json!({"prompt": "a", "max_tokens": 2});
        body.as_object_mut().unwrap().extend(selector.as_object().unwrap().clone());
        let answer = service.ok(PATH, &body).await;
        assert_eq!(text(&answer), [expected], "{selector}");
        answer["model"].as_str().unwrap().to_owned()
    };
    assert_eq!(check(json!({}), "bc").await, "base");
    assert_eq!(check(json!({"model": "base"}), "bc").await, "base");
    assert_eq!(check(json!({"model": "skip"}), "ce").await, "skip");
    assert_eq!(check(json!({"model": "base:skip"}), "ce").await, "base:skip");
    assert_eq!(check(json!({"model": "base", "adapter": "skip"}), "ce").await, "base");
    check(json!({"model": "base::skip"}), "ce").await;
    check(json!({"adapter": {"name": "skip", "generation": 1}}), "ce").await;
    check(json!({"lora_path": "skip"}), "ce").await;

    let refused = async |selector: Json, expected: (u16, Option<&str>), words: &str| {
        let mut body = json!({"prompt": "a"});
        body.as_object_mut().unwrap().extend(selector.as_object().unwrap().clone());
        service.refused(PATH, &body, expected, words).await;
    };
    refused(json!({"model": "nobody"}), (404, Some("model")), "`nobody` does not exist").await;
    refused(json!({"model": "base:nobody"}), (404, Some("model")), "nobody").await;
    refused(json!({"model": "base:"}), (404, Some("model")), "base:").await;
    refused(json!({"model": "../skip"}), (404, Some("model")), "../skip").await;
    refused(json!({"model": "skip@99"}), (404, Some("model")), "skip@99").await;
    refused(json!({"model": "base", "adapter": "nobody"}), (404, Some("model")), "`nobody`").await;
    refused(json!({"model": "broken"}), (400, Some("model")), "adapter_model.safetensors").await;
    refused(json!({"model": "skip", "adapter": "broken"}), (400, Some("adapter")), "different adapters").await;
}

#[tokio::test]
async fn chunks_have_openais_shape() {
    let service = Service::start().await;
    let body = json!({"model": "skip", "prompt": "a", "max_tokens": 2, "stream_options": {"include_usage": true}});
    let chunks = service.stream(PATH, &body).await;
    insta::assert_json_snapshot!(chunks, @r#"
    [
      {
        "id": "cmpl",
        "object": "text_completion",
        "created": 0,
        "model": "skip",
        "choices": [
          {
            "index": 0,
            "text": "c",
            "logprobs": null,
            "finish_reason": null,
            "stop_reason": null
          }
        ]
      },
      {
        "id": "cmpl",
        "object": "text_completion",
        "created": 0,
        "model": "skip",
        "choices": [
          {
            "index": 0,
            "text": "e",
            "logprobs": null,
            "finish_reason": null,
            "stop_reason": null
          }
        ]
      },
      {
        "id": "cmpl",
        "object": "text_completion",
        "created": 0,
        "model": "skip",
        "choices": [
          {
            "index": 0,
            "text": "",
            "logprobs": null,
            "finish_reason": "length",
            "stop_reason": null
          }
        ]
      },
      {
        "id": "cmpl",
        "object": "text_completion",
        "created": 0,
        "model": "skip",
        "choices": [],
        "usage": {
          "prompt_tokens": 2,
          "total_tokens": 4,
          "completion_tokens": 2,
          "prompt_tokens_details": {
            "cached_tokens": 0
          }
        }
      }
    ]
    "#);
}

#[tokio::test]
async fn streamed_text_is_the_text() {
    let service = Service::start().await;
    let bodies = [
        json!({"prompt": "a", "max_tokens": 12}),
        json!({"prompt": "=", "max_tokens": 5}),
        json!({"prompt": "=", "max_tokens": 1}),
        json!({"prompt": "s", "max_tokens": 20, "stop": ["wx"]}),
        json!({"prompt": "x", "max_tokens": 20, "stop": ["zq"]}),
        json!({"prompt": ["a", "m", "="], "n": 2, "max_tokens": 9, "temperature": 3, "seed": 1, "stop": "q"}),
        json!({"prompt": "a", "max_tokens": 30, "temperature": 20, "seed": 2, "ignore_eos": true}),
        json!({"prompt": "a", "max_tokens": 3, "echo": true, "model": "skip"}),
    ];
    for body in bodies {
        let whole = service.ok(PATH, &body).await;
        let chunks = service.stream(PATH, &body).await;
        let mut texts = vec![String::new(); text(&whole).len()];
        let mut finishes = vec![Json::Null; texts.len()];
        for chunk in &chunks {
            let choice = &chunk["choices"][0];
            let index = choice["index"].as_u64().unwrap() as usize;
            assert!(finishes[index].is_null(), "a chunk follows the last one: {chunk}");
            texts[index] += choice["text"].as_str().unwrap();
            finishes[index] = choice["finish_reason"].clone();
        }
        assert_eq!(text(&whole), texts, "{body}");
        let expected: Vec<&Json> =
            whole["choices"].as_array().unwrap().iter().map(|choice| &choice["finish_reason"]).collect();
        assert_eq!(expected, finishes.iter().collect::<Vec<_>>(), "{body}");
    }
}

#[tokio::test]
async fn usage_can_come_with_every_chunk() {
    let service = Service::start().await;
    let body = json!({"prompt": "a", "max_tokens": 2, "return_token_ids": true,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let chunks = service.stream(PATH, &body).await;
    let counts: Vec<u64> = chunks.iter().map(|chunk| chunk["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert_eq!(counts, [1, 2, 2, 2]);
    assert_eq!(chunks[0]["choices"][0]["prompt_token_ids"], json!([259, 97]));
    assert_eq!(chunks[0]["choices"][0]["token_ids"], json!([98]));
    assert_eq!(chunks[1]["choices"][0]["prompt_token_ids"], Json::Null);
    assert_eq!(chunks[3]["choices"], json!([]));
}

#[tokio::test]
async fn reused_prompt_tokens_are_counted_unless_the_salt_differs() {
    let service = Service::start().await;
    let cached = async |salt: &str| {
        let body = json!({"prompt": "mmmmmmmmmm", "max_tokens": 1, "cache_salt": salt});
        service.ok(PATH, &body).await["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached("one").await, 0);
    assert_eq!(cached("one").await, 8);
    assert_eq!(cached("two").await, 0);
}

#[tokio::test]
async fn defaults_of_the_model_apply_and_give_way() {
    let generation = patchbay::model::GenerationDefaults { temperature: Some(50.0), ..Default::default() };
    let service = Service::with(Default::default(), generation).await;
    let tokens = async |extra: Json| {
        let mut body =
            json!({"prompt": "a", "max_tokens": 12, "seed": 3, "ignore_eos": true, "return_token_ids": true});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        service.ok(PATH, &body).await["choices"][0]["token_ids"].clone()
    };
    let counting: Vec<u32> = (98..110).collect();
    assert_eq!(tokens(json!({"temperature": 0})).await, json!(counting));
    assert_eq!(tokens(json!({"top_k": 1})).await, json!(counting));
    assert_ne!(tokens(json!({})).await, json!(counting));
}

#[tokio::test]
async fn sampling_fields_reach_the_engine() {
    let service = Service::start().await;
    let check = async |extra: Json, expected: &str| {
        let mut body = json!({"prompt": "a", "max_tokens": 2});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        assert_eq!(text(&service.ok(PATH, &body).await), [expected], "{extra}");
    };
    check(json!({"logit_bias": {"98": -100}}), "cd").await;
    check(json!({"logit_bias": {"120": 100}}), "xx").await;
    check(json!({"logit_bias": {"120": 12}, "presence_penalty": 2}), "xy").await;
    check(json!({"logit_bias": {"120": 12}, "frequency_penalty": 2}), "xy").await;
    check(json!({"logit_bias": {"120": 12}, "repetition_penalty": 100}), "xy").await;
}

#[tokio::test]
async fn unknown_fields_are_ignored_and_named() {
    let service = Service::start().await;
    let body = json!({"prompt": "a", "max_tokens": 1, "user": "u", "zzz": 1, "temprature": 2, "none": null,
        "bad\nname": 1, "repetition_penalty": 1.0, "stop": null, "logprobs": null, "best_of": 1});
    let reply = service.post(PATH, &body).await;
    assert_eq!(reply.status, StatusCode::OK);
    assert_eq!(reply.headers["x-patchbay-ignored-fields"], "zzz,temprature");
    let reply = service.post(PATH, &json!({"prompt": "a", "user": "u"})).await;
    assert!(!reply.headers.contains_key("x-patchbay-ignored-fields"));
}
