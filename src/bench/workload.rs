//! Prompts, and which adapters match.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::plan::PlanError;

/// Times a prompt is drawn again because it was there before.
const DRAWS_MAX: usize = 100;

/// Random prompts, no two of them equal, so that no prefix cache can help.
pub(super) struct Prompts {
    random: ChaCha8Rng,
    vocab_size: usize,
    tokens: usize,
    /// Hashes of the prompts that were given out.
    seen: HashSet<u64>,
}

impl Prompts {
    /// Prompts of `tokens` ids below `vocab_size`.
    pub(super) fn new(seed: u64, vocab_size: usize, tokens: usize) -> Self {
        Self { random: ChaCha8Rng::seed_from_u64(seed), vocab_size, tokens, seen: HashSet::new() }
    }

    /// The next prompt as a JSON list.
    ///
    /// # Errors
    /// When so many prompts of this length cannot be told apart.
    pub(super) fn next(&mut self) -> Result<String, PlanError> {
        for _ in 0..DRAWS_MAX {
            let ids: Vec<usize> = (0..self.tokens).map(|_| self.random.random_range(0..self.vocab_size)).collect();
            let mut hasher = DefaultHasher::new();
            ids.hash(&mut hasher);
            if self.seen.insert(hasher.finish()) {
                let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
                return Ok(format!("[{}]", ids.join(",")));
            }
        }
        let reason = format!("{} ids below {} make too few different prompts", self.tokens, self.vocab_size);
        Err(PlanError::Argument { argument: "--prompt-tokens", reason })
    }

    /// The next `count` prompts.
    pub(super) fn take(&mut self, count: usize) -> Result<Vec<String>, PlanError> {
        (0..count).map(|_| self.next()).collect()
    }
}

/// The first `count` (or all) of the names that match the patterns: one of each pattern's in turn, each name once.
///
/// # Errors
/// When a pattern matches nothing, or fewer than `count` names match.
pub(super) fn choose(names: &[String], patterns: &[String], count: Option<usize>) -> Result<Vec<String>, PlanError> {
    let everything = ["*".to_owned()];
    let patterns = if patterns.is_empty() { &everything } else { patterns };
    let mut groups = Vec::new();
    for pattern in patterns {
        let group: Vec<&String> = names.iter().filter(|name| matches(pattern, name)).collect();
        if group.is_empty() && !names.is_empty() {
            return Err(PlanError::Argument { argument: "--names", reason: format!("no adapter matches `{pattern}`") });
        }
        groups.push(group);
    }
    let longest = groups.iter().map(Vec::len).max().unwrap_or(0);
    let mut chosen: Vec<String> = Vec::new();
    let mut taken = HashSet::new();
    for idx in 0..longest {
        for name in groups.iter().filter_map(|group| group.get(idx)) {
            if taken.insert(name.as_str()) {
                chosen.push((*name).clone());
            }
        }
    }
    match count {
        Some(count) if count > chosen.len() => {
            let reason = format!("asked for {count} adapters, the server has {} that match", chosen.len());
            Err(PlanError::Argument { argument: "--num-adapters", reason })
        }
        Some(count) => Ok(chosen[..count].to_vec()),
        None => Ok(chosen),
    }
}

/// Whether `name` is of the form `pattern`, where `*` stands for any text and `?` for one character.
fn matches(pattern: &str, name: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let name: Vec<char> = name.chars().collect();
    let (mut p, mut n) = (0, 0);
    // Where to go on when the text that the last star stands for must be longer.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == '?' || *c == name[n] => (p, n) = (p + 1, n + 1),
            _ => {
                let Some((at, from)) = star else { return false };
                star = Some((at, from + 1));
                (p, n) = (at + 1, from + 1);
            }
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn patterns_match_as_in_a_shell() {
        for (pattern, name) in
            [("*", ""), ("a*", "a"), ("a*c", "abcbc"), ("?-*", "x-1"), ("*-0?", "low-01"), ("a", "a")]
        {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [("", "a"), ("a*c", "abcb"), ("?", ""), ("a", "ab"), ("*-0?", "low-0"), ("a?", "a")] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn patterns_take_turns() {
        let names = owned(&["a-0", "a-1", "a-2", "b-0", "c-0"]);
        let chosen = |patterns: &[&str], count| choose(&names, &owned(patterns), count);
        assert_eq!(chosen(&["b-*", "a-*"], None).unwrap(), ["b-0", "a-0", "a-1", "a-2"]);
        assert_eq!(chosen(&["a-*", "*"], Some(3)).unwrap(), ["a-0", "a-1", "a-2"]);
        assert_eq!(chosen(&[], None).unwrap(), names);
        let refusal = |patterns: &[&str], count| chosen(patterns, count).unwrap_err().to_string();
        assert_eq!(refusal(&["a-*", "d"], None), "--names: no adapter matches `d`");
        assert_eq!(refusal(&["a-*"], Some(4)), "--num-adapters: asked for 4 adapters, the server has 3 that match");
    }

    #[test]
    fn prompts_are_all_different_and_follow_the_seed() {
        let prompts = |seed| Prompts::new(seed, 4, 3).take(40).unwrap();
        let first = prompts(1);
        assert_eq!(first, prompts(1));
        assert_ne!(first, prompts(2));
        assert_eq!(first.iter().collect::<HashSet<_>>().len(), 40);
        let ids: Vec<usize> = serde_json::from_str(&first[0]).unwrap();
        assert!(ids.len() == 3 && ids.iter().all(|id| *id < 4));
        let refusal = Prompts::new(1, 4, 3).take(65).unwrap_err().to_string();
        assert_eq!(refusal, "--prompt-tokens: 3 ids below 4 make too few different prompts");
    }
}
