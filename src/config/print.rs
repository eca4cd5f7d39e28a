//! The effective settings as text.

use std::fmt::Write as _;

use super::Resolved;
use super::keys::{self, SECTIONS};

impl Resolved {
    /// The effective settings as TOML, each line with where its value came from. Secrets are not shown.
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        for section in SECTIONS {
            let separator = if text.is_empty() { "" } else { "\n" };
            let _ = writeln!(text, "{separator}[{}]", section.name);
            for key in (section.keys)() {
                let _ = match self.entries.get(&(section.name, *key)) {
                    Some((_, origin)) if keys::is_secret(key) => writeln!(text, "{key} = \"(secret)\"  # {origin}"),
                    Some((value, origin)) => writeln!(text, "{key} = {value}  # {origin}"),
                    None => writeln!(text, "# {key} is not set"),
                };
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, Setting, Sources};

    fn sources() -> Sources {
        Sources {
            file: None,
            environment: vec![("PATCHBAY_SERVER_ADMIN_KEY".to_owned(), "hunter2".to_owned())],
            flags: vec![Setting { flag: "--port", key: "server.port".to_owned(), text: "9".to_owned() }],
        }
    }

    #[test]
    fn each_line_says_where_its_value_came_from() {
        let text = sources().resolve().unwrap().to_toml();
        assert!(text.contains("\nport = 9  # flag --port\n"), "{text}");
        assert!(text.contains("\nblock_tokens = 16  # default\n"), "{text}");
        assert!(text.contains("\n# api_key is not set\n"), "{text}");
    }

    #[test]
    fn secrets_are_not_shown() {
        let text = sources().resolve().unwrap().to_toml();
        let line = "admin_key = \"(secret)\"  # environment variable PATCHBAY_SERVER_ADMIN_KEY";
        assert!(text.contains(line) && !text.contains("hunter2"), "{text}");
    }

    #[test]
    fn the_text_is_a_configuration_file() {
        let text = Sources::default().resolve().unwrap().to_toml();
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), Config::default());
    }
}
