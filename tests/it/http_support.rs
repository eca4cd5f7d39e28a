//! The HTTP service over a real engine and store with a fake model, asked through the router without a socket.
//!
//! The fake model counts: behind a byte comes the next one, with an adapter the one after that. So `a` goes on as
//! `bcd...` from the base and as `ceg...` from the adapter. Behind `z` comes the end token, behind `=` the bytes of `é`.

#![allow(clippy::unwrap_used, reason = "a test stops at any surprise")]

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderValue, Request, StatusCode};
use candle_core::{DType, Device, Result, Tensor};
use http_body_util::BodyExt;
use patchbay::adapter::{BaseShape, BaseWeights, Formats, LoweredAdapter, Site, SiteId, SiteKind, SiteTable};
use patchbay::engine::{EngineConfig, EngineHandle, Forward, ForwardLimits};
use patchbay::metrics::{Metrics, MetricsConfig};
use patchbay::model::{Batch, DeviceAdapter, GenerationDefaults, RopeLengthRule};
use patchbay::server::{AppState, ServedModel, ServerConfig, router};
use patchbay::store::{Admission, Store, StoreConfig};
use patchbay::text::Text;
use serde_json::{Value as Json, json};
use tempfile::TempDir;
use tower::ServiceExt;

/// Rows of the fake's logits; 256 bytes, two tokens of several bytes, two added ones and some padding.
pub(crate) const VOCAB: usize = 264;
/// Longest context.
pub(crate) const CONTEXT: usize = 64;
/// The token `<|end|>`.
pub(crate) const END: u32 = 258;
/// A forward pass with this token in it panics. The model itself never chooses it.
pub(crate) const PANIC: u32 = 263;
/// Refuses the role `tool`.
const TEMPLATE: &str = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}\
    {% endif %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if tools %}{{ tools | length }}T{% endif %}\
    {% if shout %}!!{% endif %}{% if add_generation_prompt %}a{% endif %}";

/// Holds the fake model's steps back while closed.
#[derive(Default)]
pub(crate) struct Gate {
    closed: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    pub(crate) fn set_closed(&self, closed: bool) {
        *self.closed.lock().unwrap() = closed;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let closed = self.closed.lock().unwrap();
        drop(self.changed.wait_while(closed, |closed| *closed).unwrap());
    }
}

struct Counting {
    gate: Arc<Gate>,
    num_blocks: usize,
}

impl Forward for Counting {
    fn limits(&self) -> ForwardLimits {
        ForwardLimits {
            vocab_size: VOCAB,
            context_tokens_max: CONTEXT,
            num_blocks: self.num_blocks,
            step_tokens: 64,
            rope_length_rule: RopeLengthRule::Fixed,
        }
    }

    fn forward(&mut self, batch: &Batch) -> Result<Tensor> {
        self.gate.pass();
        assert!(!batch.token_ids.contains(&PANIC), "the fake model was asked to panic");
        let mut logits = Vec::new();
        for &row in &batch.logit_rows {
            let row = row as usize;
            let segment = batch.segments.iter().find(|s| (s.start..s.start + s.len).contains(&row)).unwrap();
            let next = next_token(batch.token_ids[row], segment.adapter.is_some()) as usize;
            logits.extend((0..VOCAB).map(|id| match id {
                id if id == next => 10.0,
                id if id == PANIC as usize => -1e9,
                id if id == (next + 1) % 256 => 8.0,
                id => -(id as f32) / 100.0,
            }));
        }
        Tensor::from_vec(logits, (batch.logit_rows.len(), VOCAB), &Device::Cpu)
    }

    fn adapter_to_device(&self, adapter: &LoweredAdapter) -> Result<DeviceAdapter> {
        Ok(DeviceAdapter::from_tensors(adapter.clone()))
    }
}

fn next_token(token: u32, has_adapter: bool) -> u32 {
    match token {
        122 => END,
        61 => 0xC3,
        0xC3 => 0xA9,
        0xA9 => 97,
        token => (token + 1 + u32::from(has_adapter)) % 256,
    }
}

struct Base(SiteTable);

impl BaseWeights for Base {
    fn sites(&self) -> &SiteTable {
        &self.0
    }

    fn shape(&self) -> BaseShape {
        BaseShape { hidden_size: 4, num_layers: 1, kv_width: 4 }
    }

    fn tied_embeddings(&self) -> bool {
        false
    }

    fn weight(&self, _: SiteId) -> Result<Tensor> {
        Tensor::zeros((4, 4), DType::F32, &Device::Cpu)
    }

    fn bias(&self, _: SiteId) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

/// A running service.
pub(crate) struct Service {
    pub(crate) router: Router,
    pub(crate) state: AppState,
    pub(crate) gate: Arc<Gate>,
    dirs: (TempDir, TempDir),
}

/// An answer, read to its end.
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Service {
    pub(crate) async fn start() -> Self {
        Self::with(ServerConfig::default(), GenerationDefaults::default()).await
    }

    pub(crate) async fn with_config(config: ServerConfig) -> Self {
        Self::with(config, GenerationDefaults::default()).await
    }

    /// A service with two adapters: `skip`, which works, and `broken`, which does not.
    pub(crate) async fn with(config: ServerConfig, generation: GenerationDefaults) -> Self {
        Self::with_store(config, generation, |_| {}).await
    }

    /// The same with other bounds on adapters.
    pub(crate) async fn with_store(
        config: ServerConfig,
        generation: GenerationDefaults,
        adjust: impl FnOnce(&mut StoreConfig),
    ) -> Self {
        let dirs = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write_text(dirs.0.path());
        write_adapter(&dirs.1.path().join("skip"));
        std::fs::create_dir(dirs.1.path().join("broken")).unwrap();
        std::fs::write(dirs.1.path().join("broken/adapter_config.json"), r#"{"peft_type": "NONSENSE"}"#).unwrap();
        std::fs::write(dirs.1.path().join("broken/adapter_model.safetensors"), "nonsense").unwrap();

        let metrics = Arc::new(Metrics::new("base", &MetricsConfig::default()));
        let gate = Arc::new(Gate::default());
        let engine_config = EngineConfig {
            sequences_max: 4,
            step_tokens_max: Some(64),
            block_tokens: 4,
            queue_max: 8,
            adapter_slots: 2,
            ..EngineConfig::default()
        };
        let model = Counting { gate: Arc::clone(&gate), num_blocks: 128 };
        let mut store_config = StoreConfig { root: dirs.1.path().to_owned(), ..StoreConfig::default() };
        adjust(&mut store_config);
        let mut sites = SiteTable::default();
        let kind = SiteKind::Linear { in_features: 4, out_features: 4, bias: false, output_head: false };
        sites.push(Site { path: "model.layers.0.self_attn.q_proj".to_owned(), kind });
        let store =
            Store::open(store_config, Arc::new(Base(sites)), Formats::uniform(DType::F32), Arc::clone(&metrics))
                .await
                .unwrap();
        let generation = GenerationDefaults {
            temperature: generation.temperature.or(Some(0.0)),
            eos_token_ids: vec![END],
            ..generation
        };
        let state = AppState {
            engine: EngineHandle::start(Box::new(model), engine_config, Arc::clone(&metrics)),
            store,
            text: Arc::new(Text::load(dirs.0.path()).unwrap()),
            encodings: Arc::new(Admission::new(2, 64)),
            metrics,
            config: Arc::new(config),
            model: Arc::new(ServedModel {
                name: "base".to_owned(),
                created: 1_700_000_000,
                context_tokens_max: CONTEXT,
                generation,
            }),
            ready: Arc::new(AtomicBool::new(true)),
            draining: Arc::new(AtomicBool::new(false)),
        };
        Self { router: router(state.clone()), state, gate, dirs }
    }

    /// Where the adapters lie.
    pub(crate) fn root(&self) -> &Path {
        self.dirs.1.path()
    }

    /// Sends a request and waits for the answer's head.
    pub(crate) async fn send(&self, mut request: Request<Body>) -> axum::response::Response {
        // As every client of a server on this machine does.
        request.headers_mut().entry("host").or_insert(HeaderValue::from_static("127.0.0.1:8000"));
        self.router.clone().oneshot(request).await.unwrap()
    }

    pub(crate) async fn call(&self, request: Request<Body>) -> Reply {
        let (head, body) = self.send(request).await.into_parts();
        Reply { status: head.status, headers: head.headers, body: body.collect().await.unwrap().to_bytes() }
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.call(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Json) -> Reply {
        self.call(post(path, body.to_string())).await
    }

    /// A successful answer without what differs each time: the id, checked for its prefix, and the time.
    pub(crate) async fn ok(&self, path: &str, body: &Json) -> Json {
        let reply = self.post(path, body).await;
        assert_eq!(reply.status, StatusCode::OK, "{body} -> {}", reply.text());
        stable(reply.json())
    }

    /// The chunks of a successful streamed answer.
    pub(crate) async fn stream(&self, path: &str, body: &Json) -> Vec<Json> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let reply = self.post(path, &body).await;
        assert_eq!(reply.status, StatusCode::OK, "{body} -> {}", reply.text());
        assert_eq!(reply.headers["content-type"], "text/event-stream");
        reply.events().into_iter().map(stable).collect()
    }

    /// Checks a refusal's whole envelope: status, param, and what the message must contain.
    pub(crate) async fn refused(&self, path: &str, body: &Json, (status, param): (u16, Option<&str>), words: &str) {
        let reply = self.post(path, body).await;
        let error = reply.json();
        let error = &error["error"];
        assert_eq!(reply.status.as_u16(), status, "{body} -> {}", reply.text());
        assert_eq!(
            (error["code"].as_u64(), error["param"].as_str()),
            (Some(u64::from(status)), param),
            "{body}: {error}"
        );
        assert!(error["message"].as_str().unwrap().contains(words), "{body}: {error}");
        assert!(error["type"].as_str().unwrap().ends_with("Error"), "{error}");
    }
}

pub(crate) fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::post(path).header("content-type", "application/json").body(body.into()).unwrap()
}

impl Reply {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.to_vec()).unwrap()
    }

    pub(crate) fn json(&self) -> Json {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    /// The data of a stream's events, which must end in `[DONE]`.
    pub(crate) fn events(&self) -> Vec<Json> {
        let text = self.text();
        let mut data: Vec<&str> = text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{text}");
        data.into_iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

fn stable(mut answer: Json) -> Json {
    if let Some(id) = answer.get("id").and_then(Json::as_str) {
        let prefix = id.split_once('-').unwrap().0.to_owned();
        answer["id"] = json!(prefix);
        assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
        answer["created"] = json!(0);
    }
    answer
}

/// A byte-level tokenizer whose ids are the bytes, a chat template, and `<|end|>` as the end.
fn write_text(dir: &Path) {
    let mut next = 0x100;
    let alphabet: HashMap<String, u8> = (0..=u8::MAX)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => (char::from(byte).to_string(), byte),
            _ => {
                next += 1;
                (char::from_u32(next - 1).unwrap().to_string(), byte)
            }
        })
        .collect();
    let mut vocab = json!(alphabet);
    vocab["Ġa"] = json!(256);
    vocab["ab"] = json!(257);
    let added = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false})
    };
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "added_tokens": [added(END, "<|end|>"), added(259, "<|start|>")], "normalizer": null,
        "pre_tokenizer": level, "decoder": level,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [259], "tokens": ["<|start|>"]}}},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["Ġ", "a"], ["a", "b"]], "byte_fallback": false},
    });
    let config = json!({"eos_token": "<|end|>", "bos_token": "<|start|>", "chat_template": TEMPLATE});
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// A LoRA of the one linear there is.
fn write_adapter(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    let config = json!({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": false, "target_modules": ["q_proj"]});
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let ones = Tensor::ones((1, 4), DType::F32, &Device::Cpu).unwrap();
    let key = |part: &str| format!("base_model.model.model.layers.0.self_attn.q_proj.{part}.weight");
    let tensors =
        HashMap::from([(key("lora_A"), ones.clone()), (key("lora_B"), ones.t().unwrap().contiguous().unwrap())]);
    candle_core::safetensors::save(&tensors, dir.join("adapter_model.safetensors")).unwrap();
}
