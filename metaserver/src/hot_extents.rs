//! Extent records of files that are changed again and again, kept in memory.
//!
//! An engine keeps what was removed until its tables are merged, and walks over it to find the next record that is there. A
//! file of a few hundred extents that was written here and there 100,000 times has 100,000 removed ones between them, and each
//! write would take longer than the one before. So a file that was changed some times has its records here,
//! and the engine is not asked for them any more.
//!
//! Invariant: of a file that is here, exactly the extent records are here that the store has.
//!
//! Bounded: a file of many extents is left to the engine, where a removed one rarely lies between two of them; and when there are too
//! many, all go.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use fjordfs_proto::InodeId;

use crate::{
    keys::{self, Key},
    store::{MetaStore, Order, Pair, StoreResult},
};

/// Changes of a file after which its records are fetched: one that is written once or appended to a little is not worth it.
const CHANGES_MIN: u8 = 16;
/// Most records of a file.
const FILE_RECORDS_MAX: usize = 4096;
/// Most records in all, of some 150 bytes each.
const RECORDS_MAX: usize = 1 << 16;
/// Most files of which something is known, of some 40 bytes each.
const FILES_MAX: usize = 1 << 16;

enum File {
    /// It was changed this often.
    Changed(u8),
    /// All its records.
    Here(BTreeMap<Key, Bytes>),
    /// It has too many.
    Large,
}

/// See the module.
#[derive(Default)]
pub(crate) struct HotExtents {
    files: HashMap<InodeId, File>,
    records: usize,
}

impl HotExtents {
    /// The extents of a file are about to be changed.
    pub(crate) fn touch(&mut self, store: &dyn MetaStore, ino: InodeId) -> StoreResult<()> {
        if self.files.len() >= FILES_MAX && !self.files.contains_key(&ino) {
            *self = HotExtents::default();
        }
        let file = self.files.entry(ino).or_insert(File::Changed(0));
        match file {
            File::Changed(times) if *times < CHANGES_MIN => *times += 1,
            File::Changed(_) => {
                let all = keys::extents(ino, 0..u64::MAX);
                let found = store.scan(&all.start..&all.end, Order::Ascending, FILE_RECORDS_MAX + 1)?;
                if found.len() > FILE_RECORDS_MAX {
                    *file = File::Large;
                    return Ok(());
                }
                self.records += found.len();
                *file = File::Here(found.into_iter().collect());
                self.shrink();
            }
            File::Here(_) | File::Large => {}
        }
        Ok(())
    }

    /// As [`MetaStore::scan`]; `None` when the store has to be asked.
    pub(crate) fn scan(&self, start: &[u8], end: &[u8], order: Order, limit: usize) -> Option<Vec<Pair>> {
        let File::Here(records) = self.files.get(&file_of(start)?)? else { return None };
        if start >= end {
            return Some(Vec::new());
        }
        let bounds = (std::ops::Bound::Included(start), std::ops::Bound::Excluded(end));
        let found = records.range::<[u8], _>(bounds).map(|(key, value)| (key.clone(), value.clone()));
        Some(match order {
            Order::Ascending => found.take(limit).collect(),
            Order::Descending => found.rev().take(limit).collect(),
        })
    }

    /// The store is given these writes.
    pub(crate) fn apply(&mut self, writes: &[(Key, Option<Bytes>)]) {
        for (key, value) in writes {
            let Some(file) = file_of(key).and_then(|ino| self.files.get_mut(&ino)) else { continue };
            let File::Here(records) = file else { continue };
            let before = records.len();
            match value {
                Some(value) => records.insert(key.clone(), value.clone()),
                None => records.remove(key),
            };
            let after = records.len();
            if after > FILE_RECORDS_MAX {
                *file = File::Large;
                self.records -= before;
            } else {
                self.records = self.records - before + after;
            }
        }
        self.shrink();
    }

    fn shrink(&mut self) {
        if self.records > RECORDS_MAX {
            *self = HotExtents::default();
        }
    }
}

/// The file whose extent a key names.
fn file_of(key: &[u8]) -> Option<InodeId> {
    key.first().filter(|kind| **kind == keys::EXTENT)?;
    keys::first_id(key).map(InodeId)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Batch, MemoryStore};

    fn write(ino: u64, offset: u64) -> (Key, Option<Bytes>) {
        (keys::extent(InodeId(ino), offset), Some(Bytes::from_static(b"extent")))
    }

    fn all(hot: &HotExtents, ino: u64) -> Option<usize> {
        let range = keys::extents(InodeId(ino), 0..u64::MAX);
        Some(hot.scan(&range.start, &range.end, Order::Ascending, usize::MAX)?.len())
    }

    #[test]
    fn a_file_comes_when_it_is_changed_often_and_goes_when_it_has_grown() {
        let (store, mut hot) = (MemoryStore::default(), HotExtents::default());
        let fence = store.take_over().unwrap();
        store.commit(Batch { writes: vec![write(5, 1), write(5, 2), write(6, 1)] }, fence).unwrap();
        (0..CHANGES_MIN).for_each(|_| hot.touch(&store, InodeId(5)).unwrap());
        assert_eq!(all(&hot, 5), None);
        hot.touch(&store, InodeId(5)).unwrap();
        assert_eq!((all(&hot, 5), all(&hot, 6)), (Some(2), None));
        hot.apply(&[write(5, 3), write(6, 2), (keys::extent(InodeId(5), 1), None)]);
        assert_eq!((all(&hot, 5), hot.records), (Some(2), 2));
        let many: Vec<_> = (0..=FILE_RECORDS_MAX as u64).map(|at| write(5, at)).collect();
        hot.apply(&many);
        assert_eq!((all(&hot, 5), hot.records), (None, 0));
        hot.touch(&store, InodeId(5)).unwrap();
        assert_eq!(all(&hot, 5), None, "it is not looked at again");
    }

    #[test]
    fn memory_is_bounded() {
        let (store, mut hot) = (MemoryStore::default(), HotExtents::default());
        for ino in 0..40 {
            (0..=CHANGES_MIN).for_each(|_| hot.touch(&store, InodeId(ino)).unwrap());
            hot.apply(&(0..FILE_RECORDS_MAX as u64).map(|at| write(ino, at)).collect::<Vec<_>>());
            assert!(hot.records <= RECORDS_MAX);
        }
        (0..2 * FILES_MAX as u64).for_each(|ino| hot.touch(&store, InodeId(ino)).unwrap());
        assert!(hot.files.len() <= FILES_MAX);
    }
}
