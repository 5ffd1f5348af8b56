//! Tables of random clusters against what must hold of every one, and those of a cluster of 2 PB.

use super::*;
use proptest::prelude::*;

/// Hosts that share nothing.
fn targets(domains: usize, each: usize) -> BTreeMap<TargetId, Domain> {
    (0..domains * each)
        .map(|i| (TargetId(i as u64 + 1), Domain::of_map(&format!("d{}", i % domains))))
        .collect()
}

/// Racks of hosts of targets.
fn racked(racks: usize, hosts: usize, each: usize) -> BTreeMap<TargetId, Domain> {
    let domain =
        |i: usize| Domain { rack: format!("r{}", i % racks), host: format!("h{}", i / racks % hosts) };
    (0..racks * hosts * each).map(|i| (TargetId(i as u64 + 1), domain(i))).collect()
}

fn load(table: &PgTable) -> BTreeMap<TargetId, usize> {
    let mut load = BTreeMap::new();
    for t in &table.members {
        *load.entry(*t).or_default() += 1;
    }
    load
}

fn check(table: &PgTable, targets: &BTreeMap<TargetId, Domain>, domains: usize) -> Result<(), TestCaseError> {
    for group in table.members.chunks(table.width) {
        let mut per_domain: BTreeMap<&Domain, usize> = BTreeMap::new();
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
        after.insert(TargetId(100), Domain::of_map("new"));
        let new = place(Some(&old), &after, 2, pgs).unwrap();
        let share = (2 * pgs).div_ceil(after.len());
        let moved = old.members.iter().zip(&new.members).filter(|(a, b)| a != b).count();
        prop_assert!(moved <= share, "{moved} moved, a share is {share}");
        prop_assert!(load(&new)[&TargetId(100)] + 1 >= share.min(pgs));
    }
}

/// What a repair promises, checked cell by cell.
fn check_repair(table: &PgTable, targets: &BTreeMap<TargetId, Domain>) -> Result<PgTable, TestCaseError> {
    let moves = repair(table, targets, |_| true);
    for (cell, target) in &moves {
        let needless = targets.contains_key(&table.members[*cell]) && table.moves.get(cell) != Some(target);
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
            let others = group.iter().enumerate().filter(|(slot, t)| *slot != but && targets.contains_key(t));
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
            if new && near(t, slot) + 1 > Plan::new(targets, table.width, 1).most.in_rack {
                prop_assert!(free().all(|f| near(f, slot) >= near(t, slot)), "{t} is too near in {group:?}");
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

/// How many members of a group are in its fullest rack, and on its fullest host.
fn nearness(group: &[TargetId], targets: &BTreeMap<TargetId, Domain>) -> Most {
    let fullest = |place: &dyn Fn(&Domain) -> String| {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for target in group {
            *counts.entry(place(&targets[target])).or_default() += 1;
        }
        counts.into_values().max().unwrap_or(0)
    };
    Most { in_rack: fullest(&|d| d.rack.clone()), on_host: fullest(&|d| format!("{}/{}", d.rack, d.host)) }
}

/// The nearest that members of the best group have to be, by trying every group.
fn unavoidable(targets: &BTreeMap<TargetId, Domain>, width: usize) -> (usize, usize) {
    let ids: Vec<TargetId> = targets.keys().copied().collect();
    let groups = (0u32..1 << ids.len()).filter(|set| set.count_ones() as usize == width);
    let nearness = groups.map(|set| {
        let group: Vec<TargetId> = (0..ids.len()).filter(|i| set >> i & 1 == 1).map(|i| ids[i]).collect();
        let Most { in_rack, on_host } = nearness(&group, targets);
        (in_rack, on_host)
    });
    nearness.min().unwrap_or((0, 0))
}

proptest! {
    #[test]
    fn racks_and_hosts_are_shared_only_when_there_are_too_few(
        places in proptest::collection::vec((0..4u8, 0..3u8), 1..10), width in 1..6usize, pgs in 1..30usize,
    ) {
        let domain = |(rack, host): (u8, u8)| Domain { rack: format!("r{rack}"), host: format!("h{host}") };
        let targets: BTreeMap<TargetId, Domain> =
            places.iter().enumerate().map(|(i, place)| (TargetId(i as u64 + 1), domain(*place))).collect();
        let Some(table) = place(None, &targets, width, pgs) else {
            prop_assert!(targets.len() < width);
            return Ok(());
        };
        let (in_rack, on_host) = unavoidable(&targets, width);
        for group in table.members.chunks(width) {
            let near = nearness(group, &targets);
            prop_assert!(near.in_rack <= in_rack && near.on_host <= on_host, "{near:?}, not {in_rack}, {on_host}");
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn load_is_within_a_tenth_of_the_ideal_and_moves_are_few(
        // More racks than members: then no rack must have one of every group, whatever its size.
        racks in 4..7usize, hosts in 2..5usize, each in 1..4usize, width in 2..4usize, added in 1..4usize,
    ) {
        let before = racked(racks, hosts, each);
        let pgs = 40 * before.len();
        let old = place(None, &before, width, pgs).unwrap();
        let within = |table: &PgTable, targets: &BTreeMap<TargetId, Domain>| {
            let (load, ideal) = (load(table), (width * pgs) as f64 / targets.len() as f64);
            targets.keys().all(|t| (load.get(t).copied().unwrap_or(0) as f64 - ideal).abs() <= 0.1 * ideal)
        };
        prop_assert!(within(&old, &before), "{:?}", load(&old));
        // More targets, on hosts there are: each takes its share, and nothing else moves.
        let mut after = before.clone();
        for n in 0..added {
            after.insert(TargetId(10_000 + n as u64), before.values().nth(n).unwrap().clone());
        }
        let new = place(Some(&old), &after, width, pgs).unwrap();
        prop_assert!(within(&new, &after), "{:?}", load(&new));
        let moved = old.members.iter().zip(&new.members).filter(|(a, b)| a != b).count();
        let least = (width * pgs * added) as f64 / after.len() as f64;
        prop_assert!(moved as f64 <= 1.2 * least, "{moved} moved, at least {least} must");
        // One less: only what it had moves.
        let gone = *before.keys().next().unwrap();
        let mut left = before.clone();
        left.remove(&gone);
        let lost = old.members.iter().filter(|t| **t == gone).count();
        prop_assert_eq!(repair(&old, &left, |_| true).len(), lost);
    }
}

#[test]
fn a_cluster_of_2_pb_is_even_and_rebuilds_with_four_fifths_of_its_targets() {
    // 40 servers of 8 targets in 8 racks, ec:8+2.
    let before = racked(8, 5, 8);
    let table = place(None, &before, 10, 4096).unwrap();
    let ideal = 4096.0 * 10.0 / 320.0;
    assert!(load(&table).values().all(|n| (*n as f64 - ideal).abs() <= 0.1 * ideal));
    assert!(
        table.members.chunks(10).all(|group| nearness(group, &before) == Most { in_rack: 2, on_host: 1 })
    );
    let gone = TargetId(7);
    let mut left = before.clone();
    left.remove(&gone);
    let moves = repair(&table, &left, |_| true);
    assert_eq!(moves.len(), load(&table)[&gone]);
    let mut busy: std::collections::BTreeSet<TargetId> = moves.values().copied().collect();
    busy.extend(table.members.chunks(10).filter(|g| g.contains(&gone)).flatten());
    busy.remove(&gone);
    assert!(busy.len() >= 319 * 4 / 5, "{} take part", busy.len());
    // A ninth rack: what moves is its share.
    let mut after = before.clone();
    after.extend(
        (0..40).map(|i| (TargetId(1000 + i), Domain { rack: "new".into(), host: format!("h{}", i % 5) })),
    );
    let new = place(Some(&table), &after, 10, 4096).unwrap();
    let moved = table.members.iter().zip(&new.members).filter(|(a, b)| a != b).count();
    assert!(moved as f64 <= 1.2 * 40960.0 * 40.0 / 360.0, "{moved} moved");
}

#[test]
fn where_nobody_is_left_nothing_moves() {
    let before = targets(3, 1);
    let table = place(None, &before, 3, 8).unwrap();
    let left = BTreeMap::from([(TargetId(1), Domain::of_map("d0")), (TargetId(2), Domain::of_map("d1"))]);
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
