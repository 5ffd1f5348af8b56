//! fallocate: extending a file, punching holes, zeroing ranges.

use fjordfs_proto::{
    FILE_SIZE_MAX, FsResult, InodeId, Policy,
    error::Errno,
    mode::without_suid,
    pb::meta::{Allocate, Entry},
};

use super::{Ctx, entry, fail};
use crate::{extents, records::Inode};

pub(super) fn run(ctx: &mut Ctx<'_>, op: &Allocate) -> FsResult<Entry> {
    let ino = InodeId(op.ino);
    let mut inode = ctx.txn.inode(ino)?;
    if !inode.is_regular() {
        let errno = if inode.is_dir() { Errno::EISDIR } else { Errno::ENODEV };
        return fail(errno, format!("inode {ino} is not a regular file: it has no bytes"));
    }
    let end = op.offset.checked_add(op.length).filter(|end| *end.max(&op.size) <= FILE_SIZE_MAX);
    let Some(end) = end else {
        return fail(Errno::EFBIG, format!("inode {ino}: the range ends beyond the largest file"));
    };
    if !op.clear {
        check_space(ctx, ino, &inode, op.length)?;
    }
    let (allocated, size) = (inode.allocated, inode.size);
    if op.clear {
        extents::remove(ctx.txn, ino, &mut inode, op.offset..end)?;
    }
    inode.size = size.max(op.size);
    if (inode.allocated, inode.size) != (allocated, size) {
        inode.data_version = ctx.start.next_version(ino, inode.data_version);
    }
    if op.clear_suid {
        inode.mode = without_suid(inode.mode);
    }
    // Whatever became of the bytes, as local filesystems do.
    (inode.mtime, inode.ctime) = (Some(ctx.now), Some(ctx.now));
    ctx.txn.put_inode(ino, &inode);
    Ok(entry(ino, &inode))
}

/// What cannot fit today is refused, though what is promised is not reserved.
fn check_space(ctx: &Ctx<'_>, ino: InodeId, inode: &Inode, length: u64) -> FsResult<()> {
    let free = ctx.facts.free;
    if length > Policy::from_code(inode.policy).map_or(free, |policy| policy.usable(free)) {
        return fail(
            Errno::ENOSPC,
            format!(
                "{length} bytes for inode {ino} with their redundancy are more than the {free} bytes that are free"
            ),
        );
    }
    Ok(())
}
