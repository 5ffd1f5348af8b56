//! Moving blocks of before to targets that were added later.
//!
//! Each round plans what [`place`] would have otherwise for an eighth of the groups of each table, so that the rest takes new
//! blocks meanwhile; the next round begins when all moves are done. Over when nothing would be otherwise. Whether it is
//! going on is in the counters, so a restart does not end it.

use std::collections::BTreeSet;

use fjordfs_proto::{
    ClusterMap, PgId, TargetId,
    cluster::PgTable,
    pb::meta::{RebalanceReply, RebalanceRequest},
    placement::place,
};

use super::{Membership, eras};
use crate::txn::Txn;

/// One group in so many is moved at a time.
const SHARE: usize = 8;

impl Membership {
    /// Begins it, or lets it end with the moves under way.
    pub(crate) fn rebalance(&mut self, txn: &mut Txn, request: &RebalanceRequest) -> RebalanceReply {
        txn.counters().rebalancing = !request.stop;
        let message = if request.stop {
            "no more blocks are moved for balance; moves under way are finished".to_owned()
        } else {
            let moves: usize = wanted(&self.map).iter().map(|table| table.cells.len()).sum();
            match moves {
                0 => match self.map.targets.values().filter(|target| !target.writable()).count() {
                    0 => "the targets are in balance".to_owned(),
                    n => format!(
                        "the targets that take blocks are in balance; {n} that do not (`fjord status`) are not looked at"
                    ),
                },
                n => format!("{n} group members are to move, `fjord status` shows how they get on"),
            }
        };
        RebalanceReply { message }
    }

    /// Plans the next round when the last one is done.
    pub(crate) fn rebalance_step(&mut self, txn: &mut Txn) {
        let tables = || self.map.eras.iter().flat_map(|era| era.tables.values());
        if !txn.counters().rebalancing || tables().any(|table| !table.moves.is_empty()) {
            return;
        }
        let mut map = ClusterMap::clone(&self.map);
        let mut planned = 0;
        for Wanted { era, width, cells } in wanted(&self.map) {
            let Some(table) = map.eras.get_mut(era).and_then(|era| era.tables.get_mut(&width)) else {
                continue;
            };
            let groups_max = table.pg_count().div_ceil(SHARE);
            let mut groups = BTreeSet::new();
            for (cell, target) in cells {
                groups.insert(cell / width);
                if groups.len() > groups_max {
                    break;
                }
                table.moves.insert(cell, target);
                planned += 1;
            }
        }
        if planned == 0 {
            txn.counters().rebalancing = false;
            tracing::info!("the targets are in balance");
        }
        self.publish(txn, map);
    }
}

/// What would have to move in one table.
struct Wanted {
    /// Index of its era.
    era: usize,
    width: usize,
    /// Index into its members, and whereto.
    cells: Vec<(usize, TargetId)>,
}

/// What would have to move.
fn wanted(map: &ClusterMap) -> Vec<Wanted> {
    let targets = eras::usable(map);
    let writable = |id: &TargetId| map.targets.get(id).is_some_and(|t| t.writable());
    let mut wanted = Vec::new();
    for (i, era) in map.eras.iter().enumerate() {
        for (width, table) in &era.tables {
            let now = eras::as_it_will_be(table);
            let Some(better) = place(Some(&now), &targets, *width, now.pg_count()) else { continue };
            let cells = now.members.iter().zip(&better.members).enumerate();
            let moves = cells
                .filter(|(cell, (old, new))| old != new && writable(new) && is_outside(table, *cell, **new));
            let cells = moves.map(|(cell, (_, new))| (cell, *new)).collect();
            wanted.push(Wanted { era: i, width: *width, cells });
        }
    }
    wanted
}

/// A target cannot take a place in a group that it is in with another shard.
fn is_outside(table: &PgTable, cell: usize, target: TargetId) -> bool {
    !table.holders(PgId((cell / table.width) as u32)).contains(&target)
}
