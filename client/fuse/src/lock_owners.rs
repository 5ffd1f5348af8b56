//! Through which open files locks were taken: what is to be given up when one of them is closed.
//!
//! The kernel keeps no locks of its own once it asks us for them, so releasing them is ours. It tells of two things: FLUSH, each
//! time when a process closes a descriptor, and RELEASE, when the last descriptor of an open file is gone.
//!
//! | lock | its owner | goes with |
//! |---|---|---|
//! | `fcntl` of a process | the process | FLUSH by this owner, of *any* open file of the inode |
//! | `fcntl` of an open file (OFD) | the open file | RELEASE of the open file through which it was taken |
//! | `flock` | the open file, by its handle | its RELEASE |
//!
//! The first two look alike when they are taken, so RELEASE gives up whatever was taken through the open file, unless its owner
//! has used another one since.
//!
//! # Closing without a FLUSH
//! A FLUSH for everybody who only reads would cost a request for each file, so files opened for reading close without one, but
//! only while nobody on this mount has ever locked the inode, as far back as the kernel remembers it. The first lock of an inode
//! may then be taken through, or beside, an open file that closes silently: such a lock goes with the RELEASE, at the *last*
//! close of the open file that it was taken through. It is never given up too early. From then on every close is heard of.

use std::collections::HashMap;

use fjordfs_proto::InodeId;
use parking_lot::Mutex;

/// For each owner, the open files through which it has locked and not closed since.
type Owners = HashMap<u64, Vec<u64>>;

/// What went with an open file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Released {
    /// Owners that had locked through it.
    pub(crate) used_by: Vec<u64>,
    /// Those among them that have used no other, whose locks go with it.
    pub(crate) without: Vec<u64>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct LockOwners {
    inodes: Mutex<HashMap<InodeId, Owners>>,
}

impl LockOwners {
    /// An owner is about to lock through an open file. Whether that is new.
    pub(crate) fn uses(&self, ino: InodeId, fh: u64, owner: u64) -> bool {
        let mut inodes = self.inodes.lock();
        let used = inodes.entry(ino).or_default().entry(owner).or_default();
        let is_new = !used.contains(&fh);
        if is_new {
            used.push(fh);
        }
        is_new
    }

    /// Whether anybody has locked the inode since the kernel knows it.
    pub(crate) fn knows(&self, ino: InodeId) -> bool {
        self.inodes.lock().contains_key(&ino)
    }

    /// The owner has closed a descriptor. Whether it had locked through the open file.
    pub(crate) fn closed(&self, ino: InodeId, fh: u64, owner: u64) -> bool {
        let mut inodes = self.inodes.lock();
        let Some(owners) = inodes.get_mut(&ino) else { return false };
        let Some(used) = owners.get_mut(&owner) else { return false };
        let before = used.len();
        used.retain(|used| *used != fh);
        let had = used.len() < before;
        if used.is_empty() {
            owners.remove(&owner);
        }
        had
    }

    /// The open file is gone.
    pub(crate) fn released(&self, ino: InodeId, fh: u64) -> Released {
        let mut released = Released::default();
        let mut inodes = self.inodes.lock();
        let Some(owners) = inodes.get_mut(&ino) else { return released };
        owners.retain(|owner, used| {
            let before = used.len();
            used.retain(|used| *used != fh);
            if used.len() < before {
                released.used_by.push(*owner);
                if used.is_empty() {
                    released.without.push(*owner);
                }
            }
            !used.is_empty()
        });
        released
    }

    /// The kernel has forgotten the inode. Owners, and the open files that they had not closed.
    pub(crate) fn forget(&self, ino: InodeId) -> Vec<(u64, u64)> {
        let owners = self.inodes.lock().remove(&ino).unwrap_or_default();
        owners.into_iter().flat_map(|(owner, used)| used.into_iter().map(move |fh| (owner, fh))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const I: InodeId = InodeId(9);

    #[test]
    fn locks_go_with_the_last_open_file_that_they_were_taken_through() {
        let owners = LockOwners::default();
        let released = |fh| {
            let Released { mut used_by, without } = owners.released(I, fh);
            used_by.sort_unstable();
            (used_by, without)
        };
        assert!(!owners.knows(I) && released(1) == (vec![], vec![]));
        assert!(owners.uses(I, 1, 100) && !owners.uses(I, 1, 100));
        owners.uses(I, 1, 200);
        owners.uses(I, 2, 200);
        assert_eq!(released(1), (vec![100, 200], vec![100]));
        assert_eq!(released(1), (vec![], vec![]));
        assert_eq!(released(2), (vec![200], vec![200]));
        assert!(owners.knows(I), "every close is heard of from now on");
        owners.uses(I, 3, 300);
        assert_eq!(owners.forget(I), [(300, 3)]);
        assert!(!owners.knows(I));
    }

    #[test]
    fn what_was_closed_with_a_flush_is_not_given_up_again() {
        let owners = LockOwners::default();
        owners.uses(I, 1, 100);
        assert!(owners.closed(I, 1, 100));
        assert!(!owners.closed(I, 3, 300) && !owners.closed(I, 1, 100));
        assert_eq!(owners.released(I, 1), Released::default());
    }
}
