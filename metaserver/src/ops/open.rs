//! Opening an inode, with the first page of its extents.

use fjordfs_proto::{
    FsResult, HandleId, InodeId,
    pb::meta::{Open, OpenReply},
};

use super::{Ctx, get_extents};

pub(super) fn run(ctx: &mut Ctx<'_>, op: &Open) -> FsResult<OpenReply> {
    let ino = InodeId(op.ino);
    let inode = ctx.txn.inode(ino)?;
    let extents =
        if inode.is_regular() { Some(get_extents::page(ctx.txn, ino, &inode, 0, 0)?) } else { None };
    ctx.opens.open(ctx.session, HandleId(op.handle), ino)?;
    Ok(OpenReply { attr: Some(inode.attr(ino)), extents })
}
