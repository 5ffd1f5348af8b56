//! What metaserver and client must agree on about operations: which of them are executed exactly once, and what a client
//! that holds a delegation may take for the effect of one before the server has executed it.

use crate::{
    mode::{PERMISSIONS, SETGID},
    pb::meta::{Attr, FileKind, Make, Time, request::Op},
};

/// What a directory reports as its size: one page, as local filesystems do.
pub const DIRECTORY_SIZE: u64 = 4096;

/// What a umask can take away.
pub const UMASK: u32 = 0o777;

/// Operations whose effect is durable and that are executed exactly once: each needs a slot.
pub fn is_mutation(op: &Op) -> bool {
    match op {
        Op::SetAttr(_)
        | Op::Make(_)
        | Op::Link(_)
        | Op::Remove(_)
        | Op::Rename(_)
        | Op::Commit(_)
        | Op::SetXattr(_)
        | Op::RemoveXattr(_)
        | Op::Allocate(_)
        | Op::CopyRange(_)
        | Op::LeaseBlocks(_)
        | Op::LeaseInodes(_) => true,
        Op::Lookup(_)
        | Op::GetAttr(_)
        | Op::ReadLink(_)
        | Op::Open(_)
        | Op::Close(_)
        | Op::GetExtents(_)
        | Op::ReadDir(_)
        | Op::StatFs(_)
        | Op::Sync(_)
        | Op::GetXattr(_)
        | Op::ListXattrs(_)
        | Op::GetParent(_)
        | Op::Lock(_)
        | Op::Unlock(_)
        | Op::TestLock(_)
        | Op::CancelLock(_) => false,
    }
}

/// Attributes of a new inode in a directory without a default access control list; the umask has yet to be taken from
/// the mode when there may be one.
pub fn new_attr(make: &Make, parent: &Attr, ino: u64, now: Time) -> Attr {
    let kind = make.kind();
    let is_dir = kind == FileKind::Directory;
    let inherits_group = parent.mode & SETGID != 0;
    Attr {
        ino,
        kind: make.kind,
        mode: make.mode & PERMISSIONS | if inherits_group && is_dir { SETGID } else { 0 },
        uid: make.uid,
        gid: if inherits_group { parent.gid } else { make.gid },
        nlink: if is_dir { 2 } else { u32::from(!make.unnamed) },
        size: match kind {
            FileKind::Directory => DIRECTORY_SIZE,
            FileKind::Symlink => make.target.len() as u64,
            _ => 0,
        },
        rdev: make.rdev,
        atime: Some(now),
        mtime: Some(now),
        ctime: Some(now),
        btime: Some(now),
        policy: parent.policy,
        ..Attr::default()
    }
}
