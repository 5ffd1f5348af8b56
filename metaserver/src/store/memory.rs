//! An engine without a disk: the reference for the others, and for tests of everything above.

use std::{
    collections::BTreeMap,
    ops::{Bound, Range},
};

use bytes::Bytes;
use parking_lot::RwLock;

use super::{Batch, Fence, MetaStore, Order, Pair, Reading, Snapshot, StoreError, StoreResult, Ticket};

/// Keeps everything in a tree. Forgets it when dropped.
#[derive(Default)]
pub struct MemoryStore {
    inner: RwLock<Inner>,
}

#[derive(Default)]
struct Inner {
    pairs: BTreeMap<Vec<u8>, Bytes>,
    fence: u64,
    commits: u64,
}

struct MemorySnapshot(BTreeMap<Vec<u8>, Bytes>);

impl Reading for MemorySnapshot {
    fn get(&self, key: &[u8]) -> StoreResult<Option<Bytes>> {
        Ok(self.0.get(key).cloned())
    }

    fn scan(&self, range: Range<&[u8]>, limit: usize) -> StoreResult<Vec<Pair>> {
        if range.start >= range.end {
            return Ok(Vec::new());
        }
        let bounds = (Bound::Included(range.start), Bound::Excluded(range.end));
        Ok(self.0.range::<[u8], _>(bounds).take(limit).map(|(k, v)| (k.clone(), v.clone())).collect())
    }
}

impl MetaStore for MemoryStore {
    fn get(&self, key: &[u8]) -> StoreResult<Option<Bytes>> {
        Ok(self.inner.read().pairs.get(key).cloned())
    }

    fn scan(&self, range: Range<&[u8]>, order: Order, limit: usize) -> StoreResult<Vec<Pair>> {
        if range.start >= range.end {
            return Ok(Vec::new());
        }
        let inner = self.inner.read();
        let bounds = (Bound::Included(range.start), Bound::Excluded(range.end));
        let pairs = inner.pairs.range::<[u8], _>(bounds).map(|(k, v)| (k.clone(), v.clone()));
        Ok(match order {
            Order::Ascending => pairs.take(limit).collect(),
            Order::Descending => pairs.rev().take(limit).collect(),
        })
    }

    fn commit(&self, batch: Batch, fence: Fence) -> StoreResult<Ticket> {
        let mut inner = self.inner.write();
        if fence.0 != inner.fence {
            return Err(StoreError::Fenced { ours: fence, current: Fence(inner.fence) });
        }
        for (key, value) in batch.writes {
            match value {
                Some(value) => inner.pairs.insert(key, value),
                None => inner.pairs.remove(&key),
            };
        }
        inner.commits += 1;
        Ok(Ticket(inner.commits))
    }

    fn sync(&self) -> StoreResult<Ticket> {
        Ok(Ticket(self.inner.read().commits))
    }

    fn take_over(&self) -> StoreResult<Fence> {
        let mut inner = self.inner.write();
        inner.fence += 1;
        Ok(Fence(inner.fence))
    }

    fn snapshot(&self) -> StoreResult<Option<Snapshot>> {
        Ok(Some(Box::new(MemorySnapshot(self.inner.read().pairs.clone()))))
    }

    fn name(&self) -> &'static str {
        "memory"
    }
}
