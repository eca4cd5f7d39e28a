//! Several adapters in one request, and one made of several, through the router.

use axum::http::{Request, StatusCode};
use patchbay::adapter::AdapterFiles;
use patchbay::model::GenerationDefaults;
use patchbay::server::ServerConfig;
use serde_json::{Value as Json, json};

use crate::http_support::{Service, post};
use crate::store_support::{adapter, open, plain, value, virtual_tokens, write_directory};

const COMPLETIONS: &str = "/v1/completions";

/// A service with the adapters `a`, `b` and `lead`, beside `skip` and `broken`.
async fn service() -> Service {
    let service = Service::start().await;
    for (name, files) in [("a", adapter(2.0)), ("b", adapter(3.0)), ("lead", virtual_tokens(2))] {
        service.state.store.publish(name, files, &plain()).await.unwrap();
    }
    service
}

/// A request for three tokens behind `a`: the base says `bcd`, any adapter `ceg`.
fn request(selection: &Json) -> Json {
    let mut request = json!({"prompt": "a", "max_tokens": 3});
    request.as_object_mut().unwrap().extend(selection.as_object().unwrap().clone());
    request
}

async fn text(service: &Service, selection: &Json) -> Json {
    service.ok(COMPLETIONS, &request(selection)).await["choices"][0]["text"].clone()
}

#[tokio::test]
async fn adapters_act_together_in_every_dialect() {
    let service = service().await;
    let ids = service.get("/lora-adapters").await.json();
    let id = |name: &str| {
        let entry = ids.as_array().unwrap().iter().find(|entry| entry["path"] == name).unwrap();
        assert_eq!(entry["scale"], 0.0, "nothing acts that is not named");
        entry["id"].clone()
    };
    for selection in [
        json!({"adapter": {"name": "a", "scale": 0.5}}),
        json!({"model": "a", "adapter": {"scale": 0.5}}),
        json!({"adapter": [{"name": "a", "scale": 0.7}, {"name": "b", "scale": 0.3}]}),
        json!({"model": "base", "adapter": ["a", "b@1"]}),
        json!({"adapter": ["lead", {"name": "a", "scale": 2}]}),
        json!({"lora": [{"id": id("a"), "scale": 0.5}, {"id": id("b"), "scale": 0}, {"name": "skip", "scale": 1}]}),
        json!({"merged_adapters": {"ids": ["a", "b"], "weights": [0.5, 0.5], "merge_strategy": "linear"}}),
    ] {
        assert_eq!(text(&service, &selection).await, "ceg", "{selection}");
    }
    let shown = service.ok(COMPLETIONS, &request(&json!({"adapter": ["a", {"name": "b", "scale": 0.5}]}))).await;
    assert_eq!(shown["model"], "a*1+b*0.5");
    for selection in [json!({"lora": []}), json!({"lora": [{"id": 0, "scale": 0}]}), json!({"adapter": []})] {
        assert_eq!(text(&service, &selection).await, "bcd", "{selection}");
    }
    let chat = json!({"messages": [{"role": "user", "content": "a"}], "adapter": ["a", "b"], "max_tokens": 1});
    service.ok("/v1/chat/completions", &chat).await;
    service.ok("/tokenize", &json!({"prompt": "a", "adapter": ["a", "b"]})).await;
}

#[tokio::test]
async fn what_cannot_act_together_is_refused_by_field() {
    let service = service().await;
    let check = async |selection: Json, refusal: (u16, Option<&str>), words: &str| {
        service.refused(COMPLETIONS, &request(&selection), refusal, words).await;
    };
    check(json!({"adapter": ["a", "nobody"]}), (404, Some("model")), "`nobody`").await;
    check(json!({"adapter": [{"name": "nobody", "scale": 0}]}), (404, Some("model")), "`nobody`").await;
    check(json!({"lora": [{"id": 99, "scale": 1}]}), (404, Some("lora")), "99").await;
    check(json!({"adapter": ["a", {"name": "b", "scale": 1e30}]}), (400, Some("adapter[1].scale")), "100").await;
    check(json!({"model": "a", "adapter": ["a", "b"]}), (400, Some("adapter")), "different adapters").await;
    check(json!({"adapter": ["lead", "a", "broken"]}), (400, Some("adapter")), "header too large").await;
    check(json!({"adapter": {"name": "lead", "scale": 0.5}}), (400, Some("adapter")), "`lead`").await;
    check(json!({"adapter": ["a", "b", {"name": "a", "scale": 2}]}), (400, Some("adapter")), "`a` is named twice")
        .await;
    check(json!({"adapter": ["a", "a@1"]}), (400, Some("adapter")), "named twice").await;
    let many: Vec<String> = (1..10).map(|generation| format!("a@{generation}")).collect();
    check(json!({"adapter": many}), (400, Some("adapter")), "adapters.composition_parts_max").await;
    let ties = json!({"ids": ["a"], "weights": [1], "merge_strategy": "ties"});
    check(json!({"merged_adapters": ties}), (400, Some("merged_adapters.merge_strategy")), ":combine").await;
    let malformed = r#"{"prompt": "a", "adapter": {"name": "a", "scale": NaN}}"#;
    assert_eq!(service.call(post(COMPLETIONS, malformed)).await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_composition_is_kept_until_a_part_is_replaced() {
    let service = service().await;
    let store = &service.state.store;
    let parts = [("a".to_owned(), 0.5), ("b".to_owned(), 1.0)];
    let compose = async || store.compose(&parts).await.unwrap().unwrap();
    let first = compose().await;
    assert!(std::sync::Arc::ptr_eq(&first, &compose().await));
    let other = store.compose(&[parts[1].clone(), parts[0].clone()]).await.unwrap().unwrap();
    assert_ne!(first.digest, other.digest, "the order counts");
    let stronger = store.compose(&[("a".to_owned(), 0.6), parts[1].clone()]).await.unwrap().unwrap();
    assert_ne!(first.digest, stronger.digest);
    drop((other, stronger));
    assert_eq!(store.status("a").await.unwrap().leases, 1);
    store.publish("a", adapter(5.0), &plain()).await.unwrap();
    let second = compose().await;
    assert_ne!(first.digest, second.digest);
    let names: Vec<_> = second.sources().map(|part| (part.name.as_str(), part.generation)).collect();
    assert_eq!(names, [("a", 2), ("b", 1)]);
    drop((first, second));
    assert_eq!(store.status("a").await.unwrap().leases, 0, "what is only kept is not in use");
    store.remove("b").await.unwrap();
    assert!(store.compose(&parts).await.is_err());
}

#[tokio::test]
async fn a_composition_counts_under_each_of_its_adapters() {
    let service = service().await;
    text(&service, &json!({"adapter": ["a", {"name": "b", "scale": 0.5}]})).await;
    text(&service, &json!({"model": "a"})).await;
    let metrics = service.get("/metrics").await.text();
    for line in [
        r#"patchbay_adapter_requests_total{adapter="a"} 2"#,
        r#"patchbay_adapter_requests_total{adapter="b"} 1"#,
        r#"patchbay_adapter_generation_tokens_total{adapter="b"} 3"#,
        r#"patchbay_adapter_time_to_first_token_seconds_count{adapter="b"} 1"#,
    ] {
        assert!(metrics.contains(line), "{line}");
    }
    assert!(!metrics.contains('*'), "no series is named after a composition");
}

#[tokio::test]
async fn numbers_of_adapters_stay_with_their_names() {
    let service = Service::start().await;
    let ids = async || {
        let list = service.get("/lora-adapters").await.json();
        let entries = list.as_array().unwrap().iter();
        entries.map(|entry| (entry["id"].as_u64().unwrap(), entry["path"].clone())).collect::<Vec<_>>()
    };
    let before = ids().await;
    assert_eq!(before, [(0, json!("broken")), (1, json!("skip"))]);
    service.state.store.publish("a", adapter(1.0), &plain()).await.unwrap();
    assert_eq!(ids().await, [(0, json!("broken")), (1, json!("skip")), (2, json!("a"))]);
    service.state.store.remove("broken").await.unwrap();
    assert_eq!(ids().await, [(1, json!("skip")), (2, json!("a"))]);
}

#[tokio::test]
async fn adapters_have_no_strength_for_all_requests() {
    let service = service().await;
    let set = async |body: Json| service.post("/lora-adapters", &body).await;
    for nothing in [json!([]), json!([{"id": 0, "scale": 0}, {"id": 1, "scale": 0.0}])] {
        let reply = set(nothing).await;
        assert_eq!((reply.status, reply.json()), (StatusCode::OK, json!({"success": true})));
    }
    let reply = set(json!([{"id": 0, "scale": 0}, {"id": 1, "scale": 0.5}])).await;
    assert_eq!(reply.status, StatusCode::BAD_REQUEST);
    let error = reply.json()["error"].clone();
    assert_eq!(error["param"], "[1].scale");
    assert!(error["message"].as_str().unwrap().contains(r#""lora": [{"id": 1, "scale": 0.5}]"#), "{error}");
    assert_eq!(set(json!({"id": 0})).await.status, StatusCode::BAD_REQUEST);
    assert_eq!(text(&service, &json!({})).await, "bcd");
}

// Combining

async fn combine(service: &Service, name: &str, body: &Json) -> crate::http_support::Reply {
    service.post(&format!("/v1/adapters/{name}:combine"), body).await
}

#[tokio::test]
async fn adapters_are_combined_to_a_new_generation_that_survives() {
    let service = service().await;
    let body = json!({"mode": "stack", "adapters": [{"name": "a", "weight": 0.5}, {"name": "b@1", "weight": -1}]});
    let reply = combine(&service, "both", &body).await;
    assert_eq!(reply.status, StatusCode::CREATED, "{}", reply.text());
    let status = reply.json();
    assert_eq!((&status["generation"], &status["report"]["ranks"]), (&json!(1), &json!([2])));
    assert_eq!(text(&service, &json!({"model": "both"})).await, "ceg");
    // A part may be the name itself: the new generation is made of the one before.
    let body = json!({"mode": "mean", "adapters": [{"name": "a"}, {"name": "b"}], "merge": true});
    assert_eq!(combine(&service, "a", &body).await.json()["generation"], 2);
    let expected = json!({"mode": "mean", "adapters": [{"name": "b"}], "expected_generation": 7});
    assert_eq!(combine(&service, "a", &expected).await.status, StatusCode::CONFLICT);

    let again = open(service.root()).await;
    let combined = again.store.resolve("a").await.unwrap();
    // b (2 and 3 on ones of rank 1): ((2 + 3) / 2) * 1, in a dense weight.
    assert_eq!((combined.generation, value(&combined)), (2, 2.5));
    assert_eq!(again.store.resolve("both").await.unwrap().digest.len(), 32);
}

#[tokio::test]
async fn what_cannot_be_combined_is_refused_by_field() {
    let service = service().await;
    let check = async |name: &str, body: Json, refusal: (u16, Option<&str>), words: &str| {
        service.refused(&format!("/v1/adapters/{name}:combine"), &body, refusal, words).await;
    };
    let both = json!([{"name": "a"}, {"name": "b"}]);
    check("c", json!({"mode": "ties", "adapters": both}), (400, Some("density")), "is missing").await;
    check("c", json!({"mode": "mean", "rank": 3, "adapters": both}), (400, Some("rank")), "stack").await;
    check("c", json!({"mode": "svd", "adapters": both}), (400, Some("mode")), "stack").await;
    check("c", json!({"mode": "mean", "adapters": []}), (400, Some("adapters")), "found 0").await;
    let typo = json!({"mode": "mean", "adapters": [{"name": "a", "scale": 1}]});
    check("c", typo, (400, Some("adapters[0].scale")), "scale").await;
    check("c", json!({"mode": "mean", "adapters": [{"name": "nobody"}]}), (404, None), "`nobody`").await;
    let lead = json!([{"name": "a"}, {"name": "lead"}]);
    check("c", json!({"mode": "mean", "adapters": lead}), (400, None), "adapter `lead`: ").await;
    check("base", json!({"mode": "mean", "adapters": both}), (400, Some("name")), "base model").await;
    check("c%20d", json!({"mode": "mean", "adapters": both}), (400, Some("name")), "not an adapter name").await;
    assert_eq!(service.get("/v1/adapters/c").await.status, StatusCode::NOT_FOUND, "nothing was left behind");
}

#[tokio::test]
async fn combining_needs_the_admin_key() {
    let config = ServerConfig { admin_key: Some("the-admin-key".to_owned()), ..ServerConfig::default() };
    let service = Service::with_config(config).await;
    let body = json!({"mode": "stack", "adapters": [{"name": "skip"}]});
    assert_eq!(combine(&service, "c", &body).await.status, StatusCode::UNAUTHORIZED);
    let request = Request::post("/v1/adapters/c:combine").header("content-type", "application/json");
    let request = request.header("authorization", "Bearer the-admin-key").body(body.to_string().into()).unwrap();
    assert_eq!(service.call(request).await.status, StatusCode::CREATED);
}

#[tokio::test]
async fn what_is_combined_is_within_the_bound_on_uploads() {
    let sizes = |files: &AdapterFiles| files.config.len() + files.weights.len();
    let limit = sizes(&adapter(1.0)) + 10;
    let service = Service::with_store(ServerConfig::default(), GenerationDefaults::default(), |config| {
        config.upload_bytes_max = limit;
        write_directory(&config.root.join("a"), &adapter(1.0));
        write_directory(&config.root.join("b"), &adapter(2.0));
    })
    .await;
    let body = json!({"mode": "mean", "adapters": [{"name": "a"}, {"name": "b"}]});
    let reply = combine(&service, "c", &body).await;
    assert_eq!(reply.status, StatusCode::PAYLOAD_TOO_LARGE, "{}", reply.text());
}
