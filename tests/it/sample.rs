//! The sample model and its adapters through the whole server, against transformers and PEFT in float32
//! (`tests/fixtures/sample.json`, written by `tools/make_sample.py`).

use std::path::Path;

use axum::body::Body;
use axum::http::Request;
use futures::future::join_all;
use http_body_util::BodyExt;
use patchbay::app::App;
use patchbay::config::Config;
use patchbay::text::{ChatPrompt, Text};
use serde_json::{Value as Json, json};
use tower::ServiceExt;

use crate::fixtures;

fn golden() -> Json {
    let path = fixtures::dir().join("sample.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Json) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn chats_and_texts_become_the_same_tokens_as_in_transformers() {
    let golden = golden();
    let text = Text::load(Path::new("sample-model")).unwrap();
    for entry in golden["prompts"].as_array().unwrap() {
        let messages = entry["messages"].as_array().unwrap().clone();
        let chat = ChatPrompt { messages, add_generation_prompt: true, ..ChatPrompt::default() };
        let prompt = text.render_chat(&chat).unwrap();
        assert_eq!(prompt, entry["prompt"].as_str().unwrap());
        assert_eq!(text.encode(&prompt, false).unwrap(), ids(&entry["token_ids"]));
    }
    for entry in golden["tokenizer"].as_array().unwrap() {
        let plain = entry["text"].as_str().unwrap();
        assert_eq!(text.encode(plain, false).unwrap(), ids(&entry["ids"]), "{plain:?}");
        assert_eq!(text.encode(plain, true).unwrap(), ids(&entry["ids_with_special"]), "{plain:?}");
        assert_eq!(text.decode(&ids(&entry["ids"]), false), entry["decoded"].as_str().unwrap());
        assert_eq!(text.decode(&ids(&entry["ids"]), true), entry["decoded_skip_special"].as_str().unwrap());
    }
}

/// All at once, so that base and adapters share batches.
#[tokio::test(flavor = "multi_thread")]
async fn base_and_adapters_answer_as_peft_does_when_asked_all_at_once() {
    let golden = golden();
    let mut config = Config::default();
    // Copies, so that the tree stays as it is.
    let root = tempfile::tempdir().unwrap();
    for name in ["reverse", "shout", "json"] {
        let to = root.path().join(name);
        std::fs::create_dir(&to).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(Path::new("adapters").join(name).join(file), to.join(file)).unwrap();
        }
    }
    config.adapters.root = root.path().to_path_buf();
    let router = App::build(config).await.unwrap().router();
    let ask = |path: &'static str, body: Json| {
        let request = Request::post(path).header("content-type", "application/json").body(Body::from(body.to_string()));
        let answer = router.clone().oneshot(request.unwrap());
        async move {
            let body = answer.await.unwrap().into_body().collect().await.unwrap().to_bytes();
            serde_json::from_slice::<Json>(&body).unwrap()
        }
    };
    let model = |entry: &Json| entry["adapter"].as_str().unwrap_or("sample-model").to_owned();
    let chats = golden["chats"].as_array().unwrap();
    let completions = golden["completions"].as_array().unwrap();
    assert!(chats.len() > 12 && completions.len() >= 6, "the golden file has something to say");
    let asked_chats = join_all(chats.iter().map(|entry| {
        ask("/v1/chat/completions", json!({"model": model(entry), "messages": entry["messages"], "temperature": 0}))
    }));
    let asked_completions = join_all(completions.iter().map(|entry| {
        let body = json!({"model": model(entry), "prompt": entry["prompt"], "temperature": 0, "max_tokens": 96});
        ask("/v1/completions", body)
    }));
    let (found_chats, found_completions) = tokio::join!(asked_chats, asked_completions);
    for (entry, found) in chats.iter().zip(found_chats) {
        assert_eq!(found["choices"][0]["message"]["content"], entry["expected"], "{entry}");
    }
    for (entry, found) in completions.iter().zip(found_completions) {
        assert_eq!(found["choices"][0]["text"], entry["expected"], "{entry}");
    }
}
