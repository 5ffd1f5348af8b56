//! Data servers and their targets: who is there, in what state, and where new blocks go.
//!
//! ```text
//!            heartbeats missed                  reports I/O errors
//!   up ─────────────────────────▶ down    up ────────────────────▶ failed
//!      ◀─────────────────────────            ◀────────────────────
//!            any heartbeat                      reports none
//! ```
//!
//! # Eras
//! Placement of a block never changes (yet), so new targets begin a new era at the next unleased block id; an era that
//! no id was leased from is replaced. A table of a width that an era lacks can be added at any time: no
//! block of that era can have used it. So every era gets tables for every width in use as soon as there are
//! enough targets.
//!
//! # Invariants
//! The map in memory is the one in the transaction; its epoch grows with every change; ids are never reused.
//! Reports (capacity, free space) are what the data servers said last, and are forgotten by a restart.

mod eras;
mod heartbeat;
mod register;

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use fjordfs_proto::{
    BlockId, ClusterMap, Epoch, FsResult, Policy, ServerId, TargetId,
    cluster::{ServerState, TargetState},
    pb::{self, meta::TargetReport},
};

use crate::{
    keys,
    ops::ClusterFacts,
    records::{self, TargetRecord},
    store::Order,
    txn::Txn,
};

/// Least room a target needs for new blocks: two whole blocks, or 2 % of it, and at most this much.
const RESERVE_MIN: u64 = 32 << 20;
const RESERVE_MAX: u64 = 16 << 30;

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
    /// Widths of the policies in use.
    widths: BTreeSet<usize>,
    /// Where each target's deletions go on: everything before was confirmed.
    delete_from: HashMap<TargetId, BlockId>,
    pg_count: usize,
    down_after: Duration,
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
        let mut membership = Membership {
            heard: map.servers.keys().map(|id| (*id, now)).collect(),
            map: Arc::new(map),
            targets,
            widths,
            delete_from: HashMap::new(),
            pg_count: config.pg_count.max(1),
            down_after: config.down_after,
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
        for heard in self.heard.values_mut() {
            *heard += stalled;
        }
    }

    /// Servers that have been silent for too long are down. Says which.
    pub(crate) fn tick(&mut self, txn: &mut Txn, now: Instant) -> Vec<ServerId> {
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
        for target in map.targets.values_mut() {
            if down.contains(&target.server) && target.state == TargetState::Up {
                target.state = TargetState::Down;
            }
        }
        self.publish(txn, map);
        down
    }

    /// Replaces the map if it changed; its epoch is set here. Reports are in place before this is called.
    fn publish(&mut self, txn: &mut Txn, mut map: ClusterMap) {
        if map != *self.map {
            map.epoch = Epoch(self.map.epoch.0 + 1);
            txn.put_record(vec![keys::MAP], &map.to_pb());
            self.map = Arc::new(map);
        }
        self.add_up();
    }
}

/// State of a target of a server that reports now.
fn state_of(report: &TargetReport, before: Option<TargetState>) -> TargetState {
    match before {
        _ if report.failed => TargetState::Failed,
        Some(kept @ (TargetState::Out | TargetState::Draining)) => kept,
        _ => TargetState::Up,
    }
}

/// Whether a target has no room for new blocks. Once full, it takes half as much again to become writable, so that
/// the map does not flicker.
fn is_full(report: &TargetReport, before: bool) -> bool {
    let reserve = (report.capacity / 50).clamp(RESERVE_MIN, RESERVE_MAX);
    report.free < if before { reserve + reserve / 2 } else { reserve }
}
