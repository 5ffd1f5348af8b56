//! Dropping shards that belong to other targets now: what is left behind on a target that was out for a while, or was drained and
//! then kept after all.
//!
//! A shard is dropped when the map gives its place to another target, that target lists it, and the map has been the same for a
//! while, so that no reader goes by an older one. What its owner does not list stays: it may be the only copy. The metaserver is told
//! of which groups such shards are, and has the owners fetch them. Or the block has been deleted meanwhile: so the metaserver has a target delete every block that dies, whoever its holders are, for as
//! long as it has not heard that there is nothing of others on it ([`Tidied`]).
//!
//! **Against a place that comes back.** If a newer map gives the place back, a check of the seat must not count a shard that is
//! about to be dropped. So the last look at the map and the dropping are one step under a lock, and checks look at what
//! is there under the same lock.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use fjordfs_proto::{
    BlockId, ClusterMap, Epoch, PgId, Policy, ShardNo, TargetId,
    pb::meta::{StrayGroup, Strays},
};
use parking_lot::Mutex;

use super::{Healing, check, restore::Sources};
use crate::{blocking, store::index::Entry};

/// How long a map has to stand before what it disowns is dropped.
const STAND: Duration = Duration::from_secs(10);

/// Longest pause before a target that has shards of others is looked through again by the same map.
const AGAIN: Duration = Duration::from_secs(600);

/// Shards in a page of a listing.
const PAGE: usize = 4096;

/// Shards that are dropped in one step.
const BATCH: usize = 64;

/// A group and a shard number of it: a place that belongs to one target.
type Slot = (BlockId, usize, PgId, ShardNo);

/// A group of an era.
type Group = (BlockId, usize, PgId);

/// By which map each target was last found to have nothing that belongs to others, and what the metaserver has not been told yet of
/// what others should have.
#[derive(Default)]
pub(crate) struct Tidied(Mutex<BTreeMap<TargetId, Found>>);

#[derive(Default)]
struct Found {
    tidied: Epoch,
    untold: Option<BTreeSet<Group>>,
}

impl Tidied {
    pub(crate) fn of(&self, target: TargetId) -> Epoch {
        self.0.lock().get(&target).map_or(Epoch(0), |found| found.tidied)
    }

    fn note(&self, target: TargetId, map: Epoch, outcome: Outcome) {
        let mut all = self.0.lock();
        let found = all.entry(target).or_default();
        if outcome.left == 0 {
            found.tidied = map;
        }
        found.untold = Some(outcome.strays);
    }

    /// For a heartbeat. What does not arrive is to be given back.
    pub(crate) fn take_strays(&self) -> Vec<Strays> {
        let told = |(first_block, width, pg): (BlockId, usize, PgId)| StrayGroup {
            first_block: first_block.0,
            width: width as u32,
            pg: pg.0,
        };
        let mut all = self.0.lock();
        let untold = all.iter_mut().filter_map(|(target, found)| Some((*target, found.untold.take()?)));
        untold
            .map(|(target, groups)| Strays {
                target: target.0,
                groups: groups.into_iter().map(told).collect(),
            })
            .collect()
    }

    /// Was not heard. What was found since is newer.
    pub(crate) fn give_back(&self, strays: Vec<Strays>) {
        let mut all = self.0.lock();
        for Strays { target, groups } in strays {
            let group = |g: StrayGroup| (BlockId(g.first_block), g.width as usize, PgId(g.pg));
            let found = all.entry(TargetId(target)).or_default();
            found.untold.get_or_insert_with(|| groups.into_iter().map(group).collect());
        }
    }
}

/// What a look through a target has come to.
#[derive(Default, PartialEq, Eq, Debug)]
struct Outcome {
    dropped: usize,
    /// Shards whose places are not this target's.
    left: usize,
    /// Groups with shards of these that may be missing where they belong.
    strays: BTreeSet<Group>,
}

/// Tidies a target whenever the map has changed and stands, and again while something of others is left on it.
pub(super) async fn run(healing: Arc<Healing>, target: TargetId) {
    let (mut looked, mut seen) = (Epoch(0), Epoch(0));
    let (mut pause, mut next) = (STAND, Instant::now());
    loop {
        tokio::time::sleep(STAND).await;
        let Some(map) = healing.node.map() else { continue };
        if map.epoch != looked {
            (pause, next) = (STAND, Instant::now());
        }
        if map.epoch == seen && healing.node.tidied.of(target) != map.epoch && Instant::now() >= next {
            (looked, next) = (map.epoch, Instant::now() + pause);
            pause = (2 * pause).min(AGAIN);
            match tidy(&healing, target, &map).await {
                Ok(outcome) => {
                    if outcome.dropped > 0 {
                        let dropped = outcome.dropped;
                        tracing::info!(
                            "{dropped} shards on {target} belong to other targets and were dropped"
                        );
                    }
                    healing.node.tidied.note(target, map.epoch, outcome);
                }
                Err(e) => tracing::warn!("looking for shards on {target} that belong to others: {e}"),
            }
        }
        seen = map.epoch;
    }
}

/// Shards of one target whose places are another's, by place, and how many such there are in which groups in motion: these are left
/// for later.
fn disowned(
    map: &ClusterMap,
    target: TargetId,
    entries: &[Entry],
) -> (BTreeMap<Slot, Vec<Entry>>, BTreeMap<Group, usize>) {
    let mut found: BTreeMap<Slot, Vec<Entry>> = BTreeMap::new();
    let mut moving: BTreeMap<Group, usize> = BTreeMap::new();
    for entry in entries {
        let Some(policy) = Policy::from_code(entry.policy.into()) else { continue };
        let Some(era) = map.era_of(entry.block) else { continue };
        let Some(table) = era.tables.get(&policy.width()) else { continue };
        let pg = table.pg_of(entry.block);
        let owner = table.group(pg).get(usize::from(entry.shard.0));
        let coming = table.moves_of(pg).any(|place| place == (entry.shard, target));
        if owner.is_none_or(|owner| *owner == target) || coming {
            continue;
        }
        if table.moves_of(pg).next().is_some() {
            *moving.entry((era.first_block, policy.width(), pg)).or_default() += 1;
        } else {
            let slot = (era.first_block, policy.width(), pg, entry.shard);
            found.entry(slot).or_default().push(*entry);
        }
    }
    (found, moving)
}

async fn tidy(healing: &Healing, target: TargetId, map: &Arc<ClusterMap>) -> Result<Outcome, String> {
    let store = healing.node.store(target.0).map_err(|e| e.message)?.clone();
    let (mut after, mut outcome) = (BlockId(0), Outcome::default());
    loop {
        let (listed, map_then) = (store.clone(), map.clone());
        let ((slots, moving), last) = blocking::run(move || {
            let (entries, end) = listed.list(after, PAGE, |_| true);
            let last = entries.last().filter(|_| !end).map(|entry| entry.block);
            (disowned(&map_then, target, &entries), last)
        })
        .await
        .map_err(|e| format!("listing: {e}"))?;
        outcome.left += moving.values().sum::<usize>();
        outcome.strays.extend(moving.into_keys());
        for (slot, entries) in slots {
            let (owned, dropped) = drop_those_owned(healing, target, map, slot, &entries).await?;
            outcome.dropped += dropped;
            outcome.left += entries.len() - dropped;
            if owned < entries.len() {
                let (first_block, width, pg, _) = slot;
                outcome.strays.insert((first_block, width, pg));
            }
        }
        match last {
            Some(last) => after = last,
            None => return Ok(outcome),
        }
    }
}

/// Drops those shards of a place that its owner lists; how many these are, and how many were dropped.
async fn drop_those_owned(
    healing: &Healing,
    target: TargetId,
    map: &Arc<ClusterMap>,
    (first_block, width, pg, shard): Slot,
    entries: &[Entry],
) -> Result<(usize, usize), String> {
    let store = healing.node.store(target.0).map_err(|e| e.message)?.clone();
    let Some((table, span)) = map.group(first_block, width, pg) else { return Ok((0, 0)) };
    let Some(owner) = table.group(pg).get(usize::from(shard.0)).copied() else { return Ok((0, 0)) };
    let mut sources = Sources::new(healing, check::readable(map, [&owner]));
    if sources.targets().is_empty() {
        return Ok((0, 0));
    }
    let mut owned: BTreeSet<BlockId> = BTreeSet::new();
    let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return Ok((0, 0)) };
    let mut after = BlockId(first.block.0.saturating_sub(1));
    loop {
        let page = sources.list(owner, after, PAGE as u32, span.to_pb()).await.map_err(|e| e.message)?;
        let of_shard = page.shards.iter().filter(|listed| listed.shard == u32::from(shard.0));
        owned.extend(of_shard.map(|listed| BlockId(listed.block)));
        match page.shards.last() {
            Some(end) if !page.end && end.block < last.block.0 => after = BlockId(end.block),
            _ => break,
        }
    }
    let mut dropped = 0;
    let surplus: Vec<Entry> = entries.iter().filter(|entry| owned.contains(&entry.block)).copied().collect();
    for batch in surplus.chunks(BATCH) {
        let _no_check_looks = healing.node.arranging.write().await;
        if healing.node.map().is_none_or(|now| now.epoch != map.epoch) {
            return Ok((surplus.len(), dropped));
        }
        for entry in batch {
            let (dropping, old) = (store.clone(), *entry);
            let result = healing.jobs.run(move || async move { dropping.drop_shard(&old).await }).await;
            result.ok_or("this data server is stopping")?.map_err(|e| e.to_string())?;
            dropped += 1;
        }
    }
    Ok((surplus.len(), dropped))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::volume::VolumeId;
    use fjordfs_proto::cluster::{Era, PgTable};

    #[test]
    fn only_what_another_target_has_the_place_of_is_disowned() {
        let members = [1, 2, 2, 3].map(TargetId).to_vec();
        let table = PgTable { width: 2, members, moves: BTreeMap::new() };
        let map = ClusterMap {
            cluster_id: "c".into(),
            epoch: Epoch(1),
            servers: BTreeMap::new(),
            targets: BTreeMap::new(),
            eras: vec![Era { first_block: BlockId(1), tables: BTreeMap::from([(2, table.clone())]) }],
            default_policy: Policy::replica(2).unwrap(),
        };
        let entry = |block: u64, shard: u8| Entry {
            block: BlockId(block),
            shard: ShardNo(shard),
            policy: 2,
            length: 1,
            volume: VolumeId(1),
            page: 1,
        };
        let entries: Vec<Entry> = (1..200).flat_map(|block| [entry(block, 0), entry(block, 1)]).collect();
        let (found, left) = disowned(&map, TargetId(2), &entries);
        assert!(left.is_empty());
        let expected = [(0, 0), (1, 1)].map(|(pg, no)| (BlockId(1), 2, PgId(pg), ShardNo(no)));
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), expected);
        for ((_, _, pg, _), entries) in &found {
            assert!(entries.iter().all(|entry| table.pg_of(entry.block) == *pg));
        }
        let mut moving = map.clone();
        moving.eras[0].tables.get_mut(&2).unwrap().moves.insert(1, TargetId(3));
        let (found, left) = disowned(&moving, TargetId(2), &entries);
        assert_eq!(found.len(), 1, "the group in motion waits");
        let those = entries.iter().filter(|e| table.pg_of(e.block) == PgId(0)).count() / 2;
        assert_eq!(left, BTreeMap::from([((BlockId(1), 2, PgId(0)), those)]));
        assert_eq!(disowned(&moving, TargetId(3), &entries).1, left, "who comes has only its own place");
    }
}
