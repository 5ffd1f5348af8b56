//! Which shards there are and where: in memory, compact, shared by all cores.
//!
//! PERFORMANCE-CRITICAL: every read looks here. A lookup takes one of 256 reader locks for some ten nanoseconds; do
//! nothing slow under them.
//!
//! An entry is 20 bytes in an open-addressing table that is between half and seven eighths full: 24 to 41 bytes with
//! the table's own, some 30 on average. That is why the fields are packed, and why there is no second index in block
//! order: listings ([`Index::after`]) are rare and go through everything.

use std::{collections::BinaryHeap, ops::Range};

use fjordfs_proto::{BlockId, PAGE_SIZE, ShardNo, cluster::mix};
use hashbrown::HashTable;
use parking_lot::RwLock;

use super::{record::record_bytes, volume::VolumeId};

/// Tables, each with its lock: enough that cores rarely meet.
const PARTS: usize = 256;

/// Most pages of a volume: the position has 20 bits.
pub(crate) const VOLUME_PAGES_MAX: u64 = 1 << 20;

/// Highest volume id: it has 24 bits.
pub(crate) const VOLUME_ID_MAX: u32 = (1 << 24) - 1;

/// Bytes of an entry, in memory and in a checkpoint.
pub(crate) const ENTRY_LEN: usize = 20;

/// A stored shard.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Entry {
    pub(crate) block: BlockId,
    pub(crate) shard: ShardNo,
    pub(crate) policy: u16,
    /// Bytes of data.
    pub(crate) length: u32,
    pub(crate) volume: VolumeId,
    /// Page of the volume that the header is in.
    pub(crate) page: u32,
}

impl Entry {
    /// Where the record lies in its volume, bytes.
    pub(crate) fn span(&self) -> Range<u64> {
        let start = u64::from(self.page) * PAGE_SIZE as u64;
        start..start + record_bytes(self.length)
    }
}

/// Five words: block (64 bits), then from the low end length (25), page (20), volume (24), policy (16), shard (8).
#[derive(Clone, Copy)]
struct Packed([u32; 5]);

impl Packed {
    fn new(e: &Entry) -> Packed {
        let rest = u128::from(e.length)
            | u128::from(e.page) << 25
            | u128::from(e.volume.0) << 45
            | u128::from(e.policy) << 69
            | u128::from(e.shard.0) << 85;
        let word = |i: u32| (rest >> (32 * i)) as u32;
        Packed([e.block.0 as u32, (e.block.0 >> 32) as u32, word(0), word(1), word(2)])
    }

    fn block(&self) -> BlockId {
        BlockId(u64::from(self.0[0]) | u64::from(self.0[1]) << 32)
    }

    fn entry(&self) -> Entry {
        let rest = u128::from(self.0[2]) | u128::from(self.0[3]) << 32 | u128::from(self.0[4]) << 64;
        let bits = |at: u32, width: u32| (rest >> at) as u32 & ((1u64 << width) - 1) as u32;
        Entry {
            block: self.block(),
            length: bits(0, 25),
            page: bits(25, 20),
            volume: VolumeId(bits(45, 24)),
            policy: bits(69, 16) as u16,
            shard: ShardNo(bits(85, 8) as u8),
        }
    }
}

/// An entry as a checkpoint holds it.
pub(crate) fn encode(entry: &Entry) -> [u8; ENTRY_LEN] {
    let mut out = [0; ENTRY_LEN];
    for (bytes, word) in out.as_chunks_mut::<4>().0.iter_mut().zip(Packed::new(entry).0) {
        *bytes = word.to_le_bytes();
    }
    out
}

/// An entry from a checkpoint.
pub(crate) fn decode(raw: &[u8; ENTRY_LEN]) -> Entry {
    let mut words = [0; 5];
    for (word, bytes) in words.iter_mut().zip(raw.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    Packed(words).entry()
}

/// All shards of a target.
pub(crate) struct Index {
    parts: Vec<RwLock<HashTable<Packed>>>,
}

fn hash(block: BlockId) -> u64 {
    mix(block.0)
}

impl Index {
    pub(crate) fn new() -> Index {
        Index { parts: (0..PARTS).map(|_| RwLock::new(HashTable::new())).collect() }
    }

    /// The table of a hash. Bits in the middle choose, because the table itself uses the lowest and the highest.
    fn part(&self, hash: u64) -> &RwLock<HashTable<Packed>> {
        &self.parts[(hash >> 40) as usize % PARTS]
    }

    /// Where a shard is.
    pub(crate) fn get(&self, block: BlockId, shard: ShardNo) -> Option<Entry> {
        let hash = hash(block);
        let part = self.part(hash).read();
        part.find(hash, |p| p.block() == block && p.entry().shard == shard).map(Packed::entry)
    }

    /// Adds a shard, unless it is there already: then that entry is the error.
    pub(crate) fn insert(&self, entry: &Entry) -> Result<(), Entry> {
        let hash = hash(entry.block);
        let mut part = self.part(hash).write();
        let same = |p: &Packed| p.block() == entry.block && p.entry().shard == entry.shard;
        if let Some(old) = part.find(hash, same) {
            return Err(old.entry());
        }
        part.insert_unique(hash, Packed::new(entry), |p| self::hash(p.block()));
        Ok(())
    }

    /// Removes one shard if it is still at that place.
    pub(crate) fn remove(&self, entry: &Entry) -> bool {
        let hash = hash(entry.block);
        let mut part = self.part(hash).write();
        part.find_entry(hash, |p| p.entry() == *entry).map(|found| found.remove()).is_ok()
    }

    /// Points a shard to another place if it is still at the old one.
    pub(crate) fn replace(&self, old: &Entry, new: &Entry) -> bool {
        let hash = hash(old.block);
        let mut part = self.part(hash).write();
        let found = part.find_mut(hash, |p| p.entry() == *old);
        found.map(|packed| *packed = Packed::new(new)).is_some()
    }

    /// All shards of a block.
    pub(crate) fn of_block(&self, block: BlockId) -> Vec<Entry> {
        let hash = hash(block);
        let part = self.part(hash).read();
        part.iter_hash(hash).filter(|p| p.block() == block).map(Packed::entry).collect()
    }

    /// Calls `visit` with the entries of one part after the other. What changes meanwhile may or may not be seen.
    pub(crate) fn visit_parts<E>(&self, mut visit: impl FnMut(Vec<Entry>) -> Result<(), E>) -> Result<(), E> {
        for part in &self.parts {
            let entries = part.read().iter().map(Packed::entry).collect();
            visit(entries)?;
        }
        Ok(())
    }

    /// Shards that fit, of blocks above `after` and in block order, about `limit` of them, and whether these are the last. All shards
    /// of a block come together, so the last block of a page is where the next one starts.
    pub(crate) fn after(
        &self,
        after: BlockId,
        limit: usize,
        fits: impl Fn(&Entry) -> bool,
    ) -> (Vec<Entry>, bool) {
        // No more than 256 shards of one block can be cut off by the limit.
        let keep = limit + PARTS;
        let mut smallest = BinaryHeap::with_capacity(keep + 1);
        let mut dropped = false;
        for part in &self.parts {
            let entries = part.read();
            for entry in entries.iter().filter(|p| p.block() > after).map(Packed::entry).filter(&fits) {
                smallest.push(entry);
                if smallest.len() > keep {
                    smallest.pop();
                    dropped = true;
                }
            }
        }
        let mut page = smallest.into_sorted_vec();
        let mut cut = limit.min(page.len());
        while cut > 0 && cut < page.len() && page[cut].block == page[cut - 1].block {
            cut += 1;
        }
        let end = cut == page.len() && !dropped;
        page.truncate(cut);
        (page, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn entry() -> impl Strategy<Value = Entry> {
        (0..50u64, 0..3u8, any::<u16>(), 1..=16u32 << 20, 0..=VOLUME_ID_MAX, 0..VOLUME_PAGES_MAX as u32)
            .prop_map(|(block, shard, policy, length, volume, page)| Entry {
                block: BlockId(block << 30 | block),
                shard: ShardNo(shard),
                policy,
                length,
                volume: VolumeId(volume),
                page,
            })
    }

    proptest! {
        #[test]
        fn an_entry_survives_packing(e in entry()) {
            prop_assert_eq!(Packed::new(&e).entry(), e);
            prop_assert_eq!(decode(&encode(&e)), e);
        }

        #[test]
        fn it_behaves_as_a_map(ops in proptest::collection::vec((entry(), any::<bool>()), 1..200), limit in 1..20usize) {
            let (index, mut oracle) = (Index::new(), BTreeMap::new());
            for (e, put) in ops {
                let key = (e.block, e.shard);
                if put {
                    match index.insert(&e) {
                        Ok(()) => prop_assert!(oracle.insert(key, e).is_none()),
                        Err(old) => prop_assert_eq!(oracle.get(&key), Some(&old)),
                    }
                } else if let Some(old) = oracle.remove(&key) {
                    let moved = Entry { page: old.page ^ 1, ..old };
                    prop_assert!(index.replace(&old, &moved));
                    prop_assert!(!index.replace(&old, &moved) && !index.remove(&old));
                    prop_assert_eq!(index.get(key.0, key.1), Some(moved));
                    prop_assert!(index.remove(&moved));
                    prop_assert!(!index.remove(&moved));
                }
            }
            for (key, e) in &oracle {
                prop_assert_eq!(index.get(key.0, key.1), Some(*e));
                let mut all = index.of_block(key.0);
                all.sort();
                prop_assert_eq!(all, oracle.values().filter(|x| x.block == key.0).copied().collect::<Vec<_>>());
            }
            let (mut listed, mut after) = (Vec::new(), BlockId(0));
            listed.extend(oracle.values().filter(|e| e.block == BlockId(0)).copied());
            loop {
                let (page, end) = index.after(after, limit, |_| true);
                prop_assert!(end || page.len() >= limit);
                after = page.last().map_or(after, |e| e.block);
                listed.extend(page);
                if end { break }
            }
            prop_assert_eq!(listed, oracle.into_values().collect::<Vec<_>>());
        }
    }
}
