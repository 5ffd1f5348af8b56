//! Data servers and their targets: who is there, in what state, and where new blocks go.
//!
//! What states there are and what leads from one to the other is in `states.rs`.
//!
//! # Eras
//! New targets begin a new era at the next unleased block id, so that no old block has to move for them; an era that
//! no id was leased from is replaced. A table of a width that an era lacks can be added at any time: no
//! block of that era can have used it. So every era gets tables for every width in use as soon as there are
//! enough targets.
//!
//! # Moves
//! A target that is out or draining is replaced in its groups, of whatever era, but not at once: the map names who comes in its
//! place, that one is filled (`healing.rs`), and then the table changes. Whenever a target's state changes, the moves are
//! planned anew from the tables and the targets alone ([`eras::mend`]); so nothing about them has to be remembered
//! but what the map says.
//!
//! Nobody is taken to be out while most of the targets are unreachable: that is the network, or this host, and not the disks.
//!
//! # Invariants
//! The map in memory is the one in the transaction; its epoch grows with every change; ids are never reused.
//! Reports (capacity, free space) are what the data servers said last, and are forgotten by a restart.

mod change;
mod eras;
mod heartbeat;
mod rebalance;
mod register;
pub(crate) mod states;
mod wanted;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use self::states::Event;
use fjordfs_proto::{
    BlockId, ClusterMap, Epoch, FsResult, Policy, ServerId, TargetId,
    cluster::{ServerState, Target, TargetState},
    pb::{self, meta::TargetReport},
};

use crate::{
    healing::Seat,
    keys,
    ops::ClusterFacts,
    records::{self, TargetRecord},
    store::Order,
    txn::Txn,
};

/// Least room a target needs for new blocks: two whole blocks, or 2 % of it, and at most this much.
const RESERVE_MIN: u64 = 32 << 20;
const RESERVE_MAX: u64 = 16 << 30;

/// How much longer than otherwise a data server may be silent after a take-over. It may hang on the owner before, which takes what it
/// says and cannot answer, and has to notice and to look for the next; those that write meanwhile must not find it down.
const FINDING_OWNER: Duration = Duration::from_secs(5);

/// What is known of a target besides its place in the map.
#[derive(Clone, Debug)]
struct TargetInfo {
    record: TargetRecord,
    report: TargetReport,
}

/// All data servers.
#[derive(Clone, Debug)]
pub(crate) struct Membership {
    map: Arc<ClusterMap>,
    targets: BTreeMap<TargetId, TargetInfo>,
    heard: HashMap<ServerId, Instant>,
    /// When targets that are down or failed became so.
    unusable_since: HashMap<TargetId, Instant>,
    /// Widths of the policies in use.
    widths: BTreeSet<usize>,
    /// Where each target's deletions go on: everything before was confirmed.
    delete_from: HashMap<TargetId, BlockId>,
    /// Removed targets that deletions may still be queued for.
    dropping: BTreeSet<TargetId>,
    pg_count: usize,
    down_after: Duration,
    out_after: Duration,
    heartbeat: Duration,
    /// Of the state above; every operation asks for them, and adding up the targets takes too long for that.
    facts: ClusterFacts,
}

impl Membership {
    /// What the store knows, or a cluster without servers.
    pub(crate) fn load(
        txn: &mut Txn,
        cluster_id: &str,
        default_policy: Policy,
        config: &crate::Config,
        now: Instant,
    ) -> FsResult<Membership> {
        let map = match txn.record::<pb::common::ClusterMap>(&[keys::MAP])? {
            Some(map) => ClusterMap::from_pb(map).map_err(|e| records::damaged(&e.to_string()))?,
            None => ClusterMap {
                cluster_id: cluster_id.to_owned(),
                epoch: Epoch(1),
                servers: BTreeMap::new(),
                targets: BTreeMap::new(),
                eras: Vec::new(),
                default_policy,
            },
        };
        let mut widths = BTreeSet::from_iter(map.default_policy.widths());
        for (key, _) in txn.scan(&keys::all(keys::WIDTH), Order::Ascending, usize::MAX)? {
            widths.extend(keys::split_width(&key));
        }
        let mut targets = BTreeMap::new();
        for (key, value) in txn.scan(&keys::all(keys::TARGET), Order::Ascending, usize::MAX)? {
            let id = keys::first_id(&key).ok_or_else(|| records::damaged("a target without an id"))?;
            let record: TargetRecord = records::decode(value, || format!("target t{id}"))?;
            let report = TargetReport {
                target: id,
                uuid: record.uuid.clone(),
                path: record.path.clone(),
                ..TargetReport::default()
            };
            targets.insert(TargetId(id), TargetInfo { record, report });
        }
        // Nobody takes over from the embedded engine.
        let finding = if config.store.is_some() { FINDING_OWNER } else { Duration::ZERO };
        let mut membership = Membership {
            heard: map.servers.keys().map(|id| (*id, now + finding)).collect(),
            unusable_since: HashMap::new(),
            dropping: targets.iter().filter(|(_, info)| info.record.removed).map(|(id, _)| *id).collect(),
            map: Arc::new(map),
            targets,
            widths,
            delete_from: HashMap::new(),
            pg_count: config.pg_count.max(1),
            down_after: config.down_after,
            out_after: config.out_after,
            heartbeat: config.heartbeat,
            facts: ClusterFacts::default(),
        };
        membership.add_up();
        if txn.get(&[keys::MAP])?.is_none() {
            txn.put_record(vec![keys::MAP], &membership.map.to_pb());
        }
        Ok(membership)
    }

    pub(crate) fn map(&self) -> &Arc<ClusterMap> {
        &self.map
    }

    /// What operations need to know.
    pub(crate) fn facts(&self) -> ClusterFacts {
        self.facts
    }

    fn add_up(&mut self) {
        let up = self
            .targets
            .iter()
            .filter(|(id, _)| self.map.targets.get(id).is_some_and(|t| t.state == TargetState::Up));
        let (capacity, free) = up.fold((0u64, 0u64), |(capacity, free), (_, info)| {
            (capacity.saturating_add(info.report.capacity), free.saturating_add(info.report.free))
        });
        self.facts = ClusterFacts {
            epoch: self.map.epoch.0,
            targets: eras::usable(&self.map).len(),
            placeable: !self.map.eras.is_empty(),
            capacity,
            free,
        };
    }

    /// Last report of every target.
    pub(crate) fn reports(&self) -> Vec<TargetReport> {
        self.targets
            .iter()
            .filter(|(_, info)| !info.record.removed)
            .map(|(id, info)| TargetReport {
                domain: self.map.targets.get(id).map(|t| t.domain.clone()).unwrap_or_default(),
                ..info.report.clone()
            })
            .collect()
    }

    /// A policy is in use from now on.
    pub(crate) fn want_policy(&mut self, txn: &mut Txn, policy: Policy) {
        let new: Vec<usize> = policy.widths().filter(|width| self.widths.insert(*width)).collect();
        if new.is_empty() {
            return;
        }
        new.into_iter().for_each(|width| txn.put(keys::width(width), Default::default()));
        let mut map = ClusterMap::clone(&self.map);
        eras::complete(&mut map, &self.widths, self.pg_count);
        self.publish(txn, map);
    }

    /// Nobody could be heard for this long.
    pub(crate) fn forgive(&mut self, stalled: Duration) {
        for moment in self.heard.values_mut().chain(self.unusable_since.values_mut()) {
            *moment += stalled;
        }
    }

    /// Notices who has been silent for too long. Says which servers are down and which targets are out since now.
    pub(crate) fn tick(&mut self, txn: &mut Txn, now: Instant) -> (Vec<ServerId>, Vec<TargetId>) {
        let mut map = ClusterMap::clone(&self.map);
        let mut down = Vec::new();
        for (id, server) in &mut map.servers {
            let silent = self
                .heard
                .get(id)
                .is_none_or(|heard| now.saturating_duration_since(*heard) > self.down_after);
            if silent && server.state != ServerState::Down {
                server.state = ServerState::Down;
                down.push(*id);
            }
        }
        let silent: Vec<TargetId> =
            map.targets.iter().filter(|(_, t)| down.contains(&t.server)).map(|(id, _)| *id).collect();
        for id in silent {
            self.step(&mut map, id, Event::Silent);
        }
        let mut out = Vec::new();
        let waited = |target: &Target| matches!(target.state, TargetState::Down | TargetState::Failed);
        let awaited: Vec<TargetId> =
            map.targets.iter().filter(|(_, t)| waited(t)).map(|(id, _)| *id).collect();
        self.unusable_since.retain(|id, _| awaited.contains(id));
        for id in awaited {
            let since = *self.unusable_since.entry(id).or_insert(now);
            if now.saturating_duration_since(since) > self.out_after && most_are_up(&map) {
                self.step(&mut map, id, Event::Overdue);
                out.push(id);
            }
        }
        self.publish(txn, map);
        (down, out)
    }

    /// What an event makes of a target of the coming map.
    fn step(&self, map: &mut ClusterMap, id: TargetId, event: Event) {
        let leaving = self.targets.get(&id).is_some_and(|info| info.record.leaving);
        if let Some(target) = map.targets.get_mut(&id) {
            target.state = states::next(target.state, leaving, event);
        }
    }

    /// Replaces the map if it changed; its epoch is set here. Reports are in place before this is called.
    fn publish(&mut self, txn: &mut Txn, mut map: ClusterMap) {
        if map.targets != self.map.targets {
            self.rearrange(txn, &mut map);
        }
        if map != *self.map {
            map.epoch = Epoch(self.map.epoch.0 + 1);
            for id in eras::displaced(&self.map, &map) {
                if let Some(info) = self.targets.get_mut(&id) {
                    info.record.displaced = map.epoch.0;
                    if !map.targets.get(&id).is_some_and(Target::readable) {
                        info.record.unasked = map.epoch.0;
                    }
                    txn.put_record(keys::target(id), &info.record);
                }
            }
            txn.put_record(vec![keys::MAP], &map.to_pb());
            self.map = Arc::new(map);
        }
        self.add_up();
    }

    /// Targets that may have shards of blocks whose holders they are not: those that are out may come back with some, and others
    /// have not been tidied since they lost a place.
    pub(crate) fn untidy(&self) -> BTreeSet<TargetId> {
        let untidy = |id: &TargetId, target: &Target| {
            matches!(target.state, TargetState::Out | TargetState::Draining)
                || self.targets.get(id).is_some_and(|info| info.report.tidied < info.record.displaced)
        };
        self.map.targets.iter().filter(|(id, t)| untidy(id, t)).map(|(id, _)| *id).collect()
    }

    /// Places of a target were filled without it, and it has not been looked through since for what only it has.
    fn is_unasked(&self, id: TargetId) -> bool {
        self.targets.get(&id).is_some_and(|info| info.report.tidied < info.record.unasked)
    }

    /// Targets have come, gone, or changed their state.
    fn rearrange(&self, txn: &mut Txn, map: &mut ClusterMap) {
        let was_staying = |id| self.map.targets.get(id).is_some_and(|t| states::stays(t.state));
        let returned = (map.targets.iter())
            .filter(|(id, t)| states::stays(t.state) && !was_staying(id))
            .map(|(id, _)| *id)
            .collect();
        eras::mend(map, &returned);
        let known = eras::known(map);
        if eras::usable(map).keys().any(|id| !known.contains(id)) {
            eras::begin(map, &self.widths, self.pg_count, BlockId(txn.counters().next_block));
        }
        eras::complete(map, &self.widths, self.pg_count);
    }

    /// These targets have every shard of their groups: they take the places that they were filled for.
    pub(crate) fn finish_moves(&mut self, txn: &mut Txn, filled: &[Seat]) {
        let mut map = ClusterMap::clone(&self.map);
        for seat in filled {
            let era = map.eras.iter_mut().find(|era| era.first_block == seat.first_block);
            let Some(table) = era.and_then(|era| era.tables.get_mut(&seat.width)) else { continue };
            let at = seat.pg.0 as usize * seat.width;
            for cell in at..at + seat.width {
                if table.moves.get(&cell) == Some(&seat.target) {
                    table.moves.remove(&cell);
                    if let Some(member) = table.members.get_mut(cell) {
                        *member = seat.target;
                    }
                }
            }
        }
        self.publish(txn, map);
    }
}

/// Whether at least half of the targets that are not given up are up.
fn most_are_up(map: &ClusterMap) -> bool {
    let staying = || map.targets.values().filter(|t| states::stays(t.state));
    2 * staying().filter(|t| t.state == TargetState::Up).count() >= staying().count()
}

/// What a report says about its target.
fn event_of(report: &TargetReport) -> Event {
    if report.failed { Event::Faulty } else { Event::Healthy }
}

/// Whether a target has no room for new blocks. Once full, it takes half as much again to become writable, so that
/// the map does not flicker.
fn is_full(report: &TargetReport, before: bool) -> bool {
    let reserve = (report.capacity / 50).clamp(RESERVE_MIN, RESERVE_MAX);
    report.free < if before { reserve + reserve / 2 } else { reserve }
}
