//! What the members of a group have, block by block: their listings merged.

use std::collections::BTreeMap;

use fjordfs_proto::{BlockId, Policy, ShardNo, TargetId, pb::data::ListShardsReply};

/// A shard that a target lists.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Listed {
    pub(super) target: TargetId,
    pub(super) shard: ShardNo,
    pub(super) policy: Policy,
    /// Bytes.
    pub(super) length: u32,
}

/// Blocks and their shards.
pub(super) type Blocks = BTreeMap<BlockId, Vec<Listed>>;

/// One page of each listing, all from the same block on: what they say together of the blocks up to the one that the
/// shortest page ends with. Returns that block; `None` when all listings are over.
pub(super) fn merge(pages: &[(TargetId, ListShardsReply)]) -> Result<(Blocks, Option<BlockId>), String> {
    let open = pages.iter().filter(|(_, page)| !page.end);
    let last = |page: &ListShardsReply| page.shards.last().map(|shard| BlockId(shard.block));
    let mut horizon = None;
    for (target, page) in open {
        let last =
            last(page).ok_or_else(|| format!("target {target} lists nothing and says that there is more"))?;
        horizon = Some(horizon.unwrap_or(last).min(last));
    }
    let mut blocks = Blocks::new();
    for (target, page) in pages {
        for info in &page.shards {
            let (block, shard) = (BlockId(info.block), u8::try_from(info.shard));
            if horizon.is_some_and(|horizon| block > horizon) {
                break;
            }
            let (Ok(shard), Some(policy)) = (shard, Policy::from_code(info.policy)) else {
                return Err(format!("target {target} lists a shard of {block} that there cannot be"));
            };
            let listed = Listed { target: *target, shard: ShardNo(shard), policy, length: info.length };
            blocks.entry(block).or_default().push(listed);
        }
    }
    Ok((blocks, horizon))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fjordfs_proto::pb::data::ShardInfo;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn page(blocks: &BTreeSet<u64>, after: u64, limit: usize) -> ListShardsReply {
        let rest: Vec<u64> = blocks.range(after + 1..).copied().collect();
        let info = |block: &u64| ShardInfo { block: *block, shard: 0, policy: 2, length: 1 };
        ListShardsReply { shards: rest.iter().take(limit).map(info).collect(), end: rest.len() <= limit }
    }

    proptest! {
        #[test]
        fn pages_together_tell_every_block_once_and_of_all_who_have_it(
            a in proptest::collection::btree_set(1..60u64, 0..40), b in proptest::collection::btree_set(1..60u64, 0..40), limit in 1..9usize,
        ) {
            let (mut after, mut seen) = (0, BTreeMap::new());
            loop {
                let pages = [(TargetId(1), page(&a, after, limit)), (TargetId(2), page(&b, after, limit + 1))];
                let (blocks, next) = merge(&pages).unwrap();
                for (block, listed) in blocks {
                    let holders: Vec<u64> = listed.iter().map(|l| l.target.0).collect();
                    prop_assert!(seen.insert(block.0, holders).is_none());
                }
                match next {
                    Some(next) => { prop_assert!(next.0 > after); after = next.0; }
                    None => break,
                }
            }
            let expected: BTreeMap<u64, Vec<u64>> = a.union(&b)
                .map(|block| (*block, [(1, &a), (2, &b)].iter().filter(|(_, has)| has.contains(block)).map(|(t, _)| *t).collect()))
                .collect();
            prop_assert_eq!(seen, expected);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let empty = ListShardsReply { shards: vec![], end: false };
        assert!(merge(&[(TargetId(1), empty)]).is_err());
        let odd = ShardInfo { block: 1, shard: 300, policy: 2, length: 1 };
        assert!(merge(&[(TargetId(1), ListShardsReply { shards: vec![odd], end: true })]).is_err());
    }
}
