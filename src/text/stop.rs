//! Stop strings: finds the first one in a stream of text and holds back no more than could begin one.

/// Looks for stop strings in text that arrives in pieces.
///
/// The match that completes first ends the text; of several that complete together the longest counts. So the result
/// does not depend on how the text is cut into pieces.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text that came in and was not let out; without a match it is always the beginning of some stop string.
    held: String,
    keep_match: bool,
}

/// What one piece of text led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStep {
    /// Text that may be shown now.
    pub text: String,
    /// Index of the stop string that was found; nothing may be pushed after that.
    pub hit: Option<usize>,
}

impl StopMatcher {
    /// A matcher for `stops` that cuts the text before the match. Empty strings are left out of account.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new(), keep_match: false }
    }

    /// The same matcher, but cutting the text behind the match.
    pub fn keeping_match(self) -> Self {
        Self { keep_match: true, ..self }
    }

    /// The stop string with this index.
    pub fn stop(&self, index: usize) -> &str {
        &self.stops[index]
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, piece: &str) -> StopStep {
        self.held.push_str(piece);
        if let Some((start, end, index)) = self.first_match() {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(if self.keep_match { end } else { start });
            return StopStep { text, hit: Some(index) };
        }
        let tail = self.held.split_off(self.held.len() - self.longest_beginning());
        StopStep { text: std::mem::replace(&mut self.held, tail), hit: None }
    }

    /// The text still held back, once no more will come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// (start, end, index) of the match that ends first; of several the one that starts first.
    fn first_match(&self) -> Option<(usize, usize, usize)> {
        let stops = self.stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty());
        stops
            .filter_map(|(index, stop)| self.held.find(stop).map(|start| (start, start + stop.len(), index)))
            .min_by_key(|&(start, end, index)| (end, start, index))
    }

    /// Bytes at the end of the held text that begin a stop string.
    fn longest_beginning(&self) -> usize {
        let held = self.held.as_bytes();
        let beginning = |stop: &String| {
            let longest = held.len().min(stop.len().saturating_sub(1));
            (1..=longest).rev().find(|&len| held.ends_with(&stop.as_bytes()[..len])).unwrap_or(0)
        };
        self.stops.iter().map(beginning).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All at once and by definition: try every end, then every stop string that could end there.
    fn naive(text: &str, stops: &[String]) -> (String, String, Option<usize>) {
        for end in 1..=text.len() {
            let ending = stops.iter().enumerate().filter(|(_, s)| !s.is_empty());
            let ending = ending.filter(|(_, s)| text.as_bytes()[..end].ends_with(s.as_bytes()));
            if let Some((index, stop)) = ending.min_by_key(|(index, s)| (usize::MAX - s.len(), *index)) {
                return (text[..end - stop.len()].to_owned(), text[..end].to_owned(), Some(index));
            }
        }
        (text.to_owned(), text.to_owned(), None)
    }

    fn run(mut matcher: StopMatcher, pieces: &[String]) -> (String, Option<usize>) {
        let mut text = String::new();
        for piece in pieces {
            let step = matcher.push(piece);
            text += &step.text;
            if step.hit.is_some() {
                return (text, step.hit);
            }
        }
        (text + &matcher.finish(), None)
    }

    #[test]
    fn holds_back_only_what_could_begin_a_stop_string() {
        let mut matcher = StopMatcher::new(vec!["\n\nUser:".to_owned(), "END".to_owned()]);
        assert_eq!(matcher.push("one E").text, "one ");
        assert_eq!(matcher.push("xit\n").text, "Exit");
        assert_eq!(matcher.push("\nUse").text, "");
        assert_eq!(matcher.push("ful").text, "\n\nUseful");
        let last = matcher.push(" ENDED");
        assert_eq!((last.text.as_str(), last.hit), (" ", Some(1)));
    }

    proptest! {
        #[test]
        fn equals_naive_search_however_the_text_is_cut(
            pieces in prop::collection::vec("[abé漢]{0,4}", 0..8),
            stops in prop::collection::vec("[abé漢]{0,4}", 0..4),
        ) {
            let (cut, kept, hit) = naive(&pieces.concat(), &stops);
            let matcher = StopMatcher::new(stops);
            prop_assert_eq!(run(matcher.clone(), &pieces), (cut, hit));
            prop_assert_eq!(run(matcher.keeping_match(), &pieces), (kept, hit));
        }

        #[test]
        fn what_is_held_back_begins_a_stop_string(
            pieces in prop::collection::vec("[ab漢]{0,3}", 1..6),
            stops in prop::collection::vec("[ab漢]{1,4}", 1..4),
        ) {
            let mut matcher = StopMatcher::new(stops.clone());
            for piece in &pieces {
                if matcher.push(piece).hit.is_some() {
                    break;
                }
                let held = &matcher.held;
                prop_assert!(held.is_empty() || stops.iter().any(|s| s.len() > held.len() && s.starts_with(held)));
            }
        }
    }
}
