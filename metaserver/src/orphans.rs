//! From an inode's last link to its last byte.
//!
//! ```text
//! made without a name (O_TMPFILE) ──────────▶ orphan record 'O' ── named ──▶ linked
//! linked ── last name removed ──┬─ perhaps open, or replaced ─▶ orphan record 'O' ── last close, or some seconds, and no recall ──┐
//!                               └─ not open ──────────────────────────────────────────────────────────────────────────────────────┴─▶ destroyed
//! destroyed: inode record and extended attributes gone; few extents go with it, many leave a record 'Z' and go in steps
//! ```

use fjordfs_proto::{FsResult, InodeId, pb::meta::Time};

use crate::{
    extents, keys,
    leases::Leases,
    opens::Opens,
    records::{self, Inode},
    store::Order,
    txn::Txn,
    xattrs,
};

/// Extents removed in the batch that destroys their file.
const EXTENTS_AT_ONCE: usize = 32;
/// Extents removed in one background step.
const EXTENTS_PER_STEP: usize = 128;

/// The inode has no name and is perhaps open.
pub(crate) fn add(txn: &mut Txn, ino: InodeId) {
    txn.put(keys::orphan(ino), Default::default());
    txn.counters().orphans += 1;
}

/// It has a name now, or is destroyed.
pub(crate) fn remove(txn: &mut Txn, ino: InodeId) {
    txn.remove(keys::orphan(ino));
    let orphans = &mut txn.counters().orphans;
    *orphans = orphans.saturating_sub(1);
}

/// One name of the inode is gone. A directory has only one. `maybe_open`: somebody may have it open, so that it must be kept.
pub(crate) fn lose_link(
    txn: &mut Txn,
    maybe_open: bool,
    ino: InodeId,
    mut inode: Inode,
    now: Time,
) -> FsResult<()> {
    inode.ctime = Some(now);
    if inode.is_dir() {
        (inode.nlink, inode.parent) = (0, 0);
        inode.name.clear();
    } else {
        inode.nlink = inode.nlink.saturating_sub(1);
    }
    if inode.nlink == 0 && !maybe_open {
        return destroy(txn, ino, &inode);
    }
    if inode.nlink == 0 {
        add(txn, ino);
    }
    txn.put_inode(ino, &inode);
    Ok(())
}

/// Nobody has `ino` open any more as far as is known: if it is unlinked, it goes. While it is recalled, somebody who has opened it under
/// a lease may still say so; it is looked at again at the end of the recall.
pub(crate) fn closed(txn: &mut Txn, opens: &Opens, leases: &Leases, ino: InodeId) -> FsResult<()> {
    if opens.maybe_open(ino) || leases.is_recalled(ino) || txn.get(&keys::orphan(ino))?.is_none() {
        return Ok(());
    }
    remove(txn, ino);
    match txn.find_inode(ino)? {
        Some(inode) => destroy(txn, ino, &inode),
        None => Ok(()),
    }
}

fn destroy(txn: &mut Txn, ino: InodeId, inode: &Inode) -> FsResult<()> {
    txn.remove(keys::inode(ino));
    xattrs::destroy(txn, ino, inode)?;
    let inodes = &mut txn.counters().inodes;
    *inodes = inodes.saturating_sub(1);
    if inode.allocated > 0 && extents::destroy_step(txn, ino, EXTENTS_AT_ONCE)? {
        txn.put(keys::destroy(ino), Default::default());
        txn.pending().destroyed = true;
    }
    Ok(())
}

/// Removes some extents of destroyed files. Says whether any remain.
pub(crate) fn destroy_step(txn: &mut Txn) -> FsResult<bool> {
    if !txn.pending().destroyed {
        return Ok(false);
    }
    let all = keys::all(keys::DESTROY);
    let Some((key, _)) = txn.scan(&all, Order::Ascending, 1)?.pop() else {
        txn.pending().destroyed = false;
        return Ok(false);
    };
    let ino = keys::first_id(&key).ok_or_else(|| records::damaged("a destroyed file without an inode"))?;
    if !extents::destroy_step(txn, InodeId(ino), EXTENTS_PER_STEP)? {
        txn.remove(key);
    }
    Ok(true)
}

/// Inodes that linger no longer are closed, a page at a time. Says whether there may be more.
pub(crate) fn let_go_step(txn: &mut Txn, opens: &mut Opens, leases: &Leases) -> FsResult<bool> {
    let lingered = opens.take_lingered(EXTENTS_PER_STEP);
    lingered.iter().try_for_each(|ino| closed(txn, opens, leases, *ino))?;
    Ok(lingered.len() == EXTENTS_PER_STEP)
}

/// After a recovery: orphans beyond `after` that nobody declared open go, a page at a time. Where to go on, or
/// `None` at the end.
pub(crate) fn reap_step(txn: &mut Txn, opens: &Opens, leases: &Leases, after: u64) -> FsResult<Option<u64>> {
    let range = keys::orphan(InodeId(after.saturating_add(1)))..keys::all(keys::ORPHAN).end;
    let rows = txn.scan(&range, Order::Ascending, EXTENTS_PER_STEP)?;
    let mut last = None;
    for (key, _) in &rows {
        let ino = keys::first_id(key).ok_or_else(|| records::damaged("an orphan without an inode"))?;
        closed(txn, opens, leases, InodeId(ino))?;
        last = Some(ino);
    }
    Ok(last.filter(|_| rows.len() == EXTENTS_PER_STEP))
}
