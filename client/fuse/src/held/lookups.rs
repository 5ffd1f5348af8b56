//! How many answers have brought each inode to the kernel, as the kernel counts them.
//!
//! Bounded by the kernel: it has an inode, of a kilobyte, for each of the entries here, of some 30 bytes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::BuildHasherDefault;

use fjordfs_proto::InodeId;
use parking_lot::Mutex;

use crate::numbers::NumberHasher;

/// Enough that workers rarely meet on one lock.
const SHARDS: usize = 64;

type Shard = HashMap<InodeId, u64, BuildHasherDefault<NumberHasher>>;

/// See the module.
#[derive(Debug)]
pub(crate) struct Lookups {
    shards: [Mutex<Shard>; SHARDS],
}

impl Default for Lookups {
    fn default() -> Lookups {
        Lookups { shards: std::array::from_fn(|_| Mutex::default()) }
    }
}

impl Lookups {
    fn shard(&self, ino: InodeId) -> &Mutex<Shard> {
        &self.shards[(ino.0 % SHARDS as u64) as usize]
    }

    /// An answer is going to bring the inode. Says whether it is the only one that the kernel has not forgotten.
    pub(crate) fn add(&self, ino: InodeId) -> bool {
        let mut shard = self.shard(ino).lock();
        let count = shard.entry(ino).or_default();
        *count += 1;
        *count == 1
    }

    /// The kernel has forgotten this many answers, or did not take them. Says whether it has none left.
    pub(crate) fn subtract(&self, ino: InodeId, answers: u64) -> bool {
        let mut shard = self.shard(ino).lock();
        let Entry::Occupied(mut count) = shard.entry(ino) else { return true };
        if *count.get() > answers {
            *count.get_mut() -= answers;
            return false;
        }
        count.remove();
        // A listing of many files must not occupy their place for good.
        if shard.len() < shard.capacity() / 8 {
            let half = shard.capacity() / 2;
            shard.shrink_to(half);
        }
        true
    }

    /// Answers that the kernel has not forgotten.
    pub(crate) fn count(&self, ino: InodeId) -> u64 {
        self.shard(ino).lock().get(&ino).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inode_is_held_until_all_of_its_answers_are_forgotten() {
        let lookups = Lookups::default();
        let ino = InodeId(7);
        assert!(lookups.subtract(ino, 1), "never held");
        assert!(lookups.add(ino));
        assert!(!lookups.add(ino));
        assert!(!lookups.add(ino));
        assert!(!lookups.subtract(ino, 2));
        assert_eq!((lookups.count(ino), lookups.count(InodeId(71))), (1, 0));
        assert!(lookups.subtract(ino, 5), "more than there were");
        assert_eq!(lookups.count(ino), 0);
        assert!(lookups.add(ino));
    }

    #[test]
    fn memory_is_given_back() {
        let lookups = Lookups::default();
        let inodes = || (0..100_000).map(|i| InodeId(i * SHARDS as u64));
        inodes().for_each(|ino| assert!(lookups.add(ino)));
        assert!(lookups.shards[0].lock().capacity() >= 100_000);
        inodes().for_each(|ino| assert!(lookups.subtract(ino, 1)));
        assert!(lookups.shards[0].lock().capacity() < 100, "{}", lookups.shards[0].lock().capacity());
    }
}
