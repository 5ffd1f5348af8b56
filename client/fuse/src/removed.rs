//! Directories that this mount has removed while they were open.
//!
//! The metaserver keeps removed files for those who have them open. A removed directory it does not keep: all that can still be
//! done with one is to look at its attributes, so those are kept here until it is closed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use fjordfs_proto::InodeId;
use fjordfs_proto::pb::meta::Attr;
use parking_lot::Mutex;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct OpenDirectories {
    open: Mutex<HashMap<InodeId, Open>>,
    /// Of `open`, for a look without the lock.
    count: AtomicUsize,
}

#[derive(Debug, Default)]
struct Open {
    handles: usize,
    /// Once it is removed.
    last: Option<Attr>,
}

impl OpenDirectories {
    pub(crate) fn opened(&self, ino: InodeId) {
        let mut open = self.open.lock();
        open.entry(ino).or_default().handles += 1;
        self.count.store(open.len(), Ordering::Release);
    }

    pub(crate) fn closed(&self, ino: InodeId) {
        let mut open = self.open.lock();
        if let Some(directory) = open.get_mut(&ino) {
            directory.handles -= 1;
            if directory.handles == 0 {
                open.remove(&ino);
            }
        }
        self.count.store(open.len(), Ordering::Release);
    }

    /// Whether any directory is open.
    pub(crate) fn are_any(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }

    /// A directory is removed, which had these attributes.
    pub(crate) fn removed(&self, attr: Attr) {
        if let Some(directory) = self.open.lock().get_mut(&InodeId(attr.ino)) {
            directory.last = Some(Attr { nlink: 0, ..attr });
        }
    }

    /// Attributes of a directory that was removed while it was open.
    pub(crate) fn last_of(&self, ino: InodeId) -> Option<Attr> {
        self.open.lock().get(&ino)?.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_kept_until_the_last_handle_is_closed() {
        let directories = OpenDirectories::default();
        let attr = |ino| Attr { ino, nlink: 2, mode: 0o750, ..Attr::default() };
        directories.removed(attr(5));
        assert!(!directories.are_any() && directories.last_of(InodeId(5)).is_none());
        directories.opened(InodeId(5));
        directories.opened(InodeId(5));
        assert!(directories.last_of(InodeId(5)).is_none());
        directories.removed(attr(5));
        directories.closed(InodeId(5));
        assert_eq!(directories.last_of(InodeId(5)), Some(Attr { nlink: 0, ..attr(5) }));
        directories.closed(InodeId(5));
        assert!(directories.last_of(InodeId(5)).is_none() && !directories.are_any());
    }
}
