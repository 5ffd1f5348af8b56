//! Where a directory is.

use fjordfs_proto::{
    FsResult, InodeId, ROOT_INODE,
    pb::meta::{GetParent, GetParentReply},
};

use super::Ctx;

/// The root is its own parent and has no name.
pub(super) fn run(ctx: &mut Ctx<'_>, op: &GetParent) -> FsResult<GetParentReply> {
    let ino = InodeId(op.ino);
    let inode = ctx.txn.directory(ino)?;
    let parent = if ino == ROOT_INODE { ROOT_INODE.0 } else { inode.parent };
    Ok(GetParentReply { parent, name: inode.name })
}
