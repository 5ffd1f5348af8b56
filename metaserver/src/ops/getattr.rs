//! Attributes of an inode.

use fjordfs_proto::{
    FsResult, InodeId,
    pb::meta::{Entry, GetAttr},
};

use super::{Ctx, entry};

pub(super) fn run(ctx: &mut Ctx<'_>, op: &GetAttr) -> FsResult<Entry> {
    let ino = InodeId(op.ino);
    Ok(entry(ino, &ctx.txn.inode(ino)?))
}
