//! Numbers for names, for clients that know adapters by number only.

use std::collections::{BTreeMap, HashMap, HashSet};

/// Most names without an adapter that keep their number.
const GONE_MAX: usize = 4096;

/// Names by number and numbers by name. Names are numbered as they are first listed; no number is given twice, so one
/// that a client remembers means the name it meant, or nothing.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    by_name: HashMap<String, usize>,
    by_number: BTreeMap<usize, String>,
    next: usize,
}

impl Numbers {
    /// Numbers those of the names that have no number. `names` are all that exist now, each once; of the others at most
    /// [`GONE_MAX`] are kept, those with the highest numbers, so that a name that comes back soon has its number again.
    pub(super) fn list(&mut self, names: &[&str]) {
        for name in names {
            if !self.by_name.contains_key(*name) {
                self.by_name.insert((*name).to_owned(), self.next);
                self.by_number.insert(self.next, (*name).to_owned());
                self.next += 1;
            }
        }
        let num_gone = self.by_name.len() - names.len();
        if num_gone <= GONE_MAX {
            return;
        }
        let existing: HashSet<&str> = names.iter().copied().collect();
        let gone = self.by_number.iter().filter(|(_, name)| !existing.contains(name.as_str()));
        let oldest: Vec<usize> = gone.map(|(number, _)| *number).take(num_gone - GONE_MAX).collect();
        for number in oldest {
            if let Some(name) = self.by_number.remove(&number) {
                self.by_name.remove(&name);
            }
        }
    }

    /// The name with this number.
    pub(super) fn name(&self, number: usize) -> Option<&str> {
        self.by_number.get(&number).map(String::as_str)
    }

    /// The number of a name.
    pub(super) fn number(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(range: std::ops::Range<usize>) -> Vec<String> {
        range.map(|at| format!("n{at}")).collect()
    }

    fn list(numbers: &mut Numbers, names: &[String]) {
        numbers.list(&names.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(numbers.by_name.len(), numbers.by_number.len());
    }

    #[test]
    fn names_keep_their_numbers_and_new_ones_get_the_next() {
        let mut numbers = Numbers::default();
        numbers.list(&["b", "d"]);
        numbers.list(&["a", "b", "d"]);
        numbers.list(&["a", "d"]);
        numbers.list(&["a", "b", "c", "d"]);
        assert_eq!(["b", "d", "a", "c"].map(|name| numbers.number(name)), [0, 1, 2, 3].map(Some));
        assert_eq!([0, 3, 4].map(|number| numbers.name(number)), [Some("b"), Some("c"), None]);
    }

    #[test]
    fn the_oldest_of_the_gone_names_give_up_their_numbers_which_nobody_gets_again() {
        let mut numbers = Numbers::default();
        let stays = "stays".to_owned();
        list(&mut numbers, &[vec![stays.clone()], names(0..GONE_MAX + 2)].concat());
        list(&mut numbers, &[stays.clone(), "n1".to_owned()]);
        // Number 0 still has an adapter, and so has n1; of the others just one is too many.
        assert_eq!((numbers.number("stays"), numbers.number("n1")), (Some(0), Some(2)));
        assert_eq!((numbers.number("n0"), numbers.name(1)), (None, None));
        assert_eq!(numbers.number("n2"), Some(3));
        list(&mut numbers, &[stays.clone(), "n0".to_owned(), "n2".to_owned()]);
        assert_eq!((numbers.number("n0"), numbers.number("n2")), (Some(GONE_MAX + 3), Some(3)));
        assert_eq!((numbers.name(1), numbers.number("n1")), (None, Some(2)));
        // However many names come and go, the table stays within its bound.
        for round in 0..4 {
            list(&mut numbers, &names(round * GONE_MAX..(round + 1) * GONE_MAX));
        }
        assert_eq!(numbers.by_name.len(), 2 * GONE_MAX);
        assert_eq!(numbers.number("stays"), None);
    }
}
