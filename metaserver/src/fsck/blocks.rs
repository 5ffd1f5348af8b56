//! Extents, and what becomes of blocks.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use fjordfs_proto::{BlockId, Extent, InodeId, interval::Run};

use super::{Counted, Fix, Report, Source, each, each_record, tree::Seen};
use crate::{
    block_ids, keys,
    records::{Counters, DeadRun, ExtentRecord, LeasedRange, LiveBlock},
    store::StoreError,
};

/// What extents say of a block.
#[derive(Clone, Copy, Default)]
struct Use {
    pieces: u32,
    bytes: u64,
}

pub(super) fn check(
    store: &Source<'_>,
    counters: &Counters,
    inodes: &HashMap<u64, Seen>,
    report: &mut Report,
) -> Result<(), StoreError> {
    let used = extents(store, inodes, report)?;
    live(store, &used, report)?;
    let fates = fates(store, counters, report)?;
    report.blocks_live = used.len() as u64;
    for block in used.keys() {
        if *block >= counters.next_block {
            report.problem(format!("b{block} is in use and was never leased"));
        }
        if let Some(fate) = fates.get(block) {
            let fix = Fix::Unbury { block: *block };
            match *fate {
                "leased" => report.problem(format!("b{block} is in use and also {fate}")),
                _ => report.fixable(fix, format!("b{block} is in use and also {fate}")),
            }
        }
    }
    Ok(())
}

fn extents(
    store: &Source<'_>,
    inodes: &HashMap<u64, Seen>,
    report: &mut Report,
) -> Result<BTreeMap<u64, Use>, StoreError> {
    let mut destroyed = BTreeSet::new();
    each(store, keys::DESTROY, |key, _| destroyed.extend(keys::first_id(key)))?;
    let mut used: BTreeMap<u64, Use> = BTreeMap::new();
    let mut allocated: HashMap<u64, u64> = HashMap::new();
    let mut last: Option<(u64, u64, Extent)> = None;
    each_record(store, keys::EXTENT, report, |report, ino, key, record: ExtentRecord| {
        report.extents += 1;
        let offset = keys::second_id(key).unwrap_or(u64::MAX);
        let extent = match record.extent(InodeId(ino), offset) {
            Ok(extent) => extent,
            Err(e) => return report.problem(e.message),
        };
        let what = format!("extent of i{ino} at {offset}");
        let end = offset + extent.len();
        for piece in extent.pieces() {
            let block = used.entry(piece.block.0).or_default();
            block.pieces += 1;
            block.bytes += u64::from(piece.length);
        }
        if let Some((_, before, mut left)) = last.take().filter(|(of, ..)| *of == ino) {
            let left_end = before + left.len();
            if left_end > offset {
                report.problem(format!("{what} overlaps the one before it"));
            } else if left_end == offset && left.join(extent.clone()).is_ok() {
                report.problem(format!("{what} goes on where the one before it ends, and is not joined"));
            }
        }
        *allocated.entry(ino).or_default() += extent.len();
        match inodes.get(&ino) {
            Some(seen) if seen.inode.size < end => report.problem(format!("{what} ends beyond the file")),
            None if !destroyed.contains(&ino) => {
                destroyed.insert(ino);
                report.fixable(Fix::Destroy { ino }, format!("{what}: there is no such inode"));
            }
            _ => {}
        }
        last = Some((ino, offset, extent));
    })?;
    for (ino, seen) in inodes {
        let sum = allocated.get(ino).copied().unwrap_or(0);
        if seen.inode.allocated != sum {
            let by = sum.wrapping_sub(seen.inode.allocated) as i64;
            let what =
                format!("i{ino} says {} bytes are allocated, its extents have {sum}", seen.inode.allocated);
            report.fixable(Fix::Allocated { ino: *ino, by }, what);
        }
        if sum > 0 && !seen.inode.is_regular() {
            report.problem(format!("i{ino} has extents and is not a regular file"));
        }
    }
    Ok(used)
}

/// Live records against the pieces of extents.
fn live(store: &Source<'_>, used: &BTreeMap<u64, Use>, report: &mut Report) -> Result<(), StoreError> {
    let mut recorded = BTreeSet::new();
    each_record(store, keys::LIVE, report, |report, block, _, record: LiveBlock| {
        recorded.insert(block);
        let bytes = used.get(&block).map_or(0, |u| u.bytes);
        if record.live != bytes || bytes == 0 {
            let by = bytes.wrapping_sub(record.live) as i64;
            let what = format!("b{block} counts {} live bytes, extents reach {bytes}", record.live);
            report.fixable(Fix::Live { block, by }, what);
        }
    })?;
    for (block, usage) in used {
        if usage.pieces != 1 && !recorded.contains(block) {
            let what = format!("b{block} is {} pieces and has no live record", usage.pieces);
            report.fixable(Fix::NoLive { block: *block, live: usage.bytes }, what);
        }
    }
    Ok(())
}

/// Blocks that nothing may reach, with the reason; each has one only.
fn fates(
    store: &Source<'_>,
    counters: &Counters,
    report: &mut Report,
) -> Result<BTreeMap<u64, &'static str>, StoreError> {
    let mut fates: BTreeMap<u64, &'static str> = BTreeMap::new();
    let mut sessions = BTreeSet::new();
    each(store, keys::SESSION, |key, _| sessions.extend(keys::first_id(key)))?;
    each_record(store, keys::RANGE, report, |report, session, key, range: LeasedRange| {
        if !sessions.contains(&session) {
            report.problem(format!("block ids are leased to session {session}, which does not exist"));
        }
        let first = keys::second_id(key).unwrap_or_default();
        for (start, count) in block_ids::free_runs(&range) {
            report.blocks_leased += count;
            fates.extend((first + start..first + start + count).map(|block| (block, "leased")));
        }
        if first + u64::from(range.count) > counters.next_block {
            report.problem(format!("the range at {} is beyond the next block to be leased", BlockId(first)));
        }
    })?;
    let mut queued = 0;
    let mut dead: BTreeMap<u64, &'static str> = BTreeMap::new();
    each_record(store, keys::DEAD, report, |report, first, _, run: DeadRun| {
        queued += run.count;
        for block in first..first + run.count {
            if dead.insert(block, "dead").is_some() {
                report.problem(format!("b{block} is dead twice"));
            }
        }
    })?;
    let mut deletions = BTreeSet::new();
    each(store, keys::DELETE, |key, _| {
        queued += 1;
        deletions.extend(keys::second_id(key));
    })?;
    for block in deletions {
        if dead.insert(block, "queued for deletion").is_some() {
            report.problem(format!("b{block} is dead and also queued for deletion"));
        }
    }
    report.blocks_dead = dead.len() as u64;
    for (block, fate) in dead {
        if fates.insert(block, fate).is_some() {
            report.problem(format!("b{block} is leased and unused, and also {fate}"));
        }
    }
    if counters.queued != queued {
        let by = queued.wrapping_sub(counters.queued) as i64;
        let what = format!("{} deletions are counted, {queued} exist", counters.queued);
        report.fixable(Fix::Count { of: Counted::Queued, by }, what);
    }
    Ok(fates)
}
