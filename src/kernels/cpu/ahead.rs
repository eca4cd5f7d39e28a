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
    /// The block of a weight that is multiplied after the panel; the last block's tiles ask for it.
    pub(super) block: Fetch,
}

impl Ahead {
    /// Deals `parts` out in about `tiles` equal shares, each of one part, for the last `tiles` of `of_tiles`; nothing is left of
    /// what was there before. Where there are more parts than tiles, the last ones are not asked for.
    pub(super) fn start(&mut self, parts: impl Iterator<Item = Fetch>, tiles: usize, of_tiles: usize) {
        self.spans.clear();
        self.spans.extend(parts.filter(|span| span.lines > 0));
        self.next = 0;
        self.skip = of_tiles.saturating_sub(tiles);
        let shares = (tiles.min(of_tiles) / self.spans.len().max(1)).max(1);
        self.lines = self.spans.iter().map(|span| span.lines).max().unwrap_or(0).div_ceil(shares);
    }

    /// The next tile's share.
    pub(super) fn share(&mut self) -> Fetch {
        if self.skip > 0 {
            self.skip -= 1;
            return Fetch::NONE;
        }
        let Some(span) = self.spans.get_mut(self.next) else { return Fetch::NONE };
        let share = span.take(self.lines);
        self.next += usize::from(span.lines == 0);
        share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_asked_for_once_in_equal_shares() {
        let memory = vec![0_u32; 16 * 40];
        let mut ahead = Ahead::default();
        let mut shares = |parts: [&[u32]; 3], tiles: usize| {
            ahead.start(parts.into_iter().map(Fetch::of), tiles, tiles + 2);
            assert_eq!([ahead.share().lines, ahead.share().lines], [0, 0]);
            let shares = std::iter::repeat_with(|| ahead.share()).take_while(|share| share.lines > 0);
            shares.map(|share| ((share.at.addr() - memory.as_ptr().addr()) / 64, share.lines)).collect::<Vec<_>>()
        };
        let parts = [&memory[..16 * 5], &memory[..0], &memory[16 * 5..16 * 21]];
        assert_eq!(shares(parts, 4), [(0, 5), (5, 8), (13, 8)]);
        assert_eq!(shares(parts, 9), [(0, 4), (4, 1), (5, 4), (9, 4), (13, 4), (17, 4)]);
        assert_eq!(shares(parts, 1), [(0, 5), (5, 16)]);
        assert_eq!(shares([&memory[..0]; 3], 7), []);
    }
}
