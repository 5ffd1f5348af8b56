//! An inode was read: its access time, by the rules of `relatime`.

use fjordfs_proto::{
    FsResult, InodeId,
    operation::access_is_due,
    pb::meta::{Accessed, Empty},
};

use super::{Ctx, EMPTY, check_time};

/// Of an inode that is gone nobody will ask.
pub(super) fn run(ctx: &mut Ctx<'_>, op: &Accessed) -> FsResult<Empty> {
    op.time.iter().chain(&op.before).try_for_each(check_time)?;
    let ino = InodeId(op.ino);
    let Some(mut inode) = ctx.txn.find_inode(ino)? else { return Ok(EMPTY) };
    // Who has written and read has changed the inode in a way that is not committed yet: `before` speaks for that.
    if inode.atime == op.before || access_is_due(inode.atime, [inode.mtime, inode.ctime], op.time) {
        inode.atime = op.time;
        ctx.txn.put_inode_untold(ino, &inode);
    }
    Ok(EMPTY)
}
