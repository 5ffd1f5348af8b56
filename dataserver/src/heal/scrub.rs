//! Reading everything that a target holds and comparing it with its checksums, before a second copy is gone too.
//!
//! A pass goes through the target's shards in block order at a bounded rate. It begins when the last one began longer ago than
//! the interval, or when an administrator asks for it; after a restart it goes on where it was (`place.rs`). What readers report
//! goes through the same examination at once.
//!
//! **Repair.** A bad shard is restored from the others into memory, and stored; only then is the damaged one dropped
//! (`store/replace.rs`). One that cannot be restored, or that there is no room for, stays as it is: most of its pages are good.

mod place;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use fjordfs_proto::{BlockId, FsResult, PAGE_SIZE, Policy, ShardNo, TargetId, pb::meta::ScrubReport};
use parking_lot::Mutex;
use tokio::sync::Notify;

use self::place::{Place, now_ms};
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

/// How often the place of a pass is written down. A restart reads again what was read since.
const SAVE: Duration = Duration::from_secs(5);

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
    let Ok(store) = healing.node.store(target.0).cloned() else { return };
    let mut place = Place::load(store.path());
    healing.node.scrubs.note(target, |p| {
        p.report.completed_ms = place.completed_ms;
        (p.report.shards_bad, p.report.shards_repaired) = (place.shards_bad, place.shards_repaired);
    });
    if let Err(e) = place.save(store.path()) {
        tracing::warn!("scrub of {target}: its place cannot be written down: {e}");
    }
    loop {
        tokio::time::sleep(LOOK).await;
        if healing.node.scrubs.take_wanted(target) || place.is_due(interval, now_ms()) {
            place = Place { began_ms: now_ms(), after_block: Some(0), bytes_done: 0, ..place };
        }
        if place.after_block.is_some() {
            if let Err(e) = pass(&healing, target, &store, &throttle, &mut place).await {
                tracing::warn!("scrub of {target}: {e}");
                // It is tried again when the next one is due.
                place.after_block = None;
            }
            healing.node.scrubs.note(target, |p| p.report.running = false);
            save(&healing, target, &store, &mut place);
        }
    }
}

/// Writes down how far it is. What cannot be written costs a repetition only.
fn save(healing: &Healing, target: TargetId, store: &Store<Files>, place: &mut Place) {
    if let Some(report) = healing.node.scrubs.report(target) {
        (place.shards_bad, place.shards_repaired) = (report.shards_bad, report.shards_repaired);
    }
    if let Err(e) = place.save(store.path()) {
        tracing::debug!("scrub of {target}: its place cannot be written down: {e}");
    }
}

/// Goes through all shards behind the place.
async fn pass(
    healing: &Healing,
    target: TargetId,
    store: &Arc<Store<Files>>,
    throttle: &Throttle,
    place: &mut Place,
) -> Result<(), String> {
    let total = store.stats().map_err(|e| e.to_string())?.shard_bytes;
    let begin = |p: &mut Progress| {
        (p.report.running, p.report.bytes_done, p.report.bytes_total) = (true, place.bytes_done, total);
    };
    healing.node.scrubs.note(target, begin);
    let mut after = BlockId(place.after_block.unwrap_or_default());
    let mut saved = Instant::now();
    loop {
        let listed = store.clone();
        let (entries, end) = blocking::run(move || listed.list(after, PAGE, |_| true))
            .await
            .map_err(|e| format!("listing: {e}"))?;
        for entry in &entries {
            throttle.take(entry.length.into()).await;
            look_at(healing, target, store, entry).await;
            healing.node.scrubs.note(target, |p| p.report.bytes_done += u64::from(entry.length));
            place.bytes_done += u64::from(entry.length);
            // Another shard of the same block may follow, and is looked at again.
            place.after_block = Some(entry.block.0.saturating_sub(1));
            if saved.elapsed() >= SAVE {
                save(healing, target, store, place);
                saved = Instant::now();
            }
        }
        match entries.last() {
            Some(last) if !end => after = last.block,
            _ => break,
        }
    }
    (place.after_block, place.completed_ms) = (None, now_ms());
    healing.node.scrubs.note(target, |p| p.report.completed_ms = place.completed_ms);
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
    let seat = Seat { target, span, shards: vec![entry.shard], strays: Default::default() };
    let bad = Missing { block: entry.block, shards: vec![entry.shard], policy, others: listed };
    check::replace(healing, &seat, &mut sources, &bad, store, entry).await
}
