//! Which adapter sits in which device slot. Digests and integers only; the tensors are with the engine.
//!
//! A slot is pinned while running sequences use it. Unpinned slots keep their adapter until another needs the place;
//! the one unpinned longest ago leaves first.

use std::collections::HashMap;

/// Owns the accounting of all adapter slots.
#[derive(Debug)]
pub(super) struct SlotManager {
    slots: Vec<Slot>,
    by_digest: HashMap<[u8; 32], usize>,
    clock: u64,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    digest: Option<[u8; 32]>,
    pins: usize,
    /// Time of the last claim or unpin; 0 for a slot never used.
    used_at: u64,
}

impl SlotManager {
    /// All slots empty.
    pub(super) fn new(num_slots: usize) -> Self {
        assert!(num_slots > 0, "the config was checked");
        Self { slots: vec![Slot::default(); num_slots], by_digest: HashMap::new(), clock: 0 }
    }

    /// The slot that holds this adapter.
    pub(super) fn find(&self, digest: &[u8; 32]) -> Option<usize> {
        self.by_digest.get(digest).copied()
    }

    /// The slot that the next new adapter would get: an empty one, else the unpinned one unused for longest.
    pub(super) fn next_victim(&self) -> Option<usize> {
        let unpinned = self.slots.iter().enumerate().filter(|(_, slot)| slot.pins == 0);
        unpinned.min_by_key(|(_, slot)| (slot.digest.is_some(), slot.used_at)).map(|(slot_idx, _)| slot_idx)
    }

    /// Gives `slot_idx` (from [`Self::next_victim`]) to an adapter that holds no slot; what was there leaves.
    pub(super) fn replace(&mut self, slot_idx: usize, digest: [u8; 32]) {
        self.vacate(slot_idx);
        let previous = self.by_digest.insert(digest, slot_idx);
        assert_eq!(previous, None, "an adapter sits in one slot only");
        self.slots[slot_idx].digest = Some(digest);
        self.touch(slot_idx);
    }

    /// Whether no running sequence uses the slot.
    pub(super) fn is_unpinned(&self, slot_idx: usize) -> bool {
        self.slots[slot_idx].pins == 0
    }

    /// Empties an unpinned slot.
    pub(super) fn vacate(&mut self, slot_idx: usize) {
        let slot = &mut self.slots[slot_idx];
        assert_eq!(slot.pins, 0, "slot {slot_idx} is emptied while in use");
        if let Some(digest) = slot.digest.take() {
            let removed = self.by_digest.remove(&digest);
            assert_eq!(removed, Some(slot_idx), "a digest names its slot");
        }
    }

    /// One more running sequence uses the slot.
    pub(super) fn pin(&mut self, slot_idx: usize) {
        let slot = &mut self.slots[slot_idx];
        assert!(slot.digest.is_some(), "slot {slot_idx} is pinned while empty");
        slot.pins += 1;
    }

    /// One running sequence fewer uses the slot.
    pub(super) fn unpin(&mut self, slot_idx: usize) {
        let slot = &mut self.slots[slot_idx];
        assert!(slot.pins > 0, "slot {slot_idx} is unpinned too often");
        slot.pins -= 1;
        self.touch(slot_idx);
    }

    fn touch(&mut self, slot_idx: usize) {
        self.clock += 1;
        self.slots[slot_idx].used_at = self.clock;
    }

    /// Checks every invariant against the slots that running sequences use. For tests.
    pub(super) fn audit(&self, used: impl Iterator<Item = usize>) {
        let mut pins = vec![0; self.slots.len()];
        for slot_idx in used {
            pins[slot_idx] += 1;
        }
        for (slot_idx, slot) in self.slots.iter().enumerate() {
            assert_eq!(slot.pins, pins[slot_idx], "pins of slot {slot_idx}");
            assert!(slot.pins == 0 || slot.digest.is_some(), "slot {slot_idx} is used while empty");
            if let Some(digest) = &slot.digest {
                assert_eq!(self.find(digest), Some(slot_idx), "slot {slot_idx} is not found");
            }
        }
        let held = self.slots.iter().filter(|slot| slot.digest.is_some()).count();
        assert_eq!(held, self.by_digest.len(), "digests and held slots differ");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claim(slots: &mut SlotManager, adapter: u8) -> Option<usize> {
        let slot_idx = slots.next_victim()?;
        slots.replace(slot_idx, [adapter; 32]);
        Some(slot_idx)
    }

    #[test]
    fn pinned_slots_stay_and_the_longest_unused_leaves() {
        let mut slots = SlotManager::new(2);
        let a = claim(&mut slots, 1).unwrap();
        slots.pin(a);
        let b = claim(&mut slots, 2).unwrap();
        slots.pin(b);
        assert_eq!(claim(&mut slots, 3), None);
        slots.unpin(b);
        slots.unpin(a);
        assert_eq!(claim(&mut slots, 3), Some(b));
        assert_eq!(slots.find(&[2; 32]), None);
        assert_eq!(slots.find(&[1; 32]), Some(a));
    }

    #[test]
    fn empty_slots_are_filled_before_anyone_leaves() {
        let mut slots = SlotManager::new(3);
        let claimed: Vec<_> = (1..4).map(|adapter| claim(&mut slots, adapter).unwrap()).collect();
        assert_eq!(claimed, [0, 1, 2]);
        slots.vacate(1);
        assert_eq!(claim(&mut slots, 9), Some(1));
    }

    proptest! {
        /// Sequences of eight adapters come and go over one to four slots; the audit holds throughout.
        #[test]
        fn no_slot_leaks_or_serves_two(
            num_slots in 1_usize..5,
            ops in prop::collection::vec((any::<bool>(), 0_u8..8), 0..200),
        ) {
            let mut slots = SlotManager::new(num_slots);
            let mut used: Vec<(usize, u8)> = Vec::new();
            for (arrives, adapter) in ops {
                if arrives {
                    let slot_idx = slots.find(&[adapter; 32]).or_else(|| claim(&mut slots, adapter));
                    let pinned: std::collections::HashSet<_> = used.iter().map(|(slot_idx, _)| *slot_idx).collect();
                    let must_find = pinned.len() < num_slots || used.iter().any(|(_, other)| *other == adapter);
                    prop_assert_eq!(slot_idx.is_some(), must_find);
                    if let Some(slot_idx) = slot_idx {
                        slots.pin(slot_idx);
                        used.push((slot_idx, adapter));
                    }
                } else if !used.is_empty() {
                    let (slot_idx, _) = used.remove(adapter as usize % used.len());
                    slots.unpin(slot_idx);
                }
                slots.audit(used.iter().map(|(slot_idx, _)| *slot_idx));
                for (slot_idx, adapter) in &used {
                    prop_assert_eq!(slots.find(&[*adapter; 32]), Some(*slot_idx));
                }
            }
        }
    }
}
