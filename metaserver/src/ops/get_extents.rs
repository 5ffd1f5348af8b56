//! Where a file's bytes are, a page at a time.

use fjordfs_proto::{
    FsResult, InodeId,
    error::Errno,
    pb::meta::{ExtentsReply, GetExtents},
};

use super::{Ctx, fail};
use crate::{extents, records::Inode, txn::Txn};

/// Extents of a page when the client does not say.
const PAGE_DEFAULT: usize = 512;
/// Most extents of a page.
const PAGE_MAX: usize = 4096;

pub(super) fn run(ctx: &mut Ctx<'_>, op: &GetExtents) -> FsResult<ExtentsReply> {
    let ino = InodeId(op.ino);
    let inode = ctx.txn.inode(ino)?;
    if !inode.is_regular() {
        return fail(Errno::EINVAL, format!("inode {ino} is not a regular file: it has no extents"));
    }
    page(ctx.txn, ino, &inode, op.offset, op.limit as usize)
}

/// A page of extents from `offset` on; `limit` 0 means the default.
pub(super) fn page(
    txn: &mut Txn,
    ino: InodeId,
    inode: &Inode,
    offset: u64,
    limit: usize,
) -> FsResult<ExtentsReply> {
    let limit = if limit == 0 { PAGE_DEFAULT } else { limit.min(PAGE_MAX) };
    let (found, next) =
        if inode.allocated == 0 { (Vec::new(), None) } else { extents::page(txn, ino, offset, limit)? };
    Ok(ExtentsReply {
        extents: found.iter().map(|(at, extent)| extent.to_pb(*at)).collect(),
        next_offset: next.unwrap_or(u64::MAX),
        data_version: inode.data_version,
    })
}
