//! The metadata engine: a tree in memory, with the log of what was committed since the last sync.
//!
//! A kill leaves all that was committed, a power failure all that was synced and any first part of the rest. Whoever still
//! has the engine of before writes to what nobody will ever see.

use std::{
    collections::BTreeMap,
    ops::{Bound, Range},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use fjordfs_metaserver::store::{Batch, Fence, MetaStore, Order, Pair, StoreError, StoreResult, Ticket};
use fjordfs_tests::rng::TestRng;
use futures_util::future::BoxFuture;
use rand::{Rng, SeedableRng};

type Undo = Vec<(Vec<u8>, Option<Bytes>)>;

#[derive(Clone)]
struct Tree {
    pairs: BTreeMap<Vec<u8>, Bytes>,
    fence: u64,
    commits: u64,
    /// How to undo the last commits, of those that are not synced.
    unsynced: Vec<Undo>,
    random: TestRng,
}

impl Tree {
    /// Undoes so many commits, and forgets how to undo the others.
    fn lose(&mut self, commits: usize) {
        for undo in self.unsynced.split_off(self.unsynced.len() - commits).into_iter().rev() {
            // A batch may write a key twice.
            for (key, before) in undo.into_iter().rev() {
                match before {
                    Some(value) => self.pairs.insert(key, value),
                    None => self.pairs.remove(&key),
                };
            }
        }
        self.unsynced.clear();
    }
}

/// The disk of the metaserver's host: another one after each crash.
pub(crate) type Drive = Arc<Mutex<Disk>>;

/// See the module.
#[derive(Clone)]
pub(crate) struct Disk(Arc<Mutex<Tree>>);

impl Disk {
    pub(crate) fn new(random: TestRng) -> Disk {
        let tree = Tree { pairs: BTreeMap::new(), fence: 0, commits: 0, unsynced: Vec::new(), random };
        Disk(Arc::new(Mutex::new(tree)))
    }

    fn tree(&self) -> MutexGuard<'_, Tree> {
        self.0.lock().unwrap()
    }

    /// What the metaserver finds after it was killed, or after its host has lost its power.
    pub(crate) fn after_crash(&self, power: bool) -> Disk {
        let mut tree = self.tree().clone();
        tree.random = TestRng::seed_from_u64(self.tree().random.random());
        if power {
            let lost = tree.random.random_range(0..=tree.unsynced.len());
            tree.lose(lost);
        }
        Disk(Arc::new(Mutex::new(tree)))
    }

    /// The least that a power failure now would leave.
    pub(crate) fn synced(&self) -> Disk {
        let mut tree = self.tree().clone();
        tree.lose(tree.unsynced.len());
        Disk(Arc::new(Mutex::new(tree)))
    }
}

impl MetaStore for Disk {
    fn get(&self, key: &[u8]) -> StoreResult<Option<Bytes>> {
        Ok(self.tree().pairs.get(key).cloned())
    }

    fn scan(&self, range: Range<&[u8]>, order: Order, limit: usize) -> StoreResult<Vec<Pair>> {
        if range.start >= range.end {
            return Ok(Vec::new());
        }
        let tree = self.tree();
        let bounds = (Bound::Included(range.start), Bound::Excluded(range.end));
        let pairs = tree.pairs.range::<[u8], _>(bounds).map(|(k, v)| (k.clone(), v.clone()));
        Ok(match order {
            Order::Ascending => pairs.take(limit).collect(),
            Order::Descending => pairs.rev().take(limit).collect(),
        })
    }

    fn commit(&self, batch: Batch, fence: Fence) -> StoreResult<Ticket> {
        let mut tree = self.tree();
        if fence.0 != tree.fence {
            return Err(StoreError::Fenced { ours: fence, current: Fence(tree.fence) });
        }
        let mut undo = Vec::with_capacity(batch.writes.len());
        for (key, value) in batch.writes {
            let before = match value {
                Some(value) => tree.pairs.insert(key.clone(), value),
                None => tree.pairs.remove(&key),
            };
            undo.push((key, before));
        }
        tree.unsynced.push(undo);
        tree.commits += 1;
        Ok(Ticket(tree.commits))
    }

    fn sync(&self) -> StoreResult<Ticket> {
        let mut tree = self.tree();
        tree.unsynced.clear();
        Ok(Ticket(tree.commits))
    }

    fn sync_waiting(&self) -> Option<BoxFuture<'static, StoreResult<Ticket>>> {
        let disk = self.clone();
        Some(Box::pin(async move {
            let (upto, wait) = {
                let mut tree = disk.tree();
                (tree.commits, Duration::from_millis(tree.random.random_range(0..30)))
            };
            tokio::time::sleep(wait).await;
            let mut tree = disk.tree();
            let later = (tree.commits - upto) as usize;
            let synced = tree.unsynced.len().saturating_sub(later);
            tree.unsynced.drain(..synced);
            Ok(Ticket(upto))
        }))
    }

    fn take_over(&self) -> StoreResult<Fence> {
        let mut tree = self.tree();
        tree.fence += 1;
        Ok(Fence(tree.fence))
    }

    fn name(&self) -> &'static str {
        "simulated"
    }
}
