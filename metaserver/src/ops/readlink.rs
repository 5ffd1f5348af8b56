//! Where a symbolic link points.

use fjordfs_proto::{
    FsResult, InodeId,
    error::Errno,
    pb::meta::{FileKind, ReadLink, ReadLinkReply},
};

use super::{Ctx, fail};

pub(super) fn run(ctx: &mut Ctx<'_>, op: &ReadLink) -> FsResult<ReadLinkReply> {
    let ino = InodeId(op.ino);
    let inode = ctx.txn.inode(ino)?;
    if inode.kind() != FileKind::Symlink {
        return fail(Errno::EINVAL, format!("inode {ino} is not a symbolic link"));
    }
    Ok(ReadLinkReply { target: inode.target })
}
