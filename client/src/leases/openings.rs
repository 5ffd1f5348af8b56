//! Handles that were opened under a lease, and of which the server does not know.
//!
//! # Invariant
//! There is a lease on the inode of each. So before a lease ends, and before this client removes a name of the inode, they
//! are told; the server keeps an inode without a name while it waits for that.

use std::collections::HashMap;

use fjordfs_proto::{
    HandleId, InodeId,
    pb::meta::{Open, request::Op},
};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Openings(HashMap<InodeId, Vec<HandleId>>);

impl Openings {
    pub(super) fn add(&mut self, ino: InodeId, handle: HandleId) {
        self.0.entry(ino).or_default().push(handle);
    }

    /// The handle is closed; whether the server had not been told of it.
    pub(super) fn remove(&mut self, ino: InodeId, handle: HandleId) -> bool {
        let Some(handles) = self.0.get_mut(&ino) else { return false };
        let Some(at) = handles.iter().position(|other| *other == handle) else { return false };
        handles.swap_remove(at);
        if handles.is_empty() {
            self.0.remove(&ino);
        }
        true
    }

    /// What the server must be told now of an inode.
    pub(super) fn tell(&mut self, ino: InodeId) -> Vec<Op> {
        // Mostly there is nothing, and this is asked for each inode that is recalled.
        if self.0.is_empty() {
            return Vec::new();
        }
        let handles = self.0.remove(&ino).unwrap_or_default();
        handles.into_iter().map(|handle| open(ino, handle)).collect()
    }

    /// What the server must be told now of all inodes.
    pub(super) fn tell_all(&mut self) -> Vec<Op> {
        let all = std::mem::take(&mut self.0).into_iter();
        all.flat_map(|(ino, handles)| handles.into_iter().map(move |handle| open(ino, handle))).collect()
    }

    /// The server is told of every handle in another way.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

fn open(ino: InodeId, handle: HandleId) -> Op {
    Op::Open(Open { ino: ino.0, handle: handle.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_handle_is_told_once_and_none_that_was_closed() {
        let mut openings = Openings::default();
        let (a, b) = (InodeId(1), InodeId(2));
        for (ino, handle) in [(a, 1), (a, 2), (b, 3), (a, 4)] {
            openings.add(ino, HandleId(handle));
        }
        assert!(openings.remove(a, HandleId(2)));
        assert!(!openings.remove(a, HandleId(2)) && !openings.remove(b, HandleId(1)));
        assert_eq!(openings.tell(a), [open(a, HandleId(1)), open(a, HandleId(4))]);
        assert!(openings.tell(a).is_empty());
        assert!(!openings.remove(a, HandleId(1)), "the server knows of it");
        assert_eq!(openings.tell_all(), [open(b, HandleId(3))]);
        assert!(openings.tell_all().is_empty());
    }
}
