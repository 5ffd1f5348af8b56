//! getxattr, setxattr, listxattr, removexattr. Who may read and write which namespace is decided by the caller's kernel.
//! Of the namespace `system` there are the two access control lists.

use bytes::Bytes;
use fjordfs_proto::{
    FsResult, InodeId, XATTR_NAME_MAX, XATTR_VALUE_MAX,
    error::Errno,
    pb::meta::{Entry, GetXattr, ListXattrs, RemoveXattr, SetXattr, XattrNamesReply, XattrReply},
};

use super::{Ctx, acl, entry, fail};
use crate::{names, xattrs};

const CREATE: u32 = 1;
const REPLACE: u32 = 2;

/// Namespaces that are kept; others are refused, as local filesystems refuse them.
const NAMESPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];

pub(super) fn get(ctx: &mut Ctx<'_>, op: &GetXattr) -> FsResult<XattrReply> {
    let ino = InodeId(op.ino);
    check_name(&op.name)?;
    let inode = ctx.txn.inode(ino)?;
    match xattrs::find(ctx.txn, ino, &inode, &op.name)? {
        Some(value) => Ok(XattrReply { value }),
        None => absent(ino, &op.name),
    }
}

pub(super) fn set(ctx: &mut Ctx<'_>, op: &SetXattr) -> FsResult<Entry> {
    let ino = InodeId(op.ino);
    check_name(&op.name)?;
    if op.value.len() > XATTR_VALUE_MAX {
        return fail(
            Errno::E2BIG,
            format!("the value has {} bytes, {XATTR_VALUE_MAX} are allowed", op.value.len()),
        );
    }
    if op.flags & !(CREATE | REPLACE) != 0 {
        return fail(Errno::EINVAL, format!("unknown flags {:#x}", op.flags));
    }
    let mut inode = ctx.txn.inode(ino)?;
    let exists = op.flags != 0 && xattrs::find(ctx.txn, ino, &inode, &op.name)?.is_some();
    if exists && op.flags & CREATE != 0 {
        return fail(Errno::EEXIST, format!("inode {ino} has '{}' already", names::show(&op.name)));
    }
    if !exists && op.flags & REPLACE != 0 {
        return absent(ino, &op.name);
    }
    if acl::is_list(&op.name) {
        acl::set(ctx, ino, &mut inode, &op.name, &op.value, op.clear_sgid)?;
    } else {
        xattrs::put(ctx.txn, ino, &mut inode, &op.name, op.value.clone())?;
    }
    inode.ctime = Some(ctx.now);
    ctx.txn.put_inode(ino, &inode);
    Ok(entry(ino, &inode))
}

pub(super) fn list(ctx: &mut Ctx<'_>, op: &ListXattrs) -> FsResult<XattrNamesReply> {
    let ino = InodeId(op.ino);
    let inode = ctx.txn.inode(ino)?;
    Ok(XattrNamesReply { names: xattrs::names(ctx.txn, ino, &inode)? })
}

pub(super) fn remove(ctx: &mut Ctx<'_>, op: &RemoveXattr) -> FsResult<Entry> {
    let ino = InodeId(op.ino);
    check_name(&op.name)?;
    let mut inode = ctx.txn.inode(ino)?;
    // An inode without a list is as one whose list was removed.
    if !xattrs::take(ctx.txn, ino, &mut inode, &op.name)? && !acl::is_list(&op.name) {
        return absent(ino, &op.name);
    }
    inode.ctime = Some(ctx.now);
    ctx.txn.put_inode(ino, &inode);
    Ok(entry(ino, &inode))
}

fn check_name(name: &Bytes) -> FsResult<()> {
    if name.is_empty() || name.len() > XATTR_NAME_MAX {
        return fail(
            Errno::ERANGE,
            format!("the name has {} bytes, 1 to {XATTR_NAME_MAX} are allowed", name.len()),
        );
    }
    if NAMESPACES.contains(&&name[..]) || name.contains(&0) {
        return fail(Errno::EINVAL, format!("'{}' is not a name", names::show(name)));
    }
    if !NAMESPACES.iter().any(|namespace| name.starts_with(namespace)) && !acl::is_list(name) {
        return fail(
            Errno::EOPNOTSUPP,
            format!("'{}' is in no namespace that is kept: user, trusted, security", names::show(name)),
        );
    }
    Ok(())
}

fn absent<T>(ino: InodeId, name: &[u8]) -> FsResult<T> {
    fail(Errno::ENODATA, format!("inode {ino} has no '{}'", names::show(name)))
}
