//! Open files and directories by the number the kernel knows them by.
//!
//! A table, not a pointer in disguise: a number that the kernel should not have is `EBADF`, never undefined behaviour.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use crate::numbers::NumberHasher;

/// Enough that workers rarely meet on one lock.
const SHARDS: usize = 32;

type Shard<T> = HashMap<u64, Arc<T>, BuildHasherDefault<NumberHasher>>;

/// A table of open things.
#[derive(Debug)]
pub(crate) struct Handles<T> {
    next: AtomicU64,
    shards: [RwLock<Shard<T>>; SHARDS],
}

impl<T> Handles<T> {
    /// `first`: numbers before it are a former process's.
    pub(crate) fn new(first: u64) -> Handles<T> {
        Handles { next: AtomicU64::new(first), shards: std::array::from_fn(|_| RwLock::default()) }
    }

    fn shard(&self, fh: u64) -> &RwLock<Shard<T>> {
        &self.shards[(fh % SHARDS as u64) as usize]
    }

    /// Numbers are never used twice in a mount's life.
    pub(crate) fn insert(&self, value: T) -> u64 {
        let fh = self.number();
        self.insert_as(fh, value);
        fh
    }

    /// A number for [`Handles::insert_as`].
    pub(crate) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn insert_as(&self, number: u64, value: T) {
        self.shard(number).write().insert(number, Arc::new(value));
    }

    pub(crate) fn get(&self, fh: u64) -> Option<Arc<T>> {
        self.shard(fh).read().get(&fh).cloned()
    }

    pub(crate) fn remove(&self, fh: u64) -> Option<Arc<T>> {
        self.shard(fh).write().remove(&fh)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.shards.iter().all(|shard| shard.read().is_empty())
    }

    /// Empties the table.
    pub(crate) fn drain(&self) -> Vec<Arc<T>> {
        self.shards.iter().flat_map(|shard| std::mem::take(&mut *shard.write()).into_values()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_and_removed_numbers_are_nothing() {
        let handles = Handles::new(1);
        let fh = handles.insert("file");
        assert_eq!(handles.get(fh).as_deref(), Some(&"file"));
        assert!(handles.get(fh + 1).is_none());
        assert!(handles.remove(fh).is_some());
        assert!(handles.get(fh).is_none() && handles.remove(fh).is_none());
        handles.insert("other");
        assert_eq!(handles.drain().len(), 1);
        assert!(handles.drain().is_empty());
    }
}
