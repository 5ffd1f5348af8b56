//! The function that fills placement groups.
//!
//! One pure function of (old table, targets): the same input gives the same table on every machine. What it aims
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
    Some(PgTable { width, members })
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

    #[test]
    fn a_lost_target_is_rebuilt_by_nearly_all_others() {
        let table = place(None, &targets(10, 1), 3, 256).unwrap();
        let partners: std::collections::BTreeSet<TargetId> =
            table.members.chunks(3).filter(|g| g.contains(&TargetId(1))).flatten().copied().collect();
        assert_eq!(partners.len(), 10);
    }
}
