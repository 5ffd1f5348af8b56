//! Writing much into a store that nobody reads yet: in batches that every engine takes as one transaction, several under way at a time,
//! and no more of them than memory bears.

use std::time::Duration;

use bytes::Bytes;

use super::{Batch, Fence, Late, MetaStore, StoreResult, each_page};
use crate::keys;

/// Bytes of one batch.
const BATCH_BYTES: usize = 256 << 10;
/// Writes that the store has not acknowledged are awaited after so many batches.
const BATCHES_UNSAFE_MAX: u32 = 64;
/// An engine across a network must take a batch within this time.
const PATIENCE: Duration = Duration::from_secs(300);

/// Waits until everything that was committed is safe in the store.
pub(crate) fn settle(store: &dyn MetaStore) -> StoreResult<()> {
    match store.late() {
        Some(late) => late.settle(PATIENCE)?,
        None => store.sync()?,
    };
    Ok(())
}

/// Removes all records but that the store is closed.
pub(crate) fn clear(store: &dyn MetaStore, fence: Fence) -> StoreResult<()> {
    let mut bulk = Bulk::new(store, fence);
    each_page(store, keys::everything(), |page| {
        page.into_iter().filter(|(key, _)| key != keys::CLOSED).try_for_each(|(key, _)| bulk.write(key, None))
    })?;
    bulk.finish()
}

/// See the module.
pub(crate) struct Bulk<'a> {
    store: &'a dyn MetaStore,
    fence: Fence,
    writes_max: usize,
    writes: Vec<(Vec<u8>, Option<Bytes>)>,
    bytes: usize,
    batches: u32,
}

impl<'a> Bulk<'a> {
    /// Into a store that is owned with this fence.
    pub(crate) fn new(store: &'a dyn MetaStore, fence: Fence) -> Bulk<'a> {
        let writes_max = store.late().map_or(usize::MAX, Late::batch_writes);
        Bulk { store, fence, writes_max, writes: Vec::new(), bytes: 0, batches: 0 }
    }

    /// Sets a key, or removes it.
    pub(crate) fn write(&mut self, key: Vec<u8>, value: Option<Bytes>) -> StoreResult<()> {
        let cost = key.len() + value.as_ref().map_or(0, Bytes::len);
        let is_full = self.writes.len() >= self.writes_max || self.bytes + cost > BATCH_BYTES;
        if is_full && !self.writes.is_empty() {
            self.commit()?;
        }
        self.bytes += cost;
        self.writes.push((key, value));
        Ok(())
    }

    fn commit(&mut self) -> StoreResult<()> {
        self.bytes = 0;
        self.batches += 1;
        self.store.commit(Batch { writes: std::mem::take(&mut self.writes) }, self.fence)?;
        if self.batches.is_multiple_of(BATCHES_UNSAFE_MAX) { settle(self.store) } else { Ok(()) }
    }

    /// Returns when all of it is safe in the store.
    pub(crate) fn finish(mut self) -> StoreResult<()> {
        if !self.writes.is_empty() {
            self.commit()?;
        }
        settle(self.store)
    }
}
