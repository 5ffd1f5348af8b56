//! chmod, chown, utimes, truncate, and the policy of a directory or an empty file.

use fjordfs_proto::{
    FILE_SIZE_MAX, FsResult, InodeId, Policy,
    error::Errno,
    mode::{PERMISSIONS, without_suid},
    pb::meta::{Entry, SetAttr},
};

use super::{Ctx, acl, check_time, entry, fail};
use crate::{extents, records::Inode};

pub(super) fn run(ctx: &mut Ctx<'_>, op: &SetAttr) -> FsResult<Entry> {
    let ino = InodeId(op.ino);
    let mut inode = ctx.txn.inode(ino)?;
    for time in [&op.atime, &op.mtime, &op.ctime].into_iter().flatten() {
        check_time(time)?;
    }
    if let Some(code) = op.policy {
        set_policy(ctx, ino, &mut inode, code)?;
    }
    let changes_owner = op.uid.is_some() || op.gid.is_some();
    if !inode.is_dir() && (changes_owner || op.clear_suid) {
        // A new owner's privileges are never taken over from the old one, whoever asks.
        inode.mode = without_suid(inode.mode);
    }
    if let Some(mode) = op.mode {
        inode.mode = mode & PERMISSIONS;
        acl::chmod(ctx, ino, &mut inode)?;
    }
    inode.uid = op.uid.unwrap_or(inode.uid);
    inode.gid = op.gid.unwrap_or(inode.gid);
    if let Some(size) = op.size {
        truncate(ctx, ino, &mut inode, size)?;
        // As Linux does for a truncate that names a size, changed or not.
        inode.mtime = Some(ctx.now);
    }
    inode.atime = if op.atime_now { Some(ctx.now) } else { op.atime.or(inode.atime) };
    inode.mtime = if op.mtime_now { Some(ctx.now) } else { op.mtime.or(inode.mtime) };
    inode.ctime = Some(op.ctime.unwrap_or(ctx.now));
    ctx.txn.put_inode(ino, &inode);
    Ok(entry(ino, &inode))
}

fn truncate(ctx: &mut Ctx<'_>, ino: InodeId, inode: &mut Inode, size: u64) -> FsResult<()> {
    if inode.is_dir() {
        return fail(Errno::EISDIR, format!("inode {ino} is a directory: it has no size to set"));
    }
    if !inode.is_regular() {
        return fail(Errno::EINVAL, format!("inode {ino} is not a regular file: it has no size to set"));
    }
    if size > FILE_SIZE_MAX {
        return fail(Errno::EFBIG, format!("{size} bytes are more than a file can have ({FILE_SIZE_MAX})"));
    }
    if size == inode.size {
        return Ok(());
    }
    let end = inode.size;
    extents::remove(ctx.txn, ino, inode, size..end)?;
    inode.size = size;
    inode.data_version = ctx.start.next_version(ino, inode.data_version);
    Ok(())
}

fn set_policy(ctx: &mut Ctx<'_>, ino: InodeId, inode: &mut Inode, code: u32) -> FsResult<()> {
    if !inode.is_dir() && (!inode.is_regular() || inode.size > 0 || inode.allocated > 0) {
        return fail(
            Errno::EINVAL,
            format!(
                "inode {ino} is neither a directory nor an empty file: set the policy of a directory, files made in it inherit it"
            ),
        );
    }
    let Some(policy) = Policy::from_code(code) else {
        return fail(Errno::EINVAL, format!("unknown policy code {code}"));
    };
    if policy.width() > ctx.facts.targets {
        return fail(
            Errno::EINVAL,
            format!(
                "policy {policy} needs {} targets and the cluster has {}: add data servers first",
                policy.width(),
                ctx.facts.targets
            ),
        );
    }
    inode.policy = code;
    ctx.policy_wanted = Some(policy);
    Ok(())
}
