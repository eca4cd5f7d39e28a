//! The adapter routes, native and vLLM's, through the router.

use std::io::Write;

use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use flate2::Compression;
use flate2::write::GzEncoder;
use patchbay::adapter::AdapterFiles;
use patchbay::model::GenerationDefaults;
use patchbay::server::ServerConfig;
use patchbay::store::StoreConfig;
use proptest::prelude::*;
use serde_json::{Value as Json, json};
use tar::{Builder, EntryType, Header};

use crate::http_support::{CONTEXT, Reply, Service, post};
use crate::store_support::{adapter, files_below, mixture, virtual_tokens, write_directory};

const BOUNDARY: &str = "frontier";
const MULTIPART: &str = "multipart/form-data; boundary=frontier";
const TAR: &str = "application/x-tar";
const GZIP: &str = "application/gzip";

fn part(disposition: &str, content: &[u8]) -> Vec<u8> {
    let head = format!("--{BOUNDARY}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n");
    [head.as_bytes(), content, b"\r\n"].concat()
}

fn multipart(parts: &[Vec<u8>]) -> Vec<u8> {
    [parts.concat(), format!("--{BOUNDARY}--\r\n").into_bytes()].concat()
}

fn multipart_of(files: &AdapterFiles) -> Vec<u8> {
    multipart(&[
        part(r#"name="file"; filename="adapter_config.json""#, &files.config),
        part(r#"name="file"; filename="README.md""#, b"not kept"),
        part(r#"name="adapter_model.safetensors""#, &files.weights),
    ])
}

/// Every file with its path in the directory.
fn named(files: &AdapterFiles) -> Vec<(String, &[u8])> {
    let parts = files.parts.iter().enumerate().map(|(number, part)| (format!("{number}/"), part));
    let dirs = [(String::new(), files)].into_iter().chain(parts);
    dirs.flat_map(|(dir, files)| {
        [("adapter_config.json", &files.config), ("adapter_model.safetensors", &files.weights)]
            .map(|(name, content)| (format!("{dir}{name}"), &**content))
    })
    .collect()
}

fn tar_of(files: &AdapterFiles) -> Vec<u8> {
    tar_with(files, "adapter_model.safetensors")
}

fn tar_with(files: &AdapterFiles, weights_file: &str) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (name, content) in [("adapter_config.json", &files.config), (weights_file, &files.weights)] {
        let mut header = Header::new_gnu();
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, format!("out/{name}"), &**content).unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

async fn upload(service: &Service, path: &str, content_type: &str, body: Vec<u8>) -> Reply {
    let request = Request::put(format!("/v1/adapters/{path}")).header("content-type", content_type);
    service.call(request.body(body.into()).unwrap()).await
}

async fn delete(service: &Service, name: &str) -> Reply {
    service.call(Request::delete(format!("/v1/adapters/{name}")).body(Body::empty()).unwrap()).await
}

/// The answer of the model to `a`: `bcd` from the base, `ceg` with an adapter.
async fn completion(service: &Service, model: &str) -> Reply {
    service.post("/v1/completions", &json!({"model": model, "prompt": "a", "max_tokens": 3})).await
}

#[track_caller]
fn check_error(reply: &Reply, (status, kind, param): (u16, &str, Option<&str>), words: &str) {
    let error = &reply.json()["error"];
    assert_eq!(reply.status.as_u16(), status, "{}", reply.text());
    let found = (error["code"].as_u64(), error["type"].as_str(), error["param"].as_str());
    assert_eq!(found, (Some(u64::from(status)), Some(kind), param), "{}", reply.text());
    assert!(error["message"].as_str().unwrap().contains(words), "{}", reply.text());
}

async fn with_store(adjust: impl FnOnce(&mut StoreConfig)) -> Service {
    Service::with_store(ServerConfig::default(), GenerationDefaults::default(), adjust).await
}

// Native routes

#[tokio::test]
async fn an_uploaded_adapter_answers_at_once() {
    let service = Service::start().await;
    assert_eq!(completion(&service, "new").await.status, StatusCode::NOT_FOUND);
    let reply = upload(&service, "new", MULTIPART, multipart_of(&adapter(1.0))).await;
    assert_eq!(reply.status, StatusCode::CREATED, "{}", reply.text());
    let mut status = reply.json();
    assert_eq!(status["digest"].as_str().unwrap().len(), 64);
    assert!(status["created"].as_u64().unwrap() > 1_700_000_000);
    assert!(status["load_ms"].as_f64().unwrap() > 0.0);
    for field in ["digest", "created", "load_ms"] {
        status.as_object_mut().unwrap().shift_remove(field);
    }
    assert_eq!(
        status,
        json!({"name": "new", "generation": 1, "merge": false, "loaded": true, "leases": 0, "report": {
            "kind": "LORA", "merged": false, "modules": 1, "leading_tokens": 0, "ranks": [1], "bytes": 32,
            "own_weight_bytes": 0, "warnings": []}})
    );
    let answer = completion(&service, "new").await.json();
    assert_eq!(answer["choices"][0]["text"], "ceg");
}

#[tokio::test]
async fn sub_directories_come_along_in_every_form() {
    let service = Service::start().await;
    let mixture = mixture(2.0);
    let parts = |files: &[(String, &[u8])]| {
        let by_name = |(name, content): &(String, &[u8])| part(&format!(r#"name="{name}""#), content);
        let by_file = |(name, content): &(String, &[u8])| part(&format!(r#"name="f"; filename="{name}""#), content);
        let half = files.len() / 2;
        multipart(
            &[files[..half].iter().map(by_name).collect(), files[half..].iter().map(by_file).collect::<Vec<_>>()]
                .concat(),
        )
    };
    let mut builder = Builder::new(Vec::new());
    for (name, content) in named(&mixture) {
        let mut header = Header::new_gnu();
        header.set_size(content.len() as u64);
        builder.append_data(&mut header, format!("out/{name}"), content).unwrap();
    }
    let archive = builder.into_inner().unwrap();
    let mut digests = Vec::new();
    for (name, kind, body) in [
        ("parts", MULTIPART, parts(&named(&mixture))),
        ("archive", TAR, archive.clone()),
        ("packed", GZIP, gzip(&archive)),
    ] {
        let reply = upload(&service, name, kind, body).await;
        assert_eq!(reply.status, StatusCode::CREATED, "{name}: {}", reply.text());
        assert_eq!(reply.json()["report"]["kind"], "XLORA");
        digests.push(reply.json()["digest"].as_str().unwrap().to_owned());
        assert_eq!(completion(&service, name).await.status, StatusCode::OK, "{name}");
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
    let reply = upload(&service, "short", MULTIPART, parts(&named(&mixture)[..4])).await;
    check_error(&reply, (400, "BadRequestError", None), "1/adapter_config.json");
}

#[tokio::test]
async fn weights_may_have_the_name_of_adapterhub() {
    const NAME: &str = "adapter.safetensors";
    let service = Service::start().await;
    let files = adapter(1.0);
    let parts = [
        part(r#"name="adapter_config.json""#, &files.config),
        part(r#"name="file"; filename="adapter.safetensors""#, &files.weights),
    ];
    for (name, kind, body) in [
        ("parts", MULTIPART, multipart(&parts)),
        ("archive", TAR, tar_with(&files, NAME)),
        ("packed", GZIP, gzip(&tar_with(&files, NAME))),
    ] {
        let reply = upload(&service, name, kind, body).await;
        assert_eq!(reply.status, StatusCode::CREATED, "{name}: {}", reply.text());
        assert_eq!(completion(&service, name).await.json()["choices"][0]["text"], "ceg", "{name}");
    }
    let doubled = multipart(&[parts[0].clone(), parts[1].clone(), parts[1].clone()]);
    check_error(&upload(&service, "doubled", MULTIPART, doubled).await, (400, "BadRequestError", None), "twice");
}

#[tokio::test]
async fn virtual_tokens_take_context_and_show_nowhere() {
    let service = Service::start().await;
    let reply = upload(&service, "leading", MULTIPART, multipart_of(&virtual_tokens(20))).await;
    assert_eq!(reply.json()["report"]["leading_tokens"], 20, "{}", reply.text());
    let request = |len: usize| json!({"model": "leading", "prompt": vec![97; len]});
    let answer = service.ok("/v1/completions", &request(CONTEXT - 21)).await;
    assert_eq!(answer["usage"]["prompt_tokens"], CONTEXT - 21);
    assert_eq!(answer["usage"]["completion_tokens"], 1, "the default gives way to what is left");
    let limit = format!("the limit is {}", CONTEXT - 21);
    service.refused("/v1/completions", &request(CONTEXT - 20), (400, Some("prompt")), &limit).await;
    let mut echo = request(3);
    echo["max_tokens"] = json!(2);
    echo["echo"] = json!(true);
    echo["logprobs"] = json!(0);
    let answer = service.ok("/v1/completions", &echo).await;
    assert_eq!(answer["choices"][0]["text"], "aaace");
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"], json!(["a", "a", "a", "c", "e"]));
    assert_eq!(answer["choices"][0]["logprobs"]["token_logprobs"][0], Json::Null);
}

#[tokio::test]
async fn every_form_of_upload_is_understood() {
    let service = Service::start().await;
    let archive = tar_of(&adapter(1.0));
    let mut digests = Vec::new();
    for (name, content_type, body) in [
        ("multipart", MULTIPART, multipart_of(&adapter(1.0))),
        ("tar", TAR, archive.clone()),
        ("gzip", GZIP, gzip(&archive)),
        ("x-gzip", "Application/X-GZip; x=y", gzip(&archive)),
        ("bytes", "application/octet-stream", gzip(&archive)),
    ] {
        let reply = upload(&service, name, content_type, body).await;
        assert_eq!(reply.status, StatusCode::CREATED, "{name}: {}", reply.text());
        digests.push(reply.json()["digest"].clone());
    }
    let untyped = Request::put("/v1/adapters/untyped").body(archive.into()).unwrap();
    digests.push(service.call(untyped).await.json()["digest"].clone());
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
}

#[tokio::test]
async fn adapters_are_listed_shown_replaced_and_removed() {
    let service = Service::start().await;
    assert_eq!(upload(&service, "a", TAR, tar_of(&adapter(1.0))).await.status, StatusCode::CREATED);
    let replaced = upload(&service, "a", TAR, tar_of(&adapter(2.0))).await;
    assert_eq!((replaced.status, &replaced.json()["generation"]), (StatusCode::OK, &json!(2)));
    assert_eq!(service.get("/v1/adapters/a").await.json(), replaced.json());
    let list = service.get("/v1/adapters").await.json();
    let names: Vec<&Json> = list["data"].as_array().unwrap().iter().map(|adapter| &adapter["name"]).collect();
    assert_eq!((&list["object"], names), (&json!("list"), vec![&json!("a"), &json!("broken"), &json!("skip")]));
    let removed = delete(&service, "a").await;
    assert_eq!((removed.status, removed.json()), (StatusCode::OK, json!({"name": "a", "removed": true})));
    check_error(&delete(&service, "a").await, (404, "NotFoundError", None), "`a` does not exist");
    check_error(&service.get("/v1/adapters/a").await, (404, "NotFoundError", None), "`a` does not exist");
    check_error(&completion(&service, "a").await, (404, "NotFoundError", Some("model")), "`a`");
    assert_eq!(upload(&service, "a", TAR, tar_of(&adapter(1.0))).await.status, StatusCode::CREATED);
    // A plain directory is replaced, not created.
    let over = upload(&service, "skip", TAR, tar_of(&adapter(1.0))).await;
    assert_eq!((over.status, &over.json()["generation"]), (StatusCode::OK, &json!(2)));
}

#[tokio::test]
async fn a_generation_is_described_by_its_number() {
    let service = Service::start().await;
    for generation in [1, 2] {
        let reply = upload(&service, "a", TAR, tar_of(&adapter(generation as f32))).await;
        assert_eq!(reply.json()["generation"], generation);
    }
    for (id, generation) in [("a", 2), ("a@2", 2), ("a@1", 1), ("base:a@1", 1)] {
        let entry = service.get(&format!("/v1/models/{id}")).await.json();
        assert_eq!((&entry["id"], &entry["adapter_generation"]), (&json!("a"), &json!(generation)), "{id}");
    }
    check_error(&service.get("/v1/models/a@3").await, (404, "NotFoundError", Some("model")), "`a@3` does not exist");
    delete(&service, "a").await;
    check_error(&service.get("/v1/models/a@1").await, (404, "NotFoundError", Some("model")), "`a@1` does not exist");
}

#[tokio::test]
async fn options_come_in_the_query() {
    let service = Service::start().await;
    let merged = upload(&service, "a?merge=true", TAR, tar_of(&adapter(1.0))).await.json();
    assert_eq!((&merged["merge"], &merged["report"]["own_weight_bytes"]), (&json!(true), &json!(64)));
    let guarded = upload(&service, "a?expected_generation=1", TAR, tar_of(&adapter(2.0))).await;
    assert_eq!(guarded.json()["generation"], 2);
    let late = upload(&service, "a?expected_generation=1", TAR, tar_of(&adapter(3.0))).await;
    check_error(&late, (409, "ConflictError", Some("expected_generation")), "at generation 2, expected 1");
    for query in ["expected_generaton=1", "merge=perhaps", "expected_generation=-1"] {
        let reply = upload(&service, &format!("a?{query}"), TAR, tar_of(&adapter(3.0))).await;
        check_error(&reply, (400, "BadRequestError", None), "");
    }
    assert_eq!(service.get("/v1/adapters/a").await.json()["generation"], 2);
}

#[tokio::test]
async fn a_directory_inside_the_roots_is_loaded_by_path() {
    let extra = tempfile::tempdir().unwrap();
    write_directory(&extra.path().join("trained"), &adapter(1.0));
    let service = with_store(|config| config.extra_roots = vec![extra.path().to_owned()]).await;
    let load = async |name: &str, body: Json| service.post(&format!("/v1/adapters/{name}"), &body).await;
    let reply = load("a", json!({"path": extra.path().join("trained")})).await;
    assert_eq!((reply.status, &reply.json()["generation"]), (StatusCode::CREATED, &json!(1)));
    let reply = load("a", json!({"path": "skip", "merge": true, "expected_generation": 1})).await;
    assert_eq!((reply.status, &reply.json()["merge"]), (StatusCode::OK, &json!(true)));

    let bad = |param| (400, "BadRequestError", param);
    check_error(&load("a", json!({"path": "/etc"})).await, bad(Some("path")), "not inside");
    check_error(&load("a", json!({"path": "../x"})).await, bad(Some("path")), "not inside");
    check_error(&load("a", json!({"path": "absent"})).await, (404, "NotFoundError", Some("path")), "does not exist");
    check_error(&load("a", json!({"path": "x", "merged": true})).await, bad(None), "merged");
    check_error(&load("a", json!({"merge": true})).await, bad(None), "path");
    check_error(&load("a", json!({"path": 7})).await, bad(None), "path");
    check_error(
        &load("a", json!({"path": "skip", "expected_generation": 7})).await,
        (409, "ConflictError", Some("expected_generation")),
        "expected 7",
    );
    check_error(&load("a", json!({"path": "broken"})).await, bad(None), "adapter_model.safetensors");
    check_error(&service.call(post("/v1/adapters/a", "{")).await, bad(None), "EOF");
    let untyped = Request::post("/v1/adapters/a").body(Body::from("{}")).unwrap();
    check_error(&service.call(untyped).await, bad(None), "application/json");
}

#[tokio::test]
async fn uploads_have_their_own_limit_and_other_bodies_the_usual_one() {
    let config = ServerConfig { body_bytes_max: 100, ..ServerConfig::default() };
    let service = Service::with_config(config).await;
    let archive = tar_of(&adapter(1.0));
    assert!(archive.len() > 100);
    assert_eq!(upload(&service, "a", TAR, archive).await.status, StatusCode::CREATED);
    let large = json!({"path": "x".repeat(100)}).to_string();
    for path in ["/v1/adapters/a", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"] {
        let reply = service.call(post(path, large.clone())).await;
        check_error(&reply, (413, "PayloadTooLargeError", None), "server.body_bytes_max");
    }
}

/// A member with its path written as it is, which `tar` itself would refuse to do.
fn hostile_tar(path: &str, kind: EntryType, size: u64) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_cksum();
    [header.as_bytes().as_slice(), &[0; 1024]].concat()
}

#[tokio::test]
async fn malformed_uploads_are_refused_and_leave_nothing() {
    const LIMIT: usize = 2000;
    let service = with_store(|config| config.upload_bytes_max = LIMIT).await;
    let before = files_below(service.root());
    let good = adapter(1.0);
    let config = part(r#"name="adapter_config.json""#, &good.config);
    let weights = part(r#"name="adapter_model.safetensors""#, &good.weights);
    let mut wrong = good.clone();
    wrong.weights.truncate(wrong.weights.len() - 1);
    let zeros = AdapterFiles { config: vec![b' '; LIMIT].into(), ..good.clone() };
    let endless_header = [format!("--{BOUNDARY}\r\nX: ").as_bytes(), &vec![b'x'; 6 << 20]].concat();
    let cases: Vec<(&str, Vec<u8>, u16, &str)> = vec![
        (MULTIPART, multipart(std::slice::from_ref(&config)), 400, "no part adapter_model.safetensors"),
        (MULTIPART, multipart(std::slice::from_ref(&weights)), 400, "no part adapter_config.json"),
        (MULTIPART, multipart(&[config.clone(), config.clone()]), 400, "twice"),
        (MULTIPART, multipart(&vec![part(r#"name="x""#, b""); 201]), 400, "more than 200 parts"),
        (MULTIPART, config.clone(), 400, "multipart"),
        (MULTIPART, b"nonsense".to_vec(), 400, "multipart"),
        (MULTIPART, multipart_of(&zeros), 413, "upload_bytes_max"),
        (MULTIPART, endless_header, 413, "upload_bytes_max"),
        ("multipart/form-data", multipart_of(&good), 400, "boundary"),
        (MULTIPART, multipart_of(&wrong), 400, "adapter_model.safetensors"),
        (TAR, b"nonsense".to_vec(), 400, "archive"),
        (TAR, Vec::new(), 400, "adapter_config.json"),
        (TAR, tar_of(&wrong), 400, "adapter_model.safetensors"),
        (TAR, tar_of(&zeros), 413, "upload_bytes_max"),
        (TAR, vec![0; LIMIT + (4 << 20) + 1], 413, "upload_bytes_max"),
        (TAR, hostile_tar("../adapter_config.json", EntryType::Regular, 0), 400, "`..`"),
        (TAR, hostile_tar("/etc/passwd", EntryType::Regular, 0), 400, "absolute"),
        (TAR, hostile_tar("adapter_config.json", EntryType::Symlink, 0), 400, "link"),
        (TAR, hostile_tar("adapter_config.json", EntryType::Regular, 1 << 40), 400, "ends within"),
        (GZIP, gzip(&[0; 1024]), 400, "adapter_config.json"),
        (GZIP, gzip(&tar_of(&good))[..50].to_vec(), 400, "archive"),
        (GZIP, [&gzip(&hostile_tar("x", EntryType::Regular, 8 << 20))[..], &gzip(&vec![0; 8 << 20])].concat(), 413, ""),
        ("text/plain", tar_of(&good), 415, "text/plain"),
    ];
    for (content_type, body, status, words) in cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
        let reply = upload(&service, "a", content_type, body).await;
        assert_eq!(reply.status.as_u16(), status, "{content_type} {shown:?}: {}", reply.text());
        assert!(reply.json()["error"]["message"].as_str().unwrap().contains(words), "{}", reply.text());
    }
    let announced = Request::put("/v1/adapters/a").header("content-type", TAR).header("content-length", "999999999999");
    let reply = service.call(announced.body(Body::empty()).unwrap()).await;
    check_error(&reply, (413, "PayloadTooLargeError", None), "upload_bytes_max");
    assert_eq!(files_below(service.root()), before);
    assert_eq!(service.state.metrics.adapters_loaded_bytes.get(), 0);
}

#[tokio::test]
async fn names_that_cannot_be_are_refused() {
    let service = Service::start().await;
    let before = files_below(service.root());
    let long = "n".repeat(129);
    for (name, words) in [
        ("%2e%2e", "not an adapter name"),
        ("a%2Fb", "not an adapter name"),
        ("..%2F..%2Fetc", "not an adapter name"),
        ("a%00b", "not an adapter name"),
        (".hidden", "not an adapter name"),
        ("a@1", "not an adapter name"),
        (&long, "not an adapter name"),
        ("blobs", "reserved"),
        ("catalog", "reserved"),
        ("base", "base model"),
        ("%ff", "UTF-8"),
    ] {
        let reply = upload(&service, name, TAR, tar_of(&adapter(1.0))).await;
        check_error(&reply, (400, "BadRequestError", Some("name")), words);
        let reply = service.post(&format!("/v1/adapters/{name}"), &json!({"path": "skip"})).await;
        check_error(&reply, (400, "BadRequestError", Some("name")), words);
        for reply in [delete(&service, name).await, service.get(&format!("/v1/adapters/{name}")).await] {
            assert!(matches!(reply.status.as_u16(), 400 | 404), "{name}: {}", reply.text());
        }
    }
    assert_eq!(files_below(service.root()), before);
}

#[tokio::test]
async fn too_many_uploads_are_told_to_come_back() {
    let service = with_store(|config| (config.loads_max, config.load_queue_max) = (1, 0)).await;
    let slot = service.state.store.upload_slot().await.unwrap();
    let reply = upload(&service, "a", TAR, tar_of(&adapter(1.0))).await;
    check_error(&reply, (429, "RateLimitError", None), "too many");
    assert_eq!(reply.headers["retry-after"], "1");
    drop(slot);
    assert_eq!(upload(&service, "a", TAR, tar_of(&adapter(1.0))).await.status, StatusCode::CREATED);
}

#[tokio::test]
async fn storage_failures_tell_clients_nothing() {
    let service = Service::start().await;
    std::fs::create_dir_all(service.root().join("catalog/a")).unwrap();
    std::fs::write(service.root().join("catalog/a/1.json"), r#"{"kind":"split"}"#).unwrap();
    for reply in [
        service.get("/v1/adapters/a").await,
        upload(&service, "a", TAR, tar_of(&adapter(1.0))).await,
        delete(&service, "a").await,
        completion(&service, "a").await,
    ] {
        check_error(&reply, (500, "InternalServerError", None), "adapter storage failed");
        assert!(!reply.text().contains("catalog"), "{}", reply.text());
    }
}

#[tokio::test]
async fn changing_adapters_needs_the_admin_key_and_looking_does_not() {
    let config =
        ServerConfig { api_key: Some("user".into()), admin_key: Some("admin".into()), ..ServerConfig::default() };
    let service = Service::with_config(config).await;
    let call = async |method: &Method, path: &str, key: &str| {
        let request = Request::builder().method(method).uri(path).header("authorization", format!("Bearer {key}"));
        service.call(request.header("content-type", "application/json").body(Body::from("{}")).unwrap()).await.status
    };
    for (method, path) in [
        (Method::PUT, "/v1/adapters/a"),
        (Method::POST, "/v1/adapters/a"),
        (Method::DELETE, "/v1/adapters/a"),
        (Method::POST, "/v1/load_lora_adapter"),
        (Method::POST, "/v1/unload_lora_adapter"),
    ] {
        assert_eq!(call(&method, path, "user").await, StatusCode::FORBIDDEN, "{method} {path}");
        assert_eq!(call(&method, path, "guess").await, StatusCode::UNAUTHORIZED, "{method} {path}");
        let allowed = call(&method, path, "admin").await;
        assert!(matches!(allowed.as_u16(), 400 | 404 | 415), "{method} {path}: {allowed}");
    }
    for path in ["/v1/adapters", "/v1/adapters/skip"] {
        assert_eq!(call(&Method::GET, path, "user").await, StatusCode::OK, "{path}");
    }
}

// vLLM's routes

#[tokio::test]
async fn vllm_controllers_get_the_answers_they_know() {
    let service = Service::start().await;
    write_directory(&service.root().join("sql-v1"), &adapter(1.0));
    let load = async |body: Json| service.post("/v1/load_lora_adapter", &body).await;
    let unload = async |body: Json| service.post("/v1/unload_lora_adapter", &body).await;
    let path = service.root().join("sql-v1");

    let added = load(json!({"lora_name": "sql-v1", "lora_path": path, "is_3d_lora_weight": false})).await;
    assert_eq!(
        (added.status, added.text().as_str()),
        (StatusCode::OK, "Success: LoRA adapter 'sql-v1' added successfully.")
    );
    assert!(added.headers["content-type"].to_str().unwrap().starts_with("text/plain"));
    let invalid = (400, "InvalidUserInput", None);
    check_error(&load(json!({"lora_name": "sql-v1", "lora_path": path})).await, invalid, "already loaded");
    let inplace = load(json!({"lora_name": "sql-v1", "lora_path": "sql-v1", "load_inplace": true})).await;
    assert_eq!(inplace.text(), "Success: LoRA adapter 'sql-v1' added successfully.");
    assert_eq!(completion(&service, "sql-v1").await.json()["choices"][0]["text"], "ceg");

    for body in [
        json!({}),
        json!({"lora_name": "x"}),
        json!({"lora_path": "x"}),
        json!({"lora_name": "", "lora_path": "x"}),
        json!({"lora_name": "x", "lora_path": ""}),
        json!({"lora_name": null, "lora_path": "x"}),
    ] {
        check_error(&load(body).await, invalid, "lora_path");
    }
    check_error(&load(json!({"lora_name": "base", "lora_path": "sql-v1"})).await, invalid, "base model");
    check_error(&load(json!({"lora_name": "a/b", "lora_path": "sql-v1"})).await, invalid, "not an adapter name");
    check_error(&load(json!({"lora_name": "x", "lora_path": "/etc"})).await, invalid, "not inside");
    let not_found = (404, "NotFoundError", None);
    check_error(&load(json!({"lora_name": "x", "lora_path": "org/repo"})).await, not_found, "does not exist");
    let failed = (500, "InternalServerError", None);
    check_error(&load(json!({"lora_name": "x", "lora_path": "broken"})).await, failed, "adapter_model.safetensors");

    let removed = unload(json!({"lora_name": "sql-v1", "lora_int_id": null})).await;
    assert_eq!(
        (removed.status, removed.text().as_str()),
        (StatusCode::OK, "Success: LoRA adapter 'sql-v1' removed successfully.")
    );
    check_error(&unload(json!({"lora_name": "sql-v1"})).await, not_found, "does not exist");
    check_error(&unload(json!({})).await, invalid, "lora_name");
    check_error(&unload(json!({"lora_name": ""})).await, invalid, "lora_name");
    check_error(&completion(&service, "sql-v1").await, (404, "NotFoundError", Some("model")), "sql-v1");

    let untyped = Request::post("/v1/load_lora_adapter").body(Body::from("{}")).unwrap();
    check_error(&service.call(untyped).await, (400, "BadRequestError", None), "application/json");
    check_error(&service.call(post("/v1/load_lora_adapter", "[")).await, (400, "BadRequestError", None), "");
}

// Several at once

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn completions_never_fail_while_their_adapter_is_replaced() {
    let service = Service::start().await;
    assert_eq!(upload(&service, "a", TAR, tar_of(&adapter(1.0))).await.status, StatusCode::CREATED);
    let requests = async {
        for _ in 0..60 {
            let reply = completion(&service, "a").await;
            assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
            assert_eq!(reply.json()["choices"][0]["text"], "ceg");
        }
    };
    let swaps = async {
        for idx in 0..30_u8 {
            let query = if idx % 2 == 0 { "a?merge=true" } else { "a" };
            let reply = upload(&service, query, TAR, tar_of(&adapter(f32::from(idx) + 2.0))).await;
            assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
        }
    };
    futures::join!(requests, swaps);
    let status = service.get("/v1/adapters/a").await.json();
    assert_eq!(status["generation"], 31);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn arbitrary_bodies_are_4xx(
        body in prop::collection::vec(any::<u8>(), 0..600),
        kind in prop::sample::select(vec![MULTIPART, TAR, GZIP, "", "application/json"]),
        framed in any::<bool>(),
    ) {
        let body = if framed { [format!("--{BOUNDARY}\r\n").as_bytes(), &body].concat() } else { body };
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap().block_on(async {
            let service = Service::start().await;
            let reply = upload(&service, "a", kind, body.clone()).await;
            assert!(reply.status.is_client_error(), "{}", reply.text());
            for path in ["/v1/adapters/a", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"] {
                let reply = service.call(post(path, body.clone())).await;
                assert!(reply.status.is_client_error(), "{path}: {}", reply.text());
            }
        });
    }
}
