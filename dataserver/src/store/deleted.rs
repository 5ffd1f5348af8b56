//! Blocks whose deletion was ordered: nothing of them is stored any more.
//!
//! A put can come late: its writer stood still in the middle of it, or the network delivers what was sent before its host
//! died. If the block was deleted meanwhile, nobody would delete that shard again, and healing would take it for what is
//! left of a block. Block ids are used once, so their numbers are remembered, as runs, for there are few of those. Not beyond
//! a restart, which ends every connection; a writer that stood still for longer than that can leave a shard to `fjord gc`.

use fjordfs_proto::{
    BlockId,
    interval::{IntervalMap, Run},
};
use parking_lot::RwLock;

/// Beyond so many runs the smallest numbers, which are the oldest, are forgotten. A run takes about 32 bytes.
const RUNS_MAX: usize = 1 << 16;

/// Consecutive numbers.
#[derive(Clone, Copy, Debug)]
struct Span(u64);

impl Run for Span {
    fn len(&self) -> u64 {
        self.0
    }

    fn slice(&self, range: std::ops::Range<u64>) -> Span {
        Span(range.end - range.start)
    }

    fn join(&mut self, next: Span) -> Result<(), Span> {
        self.0 += next.0;
        Ok(())
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Deleted(RwLock<IntervalMap<Span>>);

impl Deleted {
    pub(super) fn add(&self, blocks: &[BlockId]) {
        let mut spans = self.0.write();
        // Nobody is given the last number of all.
        for block in blocks.iter().filter(|block| block.0 < u64::MAX) {
            spans.insert(block.0, Span(1));
        }
        while spans.len() > RUNS_MAX {
            let Some((first, span)) = spans.iter().next().map(|(first, span)| (first, span.0)) else { break };
            spans.remove(first..first + span);
        }
    }

    pub(super) fn contains(&self, block: BlockId) -> bool {
        block.0 < u64::MAX && self.0.read().overlapping(block.0..block.0 + 1).next().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_deleted_is_known_and_the_oldest_is_forgotten() {
        let deleted = Deleted::default();
        deleted.add(&[7, 5, 6, 9, u64::MAX].map(BlockId));
        let known =
            |ids: std::ops::Range<u64>| ids.filter(|id| deleted.contains(BlockId(*id))).collect::<Vec<_>>();
        assert_eq!(known(0..20), [5, 6, 7, 9]);
        assert!(!deleted.contains(BlockId(u64::MAX)));
        let far: Vec<BlockId> = (0..RUNS_MAX as u64).map(|n| BlockId(100 + 2 * n)).collect();
        deleted.add(&far);
        assert_eq!(known(0..103), [100, 102]);
    }
}
