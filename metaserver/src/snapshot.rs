//! A store as it was, for engines that cannot keep one themselves.
//!
//! All writes go through one executor. While somebody reads a snapshot, it looks up what each batch is about to change and keeps the
//! value of before. A reader takes what the store holds now and puts the kept values over it: a change that it can see in the store
//! was noted before it was made, so the two together are the store of the moment when the snapshot was taken.
//!
//! The kept values are bounded: a snapshot that has lasted too long fails to be read, and is to be taken again.

use std::{
    collections::BTreeMap,
    io,
    ops::{Bound, Range},
    path::PathBuf,
    sync::{Arc, Weak},
};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::{
    keys::Key,
    store::{Batch, MetaStore, Order, Pair, Reading, Snapshot, StoreError, StoreResult, successor},
};

/// Most bytes of keys and values that are kept for one snapshot.
const KEPT_MAX: usize = 256 << 20;

#[derive(Default)]
struct Kept {
    values: BTreeMap<Key, Option<Bytes>>,
    bytes: usize,
    /// Why it is of no use any more.
    broken: Option<&'static str>,
}

/// For the executor: what has to be noted before a batch is applied.
pub(crate) struct Keeper(Weak<Mutex<Kept>>);

struct Frozen {
    store: Arc<dyn MetaStore>,
    kept: Arc<Mutex<Kept>>,
}

/// A snapshot of the store as it is, and what keeps it so. Between two batches.
pub(crate) fn freeze(store: Arc<dyn MetaStore>) -> (Snapshot, Keeper) {
    let kept = Arc::new(Mutex::new(Kept::default()));
    let keeper = Keeper(Arc::downgrade(&kept));
    (Box::new(Frozen { store, kept }), keeper)
}

impl Keeper {
    /// Keeps what the batch is about to change. Says whether anybody still reads the snapshot.
    pub(crate) fn note(&self, batch: &Batch, store: &dyn MetaStore) -> bool {
        let Some(kept) = self.0.upgrade() else { return false };
        let mut kept = kept.lock();
        for (key, _) in &batch.writes {
            if kept.values.contains_key(key) {
                continue;
            }
            let before = match store.get(key) {
                Ok(before) => before,
                Err(_) => {
                    kept.broken = Some("a value of before could not be read");
                    break;
                }
            };
            kept.bytes += key.len() + before.as_ref().map_or(0, Bytes::len);
            kept.values.insert(key.clone(), before);
        }
        if kept.bytes > KEPT_MAX {
            kept.broken = Some("too much has changed since it began: try again when there is less to do");
        }
        if kept.broken.is_some() {
            kept.values.clear();
        }
        kept.broken.is_none()
    }
}

impl Frozen {
    fn usable<'a>(&self, kept: &'a Kept) -> StoreResult<&'a BTreeMap<Key, Option<Bytes>>> {
        match kept.broken {
            None => Ok(&kept.values),
            Some(why) => Err(StoreError::Io {
                folder: PathBuf::from(self.store.name()),
                source: io::Error::other(format!("its snapshot cannot be read any more: {why}")),
            }),
        }
    }
}

impl Reading for Frozen {
    fn get(&self, key: &[u8]) -> StoreResult<Option<Bytes>> {
        let now = self.store.get(key)?;
        let kept = self.kept.lock();
        Ok(self.usable(&kept)?.get(key).cloned().unwrap_or(now))
    }

    fn scan(&self, range: Range<&[u8]>, limit: usize) -> StoreResult<Vec<Pair>> {
        let (mut start, end) = (range.start.to_vec(), range.end);
        let mut pairs = Vec::new();
        while start.as_slice() < end && pairs.len() < limit {
            let want = limit - pairs.len();
            let page = self.store.scan(&start..end, Order::Ascending, want)?;
            // What this page speaks for.
            let upto = if page.len() == want { page.last().map(|(key, _)| successor(key)) } else { None };
            let upto = upto.unwrap_or_else(|| end.to_vec());
            let mut merged: BTreeMap<Key, Bytes> = page.into_iter().collect();
            let kept = self.kept.lock();
            let bounds = (Bound::Included(start.as_slice()), Bound::Excluded(upto.as_slice()));
            for (key, before) in self.usable(&kept)?.range::<[u8], _>(bounds) {
                match before {
                    Some(before) => merged.insert(key.clone(), before.clone()),
                    None => merged.remove(key),
                };
            }
            pairs.extend(merged);
            start = upto;
        }
        pairs.truncate(limit);
        Ok(pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;
    use proptest::prelude::*;

    type Writes = Vec<(u8, Option<u8>)>;

    fn batch(writes: &Writes) -> Batch {
        let last: BTreeMap<u8, Option<u8>> = writes.iter().copied().collect();
        let writes = last.into_iter().map(|(k, v)| (vec![b'k', k], v.map(|v| Bytes::from(vec![v]))));
        Batch { writes: writes.collect() }
    }

    proptest! {
        /// Against the engine in memory, which copies everything.
        #[test]
        fn it_is_the_store_of_then(
            before in proptest::collection::vec((0..40u8, any::<Option<u8>>()), 0..60),
            since in proptest::collection::vec(proptest::collection::vec((0..40u8, any::<Option<u8>>()), 0..20), 0..6),
            from in 0..40u8, to in 0..40u8, limit in 1..30usize,
        ) {
            let store = Arc::new(MemoryStore::default());
            let fence = store.take_over().unwrap();
            store.commit(batch(&before), fence).unwrap();
            let then = store.snapshot().unwrap().unwrap();
            let (frozen, keeper) = freeze(store.clone());
            for writes in since {
                prop_assert!(keeper.note(&batch(&writes), &*store));
                let range = [b'k', from]..[b'k', to];
                let page = |s: &Snapshot| s.scan(&range.start[..]..&range.end[..], limit).unwrap();
                prop_assert_eq!(page(&frozen), page(&then), "noted, and not yet applied");
                store.commit(batch(&writes), fence).unwrap();
                prop_assert_eq!(page(&frozen), page(&then));
                for k in 0..40 {
                    prop_assert_eq!(frozen.get(&[b'k', k]).unwrap(), then.get(&[b'k', k]).unwrap());
                }
            }
            drop(frozen);
            prop_assert!(!keeper.note(&batch(&vec![(1, None)]), &*store), "nobody reads it");
        }
    }
}
