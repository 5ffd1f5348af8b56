//! What version of a file's bytes the kernel's page cache was filled with.
//!
//! At `open`, pages cached earlier are kept only when the version of the bytes is still the one they were read under.
//! The remembered version is the one of the *last* open, which is the oldest that any page can have: an open that found
//! another version made the kernel drop every page. So a page may be newer than its label, which costs a needless drop, and
//! never older.
//!
//! Bounded: an entry goes when the kernel forgets the inode, and its pages with it, and a full shard is emptied, which costs
//! one needless drop per file.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use fjordfs_proto::InodeId;
use parking_lot::Mutex;

const SHARDS: usize = 32;
/// 32 × 32 Ki entries of 16 bytes: some 20 MiB when the kernel caches a million open inodes.
const SHARD_ENTRIES_MAX: usize = 32 << 10;

/// Inode → data version of its cached pages.
#[derive(Debug)]
pub(crate) struct KernelCache {
    shards: [Mutex<HashMap<InodeId, u64>>; SHARDS],
}

impl KernelCache {
    pub(crate) fn new() -> KernelCache {
        KernelCache { shards: std::array::from_fn(|_| Mutex::default()) }
    }

    fn shard(&self, ino: InodeId) -> &Mutex<HashMap<InodeId, u64>> {
        &self.shards[(ino.0 % SHARDS as u64) as usize]
    }

    /// A file is being opened while its bytes have this version: whether cached pages may stay.
    pub(crate) fn keep_at_open(&self, ino: InodeId, data_version: u64) -> bool {
        let mut shard = self.shard(ino).lock();
        if shard.len() >= SHARD_ENTRIES_MAX && !shard.contains_key(&ino) {
            shard.clear();
        }
        shard.insert(ino, data_version) == Some(data_version)
    }

    /// Whether the pages have this version, which an open would keep.
    pub(crate) fn is_current(&self, ino: InodeId, data_version: u64) -> bool {
        self.shard(ino).lock().get(&ino) == Some(&data_version)
    }

    /// Between these versions only this mount changed the bytes, and the kernel had every change in its pages first.
    pub(crate) fn changed_here(&self, ino: InodeId, own: RangeInclusive<u64>) {
        if let Some(version) = self.shard(ino).lock().get_mut(&ino)
            && own.contains(version)
        {
            *version = *own.end();
        }
    }

    /// The pages are gone or not to be trusted.
    pub(crate) fn forget(&self, ino: InodeId) {
        self.shard(ino).lock().remove(&ino);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_stay_only_under_the_same_version() {
        let cache = KernelCache::new();
        let ino = InodeId(33);
        assert!(!cache.keep_at_open(ino, 1));
        assert!(cache.keep_at_open(ino, 1));
        assert!(!cache.keep_at_open(ino, 2));
        // A late answer with the older version relabels, it never keeps.
        assert!(!cache.keep_at_open(ino, 1));
        assert!(!cache.keep_at_open(ino, 2));
        cache.forget(ino);
        assert!(!cache.keep_at_open(ino, 2));
    }

    #[test]
    fn pages_stay_over_changes_made_here() {
        let cache = KernelCache::new();
        let ino = InodeId(7);
        cache.keep_at_open(ino, 3);
        cache.changed_here(ino, 2..=5);
        assert!(cache.keep_at_open(ino, 5));
        // Somebody else made version 6.
        cache.changed_here(ino, 6..=8);
        assert!(!cache.keep_at_open(ino, 8));
    }

    #[test]
    fn the_map_is_bounded() {
        let cache = KernelCache::new();
        for i in 0..2 * SHARD_ENTRIES_MAX as u64 {
            cache.keep_at_open(InodeId(i * SHARDS as u64), 1);
        }
        assert!(cache.shards[0].lock().len() <= SHARD_ENTRIES_MAX);
    }
}
