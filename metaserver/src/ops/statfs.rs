//! Capacity and use of the whole filesystem.

use fjordfs_proto::{FsResult, ROOT_INODE, pb::meta::StatFsReply};

use super::Ctx;

pub(super) fn run(ctx: &mut Ctx<'_>) -> FsResult<StatFsReply> {
    let root = ctx.txn.inode(ROOT_INODE)?;
    Ok(StatFsReply {
        capacity: ctx.facts.capacity,
        free: ctx.facts.free,
        inodes: ctx.txn.counters().inodes,
        policy: root.policy,
    })
}
