//! The extent map of a file as records: the same rules as `fjordfs_proto::IntervalMap`, read and written by range.
//!
//! Invariants: extents of a file never overlap, none ends beyond the file's size, neighbours that could be one run
//! are one run, and `Inode::allocated` is the sum of their lengths. That a file of no allocated bytes has no extents
//! spares new files every scan.

use std::ops::Range;

use fjordfs_proto::{Extent, FsResult, InodeId, interval::Run};

use crate::{
    keys, liveness,
    records::{self, ExtentRecord, Inode},
    store::{Order, Pair},
    txn::Txn,
};

/// Records read at a time while a range is cut.
const PAGE: usize = 512;

/// Extents by offset, and where the next page begins; `None` at the end of the file.
pub(crate) type Page = (Vec<(u64, Extent)>, Option<u64>);

fn parse(ino: InodeId, (key, value): Pair) -> FsResult<(u64, Extent)> {
    let offset = keys::second_id(&key)
        .ok_or_else(|| records::damaged(&format!("an extent of {ino} without an offset")))?;
    let record: ExtentRecord = records::decode(value, || format!("extent of {ino} at {offset}"))?;
    Ok((offset, record.extent(ino, offset)?))
}

/// The last extent that begins before `offset`.
fn before(txn: &mut Txn, ino: InodeId, offset: u64) -> FsResult<Option<(u64, Extent)>> {
    let found = txn.scan(&keys::extents(ino, 0..offset), Order::Descending, 1)?.pop();
    found.map(|pair| parse(ino, pair)).transpose()
}

fn put(txn: &mut Txn, ino: InodeId, offset: u64, extent: &Extent) {
    txn.put_record(keys::extent(ino, offset), &ExtentRecord::new(extent));
}

/// At most `limit` whole extents that intersect `[offset, end of file)`.
pub(crate) fn page(txn: &mut Txn, ino: InodeId, offset: u64, limit: usize) -> FsResult<Page> {
    let mut found = Vec::new();
    if let Some((at, extent)) = before(txn, ino, offset)?
        && at + extent.len() > offset
    {
        found.push((at, extent));
    }
    for pair in txn.scan(&keys::extents(ino, offset..u64::MAX), Order::Ascending, limit.saturating_add(1))? {
        found.push(parse(ino, pair)?);
    }
    let next = found.get(limit).map(|(at, _)| *at);
    found.truncate(limit);
    Ok((found, next))
}

/// Takes out what lies in `range`; the parts outside stay. Its blocks lose those bytes.
pub(crate) fn remove(txn: &mut Txn, ino: InodeId, inode: &mut Inode, range: Range<u64>) -> FsResult<()> {
    if inode.allocated == 0 || range.start >= inode.size || range.is_empty() {
        return Ok(());
    }
    txn.changes_extents(ino)?;
    if let Some((at, extent)) = before(txn, ino, range.start)?
        && at + extent.len() > range.start
    {
        cut(txn, ino, inode, (at, extent), &range)?;
    }
    let mut from = range.start;
    loop {
        let rows = txn.scan(&keys::extents(ino, from..range.end), Order::Ascending, PAGE)?;
        let full = rows.len() == PAGE;
        for row in rows {
            let (at, extent) = parse(ino, row)?;
            from = at + extent.len();
            cut(txn, ino, inode, (at, extent), &range)?;
        }
        if !full || from >= range.end {
            return Ok(());
        }
    }
}

fn cut(
    txn: &mut Txn,
    ino: InodeId,
    inode: &mut Inode,
    (at, extent): (u64, Extent),
    range: &Range<u64>,
) -> FsResult<()> {
    let end = at + extent.len();
    let (from, to) = (at.max(range.start), end.min(range.end));
    if at < from {
        put(txn, ino, at, &extent.slice(0..from - at));
    } else {
        txn.remove(keys::extent(ino, at));
    }
    if to < end {
        put(txn, ino, to, &extent.slice(to - at..extent.len()));
    }
    inode.allocated = inode.allocated.checked_sub(to - from).ok_or_else(|| {
        records::damaged(&format!("inode {ino} has fewer allocated bytes than its extents"))
    })?;
    liveness::release(txn, &extent, from - at..to - at)
}

/// Puts `extent` at `offset`, replacing what lies there, and joins it with its neighbours where they agree.
/// The caller sees to the file's size.
pub(crate) fn insert(
    txn: &mut Txn,
    ino: InodeId,
    inode: &mut Inode,
    offset: u64,
    extent: Extent,
) -> FsResult<()> {
    let end = offset + extent.len();
    remove(txn, ino, inode, offset..end)?;
    let had_any = inode.allocated > 0;
    inode.allocated += extent.len();
    let (mut at, mut run) = (offset, extent);
    if had_any {
        if let Some((left_at, mut left)) = before(txn, ino, offset)?
            && left_at + left.len() == offset
        {
            match left.join(run) {
                Ok(()) => (at, run) = (left_at, left),
                Err(unjoined) => run = unjoined,
            }
        }
        if end < inode.size
            && let Some(value) = txn.get(&keys::extent(ino, end))?
        {
            let (_, right) = parse(ino, (keys::extent(ino, end), value))?;
            if run.join(right).is_ok() {
                txn.remove(keys::extent(ino, end));
            }
        }
    }
    put(txn, ino, at, &run);
    Ok(())
}

/// Removes up to `limit` extents of an inode that is gone. Says whether any remain.
pub(crate) fn destroy_step(txn: &mut Txn, ino: InodeId, limit: usize) -> FsResult<bool> {
    let rows = txn.scan(&keys::extents(ino, 0..u64::MAX), Order::Ascending, limit.saturating_add(1))?;
    let more = rows.len() > limit;
    for row in rows.into_iter().take(limit) {
        let (at, extent) = parse(ino, row)?;
        txn.remove(keys::extent(ino, at));
        liveness::release(txn, &extent, 0..extent.len())?;
    }
    Ok(more)
}
