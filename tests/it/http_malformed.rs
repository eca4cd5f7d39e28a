//! What clients get wrong, by mistake or on purpose: each a 4xx that says what, and the service goes on.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use futures::stream;
use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::http_support::{Service, VOCAB, post};

const PATH: &str = "/v1/completions";

async fn still_works(service: &Service) {
    let answer = service.ok(PATH, &json!({"prompt": "a", "max_tokens": 2})).await;
    assert_eq!(answer["choices"][0]["text"], "bc");
}

#[tokio::test]
async fn bodies_over_the_limit_are_refused_before_they_are_read() {
    let service = Service::start().await;
    // The announced length alone is enough.
    let announced = Request::post(PATH).header("content-length", "100000000").body(Body::empty()).unwrap();
    let reply = service.call(announced).await;
    assert_eq!(reply.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(reply.json()["error"]["code"], 413);
    assert!(reply.text().contains("server.body_bytes_max"));
    // Without one, no more is read than the limit.
    let read = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = read.clone();
    let chunks = (0..1600).map(move |_| {
        count.fetch_add(65536, std::sync::atomic::Ordering::Relaxed);
        Ok::<_, std::io::Error>(vec![b'['; 65536])
    });
    let reply = service.call(post(PATH, Body::from_stream(stream::iter(chunks)))).await;
    assert_eq!(reply.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(read.load(std::sync::atomic::Ordering::Relaxed) <= (8 << 20) + 2 * 65536);
    still_works(&service).await;
}

#[tokio::test]
async fn bodies_that_are_no_json_objects_are_refused() {
    let service = Service::start().await;
    let deep = format!("{{\"prompt\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let bodies =
        ["", "{", "[]", "null", "\u{feff}{}", "{\"prompt\": }", "{\"a\":1}{", &"{\"a\":".repeat(50_000), &deep];
    for body in bodies {
        for path in [PATH, "/v1/chat/completions", "/tokenize", "/detokenize"] {
            let reply = service.call(post(path, body.to_owned())).await;
            assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{path}");
            assert_eq!(reply.json()["error"]["type"], "BadRequestError");
        }
    }
    let reply = service.call(post(PATH, b"{\"prompt\": \"\xff\"}".to_vec())).await;
    assert_eq!(reply.status, StatusCode::BAD_REQUEST);
    still_works(&service).await;
}

#[tokio::test]
async fn wrong_values_name_the_field() {
    let service = Service::start().await;
    let check = async |extra: Json, param: &str, words: &str| {
        let mut body = json!({"prompt": "a"});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        service.refused(PATH, &body, (400, Some(param)), words).await;
    };
    check(json!({"prompt": null}), "prompt", "missing").await;
    check(json!({"prompt": []}), "prompt", "empty").await;
    check(json!({"prompt": [[]]}), "prompt", "at least one token").await;
    check(json!({"prompt": {}}), "prompt", "a string, a list").await;
    check(json!({"prompt": ["a", 5]}), "prompt[1]", "string").await;
    check(json!({"prompt": [VOCAB]}), "prompt", "not in the vocabulary of 264").await;
    check(json!({"prompt": [[1], [4_000_000_000u32]]}), "prompt", "4000000000").await;
    check(json!({"prompt": [-1]}), "prompt[0]", "-1").await;
    check(json!({"prompt": "a".repeat(200)}), "prompt", "has 201 tokens, the limit is 63").await;
    check(json!({"prompt": "a", "max_tokens": 63}), "max_tokens", "asks for 63 more").await;
    check(json!({"prompt": "a", "max_tokens": u64::MAX}), "max_tokens", "context has 64").await;
    check(json!({"max_tokens": 1e300}), "max_tokens", "floating point").await;
    check(json!({"max_tokens": 0}), "max_tokens", "echo").await;
    check(json!({"max_tokens": -5}), "max_tokens", "-5").await;
    check(json!({"max_tokens": "5"}), "max_tokens", "string").await;
    check(json!({"n": 129}), "n", "limit is 128").await;
    check(json!({"n": u64::MAX, "prompt": ["a", "b"]}), "n", "limit is 128").await;
    check(json!({"best_of": 3}), "best_of", "best_of").await;
    check(json!({"temperature": -1}), "temperature", "from 0 to").await;
    check(json!({"top_p": 7}), "top_p", "from 0 to 1").await;
    check(json!({"logprobs": 21}), "logprobs", "at most 20").await;
    check(json!({"logprobs": true}), "logprobs", "boolean").await;
    check(json!({"logit_bias": {"264": 1}}), "logit_bias", "264").await;
    check(json!({"suffix": "x"}), "suffix", "not supported").await;
    check(json!({"stream": "yes"}), "stream", "boolean").await;
    check(json!({"model": ["skip"]}), "model", "string").await;
    check(json!({"guided_regex": "a+"}), "guided_regex", "not supported").await;
    still_works(&service).await;
}

#[tokio::test]
async fn a_prompt_may_fill_the_context_when_it_is_only_scored() {
    let service = Service::start().await;
    let body = json!({"prompt": vec![1; 64], "max_tokens": 0, "echo": true, "logprobs": 0});
    let answer = service.ok(PATH, &body).await;
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), 64);
    let body = json!({"prompt": vec![1; 65], "max_tokens": 0, "echo": true});
    service.refused(PATH, &body, (400, Some("prompt")), "limit is 64").await;
}

#[tokio::test]
async fn unknown_routes_and_methods_are_answered_in_the_envelope() {
    let service = Service::start().await;
    let reply = service.get("/v2/nothing").await;
    assert_eq!((reply.status, reply.json()["error"]["type"].as_str()), (StatusCode::NOT_FOUND, Some("NotFoundError")));
    let reply = service.get(PATH).await;
    assert_eq!(reply.status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(reply.json()["error"]["code"], 405);
    assert_eq!(reply.headers["allow"], "POST");
    let reply = service.call(Request::patch("/health").body(Body::empty()).unwrap()).await;
    assert_eq!(reply.status, StatusCode::METHOD_NOT_ALLOWED);
}

/// JSON of any shape, with the words that the service looks for.
fn any_json() -> impl Strategy<Value = Json> {
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        "\\PC{0,6}".prop_map(Json::from),
        prop::sample::select(vec!["text", "user", "base", "skip", "none"]).prop_map(Json::from),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        let key = prop::sample::select(vec![
            "role",
            "content",
            "type",
            "text",
            "name",
            "generation",
            "scale",
            "id",
            "ids",
            "7",
            "tool_calls",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Json::from),
            prop::collection::hash_map(key, inner, 0..3).prop_map(|map| json!(map)),
        ]
    })
}

const FIELDS: &[&str] = &[
    "model",
    "adapter",
    "lora_path",
    "lora",
    "merged_adapters",
    "prompt",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "n",
    "best_of",
    "logprobs",
    "top_logprobs",
    "echo",
    "logit_bias",
    "stream",
    "stream_options",
    "tools",
    "tool_choice",
    "chat_template_kwargs",
    "continue_final_message",
    "stop_token_ids",
    "presence_penalty",
    "repetition_penalty",
    "response_format",
    "tokens",
    "cache_salt",
];

#[test]
fn any_object_is_answered_and_none_is_our_fault() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let service = runtime.block_on(Service::start());
    let object = prop::collection::hash_map(prop::sample::select(FIELDS.to_vec()), any_json(), 0..5);
    let path = prop::sample::select(vec![PATH, "/v1/chat/completions", "/tokenize", "/detokenize"]);
    proptest!(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }, |(object in object, path in path)| {
        let mut body = json!(object);
        // What most requests have in order, so that the others fields are looked at.
        for (field, value) in [("prompt", json!("a")), ("messages", json!([{"role": "user", "content": "b"}]))] {
            if body.get(field).is_none() {
                body[field] = value;
            }
        }
        let reply = runtime.block_on(service.post(path, &body));
        prop_assert!(reply.status.as_u16() < 500, "{path} {body} -> {}", reply.text());
        prop_assert!(reply.status.is_success() || reply.json()["error"]["message"].is_string());
    });
    runtime.block_on(still_works(&service));
}
