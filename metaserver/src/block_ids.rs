//! Block ids leased to sessions. Each id is used up once: committed, abandoned, or swept when its session ends.

use std::{collections::BTreeSet, ops::Range};

use fjordfs_proto::{BlockId, FsError, FsResult, SessionId, error::Errno};

use crate::{
    keys, liveness,
    records::{self, LeasedRange},
    store::{Order, Pair},
    txn::Txn,
};

/// Most ids of one lease: keeps the bitmap, rewritten by every Commit, at 512 bytes.
pub(crate) const LEASE_MAX: u32 = 4096;
/// Most ranges a session may have that are not used up.
const RANGES_MAX: usize = 1024;

/// Leases `count` ids; the first is returned.
pub(crate) fn lease(txn: &mut Txn, session: SessionId, count: u32) -> FsResult<BlockId> {
    if txn.scan(&keys::ranges(session), Order::Ascending, RANGES_MAX)?.len() == RANGES_MAX {
        return Err(FsError::new(
            Errno::EBUSY,
            format!(
                "{session} holds {RANGES_MAX} unfinished ranges of block ids: commit or abandon some first"
            ),
        ));
    }
    let first = BlockId(txn.counters().next_block);
    txn.counters().next_block += u64::from(count);
    let record = LeasedRange { count, taken: vec![0; count.div_ceil(8) as usize] };
    txn.put_record(keys::range(session, first), &record);
    Ok(first)
}

fn parse((key, value): Pair) -> FsResult<(u64, LeasedRange)> {
    let first = keys::second_id(&key).ok_or_else(|| records::damaged("a leased range without a block"))?;
    let record: LeasedRange = records::decode(value, || format!("leased range at b{first}"))?;
    if record.taken.len() != record.count.div_ceil(8) as usize {
        return Err(records::damaged(&format!(
            "the leased range at b{first} has a bitmap of the wrong size"
        )));
    }
    Ok((first, record))
}

/// Uses up ids, ascending and distinct. `EINVAL` when one is not leased to the session or was used up before.
pub(crate) fn claim(
    txn: &mut Txn,
    session: SessionId,
    blocks: impl IntoIterator<Item = BlockId>,
) -> FsResult<()> {
    claim_each(txn, session, blocks, |block| {
        Err(FsError::new(
            Errno::EINVAL,
            format!("block {block} is not leased to {session}, or its lease is used up"),
        ))
    })
}

/// Like [`claim`], but passes over those that are not leased to the session; says which were.
pub(crate) fn claim_own(
    txn: &mut Txn,
    session: SessionId,
    blocks: impl IntoIterator<Item = BlockId>,
) -> FsResult<Vec<u64>> {
    let (mut own, mut strange) = (Vec::new(), BTreeSet::new());
    let blocks = blocks.into_iter().inspect(|block| own.push(block.0));
    claim_each(txn, session, blocks, |block| {
        strange.insert(block.0);
        Ok(())
    })?;
    own.retain(|block| !strange.contains(block));
    Ok(own)
}

fn claim_each(
    txn: &mut Txn,
    session: SessionId,
    blocks: impl IntoIterator<Item = BlockId>,
    mut stranger: impl FnMut(BlockId) -> FsResult<()>,
) -> FsResult<()> {
    let mut current: Option<(u64, LeasedRange)> = None;
    for block in blocks {
        let covers = |(first, range): &(u64, LeasedRange)| {
            block.0 >= *first && block.0 - *first < u64::from(range.count)
        };
        if !current.as_ref().is_some_and(covers) {
            if let Some((first, range)) = current.take() {
                save(txn, session, first, range);
            }
            current = claimed_last(txn, session)?.filter(covers);
            if current.is_none() {
                let found = txn.scan(&keys::ranges_to(session, block), Order::Descending, 1)?.pop();
                current = found.map(parse).transpose()?.filter(covers);
            }
        }
        let Some((first, range)) = &mut current else {
            stranger(block)?;
            continue;
        };
        let at = (block.0 - *first) as usize;
        let bit = 1 << (at % 8);
        if range.taken[at / 8] & bit != 0 {
            let message =
                format!("block {block} was committed or abandoned before: a block is named by one Commit");
            return Err(FsError::new(Errno::EINVAL, message));
        }
        range.taken[at / 8] |= bit;
    }
    if let Some((first, range)) = current {
        save(txn, session, first, range);
    }
    Ok(())
}

/// The range that the session used last. Found by its key: an engine that keeps what was replaced, and finds the oldest first when it is asked
/// for the last record of a range, would walk over all that the Commits before have replaced.
fn claimed_last(txn: &mut Txn, session: SessionId) -> FsResult<Option<(u64, LeasedRange)>> {
    let Some(first) = txn.claims().get(&session).copied() else { return Ok(None) };
    let key = keys::range(session, first);
    let value = txn.get(&key)?;
    value.map(|value| parse((key, value))).transpose()
}

fn save(txn: &mut Txn, session: SessionId, first: u64, range: LeasedRange) {
    let first = BlockId(first);
    let used: u32 = range.taken.iter().map(|byte| byte.count_ones()).sum();
    if used == range.count {
        txn.claims().remove(&session);
        txn.remove(keys::range(session, first));
    } else {
        txn.claims().insert(session, first);
        txn.put_record(keys::range(session, first), &range);
    }
}

/// Ids that sessions have leased and not used up: ranges in ascending order.
/// Ascending.
pub(crate) fn unused(txn: &mut Txn) -> FsResult<Vec<Range<u64>>> {
    let mut unused = Vec::new();
    for pair in txn.scan(&keys::all(keys::RANGE), Order::Ascending, usize::MAX)? {
        let (first, range) = parse(pair)?;
        let runs = free_runs(&range);
        unused.extend(runs.into_iter().map(|(start, count)| first + start..first + start + count));
    }
    unused.sort_by_key(|range| range.start);
    Ok(unused)
}

/// Whether one of the ascending ranges has the id.
pub(crate) fn contains(ranges: &[Range<u64>], id: u64) -> bool {
    let after = ranges.partition_point(|range| range.start <= id);
    after > 0 && ranges[after - 1].contains(&id)
}

/// The session is over: ids it did not use may be on targets, where nobody will ever reach them.
pub(crate) fn sweep(txn: &mut Txn, session: SessionId) -> FsResult<()> {
    for pair in txn.scan(&keys::ranges(session), Order::Ascending, usize::MAX)? {
        let (first, range) = parse(pair)?;
        for (start, count) in free_runs(&range) {
            liveness::bury(txn, BlockId(first + start), count, None);
        }
        txn.remove(keys::range(session, BlockId(first)));
    }
    txn.claims().remove(&session);
    Ok(())
}

/// Runs of ids that are not used up: distance from the first id, and length.
pub(crate) fn free_runs(range: &LeasedRange) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for at in 0..u64::from(range.count) {
        let taken = range.taken.get((at / 8) as usize).is_none_or(|byte| byte >> (at % 8) & 1 == 1);
        match runs.last_mut() {
            _ if taken => {}
            Some((start, count)) if *start + *count == at => *count += 1,
            _ => runs.push((at, 1)),
        }
    }
    runs
}
