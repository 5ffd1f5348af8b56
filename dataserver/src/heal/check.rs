//! One seat: what a target lacks of a placement group is copied to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Instant,
};

use fjordfs_proto::{
    BlockId, ClusterMap, PgId, Policy, ServerId, ShardNo, TargetId,
    cluster::GroupSpan,
    pb::meta::{Check, CheckReport, WantedReply, WantedRequest},
};

use super::{
    Healing,
    listing::{self, Listed},
    pace::Place,
    restore::{Restored, Sources, Unrestored},
};
use crate::store::{NewShard, Store, files::Files, index::Entry};

/// Shards in a page of a listing.
const LIST_PAGE: u32 = 4096;

/// Blocks that are asked about, and then copied, at a time. A deletion of one of them waits until all are copied.
const BATCH: usize = 64;

/// A block that is listed by others and not here.
pub(super) struct Missing {
    pub(super) block: BlockId,
    pub(super) shards: Vec<ShardNo>,
    pub(super) policy: Policy,
    pub(super) others: Vec<Listed>,
}

/// What there is to know of a seat.
pub(super) struct Seat {
    pub(super) target: TargetId,
    pub(super) span: GroupSpan,
    /// The shards that it should have of each block.
    pub(super) shards: Vec<ShardNo>,
    /// Targets outside of the group that have something of it.
    pub(super) strays: BTreeSet<TargetId>,
}

/// Carries an order out. `report` is complete but for the problem that is the error.
pub(super) async fn run(healing: &Healing, order: &Check, report: &mut CheckReport) -> Result<(), String> {
    let map = healing.node.map().ok_or("this data server has no cluster map yet")?;
    let (seat, members) = find(&map, order)?;
    if seat.span.width < 2 && members.is_empty() && seat.strays.is_empty() {
        return Ok(());
    }
    let mut sources = Sources::new(healing, readable(&map, members.union(&seat.strays)));
    compare(healing, &seat, &mut sources, report).await?;
    // Also when nothing was missing: an attempt that was given up may have copied it, and synced nothing.
    sync(healing, seat.target).await?;
    if report.shards_lost > 0 {
        return Err(format!("{} shards cannot be restored from the targets that answer", report.shards_lost));
    }
    Ok(())
}

/// Server and address of those targets that can be read.
pub(super) fn readable<'a>(
    map: &ClusterMap,
    targets: impl IntoIterator<Item = &'a TargetId>,
) -> BTreeMap<TargetId, (ServerId, String)> {
    (targets.into_iter())
        .filter(|id| map.targets.get(id).is_some_and(|t| t.readable()))
        .filter_map(|id| map.server_of(*id).map(|(server, known)| (*id, (server, known.address.clone()))))
        .collect()
}

/// The seat of an order, and the other members of its group.
fn find(map: &ClusterMap, order: &Check) -> Result<(Seat, BTreeSet<TargetId>), String> {
    let (target, pg) = (TargetId(order.target), PgId(order.pg));
    let (table, span) = map
        .group(BlockId(order.first_block), order.width as usize, pg)
        .ok_or_else(|| format!("map {} has no such group", map.epoch))?;
    let group = table.group(pg);
    let member = group.iter().zip(0..).filter(|(t, _)| **t == target).map(|(_, no)| ShardNo(no));
    let coming = table.moves_of(pg).filter(|(_, t)| *t == target).map(|(no, _)| no);
    let shards: Vec<ShardNo> = member.chain(coming).collect();
    if shards.is_empty() {
        return Err(format!("target {target} is not in that group in map {}", map.epoch));
    }
    let others = group.iter().copied().filter(|t| *t != target).collect();
    let strays = order.strays.iter().copied().map(TargetId).filter(|t| *t != target).collect();
    Ok((Seat { target, span, shards, strays }, others))
}

/// Lists what the others have and copies what is missing, page by page.
async fn compare(
    healing: &Healing,
    seat: &Seat,
    sources: &mut Sources<'_>,
    report: &mut CheckReport,
) -> Result<(), String> {
    let store = healing.node.store(seat.target.0).map_err(|e| e.message)?;
    if sources.targets().is_empty() {
        return Err("no other member of the group can be read".to_owned());
    }
    let mut after = BlockId(0);
    loop {
        let mut pages = Vec::new();
        for target in sources.targets() {
            // Who is down is not among them. Whether the others have all that it has shows when it is back: then all
            // seats of its groups are checked.
            let page = sources.list(target, after, LIST_PAGE, seat.span.to_pb()).await;
            pages.push((target, page.map_err(|e| format!("listing on target {target}: {}", e.message))?));
        }
        let (blocks, next) = listing::merge(&pages)?;
        let missing = blocks.into_iter().filter_map(|(block, others)| {
            let policy = others.first()?.policy;
            let lacks = |no: &ShardNo| usize::from(no.0) < policy.width() && store.find(block, *no).is_err();
            let shards: Vec<ShardNo> = seat.shards.iter().copied().filter(lacks).collect();
            (!shards.is_empty()).then_some(Missing { block, shards, policy, others })
        });
        let missing: Vec<Missing> = {
            let _nothing_is_dropped = healing.node.arranging.read().await;
            missing.collect()
        };
        report.shards_missing += missing.iter().map(|m| m.shards.len() as u64).sum::<u64>();
        for batch in missing.chunks(BATCH) {
            copy(healing, seat, sources, batch, report).await?;
        }
        match next {
            Some(next) => after = next,
            None => return Ok(()),
        }
    }
}

/// Copies the blocks of a batch that are wanted.
async fn copy(
    healing: &Healing,
    seat: &Seat,
    sources: &mut Sources<'_>,
    batch: &[Missing],
    report: &mut CheckReport,
) -> Result<(), String> {
    let node = &healing.node;
    // See "Deletions against copies": entered first, asked then.
    let entered = node.copying.enter(seat.target, batch.iter().map(|missing| missing.block));
    let answer = wanted(healing, seat, &entered.blocks).await?;
    let (dead, unsettled): (BTreeSet<u64>, BTreeSet<u64>) =
        (answer.dead.into_iter().collect(), answer.unsettled.into_iter().collect());
    let mine: BTreeSet<BlockId> = entered.blocks.iter().copied().collect();
    for missing in batch {
        let count = missing.shards.len() as u64;
        if dead.contains(&missing.block.0) {
            report.shards_missing -= count;
        } else if unsettled.contains(&missing.block.0) || !mine.contains(&missing.block) {
            report.shards_missing -= count;
            report.shards_unsettled += count;
        } else {
            for no in &missing.shards {
                match sources.restore(missing.block, *no, missing.policy, &missing.others).await {
                    Ok(restored) => {
                        report.bytes_copied += u64::from(restored.length);
                        put(healing, seat.target, missing, *no, restored).await?;
                        report.shards_copied += 1;
                    }
                    Err(Unrestored::Gone) => {}
                    Err(Unrestored::Lost(why)) => {
                        tracing::warn!("{} {no} cannot be restored on {}: {why}", missing.block, seat.target);
                        report.shards_lost += 1;
                    }
                }
                report.shards_missing -= 1;
            }
        }
        node.checks.report(report.clone());
    }
    Ok(())
}

/// Puts a good shard in the place of a damaged one.
pub(super) async fn replace(
    healing: &Healing,
    seat: &Seat,
    sources: &mut Sources<'_>,
    bad: &Missing,
    store: &Arc<Store<Files>>,
    entry: &Entry,
) -> Result<(), String> {
    let entered = healing.node.copying.enter(seat.target, [bad.block]);
    if entered.blocks.is_empty() {
        return Err("its block is being copied, it will be looked at again".to_owned());
    }
    let answer = wanted(healing, seat, &entered.blocks).await?;
    if !answer.dead.is_empty() || !answer.unsettled.is_empty() {
        return Err("nothing reaches its block, it is left alone".to_owned());
    }
    let restored = match sources.restore(bad.block, entry.shard, bad.policy, &bad.others).await {
        Ok(restored) => restored,
        Err(Unrestored::Gone) => {
            return Err("no other target of its group that answers has its block".to_owned());
        }
        Err(Unrestored::Lost(why)) => return Err(format!("it cannot be restored: {why}")),
    };
    let Restored { record, length, page_crcs } = restored;
    let new = NewShard { block: bad.block, shard: entry.shard, policy: bad.policy.code(), length };
    let (replacing, old) = (store.clone(), *entry);
    let replaced =
        healing.jobs.run(move || async move { replacing.replace(&old, new, record, &page_crcs).await });
    replaced.await.ok_or("this data server is stopping")?.map_err(|e| e.to_string())?;
    sync(healing, seat.target).await
}

async fn wanted(healing: &Healing, seat: &Seat, blocks: &[BlockId]) -> Result<WantedReply, String> {
    if blocks.is_empty() {
        return Ok(WantedReply::default());
    }
    let request = WantedRequest {
        cluster_id: healing.node.cluster_id.clone(),
        first_block: seat.span.first_block.0,
        width: seat.span.width as u32,
        pg: seat.span.pg.0,
        blocks: blocks.iter().map(|block| block.0).collect(),
        strays: seat.strays.iter().map(|target| target.0).collect(),
    };
    let asked = healing.ask(request).await;
    asked.map_err(|e| format!("the metaserver was asked which blocks are wanted: {}", e.message()))
}

async fn put(
    healing: &Healing,
    target: TargetId,
    missing: &Missing,
    no: ShardNo,
    restored: Restored,
) -> Result<(), String> {
    let store = healing.node.store(target.0).map_err(|e| e.message)?.clone();
    let Restored { record, length, page_crcs } = restored;
    let new = NewShard { block: missing.block, shard: no, policy: missing.policy.code(), length };
    let began = Instant::now();
    let stored = healing.jobs.run(move || async move { store.put(new, record, &page_crcs).await }).await;
    stored.ok_or("this data server is stopping")?.map_err(|e| e.to_string())?;
    healing.node.rebuild_rate.took(Place::To(target), length, began);
    Ok(())
}

/// What has been copied is power-safe before it is counted on.
async fn sync(healing: &Healing, target: TargetId) -> Result<(), String> {
    let store = healing.node.store(target.0).map_err(|e| e.message)?.clone();
    let synced = healing.jobs.run(move || async move { store.sync().await }).await;
    synced.ok_or("this data server is stopping")?.map_err(|e| e.to_string())
}
