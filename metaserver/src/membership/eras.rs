//! Placement tables of a map. Pure; see the parent's heading "Eras".

use std::collections::{BTreeMap, BTreeSet};

use fjordfs_proto::{
    BlockId, ClusterMap, TargetId,
    cluster::{Era, PgTable, TargetState},
    placement::place,
};

/// Targets that groups may have as members. One that is down for now is: groups outlive an outage.
pub(super) fn usable(map: &ClusterMap) -> BTreeMap<TargetId, String> {
    map.targets
        .iter()
        .filter(|(_, t)| matches!(t.state, TargetState::Up | TargetState::Down))
        .map(|(id, t)| (*id, t.domain.clone()))
        .collect()
}

/// There are targets that no table knows: blocks from `next_block` on use them.
pub(super) fn begin(map: &mut ClusterMap, widths: &BTreeSet<usize>, pg_count: usize, next_block: BlockId) {
    let targets = usable(map);
    let unused = map.eras.last().is_some_and(|last| last.first_block >= next_block);
    // An unused era was made for fewer targets: only one that holds blocks is worth staying close to.
    let base = map.eras.iter().rev().nth(usize::from(unused));
    let tables: BTreeMap<usize, PgTable> = widths
        .iter()
        .filter_map(|width| {
            let old = base.and_then(|era| era.tables.get(width));
            Some((*width, place(old, &targets, *width, pg_count)?))
        })
        .collect();
    if tables.is_empty() {
        return;
    }
    if unused {
        map.eras.pop();
    }
    map.eras.push(Era { first_block: next_block, tables });
}

/// Gives every era the tables it lacks, where there are enough targets.
pub(super) fn complete(map: &mut ClusterMap, widths: &BTreeSet<usize>, pg_count: usize) {
    let targets = usable(map);
    for era in &mut map.eras {
        for width in widths {
            if !era.tables.contains_key(width)
                && let Some(table) = place(None, &targets, *width, pg_count)
            {
                era.tables.insert(*width, table);
            }
        }
    }
}
