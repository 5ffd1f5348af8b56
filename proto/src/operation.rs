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
        | Op::CancelLock(_)
        | Op::Accessed(_) => false,
    }
}

/// The longest that an access time may lie back, seconds.
const ACCESS_AGE_MAX: i64 = 24 * 3600;

/// Whether reading an inode with these times has to be noted, by Linux's rules of `relatime`: not since its last change, or not
/// for a day. Without `now` only the first is looked at.
pub fn access_is_due(atime: Option<Time>, changes: [Option<Time>; 2], now: Option<Time>) -> bool {
    let key = |time: Option<Time>| time.map(|time| (time.sec, time.nsec));
    changes.into_iter().any(|change| key(atime) <= key(change))
        || now.is_some_and(|now| now.sec.saturating_sub(atime.map_or(0, |time| time.sec)) >= ACCESS_AGE_MAX)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_is_noted_after_a_change_and_once_a_day() {
        let at = |sec| Some(Time { sec, nsec: 5 });
        for (atime, mtime, ctime, now, expected) in [
            (100, 100, 50, 101, true),
            (100, 50, 100, 101, true),
            (100, 99, 99, 101, false),
            (100, 99, 99, 100 + ACCESS_AGE_MAX - 1, false),
            (100, 99, 99, 100 + ACCESS_AGE_MAX, true),
            // Clocks of two clients.
            (100, 99, 99, 50, false),
        ] {
            let due = access_is_due(at(atime), [at(mtime), at(ctime)], at(now));
            assert_eq!(due, expected, "{atime} {mtime} {ctime} {now}");
        }
        assert!(access_is_due(None, [at(1), None], None));
        assert!(!access_is_due(at(100), [at(99), None], None));
        assert!(!access_is_due(at(100), [at(99), at(99)], Some(Time { sec: i64::MIN, nsec: 0 })));
    }
}
