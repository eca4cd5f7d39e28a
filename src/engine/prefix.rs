//! Names for the content of full KV blocks.
//!
//! A block's hash covers everything its keys and values depend on: the adapter, the cache salt, the RoPE frequencies,
//! and every token up to the block's end (through its predecessor's hash). SHA-256 makes an accidental or made-up
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
    /// Separates tenants.
    pub(super) salt: Option<&'a str>,
    /// Which contexts have equal RoPE frequencies.
    pub(super) rope_length_rule: RopeLengthRule,
    /// Tokens in the prompt.
    pub(super) prompt_len: usize,
}

/// The chained hashes of one sequence's full blocks, grown as its tokens grow.
#[derive(Clone, Debug)]
pub(super) struct PrefixChain {
    rope_length_rule: RopeLengthRule,
    prompt_len: usize,
    root: BlockHash,
    hashes: Vec<BlockHash>,
}

impl PrefixChain {
    /// An empty chain.
    pub(super) fn new(key: PrefixKey<'_>) -> Self {
        let mut hasher = Sha256::new();
        hash_optional(&mut hasher, key.adapter.map(<[u8; 32]>::as_slice));
        hash_optional(&mut hasher, key.salt.map(str::as_bytes));
        hasher.update(key.rope_length_rule.regime(key.prompt_len).to_le_bytes());
        Self {
            rope_length_rule: key.rope_length_rule,
            prompt_len: key.prompt_len,
            root: BlockHash(hasher.finalize().into()),
            hashes: Vec::new(),
        }
    }

    /// Hashes the full blocks of `tokens` that have no hash yet. Blocks with a token whose RoPE regime differs from the
    /// prompt's get none, nor do any after them.
    pub(super) fn extend(&mut self, tokens: &[u32], block_tokens: usize) {
        let regime = self.rope_length_rule.regime(self.prompt_len);
        for block in tokens.chunks_exact(block_tokens).skip(self.hashes.len()) {
            let end = (self.hashes.len() + 1) * block_tokens;
            // Regimes never return to an earlier value, so the last token speaks for the whole block.
            if self.rope_length_rule.regime(end.max(self.prompt_len)) != regime {
                return;
            }
            let mut hasher = Sha256::new();
            hasher.update(self.hashes.last().unwrap_or(&self.root).0);
            for token in block {
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
        PrefixKey { adapter, salt, rope_length_rule: RopeLengthRule::Fixed, prompt_len: 8 }
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
            let key = PrefixKey { adapter: None, salt: None, rope_length_rule, prompt_len };
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
            adapter: None,
            salt: None,
            rope_length_rule: RopeLengthRule::Switch { threshold: 8 },
            prompt_len,
        };
        assert_ne!(hashes(key(8), &TOKENS)[0], hashes(key(9), &TOKENS)[0]);
        assert_eq!(hashes(key(7), &TOKENS)[0], hashes(key(8), &TOKENS)[0]);
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
