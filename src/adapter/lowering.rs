//! The workbench of a kind: reads tensors by module and suffix, keeps account of them, and collects the result.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

use super::config::{Config, field_error};
use super::keys::{ModuleKeys, SharedKeys, group_by_site, key_of};
use super::kinds::Kind;
use super::matching::Matcher;
use super::tensor_file::TensorFile;
use super::{AdapterError, BaseWeights, LowerOptions, LoweredAdapter, Site, SiteId, SiteKind, Weight};

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
    /// How many linears are served in an unexpected way, by what is said of them.
    pub(super) paths: BTreeMap<&'static str, usize>,
    file: TensorFile<'a>,
    shared: SharedKeys,
    unread: ModuleKeys<SiteId>,
    absent: Option<AdapterError>,
    own_bytes: usize,
}

impl<'a> Lowering<'a> {
    /// Sorts the file's keys; refuses keys that no module or no suffix accounts for.
    pub(super) fn new(
        (config, kind, file): (Config, &'static Kind, TensorFile<'a>),
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
            paths: BTreeMap::new(),
            file,
            shared,
            unread,
            absent: None,
            own_bytes: 0,
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

    /// Takes a tensor of integers that the file must have, row by row, with its shape checked.
    pub(super) fn require_indexes(
        &mut self,
        site: SiteId,
        suffix: &str,
        expected: &[usize],
    ) -> Result<Vec<u32>, AdapterError> {
        let found = self.shape(site, suffix).ok_or_else(|| self.refuse(site, suffix, "is missing"))?;
        if found != expected {
            return Err(self.refuse(site, suffix, format!("expected shape {expected:?}, found {found:?}")));
        }
        let key = self.unread.get_mut(&site).and_then(|keys| keys.remove(suffix));
        self.file.read_indexes(&key.unwrap_or_default())
    }

    /// Shape of a tensor that belongs to no module and has not been taken yet.
    pub(super) fn shared_shape(&self, name: &str) -> Option<&[usize]> {
        self.file.shape(self.shared.get(name)?)
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
        let shared = self.shared.iter().next();
        match self.unread.values().flatten().next().or(shared) {
            Some((_, key)) => {
                let reason = "nothing in the config accounts for it".to_owned();
                Err(AdapterError::Tensor { tensor: key.clone(), reason })
            }
            None => Ok(()),
        }
    }

    /// Counts bytes of dense copies against the budget, before they are made.
    pub(super) fn reserve_own(&mut self, elements: usize) -> Result<(), AdapterError> {
        let bytes = elements.saturating_mul(self.options.dtype.size_in_bytes());
        self.own_bytes = self.own_bytes.saturating_add(bytes);
        let (needed, limit) = (self.own_bytes, self.options.own_bytes_max);
        if needed > limit { Err(AdapterError::OverBudget { needed, limit }) } else { Ok(()) }
    }

    /// Counts bytes of a dense copy against the budget if there is room for it; tells whether there is.
    pub(super) fn try_reserve_own(&mut self, elements: usize) -> bool {
        let before = self.own_bytes;
        let fits = self.reserve_own(elements).is_ok();
        if !fits {
            self.own_bytes = before;
        }
        fits
    }

    /// A dense weight or table in its final format. The caller has reserved its bytes.
    pub(super) fn own(&self, tensor: &Tensor) -> Result<Tensor, AdapterError> {
        Ok(tensor.to_dtype(self.options.dtype)?.contiguous()?)
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

    /// Number of modules that the result changes.
    pub(super) fn num_modules(&self) -> usize {
        let out = &self.out;
        let ids: BTreeSet<&SiteId> = out.linears.keys().chain(out.norms.keys()).chain(out.embeddings.keys()).collect();
        ids.len()
    }
}
