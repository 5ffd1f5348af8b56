//! Closing a handle. The last close of an unlinked inode destroys it.

use fjordfs_proto::{
    FsResult, HandleId,
    pb::meta::{Close, Empty},
};

use super::{Ctx, EMPTY};
use crate::orphans;

/// A handle that is not open is closed already: a client resends what was not answered.
pub(super) fn run(ctx: &mut Ctx<'_>, op: &Close) -> FsResult<Empty> {
    if let Some(ino) = ctx.opens.close(ctx.session, HandleId(op.handle)) {
        orphans::closed(ctx.txn, ctx.opens, ctx.leases, ino)?;
    }
    Ok(EMPTY)
}
