//! The flags that change settings.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::config::{ConfigError, Resolved, Setting, Sources, environment};
use crate::engine::KvDtypeChoice;
use crate::model::{DeviceChoice, DtypeChoice, QuantChoice};

/// Flags for the settings that are set most often; `--set` reaches every other one.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct SettingsArgs {
    /// Settings file (TOML); its keys are those that `patchbay config` prints.
    #[arg(long, value_name = "FILE", env = "PATCHBAY_CONFIG")]
    config: Option<PathBuf>,
    /// Base model: a Hugging Face directory, or a hub id such as org/name.
    #[arg(long, value_name = "DIR|ID")]
    model: Option<String>,
    /// Name clients use for the base model.
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,
    /// Adapter store.
    #[arg(long, value_name = "DIR")]
    adapters: Option<String>,
    /// Adapters to load before the server is ready, separated by commas.
    #[arg(long, value_name = "NAMES")]
    preload: Option<String>,
    /// Address to listen on.
    #[arg(long)]
    host: Option<String>,
    /// TCP port; 0 takes a free one.
    #[arg(long)]
    port: Option<u16>,
    /// Where the arithmetic runs.
    #[arg(long)]
    device: Option<DeviceChoice>,
    /// Number format of weights and activations.
    #[arg(long)]
    dtype: Option<DtypeChoice>,
    /// Quantise the base weights on load.
    #[arg(long)]
    quant: Option<QuantChoice>,
    /// Longest context in tokens.
    #[arg(long, value_name = "TOKENS")]
    context_tokens_max: Option<usize>,
    /// Size of the KV cache, for example 2GiB.
    #[arg(long, value_name = "BYTES")]
    kv_cache_bytes: Option<String>,
    /// Number format of keys and values in the KV cache.
    #[arg(long)]
    kv_cache_dtype: Option<KvDtypeChoice>,
    /// Key for everything under /v1; PATCHBAY_SERVER_API_KEY keeps it out of the process list.
    #[arg(long, value_name = "KEY")]
    api_key: Option<Secret>,
    /// Key for whatever changes adapters; PATCHBAY_SERVER_ADMIN_KEY keeps it out of the process list.
    #[arg(long, value_name = "KEY")]
    admin_key: Option<Secret>,
    /// Least severe level to log: error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Set any key; can be given more than once.
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<Secret>,
}

/// Text that may hold a key and is not shown when the arguments are.
#[derive(Clone)]
struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(secret)")
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl SettingsArgs {
    /// The effective settings: defaults, file, environment, these flags.
    pub(super) fn resolve(self) -> Result<Resolved, ConfigError> {
        Sources { file: self.config.clone(), environment: environment()?, flags: self.settings() }.resolve()
    }

    /// The first flag given that says what a server is to be, rather than how to speak to it.
    pub(super) fn server_flag(&self) -> Option<&'static str> {
        const SPEAKING: [&str; 3] = ["--api-key", "--admin-key", "--log-level"];
        let settings = Self { config: None, ..self.clone() }.settings();
        settings.into_iter().map(|setting| setting.flag).find(|flag| !SPEAKING.contains(flag))
    }

    fn settings(self) -> Vec<Setting> {
        let named = [
            ("--model", "model.path", self.model),
            ("--served-model-name", "model.served_name", self.served_model_name),
            ("--adapters", "adapters.root", self.adapters),
            ("--preload", "adapters.preload", self.preload),
            ("--host", "server.host", self.host),
            ("--port", "server.port", self.port.map(|n| n.to_string())),
            ("--device", "model.device", self.device.as_ref().map(name_of)),
            ("--dtype", "model.dtype", self.dtype.as_ref().map(name_of)),
            ("--quant", "model.quant", self.quant.as_ref().map(name_of)),
            ("--context-tokens-max", "model.context_tokens_max", self.context_tokens_max.map(|n| n.to_string())),
            ("--kv-cache-bytes", "engine.kv_cache_bytes", self.kv_cache_bytes),
            ("--kv-cache-dtype", "engine.kv_cache_dtype", self.kv_cache_dtype.as_ref().map(name_of)),
            ("--api-key", "server.api_key", self.api_key.map(|key| key.0)),
            ("--admin-key", "server.admin_key", self.admin_key.map(|key| key.0)),
            ("--log-level", "log.level", self.log_level),
        ];
        let named = named.into_iter().filter_map(|(flag, key, text)| Some((flag, key.to_owned(), text?)));
        let set = self.set.into_iter().map(|Secret(text)| {
            let (key, text) = text.split_once('=').unwrap_or((&text, ""));
            ("--set", key.trim().to_owned(), text.to_owned())
        });
        named.chain(set).map(|(flag, key, text)| Setting { flag, key, text }).collect()
    }
}

fn name_of(choice: &impl ValueEnum) -> String {
    choice.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::config::Config;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        settings: SettingsArgs,
    }

    fn config(line: &str) -> Config {
        let line = Line::try_parse_from(std::iter::once("patchbay").chain(line.split(' '))).expect("a valid line");
        let sources = Sources { flags: line.settings.settings(), ..Sources::default() };
        sources.resolve().expect("valid settings").config
    }

    #[test]
    fn every_flag_reaches_its_key() {
        let config = config(
            "--model m --served-model-name n --adapters a --preload p,q --host ::1 --port 1 --device cuda \
             --dtype bf16 --quant q4k --context-tokens-max 2 --kv-cache-bytes 1MiB --kv-cache-dtype f32 --api-key k \
             --admin-key l --log-level debug --set engine.queue_max=9",
        );
        assert_eq!((config.model.path.as_str(), config.model.served_name.as_deref()), ("m", Some("n")));
        assert_eq!(config.adapters.root, PathBuf::from("a"));
        assert_eq!(config.adapters.preload, ["p", "q"]);
        assert_eq!((config.server.host.as_str(), config.server.port), ("::1", 1));
        assert_eq!((config.model.device, config.model.dtype), (DeviceChoice::Cuda, DtypeChoice::Bf16));
        assert_eq!((config.model.quant, config.model.context_tokens_max), (Some(QuantChoice::Q4K), Some(2)));
        assert_eq!((config.engine.kv_cache_bytes, config.engine.queue_max), (1 << 20, 9));
        assert_eq!(config.engine.kv_cache_dtype, KvDtypeChoice::F32);
        assert_eq!((config.server.api_key.as_deref(), config.server.admin_key.as_deref()), (Some("k"), Some("l")));
        assert_eq!(config.log.level, "debug");
    }

    #[test]
    fn every_choice_is_spelled_alike_as_flag_and_as_setting() {
        for quant in QuantChoice::value_variants() {
            assert_eq!(config(&format!("--quant {}", name_of(quant))).model.quant, Some(*quant));
        }
        for dtype in DtypeChoice::value_variants() {
            assert_eq!(config(&format!("--dtype {}", name_of(dtype))).model.dtype, *dtype);
        }
        for dtype in KvDtypeChoice::value_variants() {
            assert_eq!(config(&format!("--kv-cache-dtype {}", name_of(dtype))).engine.kv_cache_dtype, *dtype);
        }
    }

    #[test]
    fn arguments_do_not_show_keys() {
        let line = ["patchbay", "--api-key", "hunter2", "--set", "server.admin_key=hunter3"];
        let shown = format!("{:?}", Line::try_parse_from(line).unwrap());
        assert!(!shown.contains("hunter"), "{shown}");
    }
}
