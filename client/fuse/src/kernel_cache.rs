//! What version of a file's bytes the kernel's page cache was filled with.
//!
//! At `open`, pages cached earlier are kept only when the version of the bytes is still the one they were read under.
//! The remembered version is the one of the *last* open, which is the oldest that any page can have: an open that found
//! another version made the kernel drop every page. So a page may be newer than its label, which costs a needless drop, and
//! never older.
//!
//! The kernel drops pages when a thread takes in the answer to its open, which may be long after the answer was given. Until a
//! request shows that it did, another open that finds the same version must not keep what is there: each drops for itself.
//!
//! Bounded: an entry goes when the kernel forgets the inode, and its pages with it, and a full shard is emptied, which costs
//! one needless drop per file.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::ops::RangeInclusive;

use fjordfs_proto::InodeId;
use parking_lot::Mutex;

use crate::numbers::NumberHasher;

const SHARDS: usize = 32;
/// 32 × 32 Ki entries of 32 bytes: some 40 MiB when the kernel caches a million open inodes.
const SHARD_ENTRIES_MAX: usize = 32 << 10;

type Shard = HashMap<InodeId, Label, BuildHasherDefault<NumberHasher>>;

/// Inode → what its cached pages are.
#[derive(Debug)]
pub(crate) struct KernelCache {
    shards: [Mutex<Shard>; SHARDS],
}

#[derive(Debug)]
struct Label {
    /// Data version of the pages.
    version: u64,
    /// The handle whose open makes the kernel drop older pages, while they may still be there.
    dropping: Option<u64>,
    /// Pages were filled since.
    filled: bool,
}

impl KernelCache {
    pub(crate) fn new() -> KernelCache {
        KernelCache { shards: std::array::from_fn(|_| Mutex::default()) }
    }

    fn shard(&self, ino: InodeId) -> &Mutex<Shard> {
        &self.shards[(ino.0 % SHARDS as u64) as usize]
    }

    /// A file is being opened as `fh`, and its bytes had this version when it was looked up: whether cached pages may stay. If not,
    /// [`KernelCache::dropped`] is to be told when the kernel has dropped them. What only this mount has changed since, and since the
    /// last open, is in the pages: `own` says which versions those are by now.
    pub(crate) fn keep_at_open(
        &self,
        ino: InodeId,
        data_version: u64,
        fh: u64,
        own: impl FnOnce() -> RangeInclusive<u64>,
    ) -> bool {
        let mut shard = self.shard(ino).lock();
        // Not before: another open may have labelled the pages with a version that was not known then.
        let own = own();
        let newest = |version: u64| if own.contains(&version) { *own.end() } else { version };
        let version = newest(data_version);
        match shard.get_mut(&ino) {
            Some(label) if label.dropping.is_none() && newest(label.version) == version => {
                label.version = version;
                true
            }
            _ => {
                put(&mut shard, ino, Label { version, dropping: Some(fh), filled: false });
                false
            }
        }
    }

    /// A request with this handle came, so the kernel has taken in the answer to its open.
    pub(crate) fn dropped(&self, ino: InodeId, fh: u64) {
        if let Some(label) = self.shard(ino).lock().get_mut(&ino)
            && label.dropping == Some(fh)
        {
            label.dropping = None;
        }
    }

    /// A read is to go into the page cache.
    pub(crate) fn filled(&self, ino: InodeId) {
        if let Some(label) = self.shard(ino).lock().get_mut(&ino) {
            label.filled = true;
        }
    }

    /// Whether there may be pages that were not there when the file was opened.
    pub(crate) fn may_hold_pages(&self, ino: InodeId) -> bool {
        self.shard(ino).lock().get(&ino).is_none_or(|label| label.filled)
    }

    /// No page is older than this version.
    pub(crate) fn set_current(&self, ino: InodeId, data_version: u64) {
        let label = Label { version: data_version, dropping: None, filled: true };
        put(&mut self.shard(ino).lock(), ino, label);
    }

    /// Whether the pages have this version, which an open would keep.
    pub(crate) fn is_current(&self, ino: InodeId, data_version: u64) -> bool {
        let shard = self.shard(ino).lock();
        shard.get(&ino).is_some_and(|label| label.version == data_version && label.dropping.is_none())
    }

    /// Between these versions only this mount changed the bytes, and the kernel had every change in its pages first.
    pub(crate) fn changed_here(&self, ino: InodeId, own: RangeInclusive<u64>) {
        if let Some(label) = self.shard(ino).lock().get_mut(&ino)
            && own.contains(&label.version)
        {
            label.version = *own.end();
        }
    }

    /// The pages are gone or not to be trusted.
    pub(crate) fn forget(&self, ino: InodeId) {
        self.shard(ino).lock().remove(&ino);
    }
}

fn put(shard: &mut Shard, ino: InodeId, label: Label) {
    if shard.len() >= SHARD_ENTRIES_MAX && !shard.contains_key(&ino) {
        shard.clear();
    }
    shard.insert(ino, label);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An open whose answer the kernel takes in at once.
    fn open(cache: &KernelCache, ino: InodeId, version: u64) -> bool {
        let keep = keep_at_open(cache, ino, version, 1);
        cache.dropped(ino, 1);
        keep
    }

    /// Of a file that others may have changed.
    fn keep_at_open(cache: &KernelCache, ino: InodeId, version: u64, fh: u64) -> bool {
        cache.keep_at_open(ino, version, fh, || version..=version)
    }

    #[test]
    fn pages_stay_only_under_the_same_version() {
        let cache = KernelCache::new();
        let ino = InodeId(33);
        assert!(!open(&cache, ino, 1));
        assert!(open(&cache, ino, 1));
        assert!(!open(&cache, ino, 2));
        // A late answer with the older version relabels, it never keeps.
        assert!(!open(&cache, ino, 1));
        assert!(!open(&cache, ino, 2));
        cache.forget(ino);
        assert!(!open(&cache, ino, 2));
        cache.set_current(ino, 3);
        assert!(open(&cache, ino, 3));
    }

    #[test]
    fn pages_that_are_yet_to_be_dropped_are_not_kept() {
        let cache = KernelCache::new();
        let ino = InodeId(33);
        assert!(open(&cache, ino, 1) || open(&cache, ino, 1));
        assert!(!keep_at_open(&cache, ino, 2, 7));
        assert!(!keep_at_open(&cache, ino, 2, 8), "handle 7's pages may still be there");
        cache.dropped(ino, 7);
        assert!(!cache.is_current(ino, 2), "the last to open is waited for");
        cache.dropped(ino, 8);
        assert!(keep_at_open(&cache, ino, 2, 9));
    }

    #[test]
    fn pages_stay_over_changes_made_here() {
        let cache = KernelCache::new();
        let ino = InodeId(7);
        open(&cache, ino, 3);
        cache.changed_here(ino, 2..=5);
        assert!(open(&cache, ino, 5));
        // Opens that were looked up at different moments of changes made here.
        assert!(cache.keep_at_open(ino, 7, 1, || 5..=8) && cache.keep_at_open(ino, 6, 2, || 5..=8));
        assert!(!cache.keep_at_open(ino, 4, 3, || 5..=8), "an older one is somebody else's");
        cache.set_current(ino, 5);
        // Somebody else made version 6.
        cache.changed_here(ino, 6..=8);
        assert!(!open(&cache, ino, 8));
    }

    #[test]
    fn where_no_page_was_filled_there_is_none() {
        let cache = KernelCache::new();
        let ino = InodeId(7);
        assert!(cache.may_hold_pages(ino), "nothing is known of it");
        open(&cache, ino, 1);
        assert!(!cache.may_hold_pages(ino));
        cache.filled(ino);
        assert!(cache.may_hold_pages(ino));
        assert!(open(&cache, ino, 1) && cache.may_hold_pages(ino), "they were kept");
        assert!(!open(&cache, ino, 2) && !cache.may_hold_pages(ino), "they were dropped");
    }

    #[test]
    fn the_map_is_bounded() {
        let cache = KernelCache::new();
        for i in 0..2 * SHARD_ENTRIES_MAX as u64 {
            open(&cache, InodeId(i * SHARDS as u64), 1);
        }
        assert!(cache.shards[0].lock().len() <= SHARD_ENTRIES_MAX);
    }
}
