//! Reading everything that a target holds and comparing it with its checksums, before a second copy is gone too.
//!
//! A pass goes through the target's shards in block order at a bounded rate. It begins when the last one began longer ago than
//! the interval, or when an administrator asks for it; the place is not remembered over a restart. What readers report goes
//! through the same examination at once.
//!
//! **Repair.** A bad shard is restored from the others first, into memory; only then is the damaged one dropped, and the good one put
//! in its place. A crash in between leaves a missing shard, which the check that follows every start finds. One that cannot
//! be restored stays as it is: most of its pages are good.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, SystemTime},
};

use fjordfs_proto::{BlockId, FsResult, PAGE_SIZE, Policy, ShardNo, TargetId, pb::meta::ScrubReport};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{
    Healing,
    check::{self, Missing, Seat},
    restore::Sources,
    throttle::Throttle,
};
use crate::{
    blocking,
    buffer::Pool,
    store::{Store, error::StoreError, files::Files, index::Entry, record::record_pages},
};

/// Shards that are looked up at a time.
const PAGE: usize = 1024;

/// Reports of readers that wait; more are dropped, since the next pass finds those too.
const SUSPECTS_MAX: usize = 1024;

/// How often it is looked at whether a pass is due.
const LOOK: Duration = Duration::from_secs(1);

/// How far the scrubbing of this server's targets is.
#[derive(Default)]
pub(crate) struct Scrubs {
    state: Mutex<State>,
    suspected: Notify,
}

#[derive(Default)]
struct State {
    /// The metaserver's count of passes asked for, when it was last heard.
    asked: Option<u64>,
    targets: BTreeMap<TargetId, Progress>,
    suspects: VecDeque<(TargetId, BlockId, ShardNo)>,
}

#[derive(Default, Clone)]
struct Progress {
    /// A pass shall begin.
    wanted: bool,
    report: ScrubReport,
}

impl Scrubs {
    /// The count that came with a heartbeat's answer: when it has grown, everything is scrubbed now.
    pub(crate) fn asked(&self, count: u64) {
        let mut state = self.state.lock();
        let before = state.asked.replace(count);
        if before.is_some_and(|before| before < count) {
            state.targets.values_mut().for_each(|progress| progress.wanted = true);
        }
    }

    /// For a heartbeat.
    pub(crate) fn report(&self, target: TargetId) -> Option<ScrubReport> {
        self.state.lock().targets.get(&target).map(|progress| progress.report)
    }

    /// A reader says that a shard is damaged.
    pub(crate) fn suspect(&self, target: TargetId, block: BlockId, shard: ShardNo) {
        let mut state = self.state.lock();
        let suspect = (target, block, shard);
        if state.suspects.len() < SUSPECTS_MAX && !state.suspects.contains(&suspect) {
            state.suspects.push_back(suspect);
            self.suspected.notify_one();
        }
    }

    fn note(&self, target: TargetId, change: impl FnOnce(&mut Progress)) {
        change(self.state.lock().targets.entry(target).or_default());
    }

    /// Whether a pass is to begin, which it then does.
    fn take_wanted(&self, target: TargetId) -> bool {
        let mut state = self.state.lock();
        std::mem::take(&mut state.targets.entry(target).or_default().wanted)
    }
}

/// What an examination of a shard has found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Finding {
    Good,
    Bad,
    /// Deleted meanwhile.
    Gone,
}

/// Scrubs a target again and again. `interval` zero: only when asked.
pub(super) async fn run(healing: Arc<Healing>, target: TargetId, interval: Duration, rate: u64) {
    let throttle = Throttle::new(rate);
    healing.node.scrubs.note(target, |_| {});
    // The first one is not at once: a start is busy enough, and many starts must not mean many passes.
    let mut began = tokio::time::Instant::now();
    loop {
        tokio::time::sleep(LOOK).await;
        let due = !interval.is_zero() && began.elapsed() >= interval;
        if healing.node.scrubs.take_wanted(target) || due {
            began = tokio::time::Instant::now();
            if let Err(e) = pass(&healing, target, &throttle).await {
                tracing::warn!("scrub of {target}: {e}");
            }
            healing.node.scrubs.note(target, |p| p.report.running = false);
        }
    }
}

/// Goes through all shards once.
async fn pass(healing: &Healing, target: TargetId, throttle: &Throttle) -> Result<(), String> {
    let store = healing.node.store(target.0).map_err(|e| e.message)?.clone();
    let total = store.stats().map_err(|e| e.to_string())?.shard_bytes;
    let begin = |p: &mut Progress| {
        (p.report.running, p.report.bytes_done, p.report.bytes_total) = (true, 0, total);
    };
    healing.node.scrubs.note(target, begin);
    let mut after = BlockId(0);
    loop {
        let listed = store.clone();
        let (entries, end) = blocking::run(move || listed.list(after, PAGE, |_| true))
            .await
            .map_err(|e| format!("listing: {e}"))?;
        for entry in &entries {
            throttle.take(entry.length.into()).await;
            look_at(healing, target, &store, entry).await;
            healing.node.scrubs.note(target, |p| p.report.bytes_done += u64::from(entry.length));
        }
        match entries.last() {
            Some(last) if !end => after = last.block,
            _ => break,
        }
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    healing.node.scrubs.note(target, |p| p.report.completed_ms = now.as_millis() as u64);
    Ok(())
}

/// Examines what readers report.
pub(super) async fn follow_reports(healing: Arc<Healing>) {
    loop {
        let next = healing.node.scrubs.state.lock().suspects.pop_front();
        let Some((target, block, shard)) = next else {
            healing.node.scrubs.suspected.notified().await;
            continue;
        };
        let Ok(store) = healing.node.store(target.0).cloned() else { continue };
        if let Ok(entry) = store.find(block, shard) {
            look_at(&healing, target, &store, &entry).await;
        }
    }
}

/// Examines a shard and repairs it if it is bad.
async fn look_at(healing: &Healing, target: TargetId, store: &Arc<Store<Files>>, entry: &Entry) {
    let (pool, examined, shard) = (healing.node.pool.clone(), store.clone(), *entry);
    let finding = healing.jobs.run(move || async move { examine(&pool, &examined, &shard).await }).await;
    if finding != Some(Finding::Bad) {
        return;
    }
    store.bad_page();
    healing.node.scrubs.note(target, |p| p.report.shards_bad += 1);
    match repair(healing, target, store, entry).await {
        Ok(()) => {
            tracing::warn!("{} {} on {target} was damaged and is repaired", entry.block, entry.shard);
            healing.node.scrubs.note(target, |p| p.report.shards_repaired += 1);
        }
        Err(why) => tracing::error!("{} {} on {target} is damaged: {why}", entry.block, entry.shard),
    }
}

async fn examine(pool: &Arc<Pool>, store: &Store<Files>, entry: &Entry) -> Finding {
    let pages = record_pages(entry.length);
    let Some(buf) = pool.take(&[pages]).await.and_then(|mut buffers| buffers.pop()) else {
        return Finding::Gone;
    };
    let good = match store.read_record(entry, 0, buf, 0..pages * PAGE_SIZE).await {
        Ok(record) => store.is_sound(entry, &record[..pages * PAGE_SIZE]),
        Err(StoreError::Missing { .. }) => return Finding::Gone,
        Err(_) => false,
    };
    match (store.still_there(entry), good) {
        (Err(_), _) => Finding::Gone,
        (Ok(()), true) => Finding::Good,
        (Ok(()), false) => Finding::Bad,
    }
}

/// Replaces a bad shard by one made from the others of its group.
async fn repair(
    healing: &Healing,
    target: TargetId,
    store: &Arc<Store<Files>>,
    entry: &Entry,
) -> Result<(), String> {
    let map = healing.node.map().ok_or("there is no cluster map yet")?;
    let policy = Policy::from_code(entry.policy.into()).ok_or("its policy is unknown")?;
    let (first_block, table) = map
        .era_of(entry.block)
        .and_then(|era| Some((era.first_block, era.tables.get(&policy.width())?)))
        .ok_or("it belongs to no group")?;
    let pg = table.pg_of(entry.block);
    let (_, span) = map.group(first_block, policy.width(), pg).ok_or("it belongs to no group")?;
    let others = check::readable(&map, table.group(pg).iter().filter(|id| **id != target));
    let mut sources = Sources::new(healing, others);
    let mut listed = Vec::new();
    for other in sources.targets() {
        let page: FsResult<_> =
            sources.list(other, BlockId(entry.block.0.saturating_sub(1)), 1, span.to_pb()).await;
        match page {
            Ok(page) => {
                let (blocks, _) = super::listing::merge(&[(other, page)])?;
                listed.extend(blocks.get(&entry.block).into_iter().flatten().copied());
            }
            Err(e) => tracing::debug!("{} on {other}: {e}", entry.block),
        }
    }
    let seat = Seat { target, span, shards: vec![entry.shard] };
    let bad = Missing { block: entry.block, shards: vec![entry.shard], policy, others: listed };
    check::replace(healing, &seat, &mut sources, &bad, store, entry).await
}
