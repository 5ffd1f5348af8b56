//! Inode numbers for what a client makes under its delegations. A number of a range that is not used is never used:
//! there are 2^64 of them.

use fjordfs_proto::{
    FsResult,
    error::Errno,
    pb::meta::{LeaseInodes, LeaseInodesReply},
};

use super::{Ctx, fail};
use crate::{
    keys,
    records::{InodeRange, SessionRecord},
};

/// Most numbers of one lease.
const LEASE_MAX: u32 = 1 << 14;

/// Ranges remembered: more than a client can have under way. It uses them in the order in which it got them.
const RANGES_MAX: usize = 16;

/// Fewer numbers than asked for are a complete answer.
pub(super) fn run(ctx: &mut Ctx<'_>, op: &LeaseInodes) -> FsResult<LeaseInodesReply> {
    if op.count == 0 {
        return fail(Errno::EINVAL, "a lease of no inode numbers");
    }
    let count = op.count.min(LEASE_MAX);
    let first = ctx.txn.counters().next_inode;
    ctx.txn.counters().next_inode += u64::from(count);
    let key = keys::session(ctx.session);
    let mut record: SessionRecord = ctx.txn.record(&key)?.unwrap_or_default();
    record.inodes.push(InodeRange { first, count });
    let old = record.inodes.len().saturating_sub(RANGES_MAX);
    record.inodes.drain(..old);
    *ctx.inodes = record.ranges();
    ctx.txn.put_record(key, &record);
    Ok(LeaseInodesReply { first, count })
}
