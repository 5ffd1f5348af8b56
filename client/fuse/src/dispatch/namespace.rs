//! Making inodes and changing attributes.

use bytes::Bytes;
use fjordfs_proto::error::Errno;
use fjordfs_proto::mode::PERMISSIONS;
use fjordfs_proto::pb::meta::{FileKind, Time};
use fjordfs_proto::{FILE_SIZE_MAX, FsError, FsResult, InodeId};

use super::{Answer, Dispatcher, told};
use crate::abi::{SetattrIn, fattr};
use crate::filesystem::{AttrChange, Filesystem, NewNode, TimeChange};
use crate::reply::{self, Reply};
use crate::request::Caller;

impl<F: Filesystem> Dispatcher<F> {
    pub(super) async fn make(&self, parent: InodeId, name: &[u8], node: NewNode) -> FsResult<Answer> {
        let attr = self.fs.make(parent, name, node).await?;
        Ok(self.made(parent, name, &attr))
    }

    pub(super) async fn setattr(&self, ino: InodeId, input: &SetattrIn) -> FsResult<Answer> {
        let change = attr_change(input)?;
        let attr = self.fs.setattr(ino, change).await?;
        // While the kernel truncates, nothing can be waited for ([`crate::ends`]).
        let tells = (input.valid & fattr::SIZE == 0).then(|| told(&attr));
        Ok(Answer { tells, ..Reply::of(&reply::attr_out(&attr, self.validity)).into() })
    }
}

pub(super) fn symlink(caller: Caller, target: Bytes) -> NewNode {
    NewNode { target, ..node(caller, FileKind::Symlink, 0o777, 0) }
}

pub(super) fn directory(caller: Caller, mode: u32, umask: u32) -> NewNode {
    node(caller, FileKind::Directory, mode, umask)
}

/// What `mknod` makes.
pub(super) fn special(caller: Caller, mode: u32, umask: u32, rdev: u32) -> FsResult<NewNode> {
    let kind = reply::kind_of_mode(mode)
        .filter(|kind| !matches!(kind, FileKind::Directory | FileKind::Symlink))
        .ok_or_else(|| {
            FsError::new(Errno::EINVAL, format!("mknod with file type {:#o}", mode & libc::S_IFMT))
        })?;
    let is_device = matches!(kind, FileKind::CharDevice | FileKind::BlockDevice);
    Ok(NewNode { rdev: if is_device { rdev } else { 0 }, ..node(caller, kind, mode, umask) })
}

fn node(caller: Caller, kind: FileKind, mode: u32, umask: u32) -> NewNode {
    let Caller { uid, gid, .. } = caller;
    NewNode { kind, mode: mode & PERMISSIONS, umask, uid, gid, rdev: 0, target: Bytes::new() }
}

fn attr_change(input: &SetattrIn) -> FsResult<AttrChange> {
    let given = |bit: u32| input.valid & bit != 0;
    let time = |set: u32, now: u32, sec: u64, nsec: u32| {
        if given(now) {
            Some(TimeChange::Now)
        } else {
            given(set).then_some(TimeChange::At(Time { sec: sec.cast_signed(), nsec }))
        }
    };
    if given(fattr::SIZE) && input.size > FILE_SIZE_MAX {
        return Err(FsError::new(Errno::EFBIG, format!("a file cannot have {} bytes", input.size)));
    }
    Ok(AttrChange {
        mode: given(fattr::MODE).then_some(input.mode & PERMISSIONS),
        uid: given(fattr::UID).then_some(input.uid),
        gid: given(fattr::GID).then_some(input.gid),
        size: given(fattr::SIZE).then_some(input.size),
        atime: time(fattr::ATIME, fattr::ATIME_NOW, input.atime, input.atimensec),
        mtime: time(fattr::MTIME, fattr::MTIME_NOW, input.mtime, input.mtimensec),
        ctime: given(fattr::CTIME).then_some(Time { sec: input.ctime.cast_signed(), nsec: input.ctimensec }),
        clear_suid: given(fattr::KILL_SUIDGID),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_valid_fields_are_changed() {
        let input = SetattrIn {
            valid: fattr::MODE | fattr::ATIME | fattr::MTIME | fattr::MTIME_NOW,
            mode: libc::S_IFREG | 0o4755,
            uid: 5,
            size: u64::MAX,
            atime: (-1i64).cast_unsigned(),
            atimensec: 7,
            ..SetattrIn::default()
        };
        let expected = AttrChange {
            mode: Some(0o4755),
            atime: Some(TimeChange::At(Time { sec: -1, nsec: 7 })),
            mtime: Some(TimeChange::Now),
            ..AttrChange::default()
        };
        assert_eq!(attr_change(&input).unwrap(), expected);
        let too_large = SetattrIn { valid: fattr::SIZE, ..input };
        assert_eq!(attr_change(&too_large).unwrap_err().errno, Errno::EFBIG);
    }
}
