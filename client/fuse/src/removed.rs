//! Directories that this mount has removed and the kernel still holds: open, or as the current directory of a process.
//!
//! The metaserver keeps removed files for those who have them open. A removed directory it does not keep: all that can still be
//! done with one is to look at its attributes and to find it empty, so those are kept here until the kernel forgets it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use fjordfs_proto::InodeId;
use fjordfs_proto::pb::meta::Attr;
use parking_lot::Mutex;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct RemovedDirectories {
    last: Mutex<HashMap<InodeId, Attr>>,
    /// Of `last`, for a look without the lock.
    count: AtomicUsize,
}

impl RemovedDirectories {
    /// A directory is removed, which had these attributes. The kernel knows it, and has not heard of it.
    pub(crate) fn removed(&self, attr: Attr) {
        let mut last = self.last.lock();
        last.insert(InodeId(attr.ino), Attr { nlink: 0, ..attr });
        self.count.store(last.len(), Ordering::Release);
    }

    /// The kernel has forgotten an inode.
    pub(crate) fn forget(&self, ino: InodeId) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut last = self.last.lock();
        last.remove(&ino);
        self.count.store(last.len(), Ordering::Release);
    }

    /// Attributes of a directory that was removed.
    pub(crate) fn last_of(&self, ino: InodeId) -> Option<Attr> {
        self.last.lock().get(&ino).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_kept_until_the_kernel_forgets_it() {
        let directories = RemovedDirectories::default();
        let attr = |ino| Attr { ino, nlink: 2, mode: 0o750, ..Attr::default() };
        directories.forget(InodeId(5));
        directories.removed(attr(5));
        assert_eq!(directories.last_of(InodeId(5)), Some(Attr { nlink: 0, ..attr(5) }));
        assert!(directories.last_of(InodeId(6)).is_none());
        directories.forget(InodeId(5));
        assert!(directories.last_of(InodeId(5)).is_none());
    }
}
