//! The workbench of a kind: reads tensors by module and suffix, keeps account of them, and collects the result.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

use super::config::{Config, field_error};
use super::keys::{ModuleKeys, SharedKeys, group_by_site, key_of};
use super::kinds::Kind;
use super::matching::Matcher;
use super::tensor_file::TensorFile;
use super::{
    AdapterError, AdapterFiles, BaseWeights, Delta, Demand, LowerOptions, LoweredAdapter, Need, OwnWeights, Site,
    SiteId, SiteKind, Weight,
};

/// Whether dense copies and low-rank deltas may take so many bytes in all.
pub(super) type Ask<'a> = dyn Fn(Demand, Need) -> bool + 'a;

/// What a kind lowers from and into. Tensors in `out` are f32, except whole weights and tables, which
/// [`Lowering::own`] stores in their final format at once.
pub(super) struct Lowering<'a> {
    /// The base model.
    pub(super) base: &'a dyn BaseWeights,
    /// How to lower.
    pub(super) options: LowerOptions,
    /// The config.
    pub(super) config: Config,
    /// The row of the table of kinds.
    pub(super) kind: &'static Kind,
    /// The result so far.
    pub(super) out: LoweredAdapter,
    /// Ranks found.
    pub(super) ranks: BTreeSet<usize>,
    /// What is odd but not wrong.
    pub(super) warnings: Vec<String>,
    /// The adapters in sub-directories beside it, as many as the config names.
    pub(super) parts: &'a [AdapterFiles],
    /// Keep terms that a dense weight would serve cheaper.
    pub(super) keep_terms: bool,
    /// Who may grant more dense copies than the options, and low-rank deltas; without it these have no bound.
    pub(super) ask: Option<&'a Ask<'a>>,
    /// Bytes made so far, as far as they are asked for.
    pub(super) made: Demand,
    file: TensorFile<'a>,
    unread: ModuleKeys<SiteId>,
    shared: SharedKeys,
    absent: Option<AdapterError>,
    own_reasons: BTreeMap<SiteId, &'static str>,
    without_room: BTreeSet<SiteId>,
}

impl<'a> Lowering<'a> {
    /// Sorts the file's keys; refuses keys that no module or no suffix accounts for.
    pub(super) fn new(
        (config, kind, file, parts): (Config, &'static Kind, TensorFile<'a>, &'a [AdapterFiles]),
        base: &'a dyn BaseWeights,
        options: LowerOptions,
    ) -> Result<Self, AdapterError> {
        let (unread, shared) = group_by_site(&file, base.sites(), kind)?;
        Ok(Self {
            base,
            options,
            config,
            kind,
            out: LoweredAdapter::default(),
            ranks: BTreeSet::new(),
            warnings: Vec::new(),
            parts,
            keep_terms: false,
            ask: None,
            made: Demand::default(),
            file,
            unread,
            shared,
            absent: None,
            own_reasons: BTreeMap::new(),
            without_room: BTreeSet::new(),
        })
    }

    /// The site with this id. The borrow is that of the base model, not of this struct.
    pub(super) fn site(&self, id: SiteId) -> &'a Site {
        self.base.sites().get(id)
    }

    /// The error for a module's tensor.
    pub(super) fn refuse(&self, site: SiteId, suffix: &str, reason: impl Into<String>) -> AdapterError {
        let key = self.unread.get(&site).and_then(|keys| keys.get(suffix)).cloned();
        let tensor = key.unwrap_or_else(|| key_of(&self.site(site).path, suffix));
        AdapterError::Tensor { tensor, reason: reason.into() }
    }

    /// Whether the file still has this tensor.
    pub(super) fn has(&self, site: SiteId, suffix: &str) -> bool {
        self.unread.get(&site).is_some_and(|keys| keys.contains_key(suffix))
    }

    /// Shape of a tensor that has not been taken yet.
    pub(super) fn shape(&self, site: SiteId, suffix: &str) -> Option<&[usize]> {
        self.file.shape(self.unread.get(&site)?.get(suffix)?)
    }

    /// Takes a tensor in f32; its shape must be `expected`. `None` when the file does not have it.
    pub(super) fn take(
        &mut self,
        site: SiteId,
        suffix: &str,
        expected: &[usize],
    ) -> Result<Option<Tensor>, AdapterError> {
        match self.shape(site, suffix) {
            None => return Ok(None),
            Some(found) if found != expected => {
                return Err(self.refuse(site, suffix, format!("expected shape {expected:?}, found {found:?}")));
            }
            Some(_) => {}
        }
        let key = self.unread.get_mut(&site).and_then(|keys| keys.remove(suffix));
        key.map(|key| self.file.read_f32(&key)).transpose()
    }

    /// Takes a tensor that the file must have.
    pub(super) fn require(&mut self, site: SiteId, suffix: &str, expected: &[usize]) -> Result<Tensor, AdapterError> {
        let tensor = self.take(site, suffix, expected)?;
        tensor.ok_or_else(|| self.refuse(site, suffix, "is missing"))
    }

    /// Takes a tensor of integers that the file must have, row by row; each must be below `limit`.
    pub(super) fn require_indexes(
        &mut self,
        site: SiteId,
        suffix: &str,
        (expected, limit): (&[usize], usize),
    ) -> Result<Vec<usize>, AdapterError> {
        match self.shape(site, suffix) {
            None => return Err(self.refuse(site, suffix, "is missing")),
            Some(found) if found != expected => {
                return Err(self.refuse(site, suffix, format!("expected shape {expected:?}, found {found:?}")));
            }
            Some(_) => {}
        }
        let key = self.unread.get_mut(&site).and_then(|keys| keys.remove(suffix)).unwrap_or_default();
        indexes(self.file.read_integers(&key)?, limit).map_err(|reason| AdapterError::Tensor { tensor: key, reason })
    }

    /// Shape of a tensor that belongs to no module and has not been taken yet.
    pub(super) fn shared_shape(&self, name: &str) -> Option<&[usize]> {
        self.file.shape(self.shared.get(name)?)
    }

    /// Whether the name of a tensor that belongs to no module, and has not been taken yet, has these first components.
    pub(super) fn has_shared_below(&self, components: &str) -> bool {
        let is_below = |name: &String| name.strip_prefix(components).is_some_and(|rest| rest.starts_with('.'));
        self.shared.keys().any(is_below)
    }

    /// The error for a tensor that belongs to no module.
    pub(super) fn refuse_shared(&self, name: &str, reason: impl Into<String>) -> AdapterError {
        let key = self.shared.get(name).map_or(name, String::as_str);
        AdapterError::Tensor { tensor: key.to_owned(), reason: reason.into() }
    }

    /// Takes a tensor that belongs to no module and that the file must have, in f32, with its shape checked.
    pub(super) fn require_shared(&mut self, name: &str, expected: &[usize]) -> Result<Tensor, AdapterError> {
        let key = self.take_shared_key(name, expected)?;
        self.file.read_f32(&key)
    }

    /// Takes a tensor of integers that belongs to no module and that the file must have; each must be below `limit`.
    pub(super) fn require_shared_indexes(
        &mut self,
        name: &str,
        (expected, limit): (&[usize], usize),
    ) -> Result<Vec<usize>, AdapterError> {
        let key = self.take_shared_key(name, expected)?;
        indexes(self.file.read_integers(&key)?, limit).map_err(|reason| AdapterError::Tensor { tensor: key, reason })
    }

    fn take_shared_key(&mut self, name: &str, expected: &[usize]) -> Result<String, AdapterError> {
        match self.shared_shape(name) {
            None => return Err(self.refuse_shared(name, "is missing")),
            Some(found) if found != expected => {
                return Err(self.refuse_shared(name, format!("expected shape {expected:?}, found {found:?}")));
            }
            Some(_) => {}
        }
        Ok(self.shared.remove(name).unwrap_or_default())
    }

    /// Forgets a tensor that has no effect when serving.
    pub(super) fn discard(&mut self, site: SiteId, suffix: &str) {
        if let Some(keys) = self.unread.get_mut(&site) {
            keys.remove(suffix);
        }
    }

    /// The suffixes of this kind that a module still has, in alphabetical order.
    pub(super) fn kind_suffixes(&self, site: SiteId) -> Vec<&str> {
        let keys = self.unread.get(&site).into_iter().flatten();
        keys.map(|(suffix, _)| suffix.as_str()).filter(|suffix| self.kind.suffixes.contains(suffix)).collect()
    }

    /// Sites with a tensor that has not been taken yet.
    pub(super) fn unread_sites(&self) -> Vec<SiteId> {
        self.unread.iter().filter(|(_, keys)| !keys.is_empty()).map(|(site, _)| *site).collect()
    }

    /// The modules that `matcher` names and that have tensors of this kind. Each must satisfy `fits`. Named modules
    /// without tensors are a fault that [`Lowering::check_complete`] reports, after the faults of tensors.
    pub(super) fn targets(
        &mut self,
        matcher: &Matcher,
        fits: impl Fn(&SiteKind) -> bool,
    ) -> Result<Vec<SiteId>, AdapterError> {
        let (mut targets, mut named) = (Vec::new(), Vec::new());
        for (id, site) in self.base.sites().iter() {
            if !matcher.matches(site)? {
                continue;
            }
            if !fits(&site.kind) {
                let reason = format!("names `{}`, which is {}", site.path, site.kind.noun());
                return Err(field_error(matcher.field, reason));
            }
            named.push(site.path.as_str());
            if !self.kind_suffixes(id).is_empty() {
                targets.push(id);
            } else if self.absent.is_none() {
                let reason = format!("names `{}`, for which the file has no tensor", site.path);
                self.absent = Some(field_error(matcher.field, reason));
            }
        }
        if named.is_empty() && !matcher.is_unset() && self.absent.is_none() {
            self.absent = Some(field_error(matcher.field, "matches no module of the base model"));
        }
        for name in matcher.idle_names(&named) {
            self.warnings.push(format!("`{name}` in `{}` matches no module that is adapted", matcher.field));
        }
        Ok(targets)
    }

    /// Refuses a file with a tensor that nobody took, or without tensors for a module that the config names.
    pub(super) fn check_complete(&mut self) -> Result<(), AdapterError> {
        if let Some(fault) = self.absent.take() {
            return Err(fault);
        }
        match self.unread.values().flat_map(BTreeMap::values).chain(self.shared.values()).next() {
            Some(key) => {
                let reason = "nothing in the config accounts for it".to_owned();
                Err(AdapterError::Tensor { tensor: key.clone(), reason })
            }
            None => Ok(()),
        }
    }

    /// Counts bytes of dense copies against the budget, before they are made.
    pub(super) fn reserve_own(&mut self, elements: usize) -> Result<(), AdapterError> {
        let bytes = elements.saturating_mul(self.options.formats.matrices.size_in_bytes());
        let needed = self.made.own_bytes.saturating_add(bytes);
        if !self.has_room(needed, Need::Only) {
            return Err(AdapterError::OverBudget { needed, limit: self.options.own_bytes_max });
        }
        self.made.own_bytes = needed;
        Ok(())
    }

    /// Whether dense copies may take `needed` bytes in all.
    fn has_room(&mut self, needed: usize, need: Need) -> bool {
        let demand = Demand { own_bytes: needed, ..self.made };
        if needed > self.options.own_bytes_max && self.ask.is_some_and(|ask| ask(demand, need)) {
            self.options.own_bytes_max = needed;
        }
        needed <= self.options.own_bytes_max
    }

    /// Gives a linear a dense weight of its own, made from the one it has (out, in) in f32. `reason` is for the report.
    pub(super) fn serve_own(
        &mut self,
        site: SiteId,
        reason: &'static str,
        make: impl FnOnce(Tensor) -> Result<Tensor, AdapterError>,
    ) -> Result<(), AdapterError> {
        if !self.has_own(site) {
            self.reserve_own(self.site(site).kind.num_elements())?;
        }
        let weight = make(self.weight(site)?)?;
        let own = self.own(&weight)?;
        self.out.linears.entry(site).or_default().weight = Weight::Own(own);
        self.explain_own(site, reason);
        Ok(())
    }

    /// Gives an embedding a table of its own, made from the one it has (vocab, dim) in f32. `reason` is for the report.
    pub(super) fn serve_own_table(
        &mut self,
        site: SiteId,
        reason: &'static str,
        make: impl FnOnce(Tensor) -> Result<Tensor, AdapterError>,
    ) -> Result<(), AdapterError> {
        let table = match self.out.embeddings.get(&site).and_then(|patch| patch.table.as_ref()) {
            Some(table) => table.to_dtype(candle_core::DType::F32)?,
            None => {
                self.reserve_own(self.site(site).kind.num_elements())?;
                self.base.weight(site)?
            }
        };
        let own = self.own(&make(table)?)?;
        self.out.embeddings.entry(site).or_default().table = Some(own);
        self.explain_own(site, reason);
        Ok(())
    }

    /// Adds `b a` to a linear, a: (r, in), b: (out, r), both f32; see [`Lowering::add_product`].
    pub(super) fn add_low_rank(&mut self, site: SiteId, a: Tensor, b: Tensor) -> Result<(), AdapterError> {
        let (rank, left, right) = (a.dim(0)?, b.clone(), a.clone());
        self.add_product(site, rank, || Ok((a, b)), || left.matmul(&right))
    }

    /// Adds a matrix of rank `rank` to a linear, in f32: as the factors a: (rank, in) and b: (out, rank), or where these
    /// cost more than a dense weight and the budget has room for one, as the matrix (out, in) in an own weight. Only the
    /// form that is chosen is computed.
    pub(super) fn add_product(
        &mut self,
        site: SiteId,
        rank: usize,
        factors: impl FnOnce() -> candle_core::Result<(Tensor, Tensor)>,
        matrix: impl FnOnce() -> candle_core::Result<Tensor>,
    ) -> Result<(), AdapterError> {
        if self.costs_more(site, rank) && self.finds_room(site) {
            let reason = "a low-rank delta of this rank would cost more than a dense weight";
            return self.serve_own(site, reason, |weight| Ok((weight + matrix()?)?));
        }
        self.reserve_factors(site, rank)?;
        let (a, b) = factors()?;
        self.out.linears.entry(site).or_default().deltas.push(Delta::LowRank { a, b });
        Ok(())
    }

    /// Whether the factors of a low-rank delta have more elements than a linear's weight; never where terms are kept.
    pub(super) fn costs_more(&self, site: SiteId, rank: usize) -> bool {
        if self.keep_terms {
            return false;
        }
        match self.site(site).kind {
            SiteKind::Linear { in_features, out_features, .. } => {
                rank.saturating_mul(in_features + out_features) > in_features * out_features
            }
            SiteKind::Norm { .. } | SiteKind::Embedding { .. } => false,
        }
    }

    /// Whether the budget has room for a dense weight of this linear; if not, that is remembered for the report.
    pub(super) fn finds_room(&mut self, site: SiteId) -> bool {
        if self.keep_terms {
            return false;
        }
        let bytes = self.site(site).kind.num_elements().saturating_mul(self.options.formats.matrices.size_in_bytes());
        let fits = self.has_own(site) || self.has_room(self.made.own_bytes.saturating_add(bytes), Need::Cheaper);
        if !fits {
            self.without_room.insert(site);
        }
        fits
    }

    /// What to say of linears that are served from a delta although a dense weight would cost less.
    pub(super) fn warn_of_room(&mut self) {
        if !self.without_room.is_empty() {
            self.warnings.push(format!(
                "{} linears keep a delta that costs more than a dense weight, for which adapters.merged_bytes_max has no room",
                self.without_room.len()
            ));
        }
    }

    fn has_own(&self, site: SiteId) -> bool {
        self.out.linears.get(&site).is_some_and(|slots| matches!(slots.weight, Weight::Own(_)))
    }

    /// Notes why a module has a dense weight or table of its own, for the report. The first reason stays.
    pub(super) fn explain_own(&mut self, site: SiteId, reason: &'static str) {
        self.own_reasons.entry(site).or_insert(reason);
    }

    /// Why a module has a dense weight or table of its own.
    pub(super) fn own_reason(&self, site: SiteId) -> Option<&'static str> {
        self.own_reasons.get(&site).copied()
    }

    /// The tensors that are not of this kind (replaced modules and biases), under their usual keys, in f32. They are read
    /// and not taken.
    pub(super) fn other_tensors(&self) -> Result<Vec<(String, Tensor)>, AdapterError> {
        let mut others = Vec::new();
        for (site, keys) in &self.unread {
            for (suffix, key) in keys.iter().filter(|(suffix, _)| !self.kind.suffixes.contains(&suffix.as_str())) {
                others.push((key_of(&self.site(*site).path, suffix), self.file.read_f32(key)?));
            }
        }
        Ok(others)
    }

    /// The modules with dense weights or tables of their own, counted by reason.
    pub(super) fn own_weights(&self) -> Vec<OwnWeights> {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        self.own_reasons.values().for_each(|reason| *counts.entry(reason).or_default() += 1);
        counts.into_iter().map(|(reason, modules)| OwnWeights { modules, reason: reason.to_owned() }).collect()
    }

    /// A dense weight or table in its final format. The caller has reserved its bytes.
    pub(super) fn own(&self, tensor: &Tensor) -> Result<Tensor, AdapterError> {
        Ok(tensor.to_dtype(self.options.formats.matrices)?.contiguous()?)
    }

    /// The weight that a linear's deltas belong to, in f32: the adapter's own where it has one.
    pub(super) fn weight(&self, site: SiteId) -> Result<Tensor, AdapterError> {
        match self.out.linears.get(&site).map(|slots| &slots.weight) {
            Some(Weight::Own(weight)) => Ok(weight.to_dtype(candle_core::DType::F32)?),
            Some(Weight::Base) | None => Ok(self.base.weight(site)?),
        }
    }

    /// The vector a linear adds last, in f32, as it stands now.
    pub(super) fn bias(&self, site: SiteId) -> Result<Option<Tensor>, AdapterError> {
        match self.out.linears.get(&site).and_then(|slots| slots.c.clone()) {
            Some(c) => Ok(Some(c)),
            None => Ok(self.base.bias(site)?),
        }
    }

    /// Sites that are embeddings.
    pub(super) fn embeddings(&self) -> Vec<SiteId> {
        let sites = self.base.sites().iter();
        sites.filter(|(_, site)| matches!(site.kind, SiteKind::Embedding { .. })).map(|(id, _)| id).collect()
    }

    /// The output head, when its weight is the input embedding's.
    pub(super) fn tied_head(&self) -> Option<SiteId> {
        let mut sites = self.base.sites().iter();
        let head = sites.find(|(_, site)| matches!(site.kind, SiteKind::Linear { output_head: true, .. }));
        head.filter(|_| self.base.tied_embeddings()).map(|(id, _)| id)
    }

    /// Number of modules that the result changes; a part of a layer counts as one.
    pub(super) fn num_modules(&self) -> usize {
        let out = &self.out;
        let ids: BTreeSet<&SiteId> = out.linears.keys().chain(out.norms.keys()).chain(out.embeddings.keys()).collect();
        ids.len() + out.layers.values().map(super::LayerSlots::len).sum::<usize>()
    }
}

/// Numbers as indexes below `limit`, or what is wrong with them.
fn indexes(values: Vec<i64>, limit: usize) -> Result<Vec<usize>, String> {
    let index = |value: i64| {
        let index = usize::try_from(value).ok().filter(|index| *index < limit);
        index.ok_or_else(|| format!("expected indexes below {limit}, found {value}"))
    };
    values.into_iter().map(index).collect()
}
