//! What is read after a panel of the base weight, asked for while that is multiplied.

use super::tile::Fetch;

/// What the panels of a piece need besides the base weight is asked for in shares, one with each tile, which asks for its
/// lines one after the other: more at once than the processor can wait for would hold it up.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// What is left to ask for, from `next` on.
    spans: Vec<Fetch>,
    next: usize,
    /// Lines of a share.
    lines: usize,
    /// Tiles before the first share.
    skip: usize,
    /// The parts of the last share.
    share: Vec<Fetch>,
    /// The block of a weight that is multiplied after the panel; the last block's tiles ask for it.
    pub(super) block: Fetch,
}

impl Ahead {
    /// Deals `parts` out in equal shares for the last `tiles` of `of_tiles`; nothing is left of what was there before.
    pub(super) fn start(&mut self, parts: impl Iterator<Item = Fetch>, tiles: usize, of_tiles: usize) {
        self.spans.clear();
        self.spans.extend(parts.filter(|span| span.lines > 0));
        self.next = 0;
        self.skip = of_tiles.saturating_sub(tiles);
        self.lines = self.spans.iter().map(|span| span.lines).sum::<usize>().div_ceil(tiles.min(of_tiles).max(1));
    }

    /// The next tile's share.
    pub(super) fn share(&mut self) -> Share<'_> {
        self.share.clear();
        if self.skip > 0 {
            self.skip -= 1;
            return Share::NONE;
        }
        let mut left = self.lines;
        while left > 0
            && let Some(span) = self.spans.get_mut(self.next)
        {
            let part = span.take(left);
            left -= part.lines;
            self.next += usize::from(span.lines == 0);
            self.share.push(part);
        }
        Share { part: Fetch::NONE, others: &self.share }
    }
}

/// Parts of memory that a tile asks for on its way, for a cache further away than the nearest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share<'a> {
    /// What is being asked for.
    part: Fetch,
    /// What comes after it.
    others: &'a [Fetch],
}

impl Share<'_> {
    /// Nothing.
    pub(super) const NONE: Self = Self { part: Fetch::NONE, others: &[] };

    /// Lines in all.
    pub(super) fn lines(&self) -> usize {
        self.part.lines + self.others.iter().map(|part| part.lines).sum::<usize>()
    }

    /// As many lines as are to be asked for each of `times` times.
    pub(super) fn lines_of(&self, times: usize) -> usize {
        // Asking ends with a part, whose rest is then less than that.
        self.lines().div_ceil(times.saturating_sub(self.others.len()).max(1))
    }

    /// What the `idx`th of `count` strips of the tile asks for.
    pub(super) fn of_strip(self, idx: usize, count: usize) -> Self {
        match self.others {
            [] => Self { part: self.part.share(idx, count), others: &[] },
            [only] if self.part.lines == 0 => Self { part: only.share(idx, count), others: &[] },
            parts => {
                let (from, to) = (parts.len() * idx / count, parts.len() * (idx + 1) / count);
                Self { part: if idx == 0 { self.part } else { Fetch::NONE }, others: &parts[from..to] }
            }
        }
    }

    /// Asks for the next up to `lines` lines.
    #[inline(always)]
    pub(super) fn next(&mut self, lines: usize) {
        if self.part.lines == 0 {
            let Some((part, others)) = self.others.split_first() else { return };
            *self = Self { part: *part, others };
        }
        self.part.next_far(lines);
    }

    /// Asks for everything.
    pub(super) fn all(mut self) {
        self.part.next_far(self.part.lines);
        for part in self.others {
            let mut part = *part;
            part.next_far(part.lines);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_asked_for_once_in_equal_shares() {
        let memory = vec![0_u32; 16 * 40];
        let lines = |part: &Fetch| ((part.at.addr() - memory.as_ptr().addr()) / 64, part.lines);
        let mut ahead = Ahead::default();
        let mut shares = |parts: [&[u32]; 3], tiles: usize| {
            ahead.start(parts.into_iter().map(Fetch::of), tiles, tiles + 2);
            assert_eq!([ahead.share().lines(), ahead.share().lines()], [0, 0]);
            let shares = std::iter::repeat_with(|| ahead.share().others.iter().map(lines).collect::<Vec<_>>());
            shares.take_while(|share| !share.is_empty()).collect::<Vec<_>>()
        };
        let parts = [&memory[..16 * 5], &memory[..0], &memory[16 * 5..16 * 21]];
        assert_eq!(shares(parts, 4), [vec![(0, 5), (5, 1)], vec![(6, 6)], vec![(12, 6)], vec![(18, 3)]]);
        assert_eq!(shares(parts, 1), [vec![(0, 5), (5, 16)]]);
        assert_eq!(shares([&memory[..0]; 3], 7), [[]; 0]);
    }

    #[test]
    fn a_tile_and_its_strips_ask_for_all_of_a_share() {
        let memory = vec![0_u32; 16 * 40];
        for lengths in [vec![], vec![7], vec![5, 16], vec![1, 2, 3, 4, 5]] {
            let parts: Vec<Fetch> = lengths.iter().map(|lines| Fetch::of(&memory[..16 * lines])).collect();
            let share = Share { part: Fetch::NONE, others: &parts };
            let total: usize = lengths.iter().sum();
            assert_eq!(share.lines(), total);
            for times in [10, 40] {
                let (mut asked, lines) = (share, share.lines_of(times));
                (0..times).for_each(|_| asked.next(lines));
                assert_eq!(asked.lines(), 0, "{lengths:?} in {times}");
            }
            for count in [1, 2, 4] {
                let strips = (0..count).map(|idx| share.of_strip(idx, count).lines());
                assert!(strips.sum::<usize>() >= total, "{lengths:?} by {count} strips");
            }
        }
    }
}
