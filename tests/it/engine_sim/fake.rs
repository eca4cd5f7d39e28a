//! The fake model, and the adapters and requests that go with it.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use candle_core::{Device, Result, Tensor};
use patchbay::adapter::{GateNetwork, GateRule, KvPrefix, LoadedAdapter, LoweredAdapter, NormOverride, SiteId};
use patchbay::engine::{Forward, ForwardLimits, GenerationRequest, SamplingParams};
use patchbay::model::{Batch, DeviceAdapter, RopeLengthRule};

pub(super) const VOCAB: usize = 32;

/// What the fake should do wrong in its next call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Fault {
    #[default]
    None,
    Error,
    Panic,
    Nan,
    Copy,
    CopyPanic,
}

/// What the fake tells the test, and the test the fake.
#[derive(Default)]
pub(super) struct Probe {
    pub(super) fault: Mutex<Fault>,
    pub(super) copies: AtomicUsize,
    pub(super) tokens: AtomicUsize,
    /// Entries of KV prefixes copied.
    pub(super) entries: AtomicUsize,
}

impl Probe {
    pub(super) fn set_fault(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    /// The fault, if it is one of `kinds`; it happens once.
    pub(super) fn take_fault(&self, kinds: &[Fault]) -> Fault {
        let mut fault = self.fault.lock().unwrap();
        if kinds.contains(&fault) { std::mem::take(&mut *fault) } else { Fault::None }
    }
}

/// Content of one KV slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Written {
    /// A token, or `VOCAB` and the row of a virtual token, or twice that and a copied entry.
    pub(super) token: u32,
    pub(super) position: u32,
    pub(super) adapter: Option<usize>,
    pub(super) regime: u64,
    /// Hash of the bare base's context up to here, where the adapter takes its gates from it.
    pub(super) gate: u64,
}

pub(super) struct FakeModel {
    pub(super) limits: ForwardLimits,
    pub(super) block_tokens: usize,
    pub(super) slots: Vec<Option<Written>>,
    pub(super) probe: Arc<Probe>,
}

impl FakeModel {
    pub(super) fn new(limits: ForwardLimits, block_tokens: usize, probe: Arc<Probe>) -> Self {
        Self { limits, block_tokens, slots: vec![None; limits.num_blocks * block_tokens], probe }
    }

    /// The adapter of each token. Checks that segments tile the tokens and that equal adapters adjoin, but for the tokens
    /// of adapters that can be asleep.
    pub(super) fn adapters(batch: &Batch) -> Vec<Option<usize>> {
        let mut adapters = Vec::new();
        let mut seen = HashSet::new();
        for segment in &batch.segments {
            assert_eq!(segment.start, adapters.len());
            assert!(segment.len > 0);
            let adapter = segment.adapter.as_deref().map(adapter_id);
            let may_repeat = adapter.is_none_or(|id| !lead(id).invocation.is_empty());
            assert!(seen.insert(adapter) || may_repeat, "adapter {adapter:?} has two segments");
            adapters.extend(std::iter::repeat_n(adapter, segment.len));
        }
        assert_eq!(adapters.len(), batch.token_ids.len());
        adapters
    }

    /// Each token's gate, and zero for tokens without one. The base's pass must hold the tokens that need one, in order.
    pub(super) fn gates(&mut self, batch: &Batch, adapters: &[Option<usize>]) -> Vec<u64> {
        let gated: Vec<usize> = (0..adapters.len()).filter(|idx| adapters[*idx] == Some(GATED)).collect();
        let mut gates = vec![0; adapters.len()];
        assert_eq!(batch.gate_pass.is_some(), !gated.is_empty(), "there is a pass where it is needed");
        let Some(pass) = &batch.gate_pass else { return gates };
        let pick = |values: &[u32]| gated.iter().map(|idx| values[*idx]).collect::<Vec<u32>>();
        assert_eq!(pass.token_ids, pick(&batch.token_ids));
        assert_eq!(pass.positions, pick(&batch.positions));
        assert_eq!(pass.rope_lens, pick(&batch.rope_lens));
        assert!(pass.slot_mapping.iter().all(|slot| !batch.slot_mapping.contains(slot)), "contexts share no slot");
        let bare = vec![None; gated.len()];
        assert_eq!(Self::adapters(pass), bare);
        self.write(pass, &bare, &vec![0; gated.len()]);
        let mut next = 0;
        for span in &pass.spans {
            for idx in span.start..span.start + span.len {
                gates[gated[idx]] = self.read(&span.block_table, pass.positions[idx] as usize, None);
            }
            next += span.len;
        }
        assert_eq!(next, gated.len());
        gates
    }

    pub(super) fn write(&mut self, batch: &Batch, adapters: &[Option<usize>], gates: &[u64]) {
        let copied: Vec<u32> = batch.prefix_writes.iter().flat_map(|write| write.slots.clone()).collect();
        let distinct: HashSet<_> = batch.slot_mapping.iter().chain(&copied).collect();
        assert_eq!(distinct.len(), batch.slot_mapping.len() + copied.len(), "two tokens are written to one slot");
        self.probe.entries.fetch_add(copied.len(), Ordering::SeqCst);
        for write in &batch.prefix_writes {
            let id = adapter_id(&write.adapter);
            assert!(write.first_entry + write.slots.len() <= lead(id).entries);
            for (entry, &slot) in (write.first_entry as u32..).zip(&write.slots) {
                let token = 2 * VOCAB as u32 + entry;
                self.slots[slot as usize] =
                    Some(Written { token, position: entry, adapter: Some(id), regime: 0, gate: 0 });
            }
        }
        let mut virtual_rows = HashMap::new();
        for run in &batch.virtual_runs {
            for (idx, row) in (run.start..run.start + run.len).zip(run.first_row..) {
                assert!(row < lead(adapter_id(&run.adapter)).virtual_tokens);
                assert_eq!(adapters[idx], Some(adapter_id(&run.adapter)));
                assert!(virtual_rows.insert(idx, row).is_none());
            }
        }
        for (idx, &slot) in batch.slot_mapping.iter().enumerate() {
            self.slots[slot as usize] = Some(Written {
                token: virtual_rows.get(&idx).map_or(batch.token_ids[idx], |row| (VOCAB + row) as u32),
                position: batch.positions[idx],
                adapter: adapters[idx],
                regime: self.limits.rope_length_rule.regime(batch.rope_lens[idx] as usize),
                gate: gates[idx],
            });
        }
    }

    /// Hash of the context up to `position`, read back through the block table.
    pub(super) fn read(&self, block_table: &[u32], position: usize, adapter: Option<usize>) -> u64 {
        let mut hash = mix(adapter.map_or(0, |adapter| adapter as u64 + 1));
        let mut regimes = HashSet::new();
        for idx in 0..=position {
            let slot = block_table[idx / self.block_tokens] as usize * self.block_tokens + idx % self.block_tokens;
            let written = self.slots[slot].expect("a slot is read before it is written");
            assert_eq!(written.position as usize, idx, "a slot of another position is read");
            let was_asleep = written.adapter.is_none() && adapter.is_some_and(|id| !lead(id).invocation.is_empty());
            assert!(written.adapter == adapter || was_asleep, "a slot of another adapter is read");
            let id = written.adapter.map_or(0, |id| id as u64 + 1);
            hash = mix(hash ^ u64::from(written.token) ^ (written.regime << 32) ^ (id << 16) ^ written.gate);
            if (written.token as usize) < 2 * VOCAB {
                regimes.insert(written.regime);
            }
        }
        let is_switch = matches!(self.limits.rope_length_rule, RopeLengthRule::Switch { .. });
        assert!(!is_switch || regimes.len() == 1, "a context mixes two sets of frequencies");
        hash
    }
}

impl Forward for FakeModel {
    fn limits(&self) -> ForwardLimits {
        self.limits
    }

    fn forward(&mut self, batch: &Batch) -> Result<Tensor> {
        self.probe.tokens.fetch_add(batch.token_ids.len(), Ordering::SeqCst);
        let adapters = Self::adapters(batch);
        let gates = self.gates(batch, &adapters);
        self.write(batch, &adapters, &gates);
        let fault = self.probe.take_fault(&[Fault::Error, Fault::Panic, Fault::Nan]);
        match fault {
            Fault::Error => candle_core::bail!("injected"),
            Fault::Panic => panic!("injected"),
            _ => {}
        }
        assert!(batch.logit_rows.is_sorted() && !batch.logit_rows.is_empty());
        let mut logits = Vec::new();
        let mut next_token = 0;
        for span in &batch.spans {
            assert_eq!(span.start, next_token, "spans tile the tokens");
            next_token += span.len;
            assert_eq!(batch.positions[next_token - 1] as usize, span.context_len - 1);
            for row in
                batch.logit_rows.iter().map(|row| *row as usize).filter(|row| (span.start..next_token).contains(row))
            {
                let hash = self.read(&span.block_table, batch.positions[row] as usize, adapters[row]);
                logits.extend((0..VOCAB as u64).map(|token| unit(mix(hash ^ mix(token))) * 8.0));
            }
        }
        assert_eq!(next_token, batch.token_ids.len());
        assert_eq!(logits.len(), batch.logit_rows.len() * VOCAB);
        if fault == Fault::Nan {
            logits[0] = f32::NAN;
        }
        Tensor::from_vec(logits, (batch.logit_rows.len(), VOCAB), &Device::Cpu)
    }

    fn adapter_to_device(&self, adapter: &LoweredAdapter) -> Result<DeviceAdapter> {
        self.probe.copies.fetch_add(1, Ordering::SeqCst);
        match self.probe.take_fault(&[Fault::Copy, Fault::CopyPanic]) {
            Fault::Copy => candle_core::bail!("injected"),
            Fault::CopyPanic => panic!("injected"),
            _ => Ok(DeviceAdapter::from_tensors(adapter.clone())),
        }
    }
}

/// One round of splitmix64.
pub(super) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A number in [0, 1).
pub(super) fn unit(hash: u64) -> f32 {
    (hash >> 40) as f32 / (1_u64 << 24) as f32
}

/// What a fake adapter puts before the prompt, and what wakes it.
#[derive(Default)]
pub(super) struct Lead {
    pub(super) entries: usize,
    pub(super) virtual_tokens: usize,
    pub(super) invocation: &'static [u32],
}

pub(super) fn lead(id: usize) -> Lead {
    match id {
        VIRTUAL => Lead { virtual_tokens: 3, ..Lead::default() },
        PREFIX => Lead { entries: 9, ..Lead::default() },
        BOTH => Lead { entries: 4, virtual_tokens: 2, ..Lead::default() },
        ASLEEP => Lead { invocation: &[15, 22], ..Lead::default() },
        _ => Lead::default(),
    }
}

pub(super) const VIRTUAL: usize = 3;
pub(super) const PREFIX: usize = 4;
pub(super) const BOTH: usize = 5;
pub(super) const ASLEEP: usize = 6;
pub(super) const GATED: usize = 7;

pub(super) fn adapter_id(adapter: &DeviceAdapter) -> usize {
    adapter.tensors.norms.keys().next().unwrap().0
}

/// An adapter that stays in memory, as in a store.
pub(super) fn adapter(id: usize) -> Arc<LoadedAdapter> {
    static KEPT: LazyLock<Mutex<HashMap<usize, Arc<LoadedAdapter>>>> = LazyLock::new(Mutex::default);
    let mut kept = KEPT.lock().unwrap();
    Arc::clone(kept.entry(id).or_insert_with(|| Arc::new(fresh_adapter(id))))
}

/// The same of one's own.
pub(super) fn fresh_adapter(id: usize) -> LoadedAdapter {
    let mut lowered = LoweredAdapter::default();
    lowered.norms.insert(SiteId(id), NormOverride::default());
    let rows = |count: usize| Tensor::zeros((count, 1), candle_core::DType::F32, &Device::Cpu).unwrap();
    let Lead { entries, virtual_tokens, invocation } = lead(id);
    lowered.virtual_tokens = (virtual_tokens > 0).then(|| rows(virtual_tokens));
    lowered.kv_prefix = (entries > 0).then(|| KvPrefix { layers: vec![(rows(entries), rows(entries))] });
    lowered.invocation_tokens = invocation.to_vec();
    lowered.gates = (id == GATED).then(|| GateNetwork { layers: Vec::new(), group: 1, rule: GateRule::default() });
    let digest = [id as u8; 32];
    LoadedAdapter { name: format!("adapter-{id}"), generation: 1, digest, lowered, bytes: 0, parts: Vec::new() }
}

pub(super) fn request(prompt: Vec<u32>, max_tokens: usize) -> GenerationRequest {
    GenerationRequest {
        prompt,
        adapter: None,
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens,
        stop_token_ids: Vec::new(),
        ignore_eos: false,
        logprobs: None,
        prompt_logprobs: None,
        cache_salt: None,
        satisfied: Arc::default(),
    }
}

pub(super) fn with_adapter(prompt: Vec<u32>, max_tokens: usize, id: usize) -> GenerationRequest {
    GenerationRequest { adapter: Some(adapter(id)), ..request(prompt, max_tokens) }
}
