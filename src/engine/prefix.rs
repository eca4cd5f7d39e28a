//! Names for the content of full KV blocks.
//!
//! A block's hash covers everything its keys and values depend on: the adapter (with what it puts before the prompt), the
//! cache salt, the RoPE frequencies, and every token up to the block's end (through its predecessor's hash). Blocks that
//! end before the adapter acts are the base's. Blocks that hold nothing but a KV prefix depend on the adapter alone.
//! SHA-256 makes an accidental or made-up
//! collision between tenants infeasible, so equal hashes mean equal content and no tokens need comparing; its cost, two
//! compressions per block of 16 tokens, is nothing beside computing those tokens.

use sha2::{Digest, Sha256};

use crate::model::RopeLengthRule;

/// Identifies the content of one full KV block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct BlockHash(pub(super) [u8; 32]);

/// What keys a prefix besides its tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct PrefixKey<'a> {
    /// Content digest of the adapter; `None` is the bare base.
    pub(super) adapter: Option<&'a [u8; 32]>,
    /// First position that uses the adapter.
    pub(super) adapter_from: Option<usize>,
    /// Entries of the adapter's KV prefix.
    pub(super) prefix_entries: usize,
    /// Positions before the first token, the prefix included.
    pub(super) leading: usize,
    /// Separates tenants.
    pub(super) salt: Option<&'a str>,
    /// Which contexts have equal RoPE frequencies.
    pub(super) rope_length_rule: RopeLengthRule,
    /// Positions that count as the prompt for RoPE.
    pub(super) prompt_len: usize,
}

/// The chained hashes of one sequence's full blocks, grown as its tokens grow.
#[derive(Clone, Debug)]
pub(super) struct PrefixChain {
    rope_length_rule: RopeLengthRule,
    prompt_len: usize,
    prefix_entries: usize,
    leading: usize,
    /// Where an adapter comes in that was not there from the start, and its digest.
    comes_in: Option<(usize, [u8; 32])>,
    /// Precedes the blocks of a KV prefix.
    prefix_root: BlockHash,
    /// Precedes the first block that is computed.
    root: BlockHash,
    hashes: Vec<BlockHash>,
}

impl PrefixChain {
    /// An empty chain.
    pub(super) fn new(key: PrefixKey<'_>) -> Self {
        let digest = key.adapter.map(<[u8; 32]>::as_slice);
        let mut hasher = Sha256::new();
        hash_optional(&mut hasher, digest.filter(|_| key.adapter_from == Some(0)));
        hash_optional(&mut hasher, key.salt.map(str::as_bytes));
        hasher.update(key.rope_length_rule.regime(key.prompt_len).to_le_bytes());
        let mut prefix_hasher = Sha256::new();
        hash_optional(&mut prefix_hasher, digest);
        Self {
            rope_length_rule: key.rope_length_rule,
            prompt_len: key.prompt_len,
            prefix_entries: key.prefix_entries,
            leading: key.leading,
            comes_in: key.adapter_from.filter(|from| *from > 0).zip(key.adapter.copied()),
            prefix_root: BlockHash(prefix_hasher.finalize().into()),
            root: BlockHash(hasher.finalize().into()),
            hashes: Vec::new(),
        }
    }

    /// Hashes the full blocks of the context with these tokens that have no hash yet. Blocks with a position whose RoPE
    /// regime differs from the prompt's get none, nor do any after them.
    pub(super) fn extend(&mut self, tokens: &[u32], block_tokens: usize) {
        let regime = self.rope_length_rule.regime(self.prompt_len);
        loop {
            let start = self.hashes.len() * block_tokens;
            let end = start + block_tokens;
            let is_prefix = end <= self.prefix_entries;
            // Regimes never return to an earlier value, so the last position speaks for the whole block. What is copied
            // is not rotated here.
            let is_same = is_prefix || self.rope_length_rule.regime(end.max(self.prompt_len)) == regime;
            if end > self.leading + tokens.len() || !is_same {
                return;
            }
            let follows_prefix = !is_prefix && start <= self.prefix_entries;
            let previous = match self.hashes.last() {
                Some(hash) if !follows_prefix => hash,
                _ if is_prefix => &self.prefix_root,
                _ => &self.root,
            };
            let mut hasher = Sha256::new();
            hasher.update(previous.0);
            if let Some((from, digest)) = self.comes_in
                && (start..end).contains(&from)
            {
                hasher.update((from as u64).to_le_bytes());
                hasher.update(digest);
            }
            for token in &tokens[start.saturating_sub(self.leading)..end.saturating_sub(self.leading)] {
                hasher.update(token.to_le_bytes());
            }
            self.hashes.push(BlockHash(hasher.finalize().into()));
        }
    }

    /// Hashes of the leading full blocks that may be shared, in order.
    pub(super) fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }
}

/// Presence and length go in front, so that no two different keys feed the same bytes.
fn hash_optional(hasher: &mut Sha256, bytes: Option<&[u8]>) {
    match bytes {
        None => hasher.update([0]),
        Some(bytes) => {
            hasher.update([1]);
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TOKENS: [u32; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

    fn key<'a>(adapter: Option<&'a [u8; 32]>, salt: Option<&'a str>) -> PrefixKey<'a> {
        PrefixKey {
            adapter,
            adapter_from: adapter.map(|_| 0),
            prefix_entries: 0,
            leading: 0,
            salt,
            rope_length_rule: RopeLengthRule::Fixed,
            prompt_len: 8,
        }
    }

    fn hashes(key: PrefixKey<'_>, tokens: &[u32]) -> Vec<BlockHash> {
        let mut chain = PrefixChain::new(key);
        chain.extend(tokens, 4);
        chain.hashes().to_vec()
    }

    #[test]
    fn equal_prefixes_have_equal_hashes_and_a_difference_lasts() {
        let one = hashes(key(None, None), &TOKENS);
        let mut tokens = TOKENS;
        tokens[5] = 99;
        let two = hashes(key(None, None), &tokens);
        assert_eq!(one.len(), 3);
        assert_eq!(one[0], two[0]);
        assert_ne!(one[1], two[1]);
        assert_ne!(one[2], two[2]);
    }

    #[test]
    fn adapters_and_salts_never_share() {
        let keys = [
            key(None, None),
            key(Some(&[0; 32]), None),
            key(Some(&[1; 32]), None),
            key(None, Some("")),
            key(None, Some("a")),
            key(Some(&[0; 32]), Some("a")),
        ];
        let mut firsts: Vec<_> = keys.into_iter().map(|key| hashes(key, &TOKENS)[0]).collect();
        firsts.sort();
        firsts.dedup();
        assert_eq!(firsts.len(), keys.len());
    }

    #[test]
    fn growing_a_chain_equals_hashing_at_once() {
        let mut chain = PrefixChain::new(key(None, Some("s")));
        for len in 0..=TOKENS.len() {
            chain.extend(&TOKENS[..len], 4);
        }
        assert_eq!(chain.hashes(), hashes(key(None, Some("s")), &TOKENS));
    }

    #[test]
    fn only_blocks_of_the_prompts_regime_are_hashed() {
        let check = |rope_length_rule, prompt_len, blocks| {
            let key = PrefixKey { rope_length_rule, prompt_len, ..key(None, None) };
            assert_eq!(hashes(key, &TOKENS).len(), blocks, "{rope_length_rule:?} {prompt_len}");
        };
        check(RopeLengthRule::Fixed, 5, 3);
        check(RopeLengthRule::Switch { threshold: 9 }, 5, 2);
        check(RopeLengthRule::Switch { threshold: 4 }, 5, 3);
        check(RopeLengthRule::Dynamic { threshold: 4 }, 5, 1);
        check(RopeLengthRule::Dynamic { threshold: 4 }, 8, 2);
        check(RopeLengthRule::Dynamic { threshold: 7 }, 6, 1);
    }

    #[test]
    fn different_regimes_never_share() {
        let key = |prompt_len| PrefixKey {
            rope_length_rule: RopeLengthRule::Switch { threshold: 8 },
            prompt_len,
            ..key(None, None)
        };
        assert_ne!(hashes(key(8), &TOKENS)[0], hashes(key(9), &TOKENS)[0]);
        assert_eq!(hashes(key(7), &TOKENS)[0], hashes(key(8), &TOKENS)[0]);
    }

    #[test]
    fn what_stands_before_the_prompt_shifts_its_blocks() {
        let leads = |leading, prefix_entries| PrefixKey { leading, prefix_entries, ..key(Some(&[1; 32]), None) };
        assert_eq!(hashes(leads(0, 0), &TOKENS).len(), 3);
        assert_eq!(hashes(leads(5, 0), &TOKENS).len(), 4);
        assert_eq!(hashes(leads(9, 9), &TOKENS[..2]).len(), 2);
        // Blocks of virtual tokens differ by their place, and the first with tokens of the prompt by those.
        let (one, two) = (hashes(leads(5, 0), &TOKENS), hashes(leads(5, 0), &TOKENS[1..]));
        assert_eq!(one[0], two[0]);
        assert_ne!(one[1], two[1]);
    }

    #[test]
    fn blocks_of_a_kv_prefix_depend_on_the_adapter_alone() {
        let of = |digest: u8, salt| {
            let digest = [digest; 32];
            hashes(PrefixKey { leading: 9, prefix_entries: 9, ..key(Some(&digest), salt) }, &TOKENS)
        };
        assert_eq!(of(1, None)[..2], of(1, Some("tenant"))[..2]);
        assert_ne!(of(1, None)[2], of(1, Some("tenant"))[2]);
        assert!(of(1, None).iter().all(|hash| !of(2, None).contains(hash)));
    }

    #[test]
    fn blocks_before_the_adapter_comes_in_are_the_bases() {
        let base = hashes(key(None, None), &TOKENS);
        let of = |adapter_from| hashes(PrefixKey { adapter_from, ..key(Some(&[1; 32]), None) }, &TOKENS);
        assert_eq!(of(None), base);
        let shared = |adapter_from| of(Some(adapter_from)).iter().zip(&base).take_while(|(a, b)| a == b).count();
        assert_eq!([0, 1, 3, 4, 7, 8, 11, 12].map(shared), [0, 0, 0, 1, 1, 2, 2, 3]);
        let distinct: std::collections::BTreeSet<_> = [0, 4, 5, 6, 7].map(|from| of(Some(from))[2]).into();
        assert_eq!(distinct.len(), 5);
        let other = hashes(PrefixKey { adapter_from: Some(5), ..key(Some(&[2; 32]), None) }, &TOKENS);
        assert_eq!(other[0], base[0]);
        assert!(other[1..].iter().all(|hash| !of(Some(5)).contains(hash)), "two adapters share the base's blocks only");
    }

    /// A key and tokens from small ranges, so that equal ones occur.
    fn content() -> impl Strategy<Value = (Option<[u8; 32]>, Option<String>, Vec<u32>)> {
        let adapter = prop::option::of((0_u8..2).prop_map(|byte| [byte; 32]));
        let salt = prop::option::of("[ab]{0,2}");
        (adapter, salt, prop::collection::vec(0_u32..2, 0..24))
    }

    proptest! {
        /// Two sequences share exactly the full blocks of their common prefix, and none unless their keys are equal.
        #[test]
        fn sharing_is_exactly_the_common_prefix_of_equal_keys(one in content(), two in content()) {
            let of = |(adapter, salt, tokens): &(Option<[u8; 32]>, Option<String>, Vec<u32>)| {
                hashes(key(adapter.as_ref(), salt.as_deref()), tokens)
            };
            let (hashes_one, hashes_two) = (of(&one), of(&two));
            let common_tokens = one.2.iter().zip(&two.2).take_while(|(a, b)| a == b).count();
            let expected = if (&one.0, &one.1) == (&two.0, &two.1) { common_tokens / 4 } else { 0 };
            let shared = hashes_one.iter().zip(&hashes_two).take_while(|(a, b)| a == b).count();
            prop_assert_eq!(shared, expected);
            prop_assert!(hashes_one[shared..].iter().all(|hash| !hashes_two.contains(hash)));
        }
    }
}
