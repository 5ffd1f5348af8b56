//! All blocks of a snapshot as runs, for comparing them with what targets hold.

use fjordfs_proto::{
    InodeId, Source as Kept,
    pb::meta::{BlockRun, LiveBytes},
};

use super::{Report, Source, each, each_record};
use crate::{
    block_ids, keys,
    records::{Counters, DeadRun, ExtentRecord, LeasedRange, LiveBlock, decode},
    store::{Reading, StoreError},
};

/// What can be said of block ids. Memory: three words per extent, and two for each block with a record of its live bytes.
pub(crate) struct Runs {
    /// Reached by extents; ascending, no block twice.
    pub(crate) live: Vec<BlockRun>,
    /// Leased and unused, or being deleted.
    pub(crate) reserved: Vec<BlockRun>,
    /// Ids from here on are newer.
    pub(crate) next_block: u64,
    /// Live bytes of the blocks that have a record of them.
    pub(crate) counted: Vec<LiveBytes>,
    /// The first record that makes no sense, if any: blocks that it may name are not among these. A check says more.
    pub(crate) unreadable: Option<String>,
}

/// Reads them.
pub(crate) fn read(store: &dyn Reading) -> Result<Runs, StoreError> {
    let source = &Source { store, tell: &|_| {}, read: Default::default() };
    let mut report = Report::default();
    let mut live = Vec::new();
    each_record(source, keys::EXTENT, &mut report, |report, ino, key, record: ExtentRecord| {
        let offset = keys::second_id(key).unwrap_or(u64::MAX);
        match record.extent(InodeId(ino), offset) {
            Ok(extent) => {
                if let Kept::Blocks { addr, layout } = &extent.source {
                    let count = extent.pieces().count() as u64;
                    live.push(BlockRun { first: addr.block.0, count, layout: layout.code() });
                }
            }
            Err(e) => report.problem(e.message),
        }
    })?;
    let mut reserved = Vec::new();
    let mut reserve = |first: u64, count: u64| reserved.push(BlockRun { first, count, layout: 0 });
    each_record(source, keys::RANGE, &mut report, |_, _, key, range: LeasedRange| {
        let first = keys::second_id(key).unwrap_or_default();
        block_ids::free_runs(&range).into_iter().for_each(|(start, count)| reserve(first + start, count));
    })?;
    each_record(source, keys::DEAD, &mut report, |_, first, _, run: DeadRun| reserve(first, run.count))?;
    each(source, keys::DELETE, |key, _| {
        keys::second_id(key).into_iter().for_each(|block| reserve(block, 1));
    })?;
    let mut counted = Vec::new();
    each_record(source, keys::LIVE, &mut report, |_, block, _, record: LiveBlock| {
        counted.push(LiveBytes { block, bytes: record.live });
    })?;
    let counters = store.get(&[keys::COUNTERS])?.and_then(|value| decode(value, String::new).ok());
    let counters: Counters = counters.unwrap_or_default();
    Ok(Runs {
        live: joined(live),
        reserved: joined(reserved),
        next_block: counters.next_block,
        counted,
        unreadable: report.problems.into_iter().next(),
    })
}

/// Ascending, without overlaps; neighbours that agree are one.
fn joined(mut runs: Vec<BlockRun>) -> Vec<BlockRun> {
    runs.sort_unstable_by_key(|run| (run.first, run.count));
    let mut out: Vec<BlockRun> = Vec::new();
    for mut run in runs {
        if let Some(last) = out.last_mut() {
            let end = last.first + last.count;
            if run.first < end {
                let seen = (end - run.first).min(run.count);
                (run.first, run.count) = (run.first + seen, run.count - seen);
            }
            if run.first == end && run.layout == last.layout {
                last.count += run.count;
                continue;
            }
        }
        if run.count > 0 {
            out.push(run);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn every_block_is_told_once(runs in proptest::collection::vec((1..60u64, 1..9u64), 0..20)) {
            // A block has one layout, whoever shares it.
            let layout = |block: u64| (block / 7) as u32;
            let split = |(first, count): (u64, u64)| {
                (first..first + count).map(move |b| BlockRun { first: b, count: 1, layout: layout(b) })
            };
            let expected: BTreeMap<u64, u32> =
                runs.iter().flat_map(|run| split(*run)).map(|run| (run.first, run.layout)).collect();
            let same = |run: &&(u64, u64)| layout(run.0) == layout(run.0 + run.1 - 1);
            let whole = runs.iter().filter(same).map(|(first, count)| BlockRun { first: *first, count: *count, layout: layout(*first) });
            let pieces = runs.iter().filter(|run| !same(run)).flat_map(|run| split(*run));
            let joined = joined(whole.chain(pieces).collect());
            let told: Vec<(u64, u32)> = joined.iter().flat_map(|r| (r.first..r.first + r.count).map(|b| (b, r.layout))).collect();
            prop_assert_eq!(told, expected.into_iter().collect::<Vec<_>>());
        }
    }
}
