//! Block ids for a client's next blocks.

use fjordfs_proto::{
    FsResult,
    error::Errno,
    pb::meta::{LeaseBlocks, LeaseBlocksReply},
};

use super::{Ctx, fail};
use crate::block_ids::{self, LEASE_MAX};

/// Fewer ids than asked for are a complete answer.
pub(super) fn run(ctx: &mut Ctx<'_>, op: &LeaseBlocks) -> FsResult<LeaseBlocksReply> {
    if op.count == 0 {
        return fail(Errno::EINVAL, "a lease of no block ids");
    }
    if !ctx.facts.placeable {
        // Ids leased now would belong to no era, and no block could ever be placed under them.
        return fail(
            Errno::ENOSPC,
            format!(
                "{} data targets are registered, too few for the policy: start data servers",
                ctx.facts.targets
            ),
        );
    }
    let count = op.count.min(LEASE_MAX);
    let first = block_ids::lease(ctx.txn, ctx.session, count)?;
    Ok(LeaseBlocksReply { first: first.0, count, epoch: ctx.facts.epoch })
}
