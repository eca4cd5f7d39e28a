//! The catalogue's records and what they fold to.
//!
//! A name's records are numbered from 1 without gaps; each is written once and never changed. The state of the name is
//! the fold of all of them in order. A publish record's number is the generation it publishes.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::adapter::AdapterFiles;

/// SHA-256 over an adapter's files; names the blob. Written as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(super) struct ContentDigest(pub(super) [u8; 32]);

impl ContentDigest {
    /// Digest of the config's length (8 bytes, little endian), the config and the weights, one after the other. With parts
    /// it is that of eight bytes of ones, the digest of the two files, and those of the parts.
    pub(super) fn of(files: &AdapterFiles) -> Self {
        let mut sha = Sha256::new();
        sha.update((files.config.len() as u64).to_le_bytes());
        sha.update(&files.config);
        sha.update(&files.weights);
        let own = Self(sha.finalize().into());
        if files.parts.is_empty() {
            return own;
        }
        let mut sha = Sha256::new();
        // No config is that long.
        sha.update(u64::MAX.to_le_bytes());
        sha.update(own.0);
        files.parts.iter().for_each(|part| sha.update(Self::of(part).0));
        Self(sha.finalize().into())
    }
}

impl fmt::Display for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl From<ContentDigest> for String {
    fn from(digest: ContentDigest) -> Self {
        digest.to_string()
    }
}

impl TryFrom<String> for ContentDigest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a digest of 64 hexadecimal digits");
        if text.len() != 64 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(wrong());
        }
        let mut digest = [0; 32];
        for (byte, idx) in digest.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&text[idx..idx + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Self(digest))
    }
}

/// One record of a name. A kind that this version does not know is an error, never skipped: it may change what the
/// name means.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Record {
    /// The name means this content from now on.
    Publish {
        digest: ContentDigest,
        options: RecordedOptions,
        /// Unix time in seconds.
        created: u64,
        source: Source,
    },
    /// This generation was the plain directory of that name; written before the first record of a name that takes over
    /// from a directory, so that generations go on counting where the directory's stopped.
    Directory { created: u64 },
    /// The name means nothing from now on; this also hides a plain directory.
    Retire { created: u64 },
}

/// The options that change an adapter's effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RecordedOptions {
    pub(super) merge: bool,
}

/// Where published content came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Source {
    Upload,
    Path,
    /// Made of other adapters by this server.
    Combination,
}

/// What a name means now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Current {
    /// The plain directory of that name, if there is one.
    #[default]
    Directory,
    /// A generation of the catalogue.
    Published(u64),
    /// Nothing.
    Retired,
}

/// What a publish record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Published {
    pub(super) digest: ContentDigest,
    pub(super) merge: bool,
    pub(super) created: u64,
}

/// The fold of a name's records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NameState {
    /// Number of the last record; 0 where there is none.
    pub(super) last: u64,
    pub(super) current: Current,
    /// Generations that can be asked for: those published since the name was last retired.
    pub(super) published: BTreeMap<u64, Published>,
}

impl NameState {
    /// Folds the next record in.
    pub(super) fn apply(&mut self, record: &Record) {
        self.last += 1;
        match record {
            Record::Publish { digest, options, created, source: _ } => {
                let published = Published { digest: *digest, merge: options.merge, created: *created };
                self.published.insert(self.last, published);
                self.current = Current::Published(self.last);
            }
            Record::Directory { created: _ } => {}
            Record::Retire { created: _ } => {
                self.published.clear();
                self.current = Current::Retired;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(byte: u8) -> Record {
        let options = RecordedOptions { merge: byte.is_multiple_of(2) };
        Record::Publish { digest: ContentDigest([byte; 32]), options, created: byte.into(), source: Source::Upload }
    }

    fn fold(records: &[Record]) -> NameState {
        let mut state = NameState::default();
        records.iter().for_each(|record| state.apply(record));
        state
    }

    #[test]
    fn the_last_publish_is_current_and_earlier_ones_stay_reachable() {
        let state = fold(&[publish(1), publish(2)]);
        assert_eq!((state.last, state.current), (2, Current::Published(2)));
        assert_eq!(state.published.keys().copied().collect::<Vec<_>>(), [1, 2]);
        assert_eq!(state.published[&2], Published { digest: ContentDigest([2; 32]), merge: true, created: 2 });
    }

    #[test]
    fn retiring_hides_every_generation_and_publishing_again_goes_on_counting() {
        let state = fold(&[publish(1), Record::Retire { created: 2 }]);
        assert_eq!((state.current, state.published.len()), (Current::Retired, 0));
        let state = fold(&[publish(1), Record::Retire { created: 2 }, publish(3)]);
        assert_eq!((state.current, state.published.len()), (Current::Published(3), 1));
    }

    #[test]
    fn a_directory_record_leaves_the_directory_current() {
        assert_eq!(fold(&[Record::Directory { created: 1 }]).current, Current::Directory);
        assert_eq!(fold(&[Record::Directory { created: 1 }, publish(2)]).current, Current::Published(2));
    }

    #[test]
    fn records_keep_their_form() {
        let text = serde_json::to_string(&publish(1)).unwrap();
        let digest = "01".repeat(32);
        assert_eq!(
            text,
            format!(
                r#"{{"kind":"publish","digest":"{digest}","options":{{"merge":false}},"created":1,"source":"upload"}}"#
            )
        );
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), publish(1));
        assert_eq!(serde_json::to_string(&Record::Retire { created: 7 }).unwrap(), r#"{"kind":"retire","created":7}"#);
    }

    #[test]
    fn what_is_not_known_is_an_error_that_names_it() {
        let message = |text: &str| serde_json::from_str::<Record>(text).unwrap_err().to_string();
        assert!(message(r#"{"kind":"alias","to":"x"}"#).contains("alias"));
        assert!(message(r#"{"kind":"retire","created":7,"reason":"x"}"#).contains("reason"));
        let digest = "..".repeat(32);
        let text = format!(
            r#"{{"kind":"publish","digest":"{digest}","options":{{"merge":false}},"created":1,"source":"upload"}}"#
        );
        assert!(message(&text).contains("digest"));
    }

    #[test]
    fn the_digest_separates_config_from_weights() {
        let files = |config: &[u8], weights: &[u8]| AdapterFiles::new(config.to_vec(), weights.to_vec());
        assert_ne!(ContentDigest::of(&files(b"ab", b"c")), ContentDigest::of(&files(b"a", b"bc")));
        let digest = ContentDigest::of(&files(b"a", b"b"));
        assert_eq!(ContentDigest::try_from(digest.to_string()), Ok(digest));
    }
}
