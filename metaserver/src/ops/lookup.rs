//! Name to inode.

use fjordfs_proto::{
    FsResult, InodeId,
    error::Errno,
    pb::meta::{Entry, Lookup},
};

use super::{Ctx, entry};
use crate::names;

pub(super) fn run(ctx: &mut Ctx<'_>, op: &Lookup) -> FsResult<Entry> {
    let parent = InodeId(op.parent);
    names::check(&op.name)?;
    let Some(found) = ctx.txn.dirent(parent, &op.name)? else {
        // Only an absent name needs the parent: its error says why there is none.
        ctx.txn.directory(parent)?;
        return Err(names::error(Errno::ENOENT, parent, &op.name, "does not exist"));
    };
    let ino = InodeId(found.ino);
    Ok(entry(ino, &ctx.txn.inode(ino)?))
}
