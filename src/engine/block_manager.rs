//! Who owns which KV block. Integers only; the bytes are the model's.
//!
//! A block is in exactly one of three states: free (content void), referenced (in the tables of `ref_count` sequences),
//! or cached (unreferenced, but its content is known by hash and can be taken up again until it is evicted). Only full
//! blocks are ever published under a hash, and a published block is never written again, so sharing needs no copies.

use std::collections::{BTreeMap, HashMap};

use super::prefix::BlockHash;

/// Owns the accounting of all KV blocks.
#[derive(Debug)]
pub(super) struct BlockManager {
    blocks: Vec<Block>,
    free: Vec<u32>,
    by_hash: HashMap<BlockHash, u32>,
    /// Cached blocks by the time they were released; the first is evicted first.
    cached: BTreeMap<u64, u32>,
    clock: u64,
}

#[derive(Clone, Debug, Default)]
struct Block {
    ref_count: usize,
    hash: Option<BlockHash>,
    /// Key in `cached` while the block is there.
    released_at: u64,
}

/// Leading blocks of a sequence found in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PrefixHits {
    /// How many.
    pub(super) blocks: usize,
    /// How many of them are unreferenced; taking them up lowers [`BlockManager::available`].
    pub(super) unreferenced: usize,
}

impl BlockManager {
    /// All blocks free.
    pub(super) fn new(num_blocks: usize) -> Self {
        let last = u32::try_from(num_blocks).expect("the runner bounds slots, and so blocks, by u32");
        Self {
            blocks: vec![Block::default(); num_blocks],
            free: (0..last).rev().collect(),
            by_hash: HashMap::new(),
            cached: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Blocks there are.
    pub(super) fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that can be allocated now: free ones, and cached ones by eviction.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.cached.len()
    }

    /// Blocks that sequences refer to.
    pub(super) fn in_use(&self) -> usize {
        self.total() - self.available()
    }

    /// Whether exactly one sequence refers to the block and its content is not published: only then it may be written.
    pub(super) fn is_writable(&self, block: u32) -> bool {
        let block = &self.blocks[block as usize];
        block.ref_count == 1 && block.hash.is_none()
    }

    /// How many of `hashes`, from the first on, are cached.
    pub(super) fn find_prefix(&self, hashes: &[BlockHash]) -> PrefixHits {
        let mut hits = PrefixHits { blocks: 0, unreferenced: 0 };
        for hash in hashes {
            let Some(&block) = self.by_hash.get(hash) else { break };
            hits.blocks += 1;
            hits.unreferenced += usize::from(self.blocks[block as usize].ref_count == 0);
        }
        hits
    }

    /// Adds a reference to the block with this content, which must be cached.
    pub(super) fn take_cached(&mut self, hash: &BlockHash) -> u32 {
        let block_id = self.by_hash[hash];
        let block = &mut self.blocks[block_id as usize];
        if block.ref_count == 0 {
            let removed = self.cached.remove(&block.released_at);
            assert_eq!(removed, Some(block_id), "an unreferenced block with a hash is in the cached list");
        }
        block.ref_count += 1;
        block_id
    }

    /// A block to write to, with one reference; evicts the cached block that was released first when none is free.
    pub(super) fn allocate(&mut self) -> Option<u32> {
        let block_id = self.free.pop().or_else(|| self.evict())?;
        let block = &mut self.blocks[block_id as usize];
        assert!(block.ref_count == 0 && block.hash.is_none(), "block {block_id} is allocated while in use");
        block.ref_count = 1;
        Some(block_id)
    }

    /// Makes a full block's content known under its hash. A second block of the same content stays unknown.
    pub(super) fn publish(&mut self, block_id: u32, hash: BlockHash) {
        let block = &mut self.blocks[block_id as usize];
        assert!(block.ref_count > 0, "block {block_id} is published while nobody refers to it");
        if block.hash.is_none() && !self.by_hash.contains_key(&hash) {
            block.hash = Some(hash);
            self.by_hash.insert(hash, block_id);
        }
    }

    /// Drops one reference of each block. Later blocks of the table are released first, so that eviction takes a prefix
    /// apart from its end.
    pub(super) fn release(&mut self, block_table: &[u32]) {
        for &block_id in block_table.iter().rev() {
            let block = &mut self.blocks[block_id as usize];
            assert!(block.ref_count > 0, "block {block_id} is released twice");
            block.ref_count -= 1;
            if block.ref_count > 0 {
                continue;
            }
            if block.hash.is_some() {
                self.clock += 1;
                block.released_at = self.clock;
                self.cached.insert(self.clock, block_id);
            } else {
                self.free.push(block_id);
            }
        }
        assert!(self.available() <= self.total(), "more blocks are available than there are");
    }

    fn evict(&mut self) -> Option<u32> {
        let (_, block_id) = self.cached.pop_first()?;
        let hash = self.blocks[block_id as usize].hash.take().expect("a cached block has a hash");
        let removed = self.by_hash.remove(&hash);
        assert_eq!(removed, Some(block_id), "a published hash names its block");
        Some(block_id)
    }

    /// Checks every invariant against the tables that refer to blocks, in time linear in the blocks. For tests.
    pub(super) fn audit<'a>(&self, block_tables: impl Iterator<Item = &'a [u32]>) {
        let mut ref_counts = vec![0; self.total()];
        for block_id in block_tables.flatten() {
            ref_counts[*block_id as usize] += 1;
        }
        let mut listed = vec![0; self.total()];
        for (block_id, is_cached) in
            self.free.iter().map(|id| (*id, false)).chain(self.cached.values().map(|id| (*id, true)))
        {
            listed[block_id as usize] += 1;
            assert_eq!(
                self.blocks[block_id as usize].hash.is_some(),
                is_cached,
                "block {block_id} is in the wrong list"
            );
        }
        for (block_id, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.ref_count, ref_counts[block_id], "references of block {block_id}");
            assert_eq!(listed[block_id], usize::from(block.ref_count == 0), "block {block_id} is lost or listed twice");
        }
        let published = self.blocks.iter().filter(|block| block.hash.is_some()).count();
        assert_eq!(published, self.by_hash.len(), "hashes and published blocks differ");
        for (hash, block_id) in &self.by_hash {
            assert_eq!(self.blocks[*block_id as usize].hash.as_ref(), Some(hash), "a hash names another's block");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hash(content: u8) -> BlockHash {
        BlockHash([content; 32])
    }

    #[test]
    fn blocks_run_out_and_come_back() {
        let mut blocks = BlockManager::new(2);
        let table = [blocks.allocate().unwrap(), blocks.allocate().unwrap()];
        assert_eq!(blocks.allocate(), None);
        assert_eq!(blocks.in_use(), 2);
        blocks.release(&table);
        assert_eq!(blocks.available(), 2);
        blocks.audit(std::iter::empty());
    }

    #[test]
    fn released_published_block_is_found_until_evicted() {
        let mut blocks = BlockManager::new(1);
        let block = blocks.allocate().unwrap();
        blocks.publish(block, hash(1));
        blocks.release(&[block]);
        assert_eq!(blocks.find_prefix(&[hash(1), hash(2)]), PrefixHits { blocks: 1, unreferenced: 1 });
        assert_eq!(blocks.take_cached(&hash(1)), block);
        assert!(!blocks.is_writable(block));
        blocks.release(&[block]);
        assert_eq!(blocks.allocate(), Some(block));
        assert!(blocks.is_writable(block));
        assert_eq!(blocks.find_prefix(&[hash(1)]).blocks, 0);
    }

    #[test]
    fn eviction_takes_the_longest_unused_prefix_from_its_end() {
        let mut blocks = BlockManager::new(3);
        let tables: Vec<u32> = (0..3).map(|_| blocks.allocate().unwrap()).collect();
        for (content, block) in tables.iter().enumerate() {
            blocks.publish(*block, hash(content as u8));
        }
        blocks.release(&tables[..2]);
        blocks.release(&tables[2..]);
        assert_eq!(blocks.allocate(), Some(tables[1]));
        assert_eq!(blocks.allocate(), Some(tables[0]));
        assert_eq!(blocks.allocate(), Some(tables[2]));
    }

    #[test]
    fn two_blocks_of_equal_content_are_published_once() {
        let mut blocks = BlockManager::new(2);
        let table = [blocks.allocate().unwrap(), blocks.allocate().unwrap()];
        blocks.publish(table[0], hash(1));
        blocks.publish(table[1], hash(1));
        assert!(blocks.is_writable(table[1]));
        blocks.release(&table);
        blocks.audit(std::iter::empty());
        assert_eq!(blocks.find_prefix(&[hash(1)]).blocks, 1);
    }

    proptest! {
        /// Tables grow, publish, share and go in any order; the audit holds throughout and nothing leaks.
        #[test]
        fn no_block_leaks_or_is_used_twice(
            num_blocks in 1_usize..9,
            ops in prop::collection::vec((0_u8..4, 0_usize..4, 0_u8..6), 0..200),
        ) {
            let mut blocks = BlockManager::new(num_blocks);
            let mut tables: Vec<Vec<u32>> = vec![Vec::new(); 4];
            for (op, table, content) in ops {
                let table_ref = &mut tables[table];
                match op {
                    0 => {
                        let available = blocks.available();
                        let block = blocks.allocate();
                        prop_assert_eq!(block.is_some(), available > 0);
                        table_ref.extend(block);
                    }
                    1 => if let Some(block) = table_ref.last() {
                        blocks.publish(*block, hash(content));
                    },
                    2 => if blocks.find_prefix(&[hash(content)]).blocks == 1 {
                        table_ref.push(blocks.take_cached(&hash(content)));
                    },
                    _ => blocks.release(&std::mem::take(table_ref)),
                }
                blocks.audit(tables.iter().map(Vec::as_slice));
            }
            for table in &mut tables {
                blocks.release(&std::mem::take(table));
            }
            blocks.audit(std::iter::empty());
            prop_assert_eq!(blocks.available(), num_blocks);
        }
    }
}
