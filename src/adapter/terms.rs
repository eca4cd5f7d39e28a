//! Memory for the factors of low-rank deltas: asked for before they are made, since a small file can stand for large ones.

use super::lowering::Lowering;
use super::{AdapterError, Demand, Need, SiteId, SiteKind};

impl Lowering<'_> {
    /// Counts the factors of a low-rank delta of a linear, before they are made.
    pub(super) fn reserve_factors(&mut self, site: SiteId, rank: usize) -> Result<(), AdapterError> {
        self.made = self.granted(site, rank)?;
        Ok(())
    }

    /// Asks whether there is memory for the factors of a low-rank delta, for kinds that must make them before
    /// [`Lowering::add_low_rank`] decides what is kept. Where they may make way for a dense weight they are not asked for up
    /// to twice the rank that the matrix can have: so large they are at most for as long as the weight is made.
    pub(super) fn check_factors(&self, site: SiteId, rank: usize) -> Result<(), AdapterError> {
        if let SiteKind::Linear { in_features, out_features, .. } = self.site(site).kind
            && self.costs_more(site, rank)
            && rank <= 2 * in_features.min(out_features)
        {
            return Ok(());
        }
        self.granted(site, rank).map(drop)
    }

    /// Forgets the factors that are counted, since they are about to be merged.
    pub(super) fn release_terms(&mut self) {
        self.made.term_bytes = 0;
    }

    /// What lowering comes to with the factors a: (rank, in) and b: (out, rank), in their final format.
    fn granted(&self, site: SiteId, rank: usize) -> Result<Demand, AdapterError> {
        let SiteKind::Linear { in_features, out_features, .. } = self.site(site).kind else { return Ok(self.made) };
        let bytes = (in_features + out_features).saturating_mul(self.options.formats.matrices.size_in_bytes());
        let needed = self.made.term_bytes.saturating_add(bytes.saturating_mul(rank));
        let demand = Demand { term_bytes: needed, ..self.made };
        match self.ask {
            Some(ask) if !ask(demand, Need::Terms) => Err(AdapterError::OverMemory { needed }),
            Some(_) | None => Ok(demand),
        }
    }
}
