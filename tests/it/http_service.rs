//! What is around the answers: models, probes, keys, limits, ids, overload, failures, shutdown.

#![allow(clippy::unwrap_used, reason = "a test stops at any surprise")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use futures::{FutureExt, StreamExt};
use http_body_util::BodyExt;
use patchbay::app::App;
use patchbay::server::{ServerConfig, router};
use patchbay::store::Admission;
use serde_json::{Value as Json, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use super::http_support::{PANIC, Reply, Service, post};

const PATH: &str = "/v1/completions";

fn short() -> Json {
    json!({"prompt": "a", "max_tokens": 2})
}

/// Lets other tasks and the engine go on until `condition` holds.
async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn models_are_listed_base_first() {
    let service = Service::start().await;
    let list = service.get("/v1/models").await.json();
    let ids: Vec<&str> = list["data"].as_array().unwrap().iter().map(|entry| entry["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["base", "broken", "skip"]);
    let base = service.get("/v1/models/base").await.json();
    assert_eq!(base, list["data"][0]);
    insta::assert_json_snapshot!(base, @r#"
    {
      "id": "base",
      "object": "model",
      "created": 1700000000,
      "owned_by": "patchbay",
      "root": "base",
      "permission": [
        {
          "id": "modelperm-base",
          "object": "model_permission",
          "created": 1700000000,
          "allow_create_engine": false,
          "allow_sampling": true,
          "allow_logprobs": true,
          "allow_search_indices": false,
          "allow_view": true,
          "allow_fine_tuning": false,
          "organization": "*",
          "group": null,
          "is_blocking": false
        }
      ],
      "parent": null,
      "max_model_len": 64
    }
    "#);
    for id in ["skip", "base:skip"] {
        let adapter = service.get(&format!("/v1/models/{id}")).await.json();
        assert_eq!(adapter, list["data"][2]);
        assert_eq!((&adapter["parent"], &adapter["root"]), (&json!("base"), &json!("skip")));
        assert_eq!(adapter["max_model_len"], Json::Null);
    }
    for id in ["skip@1", "base:skip@1"] {
        assert_eq!(service.get(&format!("/v1/models/{id}")).await.json(), list["data"][2], "{id}");
    }
    for id in ["skip@99", "skip@2", "skip@0", "skip@x", "skip@", "skip@1@1", "base:skip@99"] {
        let reply = service.get(&format!("/v1/models/{id}")).await;
        assert_eq!(reply.status, StatusCode::NOT_FOUND, "{id}");
        assert_eq!(reply.json()["error"]["message"], format!("The model `{id}` does not exist."));
    }
    let reply = service.get("/v1/models/org/none").await;
    assert_eq!(reply.status, StatusCode::NOT_FOUND);
    assert_eq!(reply.json()["error"]["message"], "The model `org/none` does not exist.");
}

#[tokio::test]
async fn text_and_tokens_are_each_others_inverse() {
    let service = Service::start().await;
    let tokens = service.post("/tokenize", &json!({"prompt": "ab é", "return_token_strs": true})).await.json();
    assert_eq!(
        tokens,
        json!({"count": 5, "max_model_len": 64, "tokens": [259, 257, 32, 195, 169],
            "token_strs": ["<|start|>", "ab", "Ġ", "Ã", "©"]})
    );
    let bare = service.post("/tokenize", &json!({"model": "skip", "prompt": "ab", "add_special_tokens": false})).await;
    assert_eq!(bare.json()["tokens"], json!([257]));
    assert_eq!(bare.json()["token_strs"], Json::Null);
    let text = service.post("/detokenize", &json!({"tokens": [259, 257, 32, 195, 169]})).await.json();
    assert_eq!(text, json!({"prompt": "<|start|>ab é"}));
    service.refused("/tokenize", &json!({}), (400, Some("prompt")), "`prompt` or `messages`").await;
    service.refused("/tokenize", &json!({"model": "x", "prompt": "a"}), (404, Some("model")), "x").await;
    for (path, field, value) in [("/tokenize", "prompt", json!("a")), ("/detokenize", "tokens", json!([97]))] {
        let body = |model: &str| json!({"model": model, field: value});
        assert_eq!(service.post(path, &body("skip@1")).await.status, StatusCode::OK, "{path}");
        service.refused(path, &body("skip@99"), (404, Some("model")), "`skip@99` does not exist").await;
        service.refused(path, &body("skip@x"), (404, Some("model")), "`skip@x` does not exist").await;
    }
    service.refused("/detokenize", &json!({"tokens": [264]}), (400, Some("tokens")), "264").await;
    service.refused("/detokenize", &json!({"tokens": "x"}), (400, Some("tokens")), "sequence").await;
}

#[tokio::test]
async fn probes_tell_alive_from_ready() {
    let service = Service::start().await;
    for path in ["/health", "/ping", "/ready", "/metrics", "/version"] {
        assert_eq!(service.get(path).await.status, StatusCode::OK, "{path}");
    }
    assert_eq!(service.get("/version").await.json(), json!({"version": env!("CARGO_PKG_VERSION")}));
    service.state.ready.store(false, Ordering::Release);
    assert_eq!(service.get("/ready").await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(service.get("/health").await.status, StatusCode::OK);
    service.state.engine.shut_down();
    assert_eq!(service.get("/health").await.status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn draining_refuses_new_work_only() {
    let service = Service::start().await;
    service.gate.set_closed(true);
    let running = service.call(post(PATH, short().to_string()));
    let drain = async {
        until(|| service.state.engine.in_flight() == 1).await;
        service.state.draining.store(true, Ordering::Release);
        for (path, body) in [(PATH, short()), ("/v1/chat/completions", json!({"messages": []}))] {
            let reply = service.post(path, &body).await;
            assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
            assert!(reply.headers.contains_key("retry-after"));
        }
        assert_eq!(service.get("/ready").await.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(service.get("/v1/models").await.status, StatusCode::OK);
        service.gate.set_closed(false);
    };
    let (reply, ()) = tokio::join!(running, drain);
    assert_eq!(reply.json()["choices"][0]["text"], "bc");
}

#[tokio::test]
async fn what_the_drain_timeout_cuts_off_is_told_to_try_again() {
    let service = Service::with_config(ServerConfig { drain_timeout_s: 0, ..ServerConfig::default() }).await;
    let engine = service.state.engine.clone();
    service.gate.set_closed(true);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}{PATH}", listener.local_addr().unwrap());
    let (stop, stopped) = oneshot::channel::<()>();
    let app = App { state: service.state.clone() };
    let serving = tokio::spawn(app.serve(listener, async { drop(stopped.await) }));

    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let ask = |stream: bool| {
        let body = json!({"prompt": "a", "max_tokens": 50, "ignore_eos": true, "stream": stream});
        let request = client.post(&url).header("content-type", "application/json").body(body.to_string());
        async {
            let response = request.send().await.unwrap();
            (response.status(), response.headers().clone(), response.text().await.unwrap())
        }
    };
    let drain = async {
        until(|| engine.in_flight() == 2).await;
        drop(stop);
        // The engine was told to end, so the step that waits is its last.
        until(|| !engine.is_alive()).await;
        service.gate.set_closed(false);
    };
    let (whole, streamed, ()) = tokio::join!(ask(false), ask(true), drain);
    assert_eq!(whole.0, 503, "{}", whole.2);
    assert_eq!(whole.1["retry-after"], "5");
    assert!(whole.2.contains("the server is shutting down"), "{}", whole.2);
    // The status of a stream is sent already.
    assert_eq!(streamed.0, 200);
    assert!(streamed.2.contains(r#""code":503"#) && streamed.2.ends_with("data: [DONE]\n\n"), "{}", streamed.2);
    serving.await.unwrap().unwrap();
}

async fn with_key(service: &Service, method: &str, path: &str, authorization: Option<&str>) -> Reply {
    let mut request = Request::builder().method(method).uri(path);
    if let Some(value) = authorization {
        request = request.header("authorization", value);
    }
    service.call(request.body(Body::from(short().to_string())).unwrap()).await
}

#[tokio::test]
async fn keys_open_what_they_are_for() {
    let config = |host: &str, api: Option<&str>, admin: Option<&str>| ServerConfig {
        host: host.to_owned(),
        api_key: api.map(str::to_owned),
        admin_key: admin.map(str::to_owned),
        ..ServerConfig::default()
    };
    let check = async |config: ServerConfig, cases: &[(Option<&str>, u16, u16)]| {
        let service = Service::with_config(config.clone()).await;
        for &(authorization, api_status, admin_status) in cases {
            for (method, path) in [("POST", PATH), ("GET", "/v1/models"), ("GET", "/v1/adapters")] {
                let status = with_key(&service, method, path, authorization).await.status;
                assert_eq!(status, api_status, "{method} {path} {authorization:?} {config:?}");
            }
            // Removing what is not there: 404 once the door is open.
            let reply = with_key(&service, "DELETE", "/v1/adapters/none", authorization).await;
            assert_eq!(reply.status, admin_status, "DELETE {authorization:?} {config:?}");
            assert_eq!(reply.headers.contains_key("www-authenticate"), admin_status == 401);
            assert_eq!(reply.json()["error"]["code"], admin_status);
        }
        for path in ["/health", "/ready", "/metrics", "/version"] {
            assert_eq!(service.get(path).await.status, StatusCode::OK);
        }
        let expected = if config.api_key.is_some() { 401 } else { 400 };
        assert_eq!(with_key(&service, "POST", "/detokenize", None).await.status, expected);
    };
    let wrong = Some("Bearer wrong");
    let (api, admin) = (Some("Bearer api"), Some("bearer admin"));
    check(config("127.0.0.1", None, None), &[(None, 200, 404), (wrong, 200, 404)]).await;
    check(config("0.0.0.0", None, None), &[(None, 200, 403), (wrong, 200, 403)]).await;
    let cases = [(None, 401, 401), (wrong, 401, 401), (api, 200, 404), (Some("Basic api"), 401, 401)];
    check(config("127.0.0.1", Some("api"), None), &cases).await;
    check(config("0.0.0.0", Some("api"), None), &[(None, 401, 403), (api, 200, 403)]).await;
    let cases = [(None, 401, 401), (api, 200, 403), (admin, 200, 404), (wrong, 401, 401), (Some("Bearer "), 401, 401)];
    check(config("0.0.0.0", Some("api"), Some("admin")), &cases).await;
    check(config("127.0.0.1", None, Some("admin")), &[(None, 200, 401), (admin, 200, 404), (api, 200, 401)]).await;
}

#[tokio::test]
async fn web_pages_change_no_adapters_of_a_server_without_keys() {
    let open = Service::start().await;
    let keyed = Service::with_config(ServerConfig { api_key: Some("k".to_owned()), ..ServerConfig::default() }).await;
    let check = async |service: &Service, host: &str, origin: Option<&str>, expected: u16, word: &str| {
        let routes = [("DELETE", "/v1/adapters/none"), ("POST", "/v1/unload_lora_adapter")];
        for (method, path) in routes {
            let mut request = Request::builder().method(method).uri(path).header("host", host);
            request = request.header("authorization", "Bearer k").header("content-type", "application/json");
            if let Some(origin) = origin {
                request = request.header("origin", origin);
            }
            let reply = service.call(request.body(Body::from(r#"{"lora_name": "none"}"#)).unwrap()).await;
            assert_eq!(reply.status.as_u16(), expected, "{path} {host} {origin:?}: {}", reply.text());
            assert!(reply.text().contains(word), "{}", reply.text());
        }
    };
    // Removing what is not there: 404 once the door is open.
    check(&open, "localhost:8000", None, 404, "none").await;
    check(&open, "127.0.0.1:8000", Some("http://localhost:3000"), 404, "none").await;
    check(&open, "rebound.example.org:8000", None, 403, "the request's Host").await;
    check(&open, "rebound.example.org:8000", Some("http://localhost:3000"), 403, "the request's Host").await;
    check(&open, "localhost:8000", Some("https://example.org"), 403, "the request's Origin").await;
    check(&open, "localhost:8000", Some("null"), 403, "the request's Origin").await;
    // A key says more than a header.
    check(&keyed, "models.example.org", Some("https://example.org"), 404, "none").await;
    // What changes nothing is open as before.
    let list = Request::get("/v1/models").header("host", "models.example.org").body(Body::empty()).unwrap();
    assert_eq!(open.call(list).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_full_queue_is_answered_429_before_the_first_byte() {
    let service = Service::start().await;
    service.gate.set_closed(true);
    // Four may run and eight wait; `n` takes a place for each answer.
    let mut replies = Vec::new();
    for stream in [false, true] {
        let body = json!({"prompt": "a", "max_tokens": 2, "n": 13, "stream": stream});
        replies.push(service.post(PATH, &body).await);
    }
    for reply in replies {
        assert_eq!(reply.status, StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(reply.headers["retry-after"], "1");
        assert_eq!(reply.json()["error"]["type"], "RateLimitError");
    }
    service.gate.set_closed(false);
    until(|| service.state.engine.in_flight() == 0).await;
    assert_eq!(service.post(PATH, &short()).await.status, StatusCode::OK);
}

#[tokio::test]
async fn text_that_cannot_fit_is_refused_without_reading_it() {
    let service = Service::start().await;
    // The longest token, `<|start|>`, has 9 bytes and the context 64 tokens; text may be four times as long.
    let (most, chat) =
        ("a".repeat(4 * 9 * 64), |content: &str| json!({"messages": [{"role": "user", "content": content}]}));
    let more = format!("{most}a");
    let words = "more than the limit of 64 tokens can hold";
    service.refused(PATH, &json!({"prompt": more}), (400, Some("prompt")), words).await;
    service.refused(PATH, &json!({"prompt": ["a", more]}), (400, Some("prompt")), words).await;
    service.refused("/tokenize", &json!({"prompt": more}), (400, Some("prompt")), words).await;
    service.refused("/tokenize", &chat(&more), (400, Some("messages")), words).await;
    service.refused("/v1/chat/completions", &chat(&more), (400, Some("messages")), words).await;
    // What could fit is read, and counted where it does not.
    service.refused(PATH, &json!({"prompt": most}), (400, Some("prompt")), "has 2305 tokens").await;
    assert_eq!(service.post("/tokenize", &json!({"prompt": most})).await.json()["count"], 2305);
}

#[tokio::test]
async fn too_many_prompts_are_refused_before_anything_is_done_for_them() {
    let service = Service::start().await;
    // Looking up the adapter would be a 404.
    let many = json!({"model": "nobody", "prompt": vec!["a"; 65], "n": 2});
    service.refused(PATH, &many, (400, Some("n")), "asks for 130 answers, the limit is 128").await;
    let many = json!({"model": "nobody", "messages": [{"role": "user", "content": "a"}], "n": 129});
    let reply = service.post("/v1/chat/completions", &many).await;
    assert_eq!((reply.status.as_u16(), &reply.json()["error"]["param"]), (400, &json!("n")), "{}", reply.text());
}

#[tokio::test]
async fn text_beyond_what_may_run_and_wait_is_answered_429() {
    let mut service = Service::start().await;
    service.state.encodings = Arc::new(Admission::new(1, 1));
    service.router = router(service.state.clone());
    let running = service.state.encodings.admit().await.unwrap();
    let bodies = [
        (PATH, short()),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "a"}]})),
        ("/tokenize", json!({"prompt": "a"})),
        ("/detokenize", json!({"tokens": [97]})),
    ];
    {
        let mut waiting = std::pin::pin!(service.call(post(PATH, short().to_string())));
        // It has its place once another is turned away.
        loop {
            assert!(futures::poll!(&mut waiting).is_pending());
            match service.state.encodings.admit().now_or_never() {
                Some(Err(_)) => break,
                _ => tokio::task::yield_now().await,
            }
        }
        for (path, body) in &bodies {
            let reply = service.post(path, body).await;
            assert_eq!(reply.status, StatusCode::TOO_MANY_REQUESTS, "{path}");
            assert_eq!(reply.headers["retry-after"], "1");
            assert_eq!(reply.json()["error"]["type"], "RateLimitError");
        }
    }
    // The one that waited has left, and the one that ran ends.
    drop(running);
    for (path, body) in &bodies {
        assert_eq!(service.post(path, body).await.status, StatusCode::OK, "{path}");
    }
    // An answer may be there before the engine has done with it.
    until(|| service.state.engine.in_flight() == 0).await;
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_sequence() {
    let service = Service::start().await;
    let body = json!({"prompt": "a", "max_tokens": 50, "ignore_eos": true, "stream": true});
    let response = service.send(post(PATH, body.to_string())).await;
    let mut body = response.into_body().into_data_stream();
    assert!(body.next().await.unwrap().unwrap().starts_with(b"data: {"));
    drop(body);
    until(|| service.state.engine.in_flight() == 0).await;
    // And before any answer: the request's future is dropped.
    service.gate.set_closed(true);
    {
        let mut waiting = std::pin::pin!(service.call(post(PATH, short().to_string())));
        while service.state.engine.in_flight() == 0 {
            assert!(futures::poll!(&mut waiting).is_pending());
            tokio::task::yield_now().await;
        }
    }
    service.gate.set_closed(false);
    until(|| service.state.engine.in_flight() == 0).await;
}

#[tokio::test]
async fn a_failing_model_harms_only_the_requests_it_fails() {
    let service = Service::start().await;
    let reply = service.post(PATH, &json!({"prompt": [PANIC], "max_tokens": 2})).await;
    assert_eq!(reply.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(reply.json()["error"]["type"], "InternalServerError");
    // In a stream the status is sent already, so the error is an event.
    let reply = service.post(PATH, &json!({"prompt": [PANIC], "stream": true})).await;
    assert_eq!(reply.status, StatusCode::OK);
    let events = reply.events();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["error"]["code"], 500);
    assert_eq!(service.ok(PATH, &short()).await["choices"][0]["text"], "bc");
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_ended() {
    let service = Service::with_config(ServerConfig { request_timeout_s: 0, ..ServerConfig::default() }).await;
    service.gate.set_closed(true);
    let reply = service.post(PATH, &short()).await;
    assert_eq!(reply.status, StatusCode::REQUEST_TIMEOUT);
    assert!(reply.text().contains("server.request_timeout_s"));
    service.gate.set_closed(false);
    until(|| service.state.engine.in_flight() == 0).await;
}

#[tokio::test]
async fn request_ids_go_in_and_out() {
    let service = Service::start().await;
    let send = async |id: Option<&str>| {
        let mut request = post(PATH, short().to_string());
        if let Some(id) = id {
            request.headers_mut().insert("x-request-id", id.parse().unwrap());
        }
        let reply = service.call(request).await;
        (reply.headers["x-request-id"].to_str().unwrap().to_owned(), reply.json()["id"].as_str().unwrap().to_owned())
    };
    assert_eq!(send(Some("my-id.1")).await, ("my-id.1".to_owned(), "cmpl-my-id.1".to_owned()));
    let long = "x".repeat(129);
    for given in [None, Some("has space"), Some(long.as_str())] {
        let (id, answer_id) = send(given).await;
        assert_eq!(id.len(), 32);
        assert_eq!(answer_id, format!("cmpl-{id}"));
    }
    assert_ne!(send(None).await.0, send(None).await.0);
    assert!(service.get("/nothing").await.headers.contains_key("x-request-id"));
}

#[tokio::test]
async fn requests_are_counted_by_route_and_status() {
    let service = Service::start().await;
    service.post(PATH, &short()).await;
    service.post(PATH, &json!({})).await;
    service.get("/v1/models/skip").await;
    service.get("/some/secret/path").await;
    let metrics = service.get("/metrics").await;
    assert!(metrics.headers["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"));
    let metrics = metrics.text();
    for (route, status) in [(PATH, 200), (PATH, 400), ("/v1/models/{*id}", 200), ("unmatched", 404)] {
        let line = format!("patchbay_http_requests_total{{route=\"{route}\",status=\"{status}\"}} 1");
        assert!(metrics.contains(&line), "{line}\n{metrics}");
    }
    assert!(metrics.contains("patchbay_adapter_requests_total{adapter=\"base\"} 1"), "{metrics}");
    assert!(!metrics.contains("secret"));
}

#[tokio::test]
async fn streams_are_not_held_back() {
    let service = Service::start().await;
    let body = json!({"prompt": "a", "max_tokens": 2, "stream": true});
    let response = service.send(post(PATH, body.to_string())).await;
    assert_eq!(response.headers()["cache-control"], "no-cache");
    assert_eq!(response.headers()["x-accel-buffering"], "no");
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert!(body.ends_with(b"data: [DONE]\n\n"));
}
