//! Adapter names, and references to one of their generations.

use super::StoreError;
use super::objects::{BLOBS, CATALOG};

const NAME_CHARS_MAX: usize = 128;

/// Refuses what cannot be an adapter's name. A name that passes is one path segment and nothing else.
///
/// # Errors
/// `InvalidName` or `ReservedName`.
pub(super) fn check_name(name: &str) -> Result<(), StoreError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > NAME_CHARS_MAX || name.starts_with('.') || !name.chars().all(allowed) {
        // What the message repeats of a client's text is bounded.
        return Err(StoreError::InvalidName(name.chars().take(NAME_CHARS_MAX).collect()));
    }
    if [BLOBS, CATALOG].contains(&name) {
        return Err(StoreError::ReservedName(name.to_owned()));
    }
    Ok(())
}

/// `name` or `name@generation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reference<'a> {
    pub(super) name: &'a str,
    pub(super) generation: Option<u64>,
}

/// Reads `name` or `name@generation`; what can be neither names nothing.
///
/// # Errors
/// `NotFound`.
pub(super) fn parse_reference(text: &str) -> Result<Reference<'_>, StoreError> {
    let not_found = || StoreError::NotFound(text.chars().take(2 * NAME_CHARS_MAX).collect());
    let (name, generation) = match text.split_once('@') {
        None => (text, None),
        Some((name, digits)) if digits.bytes().all(|b| b.is_ascii_digit()) => {
            (name, Some(digits.parse().map_err(|_| not_found())?))
        }
        Some(_) => return Err(not_found()),
    };
    check_name(name).map_err(|_| not_found())?;
    Ok(Reference { name, generation })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_plain_path_segment() {
        for name in ["a", "sql-v1", "A.b_c-9", "x..y", &"n".repeat(128)] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["", ".", "..", ".hidden", "a/b", "a\\b", "a b", "a@1", "a:b", "ä", "a\0", &"n".repeat(129)] {
            assert!(matches!(check_name(name), Err(StoreError::InvalidName(_))), "{name:?}");
        }
        for name in ["blobs", "catalog"] {
            assert!(matches!(check_name(name), Err(StoreError::ReservedName(_))), "{name}");
        }
    }

    #[test]
    fn references_carry_an_optional_generation() {
        assert_eq!(parse_reference("a").unwrap(), Reference { name: "a", generation: None });
        assert_eq!(parse_reference("a@12").unwrap(), Reference { name: "a", generation: Some(12) });
        for text in ["a@", "a@-1", "a@+1", "a@x", "a@1@2", "@1", "blobs@1", "a@99999999999999999999999"] {
            assert!(matches!(parse_reference(text), Err(StoreError::NotFound(_))), "{text}");
        }
    }
}
