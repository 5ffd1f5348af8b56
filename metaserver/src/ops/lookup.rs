//! Name to inode.

use fjordfs_proto::{
    FsResult, InodeId,
    error::Errno,
    pb::meta::{Entry, Lookup},
};

use super::{Ctx, entry, get_extents};
use crate::names;

/// A file of more extents is large: one question more is nothing to its reader.
const EXTENTS_MAX: usize = 4;

pub(super) fn run(ctx: &mut Ctx<'_>, op: &Lookup) -> FsResult<Entry> {
    let parent = InodeId(op.parent);
    names::check(&op.name)?;
    let Some(found) = ctx.txn.dirent(parent, &op.name)? else {
        // Only an absent name needs the parent: its error says why there is none.
        ctx.txn.directory(parent)?;
        return Err(names::error(Errno::ENOENT, parent, &op.name, "does not exist"));
    };
    let ino = InodeId(found.ino);
    let inode = ctx.txn.inode(ino)?;
    let mut entry = entry(ino, &inode);
    if op.extents && inode.is_regular() {
        let page = get_extents::page(ctx.txn, ino, &inode, 0, EXTENTS_MAX)?;
        entry.extents = (page.next_offset == u64::MAX).then_some(page);
    }
    Ok(entry)
}
