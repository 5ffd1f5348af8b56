//! The namespace operations, one file each. All are pure: they read and write a [`Txn`], are told the time, and do no
//! I/O of their own. An operation that returns an error is undone by its caller.

mod accessed;
mod acl;
mod allocate;
mod close;
mod commit;
mod copy_range;
mod get_extents;
mod get_parent;
mod getattr;
mod lease_blocks;
mod lease_inodes;
mod link;
mod lookup;
mod make;
mod open;
mod readdir;
mod readlink;
mod remove;
mod rename;
mod setattr;
mod statfs;
mod sync;
mod told;
mod xattr;

#[cfg(test)]
mod tests;

use fjordfs_proto::{
    BlockId, FsError, FsResult, InodeId, Policy, SessionId, TargetId,
    error::Errno,
    pb::meta::{Empty, Entry, Make, Time, request::Op, response::Result as Reply},
};

use crate::{leases::Leases, opens::Opens, records::Inode, store::Fence, txn::Txn};

pub(crate) use make::make_root;
pub(crate) use told::Told;

/// Numbers leased to a session for inodes that it makes by itself, oldest first.
pub(crate) type InodeRanges = Vec<std::ops::Range<u64>>;

/// What operations know of the cluster.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ClusterFacts {
    pub(crate) epoch: u64,
    /// Targets that placement groups can use.
    pub(crate) targets: usize,
    /// There are placement groups, so block ids can be used.
    pub(crate) placeable: bool,
    /// Over all up targets, bytes.
    pub(crate) capacity: u64,
    pub(crate) free: u64,
}

/// What tells this start of the metaserver from those before it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    /// Grows from one to the next, and survives whatever the store does, also when its records go on on another one.
    pub(crate) fence: Fence,
    /// Inodes below were made before, or have numbers that were leased before.
    pub(crate) first_inode: InodeId,
}

/// Changes of one file between two starts are fewer than two to the power of this.
const CHANGES_BITS: u32 = 40;

impl Start {
    /// The version of a file's bytes after `last`. A power failure may have taken versions back that clients have seen: those are not given
    /// to other bytes, which they would take for what they have. So the first change after a start jumps. What was made since
    /// counts one by one, by which its writer knows that nobody else has changed it.
    pub(crate) fn next_version(self, ino: InodeId, last: u64) -> u64 {
        if ino >= self.first_inode {
            return last.saturating_add(1);
        }
        last.max(self.first_version()).saturating_add(1)
    }

    /// Beyond all versions that were given out before this start.
    pub(crate) fn first_version(self) -> u64 {
        self.fence.0.min(u64::MAX >> CHANGES_BITS) << CHANGES_BITS
    }
}

/// What an operation works on.
pub(crate) struct Ctx<'a> {
    pub(crate) txn: &'a mut Txn,
    pub(crate) opens: &'a mut Opens,
    pub(crate) leases: &'a Leases,
    pub(crate) session: SessionId,
    pub(crate) now: Time,
    pub(crate) start: Start,
    pub(crate) facts: ClusterFacts,
    pub(crate) inodes: &'a mut InodeRanges,
    /// Set by an operation that needs placement groups for this policy.
    pub(crate) policy_wanted: Option<Policy>,
    /// Set by a commit: blocks that members of their groups have no shard of.
    pub(crate) missed: Vec<Missed>,
}

impl Ctx<'_> {
    /// Whether an inode that loses its last name must be kept: it is open, or others may have opened it under a lease. What this
    /// session has opened it has told before.
    fn maybe_open(&self, ino: InodeId) -> bool {
        self.opens.maybe_open(ino) || self.leases.others_hold(self.session, ino)
    }
}

/// A block that members of its group have no shard of.
pub(crate) struct Missed {
    pub(crate) block: BlockId,
    /// Members of the group.
    pub(crate) width: usize,
    pub(crate) targets: Vec<TargetId>,
}

/// Operations that make the store larger, and are refused when its disk is nearly full.
pub(crate) fn needs_space(op: &Op) -> bool {
    match op {
        // One that only abandons blocks gives space back.
        Op::Commit(commit) => !commit.files.is_empty(),
        Op::Make(_)
        | Op::Link(_)
        | Op::LeaseBlocks(_)
        | Op::LeaseInodes(_)
        | Op::Rename(_)
        | Op::SetXattr(_)
        | Op::CopyRange(_) => true,
        _ => false,
    }
}

/// Answers that wait for the log: the client builds on them where a power failure here must not undo them.
/// A leased id that was forgotten would be leased twice, and two blocks would have one name.
pub(crate) fn needs_sync(op: &Op) -> bool {
    match op {
        Op::Sync(_) | Op::LeaseBlocks(_) | Op::LeaseInodes(_) => true,
        Op::Commit(commit) => commit.sync,
        _ => false,
    }
}

/// What goes on while clients of before a restart may still have something to send that they have decided: operations of
/// that kind, and those that no such decision can contradict.
pub(crate) fn goes_on_in_grace(op: &Op, deferred: bool) -> bool {
    deferred
        || matches!(
            op,
            Op::Commit(_)
                | Op::Close(_)
                | Op::Accessed(_)
                | Op::Sync(_)
                | Op::StatFs(_)
                | Op::LeaseBlocks(_)
                | Op::LeaseInodes(_)
        )
}

/// What takes nothing from a client that holds a delegation, and is nobody's to wait for.
pub(crate) fn never_conflicts(op: &Op) -> bool {
    matches!(op, Op::Close(_) | Op::Accessed(_))
}

/// Executes one operation.
pub(crate) fn run(ctx: &mut Ctx<'_>, op: Op) -> FsResult<Reply> {
    Ok(match op {
        Op::Lookup(op) => Reply::Entry(lookup::run(ctx, &op)?),
        Op::GetAttr(op) => Reply::Entry(getattr::run(ctx, &op)?),
        Op::SetAttr(op) => Reply::Entry(setattr::run(ctx, &op)?),
        Op::Make(op) => Reply::Entry(make::run(ctx, &op)?),
        Op::Link(op) => Reply::Entry(link::run(ctx, &op)?),
        Op::Remove(op) => Reply::Empty(remove::run(ctx, &op)?),
        Op::Rename(op) => Reply::Empty(rename::run(ctx, &op)?),
        Op::ReadLink(op) => Reply::ReadLink(readlink::run(ctx, &op)?),
        Op::Open(op) => Reply::Open(open::run(ctx, &op)?),
        Op::Close(op) => Reply::Empty(close::run(ctx, &op)?),
        Op::GetExtents(op) => Reply::Extents(get_extents::run(ctx, &op)?),
        Op::Commit(op) => Reply::Commit(commit::run(ctx, op)?),
        Op::ReadDir(op) => Reply::ReadDir(readdir::run(ctx, &op)?),
        Op::StatFs(_) => Reply::StatFs(statfs::run(ctx)?),
        Op::LeaseBlocks(op) => Reply::LeaseBlocks(lease_blocks::run(ctx, &op)?),
        Op::LeaseInodes(op) => Reply::LeaseInodes(lease_inodes::run(ctx, &op)?),
        Op::Sync(_) => Reply::Empty(sync::run()),
        Op::Lock(_) | Op::Unlock(_) | Op::TestLock(_) | Op::CancelLock(_) => {
            return fail(Errno::EINVAL, "locks are no part of the namespace");
        }
        Op::GetParent(op) => Reply::GetParent(get_parent::run(ctx, &op)?),
        Op::GetXattr(op) => Reply::Xattr(xattr::get(ctx, &op)?),
        Op::SetXattr(op) => Reply::Entry(xattr::set(ctx, &op)?),
        Op::ListXattrs(op) => Reply::XattrNames(xattr::list(ctx, &op)?),
        Op::RemoveXattr(op) => Reply::Entry(xattr::remove(ctx, &op)?),
        Op::Allocate(op) => Reply::Entry(allocate::run(ctx, &op)?),
        Op::CopyRange(op) => Reply::CopyRange(copy_range::run(ctx, &op)?),
        Op::Accessed(op) => Reply::Empty(accessed::run(ctx, &op)?),
    })
}

/// The answer of an earlier execution is repeated: what it did in memory is done again, since a restart forgets it.
pub(crate) fn replay(opens: &mut Opens, session: SessionId, op: &Op, reply: &Reply) {
    let Op::Make(make) = op else { return };
    let ino = match reply {
        Reply::Entry(Entry { attr: Some(attr), .. }) => attr.ino,
        // A deferred one is answered without attributes.
        _ => make.ino,
    };
    if make.handle != 0 {
        // It fails only when the client reuses handles, and then the first open stands.
        let _ = opens.open(session, fjordfs_proto::HandleId(make.handle), InodeId(ino));
    }
}

/// What the answer to a `Make` says of an inode that is there.
pub(crate) fn made(txn: &mut Txn, make: &Make) -> FsResult<Reply> {
    let found = txn.dirent(InodeId(make.parent), &make.name)?;
    let gone = || FsError::new(Errno::ENOENT, "it was made, and has been removed or renamed since");
    let ino = InodeId(found.ok_or_else(gone)?.ino);
    let inode = txn.inode(ino)?;
    Ok(Reply::Entry(entry(ino, &inode)))
}

fn entry(ino: InodeId, inode: &Inode) -> Entry {
    Entry { attr: Some(inode.attr(ino)), target: inode.target.clone(), extents: None, neighbours: Vec::new() }
}

/// When an operation happened: when its client decided it, or now.
fn time_of(ctx: &Ctx<'_>, decided: Option<Time>) -> FsResult<Time> {
    decided.iter().try_for_each(check_time)?;
    Ok(decided.unwrap_or(ctx.now))
}

const NANOSECONDS: u32 = 1_000_000_000;

fn check_time(time: &Time) -> FsResult<()> {
    if time.nsec >= NANOSECONDS {
        return fail(Errno::EINVAL, format!("{} nanoseconds are a second or more", time.nsec));
    }
    Ok(())
}

fn fail<T>(errno: Errno, message: impl Into<String>) -> FsResult<T> {
    Err(FsError::new(errno, message))
}

/// A directory gained or lost an entry, and `links` subdirectories.
fn touch_directory(txn: &mut Txn, ino: InodeId, links: i64, now: Time) -> FsResult<()> {
    let mut inode = txn.inode(ino)?;
    inode.nlink = u32::try_from(i64::from(inode.nlink) + links)
        .or_else(|_| fail(Errno::EMLINK, format!("directory {ino} cannot have more subdirectories")))?;
    (inode.mtime, inode.ctime) = (Some(now), Some(now));
    txn.put_inode(ino, &inode);
    Ok(())
}

const EMPTY: Empty = Empty {};
