//! What access control lists change besides themselves: the mode of their inode, and what is made below it.

use bytes::Bytes;
use fjordfs_proto::{FsResult, InodeId, error::Errno, mode::SETGID, operation::UMASK, pb::meta::FileKind};

use super::{Ctx, fail};
use crate::{
    acl::{self, Acl},
    records::Inode,
    xattrs,
};

/// Whether an extended attribute is one of the two lists.
pub(super) fn is_list(name: &[u8]) -> bool {
    name == acl::ACCESS || name == acl::DEFAULT
}

/// Sets a list; the caller stores the inode. `clear_sgid`: whoever sets it may not give the group's rights away.
pub(super) fn set(
    ctx: &mut Ctx<'_>,
    ino: InodeId,
    inode: &mut Inode,
    name: &[u8],
    value: &Bytes,
    clear_sgid: bool,
) -> FsResult<()> {
    if inode.kind() == FileKind::Symlink {
        return fail(Errno::EOPNOTSUPP, format!("inode {ino} is a symbolic link: it has no permissions"));
    }
    let Some(list) = Acl::parse(value.clone())? else {
        xattrs::take(ctx.txn, ino, inode, name)?;
        return Ok(());
    };
    if name == acl::DEFAULT {
        if !inode.is_dir() {
            return fail(Errno::EACCES, format!("inode {ino} is not a directory: nothing inherits from it"));
        }
        return xattrs::put(ctx.txn, ino, inode, name, list.bytes());
    }
    inode.mode = list.mode(inode.mode) & !if clear_sgid { SETGID } else { 0 };
    keep(ctx, ino, inode, &list)
}

/// `chmod` of an inode that may have a list; the caller stores the inode.
pub(super) fn chmod(ctx: &mut Ctx<'_>, ino: InodeId, inode: &mut Inode) -> FsResult<()> {
    if let Some(mut list) = load(ctx, ino, inode, acl::ACCESS)? {
        list.chmod(inode.mode);
        keep(ctx, ino, inode, &list)?;
    }
    Ok(())
}

/// Gives a new inode what the default list of its directory says, or, without one, what the umask leaves of its mode.
pub(super) fn inherit(
    ctx: &mut Ctx<'_>,
    (parent_ino, parent): (InodeId, &Inode),
    ino: InodeId,
    inode: &mut Inode,
    umask: u32,
) -> FsResult<()> {
    if inode.kind() == FileKind::Symlink {
        return Ok(());
    }
    let Some(mut list) = load(ctx, parent_ino, parent, acl::DEFAULT)? else {
        inode.mode &= !(umask & UMASK);
        return Ok(());
    };
    if inode.is_dir() {
        xattrs::put(ctx.txn, ino, inode, acl::DEFAULT, list.bytes())?;
    }
    inode.mode = list.restrict(inode.mode);
    keep(ctx, ino, inode, &list)
}

fn load(ctx: &mut Ctx<'_>, ino: InodeId, inode: &Inode, name: &[u8]) -> FsResult<Option<Acl>> {
    match xattrs::find(ctx.txn, ino, inode, name)? {
        Some(value) => Acl::parse(value),
        None => Ok(None),
    }
}

/// A list that the mode expresses as well is not kept.
fn keep(ctx: &mut Ctx<'_>, ino: InodeId, inode: &mut Inode, list: &Acl) -> FsResult<()> {
    if list.is_minimal() {
        xattrs::take(ctx.txn, ino, inode, acl::ACCESS).map(drop)
    } else {
        xattrs::put(ctx.txn, ino, inode, acl::ACCESS, list.bytes())
    }
}
