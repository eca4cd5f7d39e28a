//! What the next panel reads besides the base weight, asked for while this one is multiplied.

use super::tile::Fetch;

/// Memory that is asked for a few lines at a time: more at once than the processor can wait for would hold it up.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// What is left to ask for, from `next` on.
    spans: Vec<Fetch>,
    next: usize,
    /// Lines to ask for at a time.
    lines: usize,
}

impl Ahead {
    /// Asks for `parts` in about `calls` equal shares, nothing of what was asked for before.
    pub(super) fn start<'a>(&mut self, parts: impl Iterator<Item = &'a [u32]>, calls: usize) {
        self.spans.clear();
        self.spans.extend(parts.map(Fetch::of));
        self.next = 0;
        self.lines = self.spans.iter().map(|span| span.lines).sum::<usize>().div_ceil(calls.max(1));
    }

    /// Asks for the next share.
    pub(super) fn share(&mut self) {
        let mut left = self.lines;
        while let Some(span) = self.spans.get_mut(self.next).filter(|_| left > 0) {
            let lines = left.min(span.lines);
            span.next_far(lines);
            left -= lines;
            self.next += usize::from(span.lines == 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_asked_for_once_in_equal_shares() {
        let memory = vec![0_u32; 16 * 40];
        let mut ahead = Ahead::default();
        ahead.start([&memory[..16 * 5], &memory[..0], &memory[16 * 5..16 * 21]].into_iter(), 4);
        let left = |ahead: &Ahead| ahead.spans.iter().map(|span| span.lines).sum::<usize>();
        let counts: Vec<usize> = (0..5)
            .map(|_| {
                let before = left(&ahead);
                ahead.share();
                before - left(&ahead)
            })
            .collect();
        assert_eq!(counts, [6, 6, 6, 3, 0]);
        ahead.start([&memory[..16]].into_iter(), 7);
        ahead.share();
        assert_eq!(left(&ahead), 0);
    }
}
