//! Rebuild, drain and removal as the metaserver plans them; the data servers are played by the test.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use fjordfs_proto::{
    BlockId, ClusterMap, Layout, PgId, Policy, ROOT_INODE, TargetId, cluster::TargetState, pb::meta::*,
};

use crate::{
    refusal::Refusal,
    store::MemoryStore,
    testing::{World, registration, report, run},
};

const SECOND: Duration = Duration::from_secs(1);

/// Servers 1 to `n` with a target each, of the same numbers.
fn world(n: u64) -> World {
    let mut w = World::bare(Arc::new(MemoryStore::default()));
    w.config.out_after = 10 * SECOND;
    w.restart();
    for id in 1..=n {
        let name = format!("d{id}");
        w.core.register(&registration(&name, &[&name]), w.now).unwrap();
    }
    w.core.commit().unwrap();
    w.session = w.attach();
    w
}

fn map(w: &World) -> Arc<ClusterMap> {
    w.core.members().map().clone()
}

fn state(w: &World, id: u64) -> Option<TargetState> {
    map(w).targets.get(&TargetId(id)).map(|t| t.state)
}

fn beat(w: &mut World, server: u64, checks: Vec<CheckReport>) -> Vec<Check> {
    beat_with(w, server, HeartbeatRequest { checks, ..HeartbeatRequest::default() }).checks
}

/// All that its server knows of is over, if `request` does not say otherwise.
fn beat_with(w: &mut World, server: u64, request: HeartbeatRequest) -> HeartbeatReply {
    let targets = vec![TargetReport { target: server, ..report(&format!("d{server}"), 1 << 39) }];
    let placed_epoch = if request.placed_epoch == 0 { u64::MAX } else { request.placed_epoch };
    let targets = if request.targets.is_empty() { targets } else { request.targets };
    let request = HeartbeatRequest { server, targets, epoch: u64::MAX, placed_epoch, ..request };
    let reply = w.core.heartbeat(&request, w.now).unwrap();
    w.core.commit().unwrap();
    reply
}

fn done(check: &Check) -> CheckReport {
    CheckReport {
        ticket: check.ticket,
        done: true,
        shards_copied: 1,
        bytes_copied: 100,
        ..CheckReport::default()
    }
}

fn healing(w: &mut World) -> Healing {
    w.core.status(w.now).healing.unwrap()
}

/// Nobody carries out a check until the target is out.
fn wait_out(w: &mut World, id: u64, servers: &[u64]) {
    while state(w, id) != Some(TargetState::Out) {
        servers.iter().for_each(|server| drop(beat(w, *server, vec![])));
        w.pass(SECOND);
        w.tick();
    }
}

/// A second in which these servers report, and carry out their checks.
fn work(w: &mut World, servers: &[u64]) {
    for server in servers {
        let checks = beat(w, *server, vec![]);
        beat(w, *server, checks.iter().map(done).collect());
    }
    w.pass(SECOND);
    w.tick();
}

fn work_until(w: &mut World, servers: &[u64], fits: impl Fn(&World) -> bool) {
    for _ in 0..400 {
        if fits(w) {
            return;
        }
        work(w, servers);
    }
    panic!("still not: {:?}", w.core.status(w.now).healing);
}

fn idle(w: &World) -> bool {
    let told = w.core.healing(w.now);
    told.moves_left + told.checks_left == 0
}

fn groups_of(map: &ClusterMap, id: u64) -> usize {
    map.eras.iter().flat_map(|era| era.tables.values()).flat_map(|t| &t.members).filter(|t| t.0 == id).count()
}

fn change(
    w: &mut World,
    target: u64,
    change: TargetChange,
    with: u64,
    force: bool,
) -> Result<String, Refusal> {
    let request = ChangeTargetRequest { target, change: change.into(), with, force };
    let reply = w.core.change_target(&request, w.now);
    w.core.commit().unwrap();
    reply.map(|reply| reply.message)
}

#[test]
fn a_lost_target_is_replaced_seat_by_seat_and_can_be_removed() {
    let mut w = world(4);
    w.lease(1000);
    work_until(&mut w, &[1, 2, 3, 4], idle);
    let before = map(&w);
    let lost = groups_of(&before, 4);
    assert!(lost > 0);
    for _ in 0..12 {
        work(&mut w, &[1, 2, 3]);
        assert_eq!(groups_of(&map(&w), 4), lost, "nobody is replaced who may come back");
    }
    assert_eq!(state(&w, 4), Some(TargetState::Down));
    assert!(matches!(change(&mut w, 4, TargetChange::Remove, 0, false), Err(Refusal::Precondition(_))));
    wait_out(&mut w, 4, &[1, 2, 3]);
    let planned = map(&w);
    assert_eq!(super::move_count(&planned), lost);
    assert_eq!(planned.eras.len(), before.eras.len(), "a loss begins no era");
    for (old, new) in before.eras.iter().zip(&planned.eras) {
        assert_eq!(old.tables[&2].members, new.tables[&2].members, "readers find shards where they are");
    }
    let orders = beat(&mut w, 1, vec![]);
    assert!(!orders.is_empty() && orders.len() <= super::CHECKS_PER_TARGET);
    assert_eq!(beat(&mut w, 1, vec![]), orders, "the same until they are done");
    let late = CheckReport { ticket: orders[0].ticket + 1000, ..done(&orders[0]) };
    assert_eq!(beat(&mut w, 1, vec![late]), orders, "another attempt's report counts for nothing");
    let missing = CheckReport { shards_missing: 1, problem: "why".into(), ..done(&orders[0]) };
    assert!(
        beat(&mut w, 1, vec![missing]).iter().all(|c| c.pg != orders[0].pg || c.ticket != orders[0].ticket)
    );
    assert_eq!(healing(&mut w).problems.len(), 1);
    work_until(&mut w, &[1, 2, 3], idle);
    let after = map(&w);
    assert_eq!(groups_of(&after, 4), 0);
    let told = healing(&mut w);
    assert_eq!((told.moves_done, told.moves_left, told.problems.len()), (lost as u64, 0, 0));
    for (old, new) in before.eras[0].tables[&2].members.iter().zip(&after.eras[0].tables[&2].members) {
        assert!(old == new || *old == TargetId(4), "{old} was moved to {new} and need not");
    }
    change(&mut w, 4, TargetChange::Remove, 0, false).unwrap();
    assert_eq!((state(&w, 4), map(&w).servers.len()), (None, 3));
    w.restart();
    assert_eq!(state(&w, 4), None);
    let back = w.core.register(&registration("d4", &["d4"]), w.now);
    assert!(matches!(back, Err(Refusal::Precondition(m)) if m.contains("was removed")));
    w.check();
}

#[test]
fn one_that_comes_back_keeps_the_places_that_are_not_filled_yet() {
    let mut w = world(4);
    w.lease(1000);
    work_until(&mut w, &[1, 2, 3, 4], idle);
    let lost = groups_of(&map(&w), 4);
    wait_out(&mut w, 4, &[1, 2, 3]);
    work(&mut w, &[1, 2, 3]);
    work(&mut w, &[1, 2, 3]);
    let replaced = lost - groups_of(&map(&w), 4);
    assert!(replaced > 0 && replaced < lost, "{replaced} of {lost}");
    let orders = beat(&mut w, 4, vec![]);
    assert!(!orders.is_empty(), "what it kept is compared with the others");
    let now = map(&w);
    assert_eq!((state(&w, 4), super::move_count(&now)), (Some(TargetState::Up), 0));
    work_until(&mut w, &[1, 2, 3, 4], idle);
    assert_eq!(lost - groups_of(&map(&w), 4), replaced);
}

#[test]
fn most_targets_silent_means_nobody_is_out() {
    let mut w = world(4);
    for _ in 0..40 {
        work(&mut w, &[1]);
    }
    assert_eq!([1, 2, 3, 4].map(|id| state(&w, id).unwrap()), {
        use TargetState::*;
        [Up, Down, Down, Down]
    });
    assert_eq!(super::move_count(&map(&w)), 0);
}

#[test]
fn a_drain_waits_for_writes_under_way_and_survives_a_restart() {
    let mut w = world(4);
    w.lease(1000);
    work_until(&mut w, &[1, 2, 3, 4], idle);
    assert!(change(&mut w, 9, TargetChange::Drain, 0, false).is_err());
    change(&mut w, 2, TargetChange::Drain, 0, false).unwrap();
    assert_eq!(state(&w, 2), Some(TargetState::Draining));
    let all = groups_of(&map(&w), 2);
    assert_eq!(super::move_count(&map(&w)), all);
    let planned = map(&w).epoch.0;
    for _ in 0..10 {
        let slow = HeartbeatRequest { placed_epoch: planned - 1, ..HeartbeatRequest::default() };
        beat_with(&mut w, 2, slow);
        work(&mut w, &[1, 3, 4]);
        assert_eq!(groups_of(&map(&w), 2), all, "a put of before may be under way to the one that goes");
    }
    w.restart();
    w.session = w.attach();
    assert_eq!((state(&w, 2), super::move_count(&map(&w))), (Some(TargetState::Draining), all));
    work_until(&mut w, &[1, 2, 3, 4], idle);
    assert_eq!(groups_of(&map(&w), 2), 0);
    let message = change(&mut w, 2, TargetChange::Remove, 0, false).unwrap();
    assert!(message.contains("t2"));
    beat(&mut w, 2, vec![]);
    assert_eq!(state(&w, 2), None, "its server, which still reports it, is not a stranger");
}

#[test]
fn a_server_that_starts_again_in_a_drain_may_take_puts_until_it_has_a_map() {
    let mut w = world(4);
    w.lease(1000);
    work_until(&mut w, &[1, 2, 3, 4], idle);
    change(&mut w, 2, TargetChange::Drain, 0, false).unwrap();
    let all = groups_of(&map(&w), 2);
    beat(&mut w, 2, vec![]);
    let begun: Vec<CheckReport> =
        [1, 3, 4].iter().flat_map(|server| beat(&mut w, *server, vec![])).map(|c| done(&c)).collect();
    assert!(!begun.is_empty());
    w.core.register(&registration("d2", &["d2"]), w.now).unwrap();
    for server in [1, 3, 4] {
        beat(&mut w, server, begun.clone());
    }
    w.pass(SECOND);
    w.tick();
    assert_eq!(groups_of(&map(&w), 2), all, "the checks of before may have looked too early");
    work_until(&mut w, &[1, 2, 3, 4], idle);
    assert_eq!(groups_of(&map(&w), 2), 0);
}

#[test]
fn what_a_commit_says_is_missing_is_looked_for_at_once() {
    let mut w = world(3);
    let (f, first) = (w.file("f"), w.lease(10));
    work_until(&mut w, &[1, 2, 3], idle);
    let two = Layout::of(Policy::replica(2).unwrap(), 1);
    let group = map(&w).placement(BlockId(first), two).unwrap().to_vec();
    let missing = |targets: &[u64]| {
        vec![MissingShards { block: first, targets: targets.to_vec(), ..MissingShards::default() }]
    };
    let file =
        |block| FileCommit { ino: f.0, extents: vec![run(0, 1 << 24, block, 0)], ..Default::default() };
    let stranger = MissingShards { block: first + 5, targets: vec![1, 2, 3], ..MissingShards::default() };
    let commit = Commit { files: vec![file(first + 1)], missing: vec![stranger], ..Commit::default() };
    w.commit(commit).unwrap();
    assert!(idle(&w), "it is not of this commit");
    let lacks = missing(&[group[1].0, 9]);
    w.commit(Commit { files: vec![file(first)], missing: lacks, ..Commit::default() }).unwrap();
    let orders = beat(&mut w, group[1].0, vec![]);
    assert_eq!(orders.len(), 1, "{orders:?}");
    assert_eq!((orders[0].target, orders[0].width), (group[1].0, 2));
    assert_eq!(PgId(orders[0].pg), map(&w).eras[0].tables[&2].pg_of(BlockId(first)));
    // Another one of the same group while it looks: it looks again.
    let pg_of = |block: u64| map(&w).eras[0].tables[&2].pg_of(BlockId(block));
    let next = (first + 2..first + 10).find(|block| pg_of(*block) == pg_of(first));
    let next = next.unwrap_or_else(|| {
        let more = w.lease(1000);
        (more..more + 1000)
            .find(|block| map(&w).eras[0].tables[&2].pg_of(BlockId(*block)).0 == orders[0].pg)
            .unwrap()
    });
    let lacks = vec![MissingShards { block: next, targets: vec![group[1].0], ..MissingShards::default() }];
    w.commit(Commit { files: vec![file(next)], missing: lacks, ..Commit::default() }).unwrap();
    let again = beat(&mut w, group[1].0, orders.iter().map(done).collect());
    assert_eq!((again.len(), again[0].pg), (1, orders[0].pg));
    assert_ne!(again[0].ticket, orders[0].ticket);
    assert!(beat(&mut w, group[1].0, again.iter().map(done).collect()).is_empty());
    assert!(idle(&w));
}

#[test]
fn who_lost_a_place_deletes_what_dies_until_nothing_of_others_is_left_on_it() {
    let mut w = world(3);
    let (f, first) = (w.file("f"), w.lease(60));
    w.write(f, vec![run(0, 60 << 24, first, 0)]).unwrap();
    work_until(&mut w, &[1, 2, 3], idle);
    w.core.register(&registration("d4", &["d4"]), w.now).unwrap();
    w.core.rebalance(&RebalanceRequest { stop: false }).unwrap();
    w.core.commit().unwrap();
    let before = map(&w);
    work_until(&mut w, &[1, 2, 3, 4], |w| groups_of(&map(w), 4) > groups_of(&before, 4));
    w.core.rebalance(&RebalanceRequest { stop: true }).unwrap();
    work_until(&mut w, &[1, 2, 3, 4], idle);
    let after = map(&w);
    let two = Layout::of(Policy::replica(2).unwrap(), 1);
    let moved: Vec<(u64, TargetId)> = (first..first + 60)
        .flat_map(|b| {
            let left = before.holders(BlockId(b), two);
            left.difference(&after.holders(BlockId(b), two)).map(move |t| (b, *t)).collect::<Vec<_>>()
        })
        .collect();
    assert!(!moved.is_empty());
    w.restart();
    w.session = w.attach();
    w.truncate(f, 30 << 24).unwrap();
    w.tick();
    let told = |w: &mut World, server: TargetId, tidied: u64| {
        let mine = TargetReport { target: server.0, tidied, ..report(&format!("d{server}"), 1 << 39) };
        let request = HeartbeatRequest { targets: vec![mine], ..HeartbeatRequest::default() };
        let reply = beat_with(w, server.0, request);
        reply.deletes.into_iter().flat_map(|d| d.blocks).collect::<BTreeSet<u64>>()
    };
    let (dying, living): (Vec<_>, Vec<_>) = moved.iter().copied().partition(|(b, _)| *b >= first + 30);
    for (block, target) in dying {
        assert!(told(&mut w, target, 0).contains(&block), "b{block} may still be on {target}");
    }
    // It has tidied up by that map: from now on it is not bothered with what others hold.
    for (_, target) in &moved {
        told(&mut w, *target, after.epoch.0);
    }
    w.truncate(f, 0).unwrap();
    w.tick();
    for (block, target) in living {
        assert!(!told(&mut w, target, after.epoch.0).contains(&block), "b{block} is not on {target}");
    }
}

/// A target outside of a group says that it has something of it: whoever should have it is told where to look.
#[test]
fn what_lies_outside_of_its_group_is_looked_for_there() {
    let mut w = world(4);
    w.lease(1000);
    work_until(&mut w, &[1, 2, 3, 4], idle);
    let now = map(&w);
    let era = now.eras.last().unwrap();
    let table = &era.tables[&2];
    let pg =
        (0..table.pg_count() as u32).map(PgId).find(|pg| !table.group(*pg).contains(&TargetId(4))).unwrap();
    let group = StrayGroup { first_block: era.first_block.0, width: 2, pg: pg.0 };
    let told = |w: &mut World, server: u64, groups: Vec<StrayGroup>| {
        let strays = vec![Strays { target: 4, groups }];
        beat_with(w, server, HeartbeatRequest { strays, ..HeartbeatRequest::default() });
    };
    told(&mut w, 1, vec![group]);
    assert!(idle(&w), "that is not its target");
    told(&mut w, 4, vec![group]);
    for member in table.group(pg) {
        let checks = beat(&mut w, member.0, vec![]);
        let of_group =
            |check: &&Check| (check.first_block, check.width, check.pg) == (group.first_block, 2, pg.0);
        let check = checks.iter().find(of_group).expect("no member looks");
        assert_eq!(check.strays, [4]);
        // It may have looked before this was said.
        told(&mut w, 4, vec![group]);
        beat(&mut w, member.0, vec![done(check)]);
        let checks = beat(&mut w, member.0, vec![]);
        beat(&mut w, member.0, checks.iter().map(done).collect());
    }
    work_until(&mut w, &[1, 2, 3, 4], idle);
    told(&mut w, 4, vec![]);
    w.core.register(&registration("d1", &["d1"]), w.now).unwrap();
    w.core.commit().unwrap();
    let checks = beat(&mut w, 1, vec![]);
    assert!(
        !checks.is_empty() && checks.iter().all(|check| check.strays.is_empty()),
        "it has nothing any more"
    );
}

/// With nobody else in the group to compare with, too.
#[test]
fn a_stray_is_reason_enough_to_check_a_seat() {
    let mut w = World::bare(Arc::new(MemoryStore::default()));
    for name in ["d1", "d2"] {
        w.core.register(&registration(name, &[name]), w.now).unwrap();
    }
    w.core.commit().unwrap();
    w.session = w.attach();
    w.setattr(SetAttr { ino: ROOT_INODE.0, policy: Some(1), ..SetAttr::default() }).unwrap();
    work_until(&mut w, &[1, 2], idle);
    let now = map(&w);
    let era = now.eras.last().unwrap();
    let table = &era.tables[&1];
    let pg = (0..table.pg_count() as u32).map(PgId).find(|pg| table.group(*pg) == [TargetId(1)]).unwrap();
    let groups = vec![StrayGroup { first_block: era.first_block.0, width: 1, pg: pg.0 }];
    let strays = vec![Strays { target: 2, groups }];
    beat_with(&mut w, 2, HeartbeatRequest { strays, ..HeartbeatRequest::default() });
    let checks = beat(&mut w, 1, vec![]);
    assert!(
        checks.iter().any(|check| (check.width, check.pg) == (1, pg.0) && check.strays == [2]),
        "{checks:?}"
    );
}

#[test]
fn a_drain_that_is_called_off_moves_nothing() {
    let mut w = world(4);
    w.lease(1000);
    work_until(&mut w, &[1, 2, 3, 4], idle);
    let before = map(&w).eras.clone();
    change(&mut w, 2, TargetChange::Drain, 0, false).unwrap();
    change(&mut w, 2, TargetChange::Keep, 0, false).unwrap();
    assert_eq!((state(&w, 2), &map(&w).eras), (Some(TargetState::Up), &before));
}

#[test]
fn a_new_disk_takes_the_place_of_the_old_one() {
    let mut w = world(4);
    w.lease(1000);
    work_until(&mut w, &[1, 2, 3, 4], idle);
    assert!(change(&mut w, 3, TargetChange::Replace, 0, false).is_err(), "there is nothing new in its place");
    assert!(change(&mut w, 3, TargetChange::Replace, 3, false).is_err());
    let mut new = registration("d3", &["new"]);
    (new.server, new.cluster_id, new.targets[0].path) = (3, "cluster".into(), "/d3".into());
    let id = w.core.register(&new, w.now).unwrap().targets[0];
    w.core.commit().unwrap();
    let old_era = map(&w).eras[0].tables[&2].members.clone();
    change(&mut w, 3, TargetChange::Replace, 0, false).unwrap();
    let expected: Vec<TargetId> = old_era.iter().map(|t| if t.0 == 3 { TargetId(id) } else { *t }).collect();
    let now = map(&w);
    let table = &now.eras[0].tables[&2];
    let to_be: Vec<TargetId> =
        (0..table.pg_count()).flat_map(|pg| table.group_to_be(PgId(pg as u32))).collect();
    assert_eq!(to_be, expected);
}

#[test]
fn rebalancing_fills_new_targets_and_leaves_room_for_writes() {
    let mut w = world(3);
    w.lease(1000);
    work_until(&mut w, &[1, 2, 3], idle);
    assert!(w.core.rebalance(&RebalanceRequest { stop: false }).unwrap().message.contains("in balance"));
    w.tick();
    w.core.register(&registration("d4", &["d4"]), w.now).unwrap();
    w.core.commit().unwrap();
    let in_first_era =
        |w: &World, id: u64| map(w).eras[0].tables[&2].members.iter().filter(|member| member.0 == id).count();
    assert_eq!((map(&w).eras.len(), in_first_era(&w, 4)), (2, 0));
    assert!(w.core.rebalance(&RebalanceRequest { stop: false }).unwrap().message.contains("to move"));
    w.core.commit().unwrap();
    w.restart();
    let mut rounds = 0;
    while w.core.status(w.now).healing.unwrap().rebalancing {
        work(&mut w, &[1, 2, 3, 4]);
        let now = map(&w);
        for table in now.eras.iter().flat_map(|era| era.tables.values()) {
            let moving = (0..table.pg_count()).filter(|pg| table.moves_of(PgId(*pg as u32)).next().is_some());
            assert!(moving.count() <= table.pg_count().div_ceil(8));
        }
        rounds += 1;
        assert!(rounds < 1000);
    }
    let share: Vec<usize> = (1..=4).map(|id| in_first_era(&w, id)).collect();
    assert!(share.iter().max().unwrap() - share.iter().min().unwrap() <= 2, "{share:?}");
    assert_eq!(super::move_count(&map(&w)), 0);
}

#[test]
fn everything_is_compared_again_every_hour() {
    let mut w = world(3);
    work_until(&mut w, &[1, 2, 3], idle);
    let mut quiet = 0;
    while [1, 2, 3].map(|server| beat(&mut w, server, vec![])).iter().all(Vec::is_empty) {
        w.pass(SECOND);
        w.tick();
        quiet += 1;
        assert!(quiet < 4000, "nothing is compared again");
    }
    assert!(quiet > 3000, "after {quiet} s");
    work_until(&mut w, &[1, 2, 3], idle);
}

#[test]
fn giving_up_a_target_that_is_still_needed_takes_force() {
    let mut w = world(3);
    w.lease(10);
    assert!(
        matches!(change(&mut w, 3, TargetChange::Remove, 0, true), Err(Refusal::Precondition(_))),
        "it is up"
    );
    for _ in 0..8 {
        work(&mut w, &[1, 2]);
    }
    assert_eq!(state(&w, 3), Some(TargetState::Down));
    let refused = change(&mut w, 3, TargetChange::Remove, 0, false);
    assert!(matches!(refused, Err(Refusal::Precondition(m)) if m.contains("LOSE DATA")));
    let given_up = groups_of(&map(&w), 3) as u64;
    let before = w.core.healing(w.now).checks_left;
    change(&mut w, 3, TargetChange::Remove, 0, true).unwrap();
    // Who came in its place has nothing of these groups yet.
    let told = w.core.healing(w.now).checks_left;
    assert!(given_up > 0 && told == before + given_up, "{before} and {given_up}: {told}");
    let ordered = [beat(&mut w, 1, Vec::new()), beat(&mut w, 2, Vec::new())].concat();
    assert!(!ordered.is_empty());
    assert_eq!((state(&w, 3), groups_of(&map(&w), 3), super::move_count(&map(&w))), (None, 0, 0));
    ClusterMap::from_pb(map(&w).to_pb()).unwrap();
    // Of two targets none can be spared for groups of two.
    let refused = change(&mut w, 2, TargetChange::Drain, 0, false);
    assert!(matches!(refused, Err(Refusal::Precondition(m)) if m.contains("add a target first")));
    for _ in 0..8 {
        work(&mut w, &[1]);
    }
    let refused = change(&mut w, 2, TargetChange::Remove, 0, true);
    assert!(matches!(refused, Err(Refusal::Precondition(m)) if m.contains("not enough targets")));
    assert_eq!(state(&w, 2), Some(TargetState::Down));
}

#[test]
fn blocks_that_are_dead_or_not_committed_are_not_wanted() {
    let mut w = world(2);
    let (f, first) = (w.file("f"), w.lease(40));
    w.write(f, vec![run(0, 20 << 24, first, 0)]).unwrap();
    w.truncate(f, 10 << 24).unwrap();
    let two = Policy::replica(2).unwrap();
    let ask = |w: &mut World| {
        let map = map(w);
        let era = map.era_of(BlockId(first)).unwrap().clone();
        let (mut dead, mut unsettled) = (BTreeSet::new(), BTreeSet::new());
        for pg in 0..era.tables[&2].pg_count() as u32 {
            let (_, span) = map.group(era.first_block, 2, PgId(pg)).unwrap();
            let blocks = (first..first + 40).filter(|b| span.contains(BlockId(*b), two)).collect();
            let request = WantedRequest {
                first_block: era.first_block.0,
                width: 2,
                pg,
                blocks,
                ..WantedRequest::default()
            };
            let reply = w.core.wanted(&request).unwrap();
            dead.extend(reply.dead);
            unsettled.extend(reply.unsettled);
        }
        (dead, unsettled)
    };
    let expected = ((first + 10..first + 20).collect(), (first + 20..first + 40).collect());
    assert_eq!(ask(&mut w), expected, "dead ones that are not queued yet");
    w.tick();
    assert_eq!(ask(&mut w), expected, "dead ones that are queued");
    // One of the two holders has deleted what it had: the other one must not give it back.
    let done = DeletedBlocks { target: 1, blocks: (first + 10..first + 20).collect() };
    let request = HeartbeatRequest {
        server: 1,
        targets: vec![TargetReport { target: 1, ..report("d1", 1 << 39) }],
        deleted: vec![done],
        ..HeartbeatRequest::default()
    };
    w.core.heartbeat(&request, w.now).unwrap();
    w.core.commit().unwrap();
    assert_eq!(ask(&mut w), expected, "dead ones that one holder still has");
    let nowhere = WantedRequest { first_block: 77, width: 2, ..WantedRequest::default() };
    assert!(matches!(w.core.wanted(&nowhere), Err(Refusal::NotFound(_))));
}

/// All members have deleted it, and a target outside of the group has yet to.
#[test]
fn what_only_a_stray_still_has_to_delete_is_not_given_back() {
    let mut w = world(2);
    let (f, block, stray) = (w.file("f"), w.lease(1), 3);
    w.write(f, vec![run(0, 1 << 24, block, 0)]).unwrap();
    w.truncate(f, 0).unwrap();
    assert_eq!(w.deleted_blocks(), [block]);
    w.core.register(&registration("d3", &["d3"]), w.now).unwrap();
    let map = map(&w);
    let garbage = vec![DeletedBlocks { target: stray, blocks: vec![block] }];
    let mend = MendRequest { cluster_id: map.cluster_id.clone(), garbage, ..MendRequest::default() };
    assert_eq!(w.core.mend(&mend, w.now).unwrap(), 1);
    let (table, pg) = map.group_of(BlockId(block), 2).unwrap();
    let first_block = map.era_of(BlockId(block)).unwrap().first_block.0;
    let mut ask = |strays: Vec<u64>| {
        let (width, pg) = (table.width as u32, pg.0);
        let blocks = vec![block];
        let request = WantedRequest { first_block, width, pg, blocks, strays, ..WantedRequest::default() };
        w.core.wanted(&request).unwrap().dead
    };
    assert!(ask(vec![]).is_empty());
    assert_eq!(ask(vec![stray]), [block]);
}

#[test]
fn deletions_also_go_to_those_who_are_being_filled() {
    let mut w = world(4);
    let (f, first) = (w.file("f"), w.lease(40));
    w.write(f, vec![run(0, 40 << 24, first, 0)]).unwrap();
    wait_out(&mut w, 4, &[1, 2, 3]);
    let map = map(&w);
    let two = Layout::of(Policy::replica(2).unwrap(), 1);
    let moving = (first..first + 40).find(|b| map.holders(BlockId(*b), two).len() == 3).unwrap();
    w.truncate(f, 0).unwrap();
    w.tick();
    let holders = map.holders(BlockId(moving), two);
    for holder in holders {
        let targets = vec![TargetReport { target: holder.0, ..report(&format!("d{}", holder.0), 1 << 39) }];
        let request = HeartbeatRequest { server: holder.0, targets, ..HeartbeatRequest::default() };
        let reply = w.core.heartbeat(&request, w.now).unwrap();
        assert!(reply.deletes[0].blocks.contains(&moving), "{holder}");
    }
    w.core.commit().unwrap();
}

#[test]
fn the_rate_of_those_who_copy_is_told_while_they_are_up() {
    let mut w = world(3);
    let told = |w: &World| w.core.healing(w.now).paces;
    let pace = RebuildPace { rate: 5, limit: 80, gives_way: true, server: 0 };
    let copies = HeartbeatRequest { rebuild: Some(pace), ..HeartbeatRequest::default() };
    beat_with(&mut w, 2, copies.clone());
    beat_with(&mut w, 3, copies);
    assert_eq!(told(&w), [RebuildPace { server: 2, ..pace }, RebuildPace { server: 3, ..pace }]);
    beat_with(&mut w, 3, HeartbeatRequest::default());
    assert_eq!(told(&w), [RebuildPace { server: 2, ..pace }], "s3 has ended");
    wait_out(&mut w, 2, &[1, 3]);
    assert_eq!(told(&w), [], "of s2 nothing is known");
}
