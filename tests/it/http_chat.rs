//! `POST /v1/chat/completions`. The fake template writes `u:hello;a`, so the base goes on with `bcd...`.

#![allow(clippy::unwrap_used, reason = "a test stops at any surprise")]

use serde_json::{Value as Json, json};

use super::http_support::Service;

const PATH: &str = "/v1/chat/completions";

fn hello() -> Json {
    json!([{"role": "user", "content": "hello"}])
}

#[tokio::test]
async fn the_answer_has_openais_shape() {
    let service = Service::start().await;
    let body = json!({"model": "skip", "messages": hello(), "max_tokens": 3, "logprobs": true, "top_logprobs": 1});
    let mut answer = service.ok(PATH, &body).await;
    for entry in answer["choices"][0]["logprobs"]["content"].as_array_mut().unwrap() {
        assert_eq!(entry["logprob"], entry["top_logprobs"][0]["logprob"]);
        assert!(entry["logprob"].as_f64().unwrap() < 0.0);
        entry["logprob"] = json!("below 0");
        entry["top_logprobs"][0]["logprob"] = json!("below 0");
    }
    answer["choices"][0]["logprobs"]["content"].as_array_mut().unwrap().truncate(1);
    insta::assert_json_snapshot!(answer, @r#"
    {
      "id": "chatcmpl",
      "object": "chat.completion",
      "created": 0,
      "model": "skip",
      "choices": [
        {
          "index": 0,
          "message": {
            "role": "assistant",
            "content": "ceg",
            "refusal": null
          },
          "logprobs": {
            "content": [
              {
                "token": "c",
                "logprob": "below 0",
                "bytes": [
                  99
                ],
                "top_logprobs": [
                  {
                    "token": "c",
                    "logprob": "below 0",
                    "bytes": [
                      99
                    ]
                  }
                ]
              }
            ]
          },
          "finish_reason": "length",
          "stop_reason": null
        }
      ],
      "usage": {
        "prompt_tokens": 9,
        "total_tokens": 12,
        "completion_tokens": 3,
        "prompt_tokens_details": {
          "cached_tokens": 0
        }
      }
    }
    "#);
}

#[tokio::test]
async fn chunks_have_openais_shape() {
    let service = Service::start().await;
    let body = json!({"messages": hello(), "max_completion_tokens": 1, "stream_options": {"include_usage": true}});
    let mut chunks = service.stream(PATH, &body).await;
    let last = chunks.pop().unwrap();
    assert_eq!((&last["choices"], &last["usage"]["total_tokens"]), (&json!([]), &json!(10)));
    insta::assert_json_snapshot!(chunks, @r#"
    [
      {
        "id": "chatcmpl",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "base",
        "choices": [
          {
            "index": 0,
            "delta": {
              "role": "assistant",
              "content": ""
            },
            "logprobs": null,
            "finish_reason": null,
            "stop_reason": null
          }
        ]
      },
      {
        "id": "chatcmpl",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "base",
        "choices": [
          {
            "index": 0,
            "delta": {
              "content": "b"
            },
            "logprobs": null,
            "finish_reason": null,
            "stop_reason": null
          }
        ]
      },
      {
        "id": "chatcmpl",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "base",
        "choices": [
          {
            "index": 0,
            "delta": {},
            "logprobs": null,
            "finish_reason": "length",
            "stop_reason": null
          }
        ]
      }
    ]
    "#);
}

#[tokio::test]
async fn streamed_content_is_the_content() {
    let service = Service::start().await;
    let bodies = [
        json!({"messages": hello(), "max_tokens": 9}),
        json!({"messages": hello(), "n": 3, "max_tokens": 20, "temperature": 9, "seed": 4, "stop": ["x", "yz"]}),
        json!({"model": "skip", "messages": hello(), "logprobs": true, "stop": "k"}),
        json!({"messages": hello()}),
    ];
    for body in bodies {
        let whole = service.ok(PATH, &body).await;
        let choices = whole["choices"].as_array().unwrap();
        let mut contents = vec![String::new(); choices.len()];
        let mut logprobs = vec![Vec::new(); choices.len()];
        for chunk in service.stream(PATH, &body).await {
            let choice = &chunk["choices"][0];
            let index = choice["index"].as_u64().unwrap() as usize;
            contents[index] += choice["delta"]["content"].as_str().unwrap_or_default();
            logprobs[index].extend(choice["logprobs"]["content"].as_array().cloned().unwrap_or_default());
        }
        for ((choice, content), logprobs) in choices.iter().zip(contents).zip(logprobs) {
            assert_eq!(choice["message"]["content"], content, "{body}");
            assert_eq!(choice["logprobs"]["content"].as_array().cloned().unwrap_or_default(), logprobs, "{body}");
        }
    }
}

/// The prompt that a chat request makes, as `/tokenize` and `/detokenize` show it.
async fn prompt(service: &Service, body: &Json) -> String {
    let tokens = service.post("/tokenize", body).await.json();
    assert!(tokens["tokens"].is_array(), "{tokens}");
    let text = service.post("/detokenize", &json!({"tokens": tokens["tokens"]})).await.json();
    text["prompt"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn messages_reach_the_template() {
    let service = Service::start().await;
    let check = async |body: Json, expected: &str| assert_eq!(prompt(&service, &body).await, expected, "{body}");
    check(json!({"messages": hello()}), "u:hello;a").await;
    check(json!({"messages": hello(), "add_generation_prompt": false}), "u:hello;").await;
    check(json!({"messages": hello(), "add_special_tokens": true}), "<|start|>u:hello;a").await;
    check(json!({"messages": hello(), "chat_template_kwargs": {"shout": true}}), "u:hello;!!a").await;
    let parts = json!([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]);
    check(json!({"messages": [{"role": "user", "content": parts}]}), "u:one\ntwo;a").await;
    check(json!({"messages": [{"role": "developer", "content": "d", "name": null}]}), "s:d;a").await;
    let called = json!({"role": "assistant", "content": null,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]});
    check(json!({"messages": [called]}), "a:;a").await;
    let half = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "half"}]);
    check(json!({"messages": half, "continue_final_message": true}), "u:q;a:half").await;
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    check(json!({"messages": hello(), "tools": tools, "tool_choice": "none"}), "u:hello;1Ta").await;
    check(json!({"messages": hello(), "tools": [], "tool_choice": "auto"}), "u:hello;a").await;
}

#[tokio::test]
async fn a_chat_fills_the_context_unless_told_otherwise() {
    let service = Service::start().await;
    let answer = service.ok(PATH, &json!({"messages": hello(), "ignore_eos": true})).await;
    assert_eq!(answer["usage"]["total_tokens"], 64);
    let answer = service.ok(PATH, &json!({"messages": hello(), "max_completion_tokens": 2, "max_tokens": 5})).await;
    assert_eq!(answer["usage"]["completion_tokens"], 2);
}

#[tokio::test]
async fn token_ids_are_returned_as_vllm_does() {
    let service = Service::start().await;
    let body = json!({"messages": hello(), "max_tokens": 2, "return_token_ids": true});
    let answer = service.ok(PATH, &body).await;
    let prompt: Vec<u32> = "u:hello;a".bytes().map(u32::from).collect();
    assert_eq!(answer["prompt_token_ids"], json!(prompt));
    assert_eq!(answer["choices"][0]["token_ids"], json!([98, 99]));
    let chunks = service.stream(PATH, &body).await;
    assert_eq!(chunks[0]["prompt_token_ids"], json!(prompt));
    assert_eq!(chunks[1]["prompt_token_ids"], Json::Null);
    let ids: Vec<&Json> =
        chunks.iter().flat_map(|chunk| chunk["choices"][0]["token_ids"].as_array().unwrap()).collect();
    assert_eq!(ids, [98, 99]);
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_by_name() {
    let service = Service::start().await;
    let check = async |extra: Json, param: &str, words: &str| {
        let mut body = json!({"messages": hello()});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        service.refused(PATH, &body, (400, Some(param)), words).await;
    };
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    check(json!({"tools": tools}), "tools", "tool_choice").await;
    check(json!({"tools": tools, "tool_choice": "required"}), "tool_choice", "not recognised").await;
    check(json!({"tools": tools, "tool_choice": "auto"}), "tool_choice", "not recognised").await;
    check(json!({"tool_choice": "required"}), "tool_choice", "needs `tools`").await;
    check(json!({"functions": [{}]}), "functions", "not supported").await;
    check(json!({"response_format": {"type": "json_object"}}), "response_format", "not supported").await;
    check(json!({"chat_template": "x"}), "chat_template", "not supported").await;
    check(json!({"chat_template_kwargs": {"messages": []}}), "messages", "cannot be set").await;
    check(json!({"modalities": ["audio"]}), "modalities", "not supported").await;
    check(json!({"max_tokens": 0}), "max_tokens", "at least 1").await;
    check(json!({"top_logprobs": 1}), "top_logprobs", "logprobs: true").await;
    check(json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "at most 20").await;
    check(json!({"logprobs": 1}), "logprobs", "boolean").await;
    let both = json!({"continue_final_message": true, "add_generation_prompt": true});
    check(both, "continue_final_message", "exclude").await;
    check(json!({"stream_options": {"include_usage": true}}), "stream_options", "stream: true").await;

    let check = async |messages: Json, param: &str, words: &str| {
        service.refused(PATH, &json!({"messages": messages}), (400, Some(param)), words).await;
    };
    check(Json::Null, "messages", "missing").await;
    check(json!([]), "messages", "empty").await;
    check(json!("hi"), "messages", "sequence").await;
    check(json!(["hi"]), "messages[0]", "map").await;
    check(json!([{"content": "x"}]), "messages[0].role", "missing").await;
    check(json!([{"role": 5, "content": "x"}]), "messages[0].role", "string").await;
    check(json!([{"role": "user", "content": "x"}, {"role": "user"}]), "messages[1].content", "missing").await;
    check(json!([{"role": "user", "content": 5}]), "messages[0].content", "list of parts").await;
    check(json!([{"role": "user", "content": [5]}]), "messages[0].content[0]", "object").await;
    check(json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text", "string").await;
    let image = json!([{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:"}}]);
    check(json!([{"role": "user", "content": image}]), "messages[0].content[1]", "`image_url`").await;
    check(json!([{"role": "tool", "content": "x"}]), "messages", "no tools here").await;
    check(json!([{"role": "user", "content": "x".repeat(99)}]), "messages", "the limit is 63").await;
}
