//! unlink and rmdir.

use fjordfs_proto::{
    FsResult, InodeId,
    error::Errno,
    pb::meta::{Empty, Remove},
};

use super::{Ctx, EMPTY, time_of, touch_directory};
use crate::{keys, names, orphans};

pub(super) fn run(ctx: &mut Ctx<'_>, op: &Remove) -> FsResult<Empty> {
    let parent = InodeId(op.parent);
    names::check(&op.name)?;
    let now = time_of(ctx, op.time)?;
    ctx.txn.directory(parent)?;
    let refuse = |errno, what| Err(names::error(errno, parent, &op.name, what));
    let Some(found) = ctx.txn.dirent(parent, &op.name)? else {
        return refuse(Errno::ENOENT, "does not exist");
    };
    let ino = InodeId(found.ino);
    let inode = ctx.txn.inode(ino)?;
    match (op.directory, inode.is_dir()) {
        (false, true) => return refuse(Errno::EISDIR, "is a directory"),
        (true, false) => return refuse(Errno::ENOTDIR, "is not a directory"),
        (true, true) if !ctx.txn.is_empty(&keys::dirents_after(ino, 0))? => {
            return refuse(Errno::ENOTEMPTY, "is a directory that is not empty");
        }
        _ => {}
    }
    ctx.txn.remove(keys::dirent(parent, &op.name));
    let maybe_open = ctx.maybe_open(ino);
    orphans::lose_link(ctx.txn, maybe_open, ino, inode, now)?;
    touch_directory(ctx.txn, parent, if op.directory { -1 } else { 0 }, now)?;
    Ok(EMPTY)
}
