//! Which blocks are still reached, and what becomes of those that are not.
//!
//! A block that is exactly one piece of one extent has no record: it dies with that piece. Any other block has a
//! 'live' record with the number of its bytes that extents reach, bytes reached twice counted twice:
//!
//! | event | record |
//! |---|---|
//! | a Commit names the block in several extents | created: bytes of all of them |
//! | part of its only piece goes | created: piece − part |
//! | bytes of it are shared with another extent (copy_file_range) | added, to the only piece if there was no record |
//! | bytes of it go, record present | subtracted |
//! | none left | removed, and the block joins a dead run |
//!
//! Dead runs are expanded in bounded steps ([`expand_step`]) into one deletion per target and block, which data
//! servers fetch with their heartbeats. So an operation that frees a million blocks writes one record.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use fjordfs_proto::{
    BLOCK_SIZE_MAX, BlockId, ClusterMap, Extent, FsResult, Layout, Source, TargetId, extent::BlockPiece,
    interval::Run,
};

use crate::{
    keys,
    records::{self, DeadRun, LiveBlock},
    store::Order,
    txn::Txn,
};

const BLOCK: u64 = BLOCK_SIZE_MAX as u64;

/// What one Commit says about one block.
#[derive(Clone, Copy, Default)]
pub(crate) struct Tally {
    /// Extent pieces.
    pub(crate) pieces: u32,
    /// Their bytes.
    pub(crate) bytes: u64,
}

/// Blocks named by a Commit, before any of its extents is inserted: shared ones get their record.
pub(crate) fn adopt(txn: &mut Txn, blocks: &BTreeMap<BlockId, Tally>) {
    for (block, tally) in blocks {
        if tally.pieces > 1 {
            txn.put_record(keys::live(*block), &LiveBlock { live: tally.bytes });
        }
    }
}

/// The bytes `again` of the extent `whole` are about to be reached by one more extent. Call it before that extent is inserted:
/// what the insertion replaces may release the same blocks.
pub(crate) fn share(txn: &mut Txn, whole: &Extent, again: Range<u64>) -> FsResult<()> {
    let inside = |piece: &BlockPiece| {
        let (start, end) = (piece.from, piece.from + u64::from(piece.length));
        end.min(again.end).saturating_sub(start.max(again.start))
    };
    for piece in whole.pieces().filter(|piece| inside(piece) > 0) {
        let key = keys::live(piece.block);
        let before = txn.record::<LiveBlock>(&key)?.map_or(u64::from(piece.length), |record| record.live);
        let live = before.checked_add(inside(&piece)).ok_or_else(|| {
            records::damaged(&format!("{} counts more live bytes than there can be", piece.block))
        })?;
        txn.put_record(key, &LiveBlock { live });
    }
    Ok(())
}

/// The bytes `gone` of the extent `whole` are no longer reached.
pub(crate) fn release(txn: &mut Txn, whole: &Extent, gone: Range<u64>) -> FsResult<()> {
    let Source::Blocks { addr, layout } = &whole.source else { return Ok(()) };
    if gone.is_empty() {
        return Ok(());
    }
    let head = u64::from(addr.offset);
    // Block i of the extent covers these bytes of it.
    let piece = |i: u64| (i * BLOCK).saturating_sub(head)..((i + 1) * BLOCK - head).min(whole.len());
    let (first, last) = ((head + gone.start) / BLOCK, (head + gone.end - 1) / BLOCK);
    let block = |i: u64| BlockId(addr.block.0 + i);

    // Only the two ends can lose less than their whole piece, and only recorded blocks can have bytes elsewhere;
    // everything between them dies as it stands.
    let mut recorded = BTreeMap::new();
    for (key, value) in txn.scan(&keys::lives(block(first), block(last)), Order::Ascending, usize::MAX)? {
        let id = keys::first_id(&key).ok_or_else(|| records::damaged("a live record without a block"))?;
        let record: LiveBlock = records::decode(value, || format!("live record of b{id}"))?;
        recorded.insert(id - addr.block.0, record.live);
    }
    let special: BTreeSet<u64> = recorded.keys().copied().chain([first, last]).collect();
    let mut dead = first..first;
    for i in special {
        // All blocks from dead.start up to this one are dead.
        let piece = piece(i);
        let lost = piece.end.min(gone.end) - piece.start.max(gone.start);
        let before = recorded.get(&i).copied();
        let live = before.unwrap_or(piece.end - piece.start).checked_sub(lost).ok_or_else(|| {
            records::damaged(&format!("{} has fewer live bytes than its extents", block(i)))
        })?;
        if live == 0 {
            if before.is_some() {
                txn.remove(keys::live(block(i)));
            }
            dead.end = i + 1;
        } else {
            txn.put_record(keys::live(block(i)), &LiveBlock { live });
            dead.end = i;
            bury(txn, block(dead.start), dead.end - dead.start, Some(*layout));
            dead = i + 1..i + 1;
        }
    }
    bury(txn, block(dead.start), dead.end - dead.start, Some(*layout));
    Ok(())
}

/// Consecutive blocks that nothing reaches. Without a layout, every target that could hold them is asked.
pub(crate) fn bury(txn: &mut Txn, first: BlockId, count: u64, layout: Option<Layout>) {
    if count == 0 {
        return;
    }
    let layout = layout.map_or(0, Layout::code);
    txn.put_record(keys::dead(first), &DeadRun { count, layout });
    txn.counters().queued += count;
    txn.pending().add_dead(first.0);
}

/// Whether there may be dead blocks to be expanded.
pub(crate) fn has_dead(txn: &mut Txn) -> bool {
    let pending = txn.pending();
    pending.dead_unknown || !pending.dead.is_empty()
}

/// Turns up to `limit` dead blocks into deletions of their targets. Says whether dead blocks remain.
/// Targets in `untidy` may have shards of any block.
pub(crate) fn expand_step(
    txn: &mut Txn,
    map: &ClusterMap,
    untidy: &BTreeSet<TargetId>,
    limit: u64,
) -> FsResult<bool> {
    let mut left = limit;
    while left > 0 {
        let Some(first) = txn.pending().dead.pop_first() else {
            if !txn.pending().dead_unknown {
                return Ok(false);
            }
            find_dead(txn)?;
            continue;
        };
        let Some(run) = txn.record::<DeadRun>(&keys::dead(BlockId(first)))? else { continue };
        let now = run.count.min(left);
        left -= now;
        txn.remove(keys::dead(BlockId(first)));
        if now < run.count {
            let rest = DeadRun { count: run.count - now, ..run };
            txn.put_record(keys::dead(BlockId(first + now)), &rest);
            txn.pending().add_dead(first + now);
        }
        let mut queued = 0;
        for block in (first..first + now).map(BlockId) {
            let holders = holders(map, block, Layout::from_code(run.layout));
            for target in holders.union(untidy).copied() {
                txn.put(keys::delete(target, block), Default::default());
                queued += 1;
            }
        }
        let counters = txn.counters();
        counters.queued = (counters.queued + queued).saturating_sub(now);
    }
    Ok(!txn.pending().dead.is_empty() || txn.pending().dead_unknown)
}

/// Looks for dead runs that nobody remembers.
fn find_dead(txn: &mut Txn) -> FsResult<()> {
    const PAGE: usize = 4096;
    let rows = txn.scan(&keys::all(keys::DEAD), Order::Ascending, PAGE)?;
    txn.pending().dead_unknown = rows.len() == PAGE;
    for first in rows.iter().filter_map(|(key, _)| keys::first_id(key)) {
        txn.pending().dead.insert(first);
    }
    Ok(())
}

/// Targets that may hold shards of a block. Without a layout, the members of its group in every table of its era.
fn holders(map: &ClusterMap, block: BlockId, layout: Option<Layout>) -> BTreeSet<TargetId> {
    if let Some(layout) = layout {
        return map.holders(block, layout);
    }
    let tables = map.era_of(block).into_iter().flat_map(|era| era.tables.values());
    tables.flat_map(|table| table.holders(table.pg_of(block))).collect()
}
