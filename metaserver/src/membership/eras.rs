//! Placement tables of a map. Pure; see the parent's headings "Eras" and "Moves".

use std::collections::{BTreeMap, BTreeSet};

use fjordfs_proto::{
    BlockId, ClusterMap, Domain, PgId, TargetId,
    cluster::{Era, PgTable, TargetState},
    placement::{place, repair},
};

use super::states::stays;

fn targets_with(map: &ClusterMap, fit: impl Fn(TargetState) -> bool) -> BTreeMap<TargetId, Domain> {
    let fit = map.targets.iter().filter(|(_, t)| fit(t.state));
    fit.map(|(id, t)| (*id, Domain::of_map(&t.domain))).collect()
}

/// Targets that groups may have as members. One that is down for now is: groups outlive an outage.
pub(super) fn usable(map: &ClusterMap) -> BTreeMap<TargetId, Domain> {
    targets_with(map, |state| matches!(state, TargetState::Up | TargetState::Down))
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
            let old = base.and_then(|era| era.tables.get(width)).map(as_it_will_be);
            Some((*width, place(old.as_ref(), &targets, *width, pg_count)?))
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

/// A table with its moves done.
pub(super) fn as_it_will_be(table: &PgTable) -> PgTable {
    let groups = (0..table.pg_count()).flat_map(|pg| table.group_to_be(PgId(pg as u32)));
    PgTable { width: table.width, members: groups.collect(), moves: BTreeMap::new() }
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

/// Targets that the last era's groups have, or will have, as members.
pub(super) fn known(map: &ClusterMap) -> BTreeSet<TargetId> {
    let tables = map.eras.last().into_iter().flat_map(|era| era.tables.values());
    tables.flat_map(|table| table.members.iter().chain(table.moves.values())).copied().collect()
}

/// Plans who takes the place of members that have to go. Members in `returned` are back, and what was planned for them is
/// given up.
pub(super) fn mend(map: &mut ClusterMap, returned: &BTreeSet<TargetId>) {
    let staying = targets_with(map, stays);
    let ClusterMap { eras, targets, .. } = map;
    for table in eras.iter_mut().flat_map(|era| era.tables.values_mut()) {
        let PgTable { members, moves, .. } = table;
        moves.retain(|cell, _| !members.get(*cell).is_some_and(|member| returned.contains(member)));
        table.moves = repair(table, &staying, |target| targets.get(&target).is_some_and(|t| t.writable()));
    }
}

/// Puts `new` in the place of `old` in every group that it is not in already.
pub(super) fn replace(map: &mut ClusterMap, old: TargetId, new: TargetId) {
    for table in map.eras.iter_mut().flat_map(|era| era.tables.values_mut()) {
        for cell in 0..table.members.len() {
            let pg = PgId((cell / table.width) as u32);
            if table.members[cell] == old && !table.holders(pg).contains(&new) {
                table.moves.insert(cell, new);
            }
        }
    }
}

/// Targets that a map takes a place from in some group: they were a member of it, or about to be.
pub(super) fn displaced(before: &ClusterMap, after: &ClusterMap) -> BTreeSet<TargetId> {
    let mut displaced = BTreeSet::new();
    for (era, width, old) in
        before.eras.iter().flat_map(|era| era.tables.iter().map(move |(width, table)| (era, width, table)))
    {
        let new = after.eras.iter().find(|new| new.first_block == era.first_block);
        let new = new.and_then(|new| new.tables.get(width)).filter(|new| new.pg_count() == old.pg_count());
        if new == Some(old) {
            continue;
        }
        for pg in (0..old.pg_count() as u32).map(PgId) {
            match new {
                Some(new) if new.group(pg) == old.group(pg) && new.moves_of(pg).eq(old.moves_of(pg)) => {}
                Some(new) => displaced.extend(old.holders(pg).difference(&new.holders(pg))),
                None => displaced.extend(old.holders(pg)),
            }
        }
    }
    displaced
}

/// In how many groups a target is a member.
pub(super) fn groups_of(map: &ClusterMap, target: TargetId) -> usize {
    let tables = map.eras.iter().flat_map(|era| era.tables.values());
    tables.flat_map(|table| &table.members).filter(|member| **member == target).count()
}
