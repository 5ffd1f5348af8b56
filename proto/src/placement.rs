//! The functions that fill placement groups.
//!
//! Pure functions of (old table, targets): the same input gives the same table on every machine. [`place`] makes the table
//! of a new era; [`repair`] says who takes the place of members that are gone, and touches nothing else. What they aim
//! at, in this order:
//!
//! 1. the members of a group are different targets, as far apart as the failure domains allow;
//! 2. a member that may stay stays;
//! 3. every target serves about equally many groups;
//! 4. targets share groups with as many different others as possible, so that all of them rebuild a lost one.

use std::collections::{BTreeMap, HashMap};

use crate::{
    cluster::{PgTable, mix},
    ids::TargetId,
};

/// Groups of `width` over `targets` (each with its failure domain), starting from `old`.
///
/// `None` when there are fewer targets than `width`. `pg_count` of an old table is kept.
pub fn place(
    old: Option<&PgTable>,
    targets: &BTreeMap<TargetId, String>,
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
    targets: &BTreeMap<TargetId, String>,
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
    for (pg, now) in table.members.chunks(table.width).enumerate() {
        for slot in 0..table.width {
            if plan.groups[pg][slot].is_none()
                && let Some(best) = plan.substitute(pg, now, &takes)
            {
                plan.set(pg, slot, best);
                moves.insert(pg * table.width + slot, plan.ids[best]);
            }
        }
    }
    moves
}

/// Work in progress; targets are indices into `ids`.
struct Plan {
    ids: Vec<TargetId>,
    domain: Vec<usize>,
    domain_max: usize,
    groups: Vec<Vec<Option<usize>>>,
    load: Vec<usize>,
    shared: HashMap<(usize, usize), usize>,
}

impl Plan {
    fn new(targets: &BTreeMap<TargetId, String>, width: usize, pg_count: usize) -> Plan {
        let mut domains = BTreeMap::new();
        for name in targets.values() {
            let next = domains.len();
            domains.entry(name).or_insert(next);
        }
        let domain: Vec<usize> = targets.values().map(|name| domains[name]).collect();
        Plan {
            ids: targets.keys().copied().collect(),
            domain_max: domain_max(&domain, domains.len(), width),
            domain,
            groups: vec![vec![None; width]; pg_count],
            load: vec![0; targets.len()],
            shared: HashMap::new(),
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

    fn fill(&mut self) {
        for pg in 0..self.groups.len() {
            for slot in 0..self.groups[pg].len() {
                if self.groups[pg][slot].is_none()
                    && let Some(best) = (0..self.ids.len())
                        .filter(|&i| self.fits(pg, slot, i))
                        .min_by_key(|&i| (self.load[i], self.company(pg, i), self.lot(pg, i)))
                {
                    self.set(pg, slot, best);
                }
            }
        }
    }

    /// The best target that is in `pg` neither now nor later. Apart from failure domains as in `fill`: they are kept apart as well
    /// as they can be beside the members that stay, which may share one already.
    fn substitute(&self, pg: usize, now: &[TargetId], takes: &impl Fn(TargetId) -> bool) -> Option<usize> {
        let members = || self.groups[pg].iter().flatten();
        let fits = |i: &usize| {
            let id = self.ids[*i];
            takes(id) && !now.contains(&id) && members().all(|m| m != i)
        };
        (0..self.ids.len()).filter(fits).min_by_key(|&i| {
            let near = members().filter(|m| self.domain[**m] == self.domain[i]).count() + 1;
            (near.max(self.domain_max), self.load[i], self.company(pg, i), self.lot(pg, i))
        })
    }

    /// Moves single members from the busiest targets to the idlest while that evens the load. Where failure domains
    /// forbid every direct move, a difference of two groups can remain.
    fn balance(&mut self) {
        let mut order: Vec<usize> = (0..self.ids.len()).collect();
        loop {
            order.sort_by_key(|&i| (self.load[i], i));
            let step = order.iter().find_map(|&idle| {
                order.iter().rev().take_while(|&&busy| self.load[busy] > self.load[idle] + 1).find_map(
                    |&busy| {
                        (0..self.groups.len())
                            .filter_map(|pg| {
                                let slot = self.groups[pg].iter().position(|m| *m == Some(busy))?;
                                self.fits(pg, slot, idle).then_some((pg, slot))
                            })
                            .min_by_key(|&(pg, _)| (self.company(pg, idle), self.lot(pg, idle)))
                            .map(|(pg, slot)| (pg, slot, idle))
                    },
                )
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
            && others().filter(|&m| self.domain[m] == self.domain[i]).count() < self.domain_max
    }

    /// How many groups `i` already shares with the members of `pg`.
    fn company(&self, pg: usize, i: usize) -> usize {
        self.groups[pg].iter().flatten().map(|&m| self.shared.get(&pair(m, i)).copied().unwrap_or(0)).sum()
    }

    /// A tie-breaker that differs from group to group.
    fn lot(&self, pg: usize, i: usize) -> u64 {
        mix(self.ids[i].0 ^ mix(pg as u64))
    }

    fn set(&mut self, pg: usize, slot: usize, i: usize) {
        for m in self.groups[pg].iter().flatten() {
            *self.shared.entry(pair(*m, i)).or_default() += 1;
        }
        self.groups[pg][slot] = Some(i);
        self.load[i] += 1;
    }

    fn clear(&mut self, pg: usize, slot: usize) {
        if let Some(i) = self.groups[pg][slot].take() {
            self.load[i] -= 1;
            for m in self.groups[pg].iter().flatten() {
                if let Some(n) = self.shared.get_mut(&pair(*m, i)) {
                    *n -= 1;
                }
            }
        }
    }
}

fn pair(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

/// Fewest members per domain and group with which `width` targets can still be found.
fn domain_max(domain: &[usize], domains: usize, width: usize) -> usize {
    let mut sizes = vec![0usize; domains];
    for &d in domain {
        sizes[d] += 1;
    }
    (1..=width).find(|&max| sizes.iter().map(|&size| size.min(max)).sum::<usize>() >= width).unwrap_or(width)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn targets(domains: usize, each: usize) -> BTreeMap<TargetId, String> {
        (0..domains * each).map(|i| (TargetId(i as u64 + 1), format!("d{}", i % domains))).collect()
    }

    fn load(table: &PgTable) -> BTreeMap<TargetId, usize> {
        let mut load = BTreeMap::new();
        for t in &table.members {
            *load.entry(*t).or_default() += 1;
        }
        load
    }

    fn check(
        table: &PgTable,
        targets: &BTreeMap<TargetId, String>,
        domains: usize,
    ) -> Result<(), TestCaseError> {
        for group in table.members.chunks(table.width) {
            let mut per_domain: BTreeMap<&String, usize> = BTreeMap::new();
            for (i, t) in group.iter().enumerate() {
                prop_assert!(!group[..i].contains(t), "{:?} twice in {:?}", t, group);
                *per_domain.entry(&targets[t]).or_default() += 1;
            }
            prop_assert!(per_domain.values().all(|n| *n <= table.width.div_ceil(domains)), "{group:?}");
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn groups_are_spread_and_even(domains in 1..7usize, each in 1..5usize, width in 1..6usize, pgs in 1..80usize) {
            let targets = targets(domains, each);
            let Some(table) = place(None, &targets, width, pgs) else {
                prop_assert!(targets.len() < width);
                return Ok(());
            };
            prop_assert_eq!(table.members.len(), width * pgs);
            check(&table, &targets, domains)?;
            let load = load(&table);
            let (min, max) = (targets.keys().map(|t| load.get(t).copied().unwrap_or(0)).min(), load.values().max());
            prop_assert!(max.unwrap() - min.unwrap() <= 2, "{load:?}");
        }

        #[test]
        fn little_moves_when_one_target_goes(domains in 3..7usize, each in 1..4usize, pgs in 1..80usize, gone in any::<prop::sample::Index>()) {
            let before = targets(domains, each);
            let old = place(None, &before, 2, pgs).unwrap();
            let gone = TargetId(gone.index(before.len()) as u64 + 1);
            let mut after = before.clone();
            after.remove(&gone);
            let new = place(Some(&old), &after, 2, pgs).unwrap();
            check(&new, &after, domains - 1)?;
            let lost = old.members.iter().filter(|t| **t == gone).count();
            let moved = old.members.iter().zip(&new.members).filter(|(a, b)| a != b).count();
            prop_assert!(moved <= 2 * lost + after.len(), "{moved} moved for {lost} lost");
        }

        #[test]
        fn a_new_target_takes_its_share_and_no_more(domains in 2..7usize, pgs in 8..80usize) {
            let before = targets(domains, 1);
            let old = place(None, &before, 2, pgs).unwrap();
            let mut after = before.clone();
            after.insert(TargetId(100), "new".into());
            let new = place(Some(&old), &after, 2, pgs).unwrap();
            let share = (2 * pgs).div_ceil(after.len());
            let moved = old.members.iter().zip(&new.members).filter(|(a, b)| a != b).count();
            prop_assert!(moved <= share, "{moved} moved, a share is {share}");
            prop_assert!(load(&new)[&TargetId(100)] + 1 >= share.min(pgs));
        }
    }

    /// What a repair promises, checked cell by cell.
    fn check_repair(table: &PgTable, targets: &BTreeMap<TargetId, String>) -> Result<PgTable, TestCaseError> {
        let moves = repair(table, targets, |_| true);
        for (cell, target) in &moves {
            let needless =
                targets.contains_key(&table.members[*cell]) && table.moves.get(cell) != Some(target);
            prop_assert!(!needless, "member {} moved and need not", cell);
            if let Some(before) = table.moves.get(cell).filter(|t| targets.contains_key(t)) {
                prop_assert_eq!(before, target, "a move under way has changed");
            }
            prop_assert!(targets.contains_key(target));
            prop_assert!(!table.group(crate::PgId((cell / table.width) as u32)).contains(target));
        }
        let repaired = PgTable { moves, ..table.clone() };
        for pg in 0..repaired.pg_count() {
            let group = repaired.group_to_be(crate::PgId(pg as u32));
            let near = |target: &TargetId, but: usize| {
                let others =
                    group.iter().enumerate().filter(|(slot, t)| *slot != but && targets.contains_key(t));
                others.filter(|(_, t)| targets[t] == targets[target]).count()
            };
            for (slot, t) in group.iter().enumerate() {
                prop_assert!(!group[..slot].contains(t), "{} twice in {:?}", t, group);
                let free = || {
                    targets
                        .keys()
                        .filter(|t| !group.contains(t) && !table.group(crate::PgId(pg as u32)).contains(t))
                };
                prop_assert!(targets.contains_key(t) || free().next().is_none(), "{t} stays in {group:?}");
                let new = repaired.moves.contains_key(&(pg * table.width + slot))
                    && !table.moves.contains_key(&(pg * table.width + slot));
                // More of a domain than any group needs: then every free target would have been as near.
                if new && near(t, slot) + 1 > Plan::new(targets, table.width, 1).domain_max {
                    prop_assert!(
                        free().all(|f| near(f, slot) >= near(t, slot)),
                        "{t} is too near in {group:?}"
                    );
                }
            }
        }
        Ok(repaired)
    }

    proptest! {
        #[test]
        fn a_repair_moves_only_what_must_and_keeps_domains_apart(
            domains in 2..7usize, each in 1..4usize, width in 1..5usize, pgs in 1..60usize,
            gone in proptest::collection::vec(any::<prop::sample::Index>(), 1..3),
        ) {
            let mut left = targets(domains, each);
            let Some(mut table) = place(None, &left, width, pgs) else { return Ok(()) };
            for gone in gone {
                let id = *left.keys().nth(gone.index(left.len())).unwrap();
                left.remove(&id);
                if left.len() < width.max(1) {
                    return Ok(());
                }
                table = check_repair(&table, &left)?;
            }
            // All done: nothing is left to move, and the same again changes nothing.
            let done = (0..table.pg_count()).flat_map(|pg| table.group_to_be(crate::PgId(pg as u32))).collect();
            let done = PgTable { members: done, moves: BTreeMap::new(), ..table.clone() };
            prop_assert_eq!(repair(&done, &left, |_| true), BTreeMap::new());
            prop_assert_eq!(repair(&table, &left, |_| true), table.moves);
        }

        #[test]
        fn what_a_lost_target_held_goes_to_all_others_evenly(domains in 4..12usize, pgs in 20..100usize, gone in any::<prop::sample::Index>()) {
            let before = targets(domains, 1);
            let table = place(None, &before, 2, pgs).unwrap();
            let gone = TargetId(gone.index(domains) as u64 + 1);
            let mut left = before.clone();
            left.remove(&gone);
            let moves = repair(&table, &left, |_| true);
            prop_assert_eq!(moves.len(), load(&table)[&gone]);
            let after = load(&PgTable { members: (0..pgs).flat_map(|pg| PgTable { moves: moves.clone(), ..table.clone() }.group_to_be(crate::PgId(pg as u32))).collect(), ..table.clone() });
            let (min, max) = (after.values().min().unwrap(), after.values().max().unwrap());
            prop_assert!(max - min <= 3, "{after:?}");
        }
    }

    #[test]
    fn a_large_cluster_rebuilds_with_four_fifths_of_its_targets() {
        let before = targets(10, 8);
        let table = place(None, &before, 10, 512).unwrap();
        let mut left = before.clone();
        left.remove(&TargetId(7));
        let moves = repair(&table, &left, |_| true);
        let mut busy: std::collections::BTreeSet<TargetId> = moves.values().copied().collect();
        busy.extend(table.members.chunks(10).filter(|g| g.contains(&TargetId(7))).flatten());
        assert!(busy.len() > 80 * 4 / 5, "{} take part", busy.len());
    }

    #[test]
    fn where_nobody_is_left_nothing_moves() {
        let before = targets(3, 1);
        let table = place(None, &before, 3, 8).unwrap();
        let left = BTreeMap::from([(TargetId(1), "d0".to_owned()), (TargetId(2), "d1".to_owned())]);
        assert_eq!(repair(&table, &left, |_| true), BTreeMap::new());
        let table = place(None, &before, 2, 8).unwrap();
        assert_eq!(repair(&table, &left, |_| false), BTreeMap::new());
        assert!(!repair(&table, &left, |_| true).is_empty());
    }

    #[test]
    fn a_lost_target_is_rebuilt_by_nearly_all_others() {
        let table = place(None, &targets(10, 1), 3, 256).unwrap();
        let partners: std::collections::BTreeSet<TargetId> =
            table.members.chunks(3).filter(|g| g.contains(&TargetId(1))).flatten().copied().collect();
        assert_eq!(partners.len(), 10);
    }
}
