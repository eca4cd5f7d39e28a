//! Unpacking uploaded archives: plain tar or gzip of a PEFT directory, into memory and nowhere else.
//!
//! Nothing in an archive is trusted. What is not a plain file or directory with a plain relative path is refused; every
//! byte that decompression yields is counted, read or skipped; and only the two files of an adapter are kept, and those of
//! sub-directories with numbers for names, which some adapters have.

use std::collections::{BTreeMap, HashSet};
use std::io::{self, Read};

use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use tar::{Archive, Entry, EntryType};

use super::StoreError;
use super::local::{PICKLE_FILES, pickle_refusal};
use super::objects::{CONFIG_FILE, WEIGHTS_FILE, WEIGHTS_FILES};
use crate::adapter::{self, AdapterFiles};

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Members of an archive at most; a PEFT directory has about ten.
const MEMBERS_MAX: usize = 1000;
/// Sub-directories of an adapter at most.
const PARTS_MAX: usize = 100;
/// What headers, padding and long names may add to the files' own bytes.
const OVERHEAD_BYTES_MAX: usize = 4 << 20;
/// Longest path in a message.
const SHOWN_CHARS_MAX: usize = 200;

/// The adapter in a tar archive, plain or gzip: its files lie at the top level or in one directory, and those of the adapters
/// that its config names beside it in sub-directories `0`, `1` and so on.
///
/// # Errors
/// `BadUpload` for what is not such an archive, `TooLarge` when its content exceeds `bytes_max`.
pub fn unpack_tar(archive: &Bytes, bytes_max: usize) -> Result<AdapterFiles, StoreError> {
    let limit = bytes_max.saturating_add(OVERHEAD_BYTES_MAX);
    if archive.starts_with(&GZIP_MAGIC) {
        read_members(Counted::new(MultiGzDecoder::new(&**archive), limit), bytes_max, None)
    } else {
        read_members(Counted::new(&**archive, limit), bytes_max, Some(archive))
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
    config: Option<Bytes>,
    /// By the names of [`WEIGHTS_FILES`].
    weights: [Option<Bytes>; 2],
    pickle: Option<&'static str>,
}

/// `plain` is the archive where the reader's bytes are its own: its files are parts of it then, not copies.
fn read_members<R: Read>(reader: R, bytes_max: usize, plain: Option<&Bytes>) -> Result<AdapterFiles, StoreError> {
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
        let pickle = PICKLE_FILES.into_iter().find(|name| *name == file);
        let weights = WEIGHTS_FILES.iter().position(|name| *name == file);
        if !is_near(dir) || (file != CONFIG_FILE && weights.is_none() && pickle.is_none()) {
            continue;
        }
        let found = found.entry(dir.to_owned()).or_default();
        if pickle.is_some() {
            found.pickle = pickle;
            continue;
        }
        let left = bytes_max - kept;
        let bytes = match plain {
            Some(archive) => part_of(archive, &member, left),
            None => {
                let mut bytes = Vec::new();
                member.by_ref().take((left as u64).saturating_add(1)).read_to_end(&mut bytes).map_err(broken)?;
                Some(bytes.into())
            }
        };
        let ends_early = || StoreError::BadUpload(format!("the archive ends within `{}`", shown(&path)));
        let bytes = bytes.ok_or_else(ends_early)?;
        if bytes.len() > left {
            return Err(StoreError::TooLarge { limit: bytes_max });
        }
        if bytes.len() as u64 != member.size() {
            return Err(ends_early());
        }
        kept += bytes.len();
        match weights {
            Some(idx) => found.weights[idx] = Some(bytes),
            None => found.config = Some(bytes),
        }
    }
    // To the very end: only then has the decompressor checked that nothing is missing or damaged.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(broken)?;
    choose(found)
}

/// A member's content, or no more than one byte beyond `left`; `None` where the archive ends before it.
fn part_of<R: Read>(archive: &Bytes, member: &Entry<'_, R>, left: usize) -> Option<Bytes> {
    let from = usize::try_from(member.raw_file_position()).ok()?;
    let len = usize::try_from(member.size()).unwrap_or(usize::MAX).min(left.saturating_add(1));
    let to = from.checked_add(len).filter(|to| *to <= archive.len())?;
    Some(archive.slice(from..to))
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

/// Whether an adapter's files may lie there: at the top level, in a directory, or in one of its numbered ones.
fn is_near(dir: &str) -> bool {
    let numbered = |name: &str| name.parse::<usize>().is_ok_and(|n| n < PARTS_MAX && n.to_string() == name);
    dir.split_once('/').is_none_or(|(_, below)| numbered(below))
}

/// The adapter among the directories: the top level where it has one, else the only one below it.
fn choose(mut found: BTreeMap<String, Found>) -> Result<AdapterFiles, StoreError> {
    if let Some(top) = found.remove("") {
        // Directories below, such as a trainer's checkpoints, are harmless extras then.
        return with_parts(complete(top)?, "", found);
    }
    let mut dirs = found.keys().filter(|dir| !dir.contains('/')).cloned();
    match (dirs.next(), dirs.next()) {
        (Some(only), None) => {
            let own = found.remove(&only).unwrap_or_default();
            with_parts(complete(own)?, &format!("{only}/"), found)
        }
        (None, _) => Err(StoreError::BadUpload(format!(
            "the archive has no {CONFIG_FILE} and {WEIGHTS_FILE} at its top level or one directory below"
        ))),
        (Some(_), Some(_)) => {
            Err(StoreError::BadUpload("the archive has adapters in more than one directory".to_owned()))
        }
    }
}

/// Adds the adapters in the sub-directories that the config names.
fn with_parts(
    mut files: AdapterFiles,
    dir: &str,
    mut found: BTreeMap<String, Found>,
) -> Result<AdapterFiles, StoreError> {
    for number in 0..adapter::num_parts(&files.config) {
        let path = format!("{dir}{number}");
        let part = found.remove(&path).map_or_else(|| Err(missing(CONFIG_FILE)), complete);
        files.parts.push(part.map_err(|error| match error {
            StoreError::BadUpload(reason) => StoreError::BadUpload(format!("sub-directory {number}: {reason}")),
            other => other,
        })?);
    }
    Ok(files)
}

fn missing(file: &str) -> StoreError {
    StoreError::BadUpload(format!("the archive has no {file}"))
}

fn complete(found: Found) -> Result<AdapterFiles, StoreError> {
    match (found.config, found.weights.into_iter().flatten().next(), found.pickle) {
        (Some(config), Some(weights), _) => Ok(AdapterFiles::new(config, weights)),
        (_, None, Some(pickle)) => Err(pickle_refusal(pickle)),
        (None, _, _) => Err(missing(CONFIG_FILE)),
        (_, None, None) => Err(missing(WEIGHTS_FILE)),
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;
    use tar::{Builder, Header};

    use super::*;

    const LIMIT: usize = 1000;

    fn unpack_tar(archive: &[u8], bytes_max: usize) -> Result<AdapterFiles, StoreError> {
        super::unpack_tar(&Bytes::copy_from_slice(archive), bytes_max)
    }

    /// A member with its path written as it is, which `tar` itself would refuse to do.
    fn member(path: &str, kind: EntryType, content: &[u8]) -> Vec<u8> {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        bytes
    }

    fn file(path: &str, content: &str) -> Vec<u8> {
        member(path, EntryType::Regular, content.as_bytes())
    }

    fn tar(members: &[Vec<u8>]) -> Vec<u8> {
        let mut archive = members.concat();
        archive.resize(archive.len() + 1024, 0);
        archive
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn adapter(prefix: &str) -> Vec<Vec<u8>> {
        vec![file(&format!("{prefix}{CONFIG_FILE}"), "config"), file(&format!("{prefix}{WEIGHTS_FILE}"), "weights")]
    }

    fn check_unpacks(archive: &[u8]) {
        let files = unpack_tar(archive, LIMIT).unwrap();
        assert_eq!((&*files.config, &*files.weights), (&b"config"[..], &b"weights"[..]));
    }

    fn check_refused(archive: &[u8], message: &str) {
        let error = unpack_tar(archive, LIMIT).expect_err(message);
        assert!(error.to_string().contains(message), "{error}");
    }

    #[test]
    fn a_directory_unpacks_from_the_top_or_one_level_down_packed_or_not() {
        for prefix in ["", "./", "out/", "./out/"] {
            let archive = tar(&adapter(prefix));
            check_unpacks(&archive);
            check_unpacks(&gzip(&archive));
        }
    }

    /// What names two adapters in sub-directories.
    const OF_TWO: &str = r#"{"peft_type": "XLORA", "adapters": {"0": "x", "1": "x"}}"#;

    fn of_two(prefix: &str) -> Vec<Vec<u8>> {
        let mut members =
            vec![file(&format!("{prefix}{CONFIG_FILE}"), OF_TWO), file(&format!("{prefix}{WEIGHTS_FILE}"), "weights")];
        members.extend(adapter(&format!("{prefix}0/")));
        members.extend(adapter(&format!("{prefix}1/")));
        members
    }

    #[test]
    fn the_sub_directories_that_a_config_names_unpack_too() {
        for prefix in ["", "./", "out/"] {
            let mut members = of_two(prefix);
            // Neither is named.
            members.extend(adapter(&format!("{prefix}2/")));
            members.extend(adapter(&format!("{prefix}x/1/")));
            let files = unpack_tar(&tar(&members), LIMIT).unwrap();
            assert_eq!((&*files.config, files.parts.len()), (OF_TWO.as_bytes(), 2), "{prefix}");
            assert!(files.parts.iter().all(|part| part.config == "config" && part.weights == "weights"));
        }
    }

    #[test]
    fn a_sub_directory_that_is_missing_is_named() {
        check_refused(&tar(&of_two("")[..4]), "sub-directory 1: the archive has no adapter_config.json");
        check_refused(&tar(&of_two("out/")[..5]), "sub-directory 1: the archive has no adapter_model.safetensors");
        check_refused(&tar(&[of_two("")[..2].to_vec(), adapter("00/"), adapter("1/")].concat()), "sub-directory 0");
    }

    #[test]
    fn an_archive_as_tar_writes_it_unpacks() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(CONFIG_FILE), "config").unwrap();
        std::fs::write(dir.path().join(WEIGHTS_FILE), "weights").unwrap();
        let mut builder = Builder::new(Vec::new());
        builder.append_dir_all(format!("{}-out", "long".repeat(60)), dir.path()).unwrap();
        check_unpacks(&builder.into_inner().unwrap());
    }

    #[test]
    fn weights_may_have_the_name_of_adapterhub() {
        let mut members = vec![file("out/adapter_config.json", "config"), file("out/adapter.safetensors", "weights")];
        check_unpacks(&tar(&members));
        members[1] = file("out/adapter.safetensors", "not these");
        members.push(file("out/adapter_model.safetensors", "weights"));
        check_unpacks(&tar(&members));
    }

    #[test]
    fn extra_files_and_checkpoints_are_ignored() {
        let mut members = adapter("");
        members.extend(adapter("checkpoint-10/"));
        members.extend([file("README.md", "hello"), file("a/b/adapter_config.json", "deep")]);
        members.push(member("checkpoint-10", EntryType::Directory, b""));
        check_unpacks(&tar(&members));
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for (path, message) in [
            ("../adapter_config.json", "`..`"),
            ("a/../../x", "`..`"),
            ("/etc/passwd", "absolute"),
            ("a\\b", "odd characters"),
        ] {
            check_refused(&tar(&[file(path, "x")]), message);
        }
    }

    #[test]
    fn links_devices_and_pipes_are_refused() {
        for (kind, message) in [
            (EntryType::Symlink, "link"),
            (EntryType::Link, "link"),
            (EntryType::Char, "neither"),
            (EntryType::Block, "neither"),
            (EntryType::Fifo, "neither"),
            (EntryType::GNUSparse, "tar"),
        ] {
            check_refused(&tar(&[member(CONFIG_FILE, kind, b"")]), message);
        }
    }

    #[test]
    fn doubled_missing_and_ambiguous_files_are_refused() {
        let mut twice = adapter("");
        twice.push(file("./adapter_config.json", "other"));
        check_refused(&tar(&twice), "twice");
        check_refused(&tar(&[file(CONFIG_FILE, "config")]), "has no adapter_model.safetensors");
        check_refused(&tar(&[file(WEIGHTS_FILE, "weights")]), "has no adapter_config.json");
        check_refused(&tar(&[file("README.md", "x")]), "top level or one directory below");
        check_refused(&tar(&[adapter("a/"), adapter("b/")].concat()), "more than one directory");
        for pickle in PICKLE_FILES {
            check_refused(&tar(&[file(CONFIG_FILE, "config"), file(pickle, "x")]), &format!("{pickle}: is a pickle"));
        }
        check_refused(b"", "top level");
    }

    #[test]
    fn what_is_too_large_is_refused_also_when_it_is_skipped() {
        let large =
            |archive: &[u8]| assert!(matches!(unpack_tar(archive, LIMIT), Err(StoreError::TooLarge { limit: LIMIT })));
        large(&tar(&[file(CONFIG_FILE, &"x".repeat(LIMIT + 1))]));
        large(&tar(&[file(CONFIG_FILE, &"x".repeat(LIMIT)), file(WEIGHTS_FILE, "x")]));
        // A bomb: small packed, large unpacked, and in a member that nobody wants.
        let bomb = gzip(&tar(&[file("README.md", &"\0".repeat(OVERHEAD_BYTES_MAX + LIMIT + 1))]));
        assert!(bomb.len() < 64 << 10);
        large(&bomb);
    }

    #[test]
    fn many_members_and_members_that_lie_about_their_size_are_refused() {
        let members: Vec<Vec<u8>> = (0..=MEMBERS_MAX).map(|idx| file(&format!("f{idx}"), "")).collect();
        check_refused(&tar(&members), "more than 1000 members");
        let mut header = Header::new_gnu();
        header.set_path(CONFIG_FILE).unwrap();
        header.set_entry_type(EntryType::Regular);
        header.set_size(500);
        header.set_cksum();
        check_refused(&[header.as_bytes().as_slice(), b"short"].concat(), "ends within");
        header.set_size(u64::MAX / 2);
        header.set_cksum();
        check_refused(header.as_bytes(), "archive");
    }

    #[test]
    fn truncated_archives_never_unpack_to_less() {
        let whole = tar(&adapter(""));
        let packed = gzip(&whole);
        for length in 0..whole.len() - 1024 {
            if let Ok(files) = unpack_tar(&whole[..length], LIMIT) {
                assert_eq!((&*files.config, &*files.weights), (&b"config"[..], &b"weights"[..]));
            }
        }
        for length in 0..packed.len() - 8 {
            assert!(unpack_tar(&packed[..length], LIMIT).is_err(), "{length} bytes");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
            let _ = unpack_tar(&bytes, LIMIT);
            let _ = unpack_tar(&[&GZIP_MAGIC[..], &bytes].concat(), LIMIT);
            let _ = unpack_tar(&gzip(&bytes), LIMIT);
        }

        #[test]
        fn damaged_archives_never_panic(
            damage in prop::collection::vec((0_usize..4096, any::<u8>()), 1..8),
            fix_checksums in any::<bool>(),
        ) {
            let mut archive = tar(&adapter("out/"));
            let length = archive.len();
            for (at, byte) in damage {
                archive[at % length] = byte;
            }
            if fix_checksums {
                for block in archive.chunks_exact_mut(512).step_by(2) {
                    let mut header = Header::new_old();
                    header.as_mut_bytes().copy_from_slice(block);
                    header.set_cksum();
                    block.copy_from_slice(header.as_bytes());
                }
            }
            let _ = unpack_tar(&archive, LIMIT);
        }
    }
}
