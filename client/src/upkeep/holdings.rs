//! What targets hold against what extents reach: shards that are missing, blocks that are lost, garbage, and blocks of which little
//! is left.
//!
//! The metaserver's snapshot is taken first and the targets are listed then, while clients go on. A shard of a block that nothing in the
//! snapshot reaches, that is not leased, not being deleted and not newer is garbage for ever, since an id is used once. A shard that
//! is not there may have been moved or deleted meanwhile: so what seems to be missing is looked at again, with another snapshot and
//! another map.
//!
//! Memory: three words for each run of blocks and one for each block.

use std::collections::{BTreeMap, BTreeSet};

use fjordfs_proto::{
    BlockId, ClusterMap, FsError, FsResult, Layout, TargetId,
    cluster::TargetState,
    error::Errno,
    pb::{
        data::ShardInfo,
        meta::{BlockRun, BlocksReply},
    },
};

use super::{Pace, Tell, admin};
use crate::Client;

/// Shards in a page of a listing, as many as a data server gives; and bytes of one in it, about.
const PAGE: u32 = 0;
const LISTED_BYTES: u64 = 24;

/// What the comparison has found.
#[derive(Default, Debug)]
pub struct Findings {
    /// Shards of the targets that were listed.
    pub shards: u64,
    /// Shards that the members of their groups do not have, by block.
    pub missing: Vec<Missing>,
    /// Blocks of which too few shards are left, on targets that could all be listed.
    pub lost: Vec<u64>,
    /// Shards that nothing reaches, by target.
    pub garbage: BTreeMap<u64, Vec<u64>>,
    /// Bytes of these.
    pub garbage_bytes: u64,
    /// Targets that could not be listed, and why: what they hold is not counted as missing.
    pub unseen: BTreeMap<u64, String>,
    /// Why the metadata does not tell all blocks that are used, so that nothing counts as garbage; empty when it does.
    pub unreadable: String,
    /// The cluster that was looked at.
    pub cluster_id: String,
}

/// A block whose group lacks shards.
#[derive(Debug)]
pub struct Missing {
    /// Its number.
    pub block: u64,
    /// Members of its group that lack their shards.
    pub targets: Vec<u64>,
    pub(super) layout: u32,
}

impl Findings {
    /// Shards that nothing reaches.
    pub fn garbage_shards(&self) -> usize {
        self.garbage.values().map(Vec::len).sum()
    }
}

/// The metaserver's side.
struct Known {
    live: Vec<BlockRun>,
    /// For each live run, how many blocks are in those before it.
    before: Vec<usize>,
    blocks: usize,
    reserved: Vec<BlockRun>,
    next_block: u64,
    /// Live bytes of the blocks that have more pieces than one, or lost bytes.
    counted: BTreeMap<u64, u64>,
    /// Why some blocks may be missing above; empty when none are.
    unreadable: String,
    map: ClusterMap,
}

impl Known {
    async fn ask(client: &Client) -> FsResult<Known> {
        let (mut live, mut reserved, mut counts, mut end) = (Vec::new(), Vec::new(), BTreeMap::new(), None);
        let mut unreadable = String::new();
        admin::blocks(client, |reply| {
            let BlocksReply { live: runs, reserved: taken, next_block, map, counted, unreadable: why } =
                reply;
            live.extend(runs);
            reserved.extend(taken);
            counts.extend(counted.into_iter().map(|count| (count.block, count.bytes)));
            end = map.map(|map| (next_block, map));
            unreadable = why;
        })
        .await?;
        let (next_block, map) =
            end.ok_or_else(|| FsError::new(Errno::EPROTO, "the list of blocks has no end"))?;
        let map = ClusterMap::from_pb(map).map_err(|e| FsError::new(Errno::EPROTO, e.to_string()))?;
        let known = Known::new(live, reserved, next_block, map);
        Ok(Known { counted: counts, unreadable, ..known })
    }

    fn new(live: Vec<BlockRun>, reserved: Vec<BlockRun>, next_block: u64, map: ClusterMap) -> Known {
        let (mut before, mut blocks) = (Vec::with_capacity(live.len()), 0);
        for run in &live {
            before.push(blocks);
            blocks += run.count as usize;
        }
        let (counted, unreadable) = (BTreeMap::new(), String::new());
        Known { live, before, blocks, reserved, next_block, counted, unreadable, map }
    }

    /// Number of a live block among all, and its layout.
    fn find(&self, block: u64) -> Option<(usize, Layout)> {
        let at = within(&self.live, block)?;
        let run = &self.live[at];
        Some((self.before[at] + (block - run.first) as usize, Layout::from_code(run.layout)?))
    }

    fn is_garbage(&self, block: u64) -> bool {
        self.unreadable.is_empty()
            && block < self.next_block
            && within(&self.live, block).is_none()
            && within(&self.reserved, block).is_none()
    }

    /// All live blocks, in the order of their numbers.
    fn all(&self) -> impl Iterator<Item = (u64, Option<Layout>)> {
        (self.live.iter())
            .flat_map(|run| (run.first..run.first + run.count).map(|b| (b, Layout::from_code(run.layout))))
    }
}

/// The run that has the block.
fn within(runs: &[BlockRun], block: u64) -> Option<usize> {
    let at = runs.partition_point(|run| run.first <= block).checked_sub(1)?;
    (block - runs[at].first < runs[at].count).then_some(at)
}

/// Compares everything, reading at most `rate` bytes of listings per second; 0 is no limit.
///
/// # Errors
/// When there is no metaserver. A data server that does not answer is a finding.
pub async fn compare(client: &Client, rate: u64, tell: Tell<'_>) -> FsResult<Findings> {
    tell("asking for all blocks".to_owned());
    let mut lister = Lister { client, pace: Pace::new(rate), tell };
    let known = Known::ask(client).await?;
    let mut found = Findings {
        cluster_id: known.map.cluster_id.clone(),
        unreadable: known.unreadable.clone(),
        ..Findings::default()
    };
    let mut present = vec![0u32; known.blocks];
    for (target, info) in &known.map.targets {
        let listed = match info.readable() {
            true => list(&mut lister, &known, *target, &mut present, &mut found).await,
            false => Err(FsError::new(Errno::EIO, state_of(info.state))),
        };
        if let Err(e) = listed {
            found.unseen.insert(target.0, e.message);
        }
    }
    let unseen: BTreeSet<TargetId> = found.unseen.keys().copied().map(TargetId).collect();
    let suspects = lacking(&known, &present, &unseen);
    if !suspects.is_empty() {
        tell(format!("looking again at {} blocks", suspects.len()));
        look_again(client, suspects, &mut found).await?;
    }
    Ok(found)
}

fn state_of(state: TargetState) -> &'static str {
    match state {
        TargetState::Down => "it is down",
        TargetState::Out => "it is out",
        TargetState::Failed => "it has failed",
        _ => "its state does not allow it",
    }
}

/// Goes through the listing of a target.
async fn list(
    lister: &mut Lister<'_>,
    known: &Known,
    target: TargetId,
    present: &mut [u32],
    found: &mut Findings,
) -> FsResult<()> {
    let (mut garbage, mut bytes) = (Vec::new(), 0);
    let each = |shard: &ShardInfo| {
        if let Some((at, layout)) = known.find(shard.block) {
            let group = known.map.placement(BlockId(shard.block), layout).unwrap_or_default();
            if group.get(shard.shard as usize) == Some(&target) {
                present[at] |= 1 << shard.shard;
            }
        } else if known.is_garbage(shard.block) {
            garbage.push(shard.block);
            bytes += u64::from(shard.length);
        }
    };
    found.shards += lister.each_shard(target, each).await?;
    found.garbage_bytes += bytes;
    garbage.dedup();
    if !garbage.is_empty() {
        found.garbage.insert(target.0, garbage);
    }
    Ok(())
}

/// A block of which part is dead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Sparse {
    pub block: u64,
    /// Bytes that files use; what several use counts several times.
    pub live: u64,
    /// Bytes that it has, rounded up.
    pub bytes: u64,
}

/// Blocks of which files use less than `percent`, on targets that can be listed.
///
/// # Errors
/// When the metaserver or a target does not answer.
pub(super) async fn sparse(
    client: &Client,
    percent: u64,
    rate: u64,
    tell: Tell<'_>,
) -> FsResult<Vec<Sparse>> {
    tell("asking for all blocks".to_owned());
    let mut lister = Lister { client, pace: Pace::new(rate), tell };
    let known = Known::ask(client).await?;
    let mut sizes: BTreeMap<u64, u64> = BTreeMap::new();
    for target in known.map.targets.iter().filter(|(_, info)| info.readable()).map(|(target, _)| *target) {
        let each = |shard: &ShardInfo| {
            if known.counted.contains_key(&shard.block)
                && let Some((_, layout)) = known.find(shard.block)
            {
                sizes.insert(shard.block, u64::from(shard.length) * layout.needed() as u64);
            }
        };
        lister.each_shard(target, each).await?;
    }
    let sparse = sizes.into_iter().map(|(block, bytes)| Sparse { block, live: known.counted[&block], bytes });
    Ok(sparse.filter(|sparse| sparse.live * 100 < sparse.bytes * percent).collect())
}

/// Goes through listings, at its pace.
struct Lister<'a> {
    client: &'a Client,
    pace: Pace,
    tell: Tell<'a>,
}

impl Lister<'_> {
    /// Goes through the listing of a target; how many shards it has.
    async fn each_shard(&mut self, target: TargetId, mut each: impl FnMut(&ShardInfo)) -> FsResult<u64> {
        let (mut after, mut shards) = (0, 0);
        loop {
            let page = self.client.inner.data.list_shards(target, after, PAGE).await?;
            shards += page.shards.len() as u64;
            page.shards.iter().for_each(&mut each);
            (self.tell)(format!("target {target}: {shards} shards"));
            self.pace.did(LISTED_BYTES * page.shards.len() as u64).await;
            match page.shards.last() {
                Some(last) if !page.end => after = last.block,
                _ => return Ok(shards),
            }
        }
    }
}

/// Live blocks that some member that was listed has no shard of.
fn lacking(known: &Known, present: &[u32], unseen: &BTreeSet<TargetId>) -> BTreeSet<u64> {
    let all = known.all().zip(present);
    all.filter(|((block, layout), present)| {
        let Some(layout) = layout else { return false };
        let group = known.map.placement(BlockId(*block), *layout).unwrap_or_default();
        group.iter().enumerate().any(|(no, target)| **present >> no & 1 == 0 && !unseen.contains(target))
    })
    .map(|((block, _), _)| block)
    .collect()
}

/// Asks again who has shards of these blocks, as far as they are still there.
async fn look_again(client: &Client, suspects: BTreeSet<u64>, found: &mut Findings) -> FsResult<()> {
    let known = Known::ask(client).await?;
    for block in suspects {
        let Some((_, layout)) = known.find(block) else { continue };
        let group = known.map.placement(BlockId(block), layout).unwrap_or_default();
        let mut missing = Vec::new();
        for (target, no) in group.iter().zip(0u32..) {
            let has = match known.map.targets.get(target).is_some_and(|t| t.readable()) {
                false => None,
                true => has(client, *target, block, no).await.ok(),
            };
            if has == Some(false) {
                missing.push(target.0);
            }
        }
        if missing.is_empty() {
            continue;
        }
        if group.len() - missing.len() < layout.needed() {
            found.lost.push(block);
        } else {
            let layout = layout.code();
            found.missing.push(Missing { block, targets: missing, layout });
        }
    }
    Ok(())
}

/// Whether a target has a shard now.
async fn has(client: &Client, target: TargetId, block: u64, no: u32) -> FsResult<bool> {
    // Behind the block before it, the shards of this one come first.
    let page = client.inner.data.list_shards(target, block.saturating_sub(1), 1).await?;
    Ok(page.shards.iter().any(|shard| (shard.block, shard.shard) == (block, no)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fjordfs_proto::{
        Epoch, Policy, ServerId,
        cluster::{Era, PgTable, Server, ServerState, Target},
    };

    fn known() -> Known {
        let target =
            || Target { server: ServerId(1), domain: "d".into(), state: TargetState::Up, full: false };
        let server = Server { address: "a:1".into(), name: "a".into(), state: ServerState::Up };
        let members = [1, 2].map(TargetId).to_vec();
        let map = ClusterMap {
            cluster_id: "c".into(),
            epoch: Epoch(1),
            servers: BTreeMap::from([(ServerId(1), server)]),
            targets: (1..=2).map(|id| (TargetId(id), target())).collect(),
            eras: vec![Era {
                first_block: BlockId(1),
                tables: BTreeMap::from([(2, PgTable { width: 2, members, moves: BTreeMap::new() })]),
            }],
            default_policy: Policy::replica(2).unwrap(),
        };
        let layout = Layout::of(Policy::replica(2).unwrap(), 1).code();
        let run = |first, count, layout| BlockRun { first, count, layout };
        Known::new(vec![run(5, 3, layout), run(20, 2, layout)], vec![run(9, 2, 0)], 30, map)
    }

    #[test]
    fn only_what_nothing_can_ever_reach_is_garbage() {
        let known = known();
        let garbage: Vec<u64> = (1..40).filter(|block| known.is_garbage(*block)).collect();
        let expected: Vec<u64> = (1..30).filter(|b| ![5, 6, 7, 20, 21, 9, 10].contains(b)).collect();
        assert_eq!(garbage, expected);
        assert_eq!(known.find(7).map(|(at, _)| at), Some(2));
        assert_eq!(known.find(21).map(|(at, _)| at), Some(4));
        assert!(known.find(8).is_none() && known.find(1).is_none());
        let damaged = Known { unreadable: "an extent".to_owned(), ..known };
        assert!((1..40).all(|block| !damaged.is_garbage(block)), "it may be what cannot be read");
    }

    #[test]
    fn what_a_target_that_could_not_be_listed_holds_is_not_missing() {
        let known = known();
        let present = [3, 1, 0, 3, 2];
        let lacks =
            |unseen: &[u64]| lacking(&known, &present, &unseen.iter().copied().map(TargetId).collect());
        assert_eq!(lacks(&[]), BTreeSet::from([6, 7, 21]));
        assert_eq!(lacks(&[2]), BTreeSet::from([7, 21]));
        assert_eq!(lacks(&[1, 2]), BTreeSet::new());
    }
}
