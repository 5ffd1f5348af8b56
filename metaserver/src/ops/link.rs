//! Another name for a file.

use fjordfs_proto::{
    FsResult, InodeId,
    error::Errno,
    pb::meta::{Entry, Link},
};

use super::{Ctx, entry, fail, touch_directory};
use crate::{names, orphans};

pub(super) fn run(ctx: &mut Ctx<'_>, op: &Link) -> FsResult<Entry> {
    let (ino, parent) = (InodeId(op.ino), InodeId(op.parent));
    names::check(&op.name)?;
    ctx.txn.directory(parent)?;
    let mut inode = ctx.txn.inode(ino)?;
    if inode.is_dir() {
        return fail(Errno::EPERM, format!("inode {ino} is a directory: directories have one name only"));
    }
    if inode.nlink == 0 && !inode.unnamed {
        return fail(Errno::ENOENT, format!("inode {ino} was unlinked"));
    }
    if ctx.txn.dirent(parent, &op.name)?.is_some() {
        return Err(names::error(Errno::EEXIST, parent, &op.name, "exists"));
    }
    if std::mem::take(&mut inode.unnamed) {
        orphans::remove(ctx.txn, ino);
    }
    inode.nlink = inode.nlink.checked_add(1).ok_or_else(|| {
        fjordfs_proto::FsError::new(Errno::EMLINK, format!("inode {ino} cannot have more names"))
    })?;
    inode.ctime = Some(ctx.now);
    ctx.txn.put_inode(ino, &inode);
    ctx.txn.put_dirent(parent, &op.name, ino, inode.kind);
    touch_directory(ctx.txn, parent, 0, ctx.now)?;
    Ok(entry(ino, &inode))
}
