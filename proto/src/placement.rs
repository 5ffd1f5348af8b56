//! The functions that fill placement groups.
//!
//! Pure functions of (old table, targets): the same input gives the same table on every machine. [`place`] makes the table
//! of a new era; [`repair`] says who takes the place of members that are gone, and touches nothing else. What they aim
//! at, in this order:
//!
//! 1. the members of a group are different targets, in as many racks as the group has members, or as few in one rack as there are
//!    racks for; within that the same for hosts;
//! 2. a member that may stay stays;
//! 3. every target serves about equally many groups;
//! 4. targets share groups with as many different others as possible, so that all of them rebuild a lost one.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::{
    Domain,
    cluster::{PgTable, mix},
    ids::TargetId,
};

/// Groups of `width` over `targets` (each with its failure domain), starting from `old`.
///
/// `None` when there are fewer targets than `width`. `pg_count` of an old table is kept.
pub fn place(
    old: Option<&PgTable>,
    targets: &BTreeMap<TargetId, Domain>,
    width: usize,
    pg_count: usize,
) -> Option<PgTable> {
    if width == 0 || pg_count == 0 || targets.len() < width {
        return None;
    }
    let pg_count = old.map_or(pg_count, PgTable::pg_count);
    let mut plan = Plan::new(targets, width, pg_count);
    if let Some(old) = old.filter(|old| old.width == width) {
        plan.keep(old);
    }
    plan.fill();
    plan.balance();
    let members = plan.groups.into_iter().flatten().map(|m| m.map(|i| plan.ids[i])).collect::<Option<_>>()?;
    Some(PgTable { width, members, moves: BTreeMap::new() })
}

/// The moves that a table needs so that all its members are among `targets`, by index into its members.
///
/// Only members that are not among `targets` are replaced, by those that `takes` allows. A move under way stays, unless its own
/// target has gone meanwhile. A member for which there is nobody (fewer targets than the table is wide) stays where it is.
pub fn repair(
    table: &PgTable,
    targets: &BTreeMap<TargetId, Domain>,
    takes: impl Fn(TargetId) -> bool,
) -> BTreeMap<usize, TargetId> {
    let in_order = table.members.iter().chain(table.moves.values()).all(|t| targets.contains_key(t));
    if in_order {
        return table.moves.clone();
    }
    let mut plan = Plan::new(targets, table.width, table.pg_count());
    let mut moves = BTreeMap::new();
    for (cell, member) in table.members.iter().enumerate() {
        let (pg, slot) = (cell / table.width, cell % table.width);
        let coming = table.moves.get(&cell).filter(|target| targets.contains_key(target));
        moves.extend(coming.map(|target| (cell, *target)));
        if let Ok(i) = plan.ids.binary_search(coming.unwrap_or(member)) {
            plan.set(pg, slot, i);
        }
    }
    // A host restores what all its targets are to get, over one network link: so its share counts, too.
    let mut incoming = vec![0usize; plan.ids.len()];
    for i in moves.values().filter_map(|target| plan.ids.binary_search(target).ok()) {
        incoming[plan.host[i]] += 1;
    }
    for (pg, now) in table.members.chunks(table.width).enumerate() {
        for slot in 0..table.width {
            if plan.groups[pg][slot].is_none()
                && let Some(best) = plan.substitute(pg, now, &takes, &incoming)
            {
                plan.set(pg, slot, best);
                incoming[plan.host[best]] += 1;
                moves.insert(pg * table.width + slot, plan.ids[best]);
            }
        }
    }
    moves
}

/// Work in progress; targets are indices into `ids`.
struct Plan {
    ids: Vec<TargetId>,
    rack: Vec<usize>,
    host: Vec<usize>,
    most: Most,
    groups: Vec<Vec<Option<usize>>>,
    /// Groups of each target.
    held: Vec<BTreeSet<usize>>,
    /// In how many groups two targets are together: a square, symmetric. 400 KB for 320 targets.
    shared: Vec<u32>,
}

/// How many members of a group may be in one rack, and on one host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Most {
    in_rack: usize,
    on_host: usize,
}

impl Plan {
    fn new(targets: &BTreeMap<TargetId, Domain>, width: usize, pg_count: usize) -> Plan {
        let rack = numbered(targets.values().map(|domain| &domain.rack));
        // Hosts of one name in two racks are two.
        let host = numbered(targets.values());
        Plan {
            ids: targets.keys().copied().collect(),
            most: Most::of(&rack, &host, width),
            rack,
            host,
            groups: vec![vec![None; width]; pg_count],
            held: vec![BTreeSet::new(); targets.len()],
            shared: vec![0; targets.len() * targets.len()],
        }
    }

    fn keep(&mut self, old: &PgTable) {
        let index: HashMap<TargetId, usize> = self.ids.iter().enumerate().map(|(i, id)| (*id, i)).collect();
        for (pg, members) in old.members.chunks(old.width).enumerate() {
            for (slot, id) in members.iter().enumerate() {
                if let Some(&i) = index.get(id)
                    && self.fits(pg, slot, i)
                {
                    self.set(pg, slot, i);
                }
            }
        }
    }

    /// Fills what is empty. It never gets stuck: with bounds for racks and for the hosts in them, whatever fits so far can be
    /// extended to every size that any choice reaches (such sets are the independent ones of a laminar matroid).
    fn fill(&mut self) {
        for pg in 0..self.groups.len() {
            let mut so_far = Members::new(self.ids.len());
            for member in self.groups[pg].iter().flatten() {
                so_far.add(self, *member);
            }
            for slot in 0..self.groups[pg].len() {
                if self.groups[pg][slot].is_none()
                    && let Some(best) = (0..self.ids.len())
                        .filter(|&i| so_far.admit(self, i))
                        .min_by_key(|&i| (self.held[i].len(), so_far.company[i], self.lot(pg, i)))
                {
                    self.set(pg, slot, best);
                    so_far.add(self, best);
                }
            }
        }
    }

    /// The best target that is in `pg` neither now nor later. Apart from failure domains as in `fill`: they are kept apart as well
    /// as they can be beside the members that stay, which may share one already.
    fn substitute(
        &self,
        pg: usize,
        now: &[TargetId],
        takes: &impl Fn(TargetId) -> bool,
        incoming: &[usize],
    ) -> Option<usize> {
        let members = || self.groups[pg].iter().flatten();
        let fits = |i: &usize| {
            let id = self.ids[*i];
            takes(id) && !now.contains(&id) && members().all(|m| m != i)
        };
        (0..self.ids.len()).filter(fits).min_by_key(|&i| {
            let in_rack = members().filter(|m| self.rack[**m] == self.rack[i]).count() + 1;
            let on_host = members().filter(|m| self.host[**m] == self.host[i]).count() + 1;
            let near = (in_rack.max(self.most.in_rack), on_host.max(self.most.on_host));
            (near, self.held[i].len(), incoming[self.host[i]], self.company(pg, i), self.lot(pg, i))
        })
    }

    /// Moves single members from the busiest targets to the idlest while that evens the load. Where failure domains
    /// forbid every direct move, a difference of two groups can remain.
    fn balance(&mut self) {
        let mut order: Vec<usize> = (0..self.ids.len()).collect();
        loop {
            let load = |i: usize| self.held[i].len();
            order.sort_by_key(|&i| (load(i), i));
            let step = order.iter().find_map(|&idle| {
                order.iter().rev().take_while(|&&busy| load(busy) > load(idle) + 1).find_map(|&busy| {
                    (self.held[busy].iter())
                        .filter_map(|&pg| {
                            let slot = self.groups[pg].iter().position(|m| *m == Some(busy))?;
                            self.fits(pg, slot, idle).then_some((pg, slot))
                        })
                        .min_by_key(|&(pg, _)| (self.company(pg, idle), self.lot(pg, idle)))
                        .map(|(pg, slot)| (pg, slot, idle))
                })
            });
            let Some((pg, slot, idle)) = step else { return };
            self.clear(pg, slot);
            self.set(pg, slot, idle);
        }
    }

    /// Whether target `i` may take `slot` of `pg`, given the other members.
    fn fits(&self, pg: usize, slot: usize, i: usize) -> bool {
        let others =
            || self.groups[pg].iter().enumerate().filter(|(s, _)| *s != slot).filter_map(|(_, m)| *m);
        others().all(|m| m != i)
            && others().filter(|&m| self.rack[m] == self.rack[i]).count() < self.most.in_rack
            && others().filter(|&m| self.host[m] == self.host[i]).count() < self.most.on_host
    }

    /// How many groups `i` already shares with the members of `pg`.
    fn company(&self, pg: usize, i: usize) -> u32 {
        self.groups[pg].iter().flatten().map(|&m| self.shared[m * self.ids.len() + i]).sum()
    }

    /// A tie-breaker that differs from group to group.
    fn lot(&self, pg: usize, i: usize) -> u64 {
        mix(self.ids[i].0 ^ mix(pg as u64))
    }

    fn set(&mut self, pg: usize, slot: usize, i: usize) {
        self.change_shared(pg, i, |together| *together += 1);
        self.groups[pg][slot] = Some(i);
        self.held[i].insert(pg);
    }

    fn clear(&mut self, pg: usize, slot: usize) {
        if let Some(i) = self.groups[pg][slot].take() {
            self.held[i].remove(&pg);
            self.change_shared(pg, i, |together| *together -= 1);
        }
    }

    fn change_shared(&mut self, pg: usize, i: usize, change: impl Fn(&mut u32)) {
        let count = self.ids.len();
        for m in self.groups[pg].iter().flatten() {
            change(&mut self.shared[m * count + i]);
            change(&mut self.shared[i * count + m]);
        }
    }
}

/// What the members of a group mean for the next one; kept up, because counting anew for each candidate is most of the work.
struct Members {
    /// With how many groups each target shares them, summed.
    company: Vec<u32>,
    is_member: Vec<bool>,
    in_rack: Vec<usize>,
    on_host: Vec<usize>,
}

impl Members {
    fn new(targets: usize) -> Members {
        Members {
            company: vec![0; targets],
            is_member: vec![false; targets],
            in_rack: vec![0; targets],
            on_host: vec![0; targets],
        }
    }

    fn add(&mut self, plan: &Plan, i: usize) {
        let row = &plan.shared[i * plan.ids.len()..][..plan.ids.len()];
        self.company.iter_mut().zip(row).for_each(|(sum, together)| *sum += together);
        self.is_member[i] = true;
        self.in_rack[plan.rack[i]] += 1;
        self.on_host[plan.host[i]] += 1;
    }

    /// As [`Plan::fits`].
    fn admit(&self, plan: &Plan, i: usize) -> bool {
        !self.is_member[i]
            && self.in_rack[plan.rack[i]] < plan.most.in_rack
            && self.on_host[plan.host[i]] < plan.most.on_host
    }
}

/// Numbers for names: equal ones for equal names.
fn numbered<T: Ord>(names: impl Iterator<Item = T>) -> Vec<usize> {
    let mut numbers = BTreeMap::new();
    names
        .map(|name| {
            let next = numbers.len();
            *numbers.entry(name).or_insert(next)
        })
        .collect()
}

impl Most {
    /// The least bounds with which `width` targets can still be found: for racks first, then for hosts.
    fn of(rack: &[usize], host: &[usize], width: usize) -> Most {
        let mut sizes: BTreeMap<(usize, usize), usize> = BTreeMap::new();
        for place in rack.iter().copied().zip(host.iter().copied()) {
            *sizes.entry(place).or_default() += 1;
        }
        let reaches = |most: Most| {
            let mut racks: BTreeMap<usize, usize> = BTreeMap::new();
            for ((rack, _), size) in &sizes {
                *racks.entry(*rack).or_default() += (*size).min(most.on_host);
            }
            racks.values().map(|size| (*size).min(most.in_rack)).sum::<usize>() >= width
        };
        let least = |reaches: &dyn Fn(usize) -> bool| (1..width).find(|most| reaches(*most)).unwrap_or(width);
        let in_rack = least(&|in_rack| reaches(Most { in_rack, on_host: width }));
        let on_host = least(&|on_host| reaches(Most { in_rack, on_host }));
        Most { in_rack, on_host }
    }
}

#[cfg(test)]
mod tests;
