//! Unpacking uploaded archives: plain tar or gzip of a PEFT directory, into memory and nowhere else.
//!
//! Nothing in an archive is trusted. What is not a plain file or directory with a plain relative path is refused; every
//! byte that decompression yields is counted, read or skipped; and only the two files of an adapter are kept.

use std::collections::{BTreeMap, HashSet};
use std::io::{self, Read};

use flate2::read::MultiGzDecoder;
use tar::{Archive, Entry, EntryType};

use super::StoreError;
use super::local::{PICKLE_FILE, pickle_refusal};
use super::objects::{CONFIG_FILE, WEIGHTS_FILE};
use crate::adapter::AdapterFiles;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Members of an archive at most; a PEFT directory has about ten.
const MEMBERS_MAX: usize = 1000;
/// What headers, padding and long names may add to the files' own bytes.
const OVERHEAD_BYTES_MAX: usize = 4 << 20;
/// Longest path in a message.
const SHOWN_CHARS_MAX: usize = 200;

/// The adapter in a tar archive, plain or gzip: its files lie at the top level or in one directory.
///
/// # Errors
/// `BadUpload` for what is not such an archive, `TooLarge` when its content exceeds `bytes_max`.
pub fn unpack_tar(archive: &[u8], bytes_max: usize) -> Result<AdapterFiles, StoreError> {
    let limit = bytes_max.saturating_add(OVERHEAD_BYTES_MAX);
    if archive.starts_with(&GZIP_MAGIC) {
        read_members(Counted::new(MultiGzDecoder::new(archive), limit), bytes_max)
    } else {
        read_members(Counted::new(archive, limit), bytes_max)
    }
}

/// A reader that fails once more than `left` bytes were read.
struct Counted<R> {
    reader: R,
    left: usize,
}

/// The failure of [`Counted`], as the source of an IO error.
#[derive(Debug, thiserror::Error)]
#[error("the archive unpacks to more than the bound")]
struct OverLimit;

impl<R> Counted<R> {
    fn new(reader: R, limit: usize) -> Self {
        Self { reader, left: limit }
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.left = self.left.checked_sub(read).ok_or_else(|| io::Error::other(OverLimit))?;
        Ok(read)
    }
}

/// The files kept of one directory.
#[derive(Default)]
struct Found {
    config: Option<Vec<u8>>,
    weights: Option<Vec<u8>>,
    pickle: bool,
}

fn read_members<R: Read>(reader: R, bytes_max: usize) -> Result<AdapterFiles, StoreError> {
    let broken = |error: io::Error| unreadable(&error, bytes_max);
    let mut paths = HashSet::new();
    let mut found: BTreeMap<String, Found> = BTreeMap::new();
    let mut kept = 0;
    let mut archive = Archive::new(reader);
    for (idx, member) in archive.entries().map_err(broken)?.enumerate() {
        let mut member = member.map_err(broken)?;
        if idx >= MEMBERS_MAX {
            return Err(StoreError::BadUpload(format!("the archive has more than {MEMBERS_MAX} members")));
        }
        let Some(path) = member_path(&member)? else { continue };
        if !paths.insert(path.clone()) {
            return Err(StoreError::BadUpload(format!("the archive has member `{}` twice", shown(&path))));
        }
        let (dir, file) = path.rsplit_once('/').unwrap_or(("", &path));
        if dir.contains('/') || ![CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE].contains(&file) {
            continue;
        }
        let found = found.entry(dir.to_owned()).or_default();
        if file == PICKLE_FILE {
            found.pickle = true;
            continue;
        }
        let mut bytes = Vec::new();
        let left = bytes_max - kept;
        member.by_ref().take((left as u64).saturating_add(1)).read_to_end(&mut bytes).map_err(broken)?;
        if bytes.len() > left {
            return Err(StoreError::TooLarge { limit: bytes_max });
        }
        if bytes.len() as u64 != member.size() {
            return Err(StoreError::BadUpload(format!("the archive ends within `{}`", shown(&path))));
        }
        kept += bytes.len();
        *(if file == CONFIG_FILE { &mut found.config } else { &mut found.weights }) = Some(bytes);
    }
    choose(found)
}

/// The member's path with plain parts only, `/` between them; `None` for what has no content of its own.
fn member_path<R: Read>(member: &Entry<'_, R>) -> Result<Option<String>, StoreError> {
    let bytes = member.path_bytes();
    let text = String::from_utf8_lossy(&bytes);
    let refuse = |what: &str| Err(StoreError::BadUpload(format!("the archive's member `{}` {what}", shown(&text))));
    let kind = member.header().entry_type();
    match kind {
        EntryType::Regular | EntryType::Directory => {}
        EntryType::XGlobalHeader => return Ok(None),
        EntryType::Link | EntryType::Symlink => return refuse("is a link"),
        _ => return refuse("is neither a file nor a directory"),
    }
    if text.contains(['\\', '\0', '\u{fffd}']) {
        return refuse("has a path with odd characters");
    }
    if text.starts_with('/') {
        return refuse("has an absolute path");
    }
    let parts: Vec<&str> = text.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    if parts.contains(&"..") {
        return refuse("has a path with `..`");
    }
    if kind == EntryType::Directory || parts.is_empty() {
        return Ok(None);
    }
    Ok(Some(parts.join("/")))
}

/// The adapter among the directories: the top level where it has one, else the only one below it.
fn choose(mut found: BTreeMap<String, Found>) -> Result<AdapterFiles, StoreError> {
    if let Some(top) = found.remove("") {
        // Directories below, such as a trainer's checkpoints, are harmless extras then.
        return complete(top);
    }
    let mut dirs = found.into_values();
    match (dirs.next(), dirs.next()) {
        (Some(only), None) => complete(only),
        (None, _) => Err(StoreError::BadUpload(format!(
            "the archive has no {CONFIG_FILE} and {WEIGHTS_FILE} at its top level or one directory below"
        ))),
        (Some(_), Some(_)) => {
            Err(StoreError::BadUpload("the archive has adapters in more than one directory".to_owned()))
        }
    }
}

fn complete(found: Found) -> Result<AdapterFiles, StoreError> {
    let missing = |file: &str| StoreError::BadUpload(format!("the archive has no {file}"));
    match (found.config, found.weights) {
        (Some(config), Some(weights)) => Ok(AdapterFiles { config, weights }),
        (_, None) if found.pickle => Err(pickle_refusal()),
        (None, _) => Err(missing(CONFIG_FILE)),
        (_, None) => Err(missing(WEIGHTS_FILE)),
    }
}

fn unreadable(error: &io::Error, bytes_max: usize) -> StoreError {
    if is_over_limit(error) {
        return StoreError::TooLarge { limit: bytes_max };
    }
    let reason = shown(&error.to_string());
    StoreError::BadUpload(format!("the archive cannot be read as tar or gzip-compressed tar: {reason}"))
}

/// Whether the failure is that of [`Counted`], however the libraries wrapped it.
fn is_over_limit(error: &io::Error) -> bool {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = source {
        if current.is::<OverLimit>() {
            return true;
        }
        // An IO error hides what it wraps from `source`, and shows it only here.
        let wrapped = current.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if let Some(wrapped) = wrapped {
            source = Some(wrapped as &(dyn std::error::Error + 'static));
            continue;
        }
        source = current.source();
    }
    false
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN_CHARS_MAX).collect()
}
