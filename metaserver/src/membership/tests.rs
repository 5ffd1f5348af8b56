//! Registration, states, eras and the deletion queue.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use fjordfs_proto::{
    BlockAddr, BlockId, ClusterMap, Extent, Layout, Policy, TargetId,
    cluster::{ServerState, TargetState},
    pb::meta::*,
};

use crate::{
    refusal::Refusal,
    store::MemoryStore,
    testing::{World, registration, report, run},
};

fn bare() -> World {
    World::bare(Arc::new(MemoryStore::default()))
}

fn register(w: &mut World, request: &RegisterRequest) -> RegisterReply {
    let reply = w.core.register(request, w.now).unwrap();
    w.core.commit().unwrap();
    reply
}

fn beat(w: &mut World, server: u64, targets: Vec<TargetReport>) -> HeartbeatReply {
    let request = HeartbeatRequest { server, targets, epoch: u64::MAX, ..HeartbeatRequest::default() };
    let reply = w.core.heartbeat(&request, w.now).unwrap();
    w.core.commit().unwrap();
    reply
}

fn map(w: &World) -> Arc<ClusterMap> {
    w.core.members().map().clone()
}

fn target(id: u64, free: u64) -> TargetReport {
    TargetReport { target: id, ..report("", free) }
}

#[test]
fn registering_again_keeps_the_ids() {
    let mut w = bare();
    let first = register(&mut w, &registration("a", &["x", "y"]));
    assert_eq!((first.server, first.targets.clone(), first.cluster_id.as_str()), (1, vec![1, 2], "cluster"));
    let epoch = map(&w).epoch;
    assert_eq!(register(&mut w, &registration("a", &["x", "y"])), first, "nothing new, no new epoch");
    w.restart();
    let mut moved = registration("a", &["y", "x"]);
    moved.address = "elsewhere:9".into();
    (moved.server, moved.cluster_id) = (1, "cluster".into());
    moved.targets[0].target = 2;
    let again = register(&mut w, &moved);
    assert_eq!((again.server, again.targets), (1, vec![2, 1]));
    let map = map(&w);
    assert_eq!(map.servers.values().next().unwrap().address, "elsewhere:9");
    assert!(map.epoch > epoch);
    assert_eq!(register(&mut w, &registration("b", &["z"])).server, 2);
}

#[test]
fn a_server_whose_only_disk_was_replaced_is_the_same_server() {
    let mut w = bare();
    register(&mut w, &registration("a", &["x"]));
    register(&mut w, &registration("b", &["old"]));
    assert_eq!(register(&mut w, &registration("b", &["other"])).server, 3, "the one there is up");
    w.idle(w.config.down_after + Duration::from_secs(2));
    let elsewhere = RegisterRequest { address: "elsewhere:9".into(), ..registration("b", &["more"]) };
    assert_eq!(register(&mut w, &elsewhere).server, 4, "two hosts may have one name");
    let replaced = register(&mut w, &registration("b", &["new"]));
    assert_eq!((replaced.server, replaced.targets), (2, vec![5]));
}

#[test]
fn strangers_are_turned_away() {
    let mut w = bare();
    register(&mut w, &registration("a", &["x"]));
    let mut refuse = |change: &dyn Fn(&mut RegisterRequest)| {
        let mut request = registration("b", &["y", "z"]);
        change(&mut request);
        w.core.register(&request, w.now).unwrap_err()
    };
    let precondition = |refusal| matches!(refusal, Refusal::Precondition(_));
    assert!(precondition(refuse(&|r| r.cluster_id = "other".into())));
    assert!(precondition(refuse(&|r| r.protocol_version = 0)));
    assert!(precondition(refuse(&|r| r.targets[0].target = 1)), "that id belongs to another uuid");
    let invalid = |refusal| matches!(refusal, Refusal::Invalid(_));
    assert!(invalid(refuse(&|r| r.targets.clear())));
    assert!(invalid(refuse(&|r| r.address.clear())));
    assert!(invalid(refuse(&|r| r.targets[1].uuid = "y".into())));
    assert!(invalid(refuse(&|r| r.targets[1].uuid.clear())));
    assert_eq!(map(&w).targets.len(), 1);
    assert!(beat(&mut w, 77, vec![]).unknown);
    w.check();
}

/// Metadata that was restored knows nothing of the targets that were added since, and they may have the only copies of something.
#[test]
fn what_says_that_it_is_of_this_cluster_is_taken_in_under_its_numbers() {
    let mut w = World::new();
    w.lease(1000);
    let before = map(&w);
    let mut found = registration("lost", &["z"]);
    (found.server, found.cluster_id, found.targets[0].target) = (7, "cluster".into(), 9);
    let without = RegisterRequest { cluster_id: String::new(), ..found.clone() };
    assert!(matches!(w.core.register(&without, w.now), Err(Refusal::Precondition(_))), "it says nothing");
    for _ in 0..2 {
        let taken = register(&mut w, &found);
        assert_eq!(
            (taken.server, taken.targets),
            (7, vec![9]),
            "its label says so, and it refuses any other"
        );
    }
    let after = map(&w);
    assert_eq!(after.targets[&TargetId(9)].state, TargetState::Up);
    assert_eq!(after.eras[..before.eras.len()], before.eras[..], "it is in no group of before");
    assert_eq!(after.eras.len(), before.eras.len() + 1, "and takes new blocks");
    assert!(w.core.members().untidy().contains(&TargetId(9)), "it may have anything");
    let new = register(&mut w, &registration("new", &["new"]));
    assert_eq!((new.server, new.targets), (8, vec![10]));
    let mut other = registration("other", &["o"]);
    (other.server, other.cluster_id, other.targets[0].target) = (9, "cluster".into(), 10);
    let Err(Refusal::Precondition(said)) = w.core.register(&other, w.now) else {
        panic!("two of one number")
    };
    assert!(said.contains("keep the folder") && !said.contains("empty"), "{said}");
}

#[test]
fn a_server_goes_down_and_comes_back() {
    let mut w = World::new();
    let state = |w: &World| {
        let map = map(w);
        (
            map.servers.values().map(|s| s.state).collect::<Vec<_>>(),
            map.targets.values().map(|t| t.state).collect::<Vec<_>>(),
        )
    };
    for _ in 0..6 {
        w.pass(Duration::from_secs(1));
        beat(&mut w, 1, vec![target(1, 1 << 39)]);
        w.tick();
    }
    use {ServerState as S, TargetState as T};
    assert_eq!(state(&w), (vec![S::Up, S::Down], vec![T::Up, T::Down]));
    assert_eq!(w.core.members().facts().free, 1 << 39, "what is down is not counted");
    let reply = beat(&mut w, 2, vec![target(2, 1 << 39)]);
    assert!(!reply.unknown);
    assert_eq!(state(&w), (vec![S::Up, S::Up], vec![T::Up, T::Up]));
    let failed = TargetReport { failed: true, message: "I/O error".into(), ..target(2, 1 << 39) };
    beat(&mut w, 2, vec![failed]);
    assert_eq!(state(&w).1, [T::Up, T::Failed]);
    let epoch = map(&w).epoch;
    w.restart();
    assert_eq!(map(&w).epoch, epoch, "the map is durable");
    assert_eq!(state(&w).1, [T::Up, T::Failed]);
}

#[test]
fn after_a_take_over_servers_have_time_to_find_the_owner() {
    let mut w = World::new();
    let is_up = |w: &World| map(w).servers.values().all(|server| server.state == ServerState::Up);
    w.config.store = Some("etcd://a:2379/fjord".parse().unwrap());
    w.restart();
    w.idle(w.config.down_after + Duration::from_secs(2));
    assert!(is_up(&w), "they may not have noticed yet");
    w.idle(super::FINDING_OWNER);
    assert!(!is_up(&w));
    // Whoever restarts with the embedded engine is where it was.
    w.config.store = None;
    let mut w = World { config: w.config, ..World::new() };
    w.restart();
    w.idle(w.config.down_after + Duration::from_secs(2));
    assert!(!is_up(&w));
}

#[test]
fn a_target_that_its_server_does_without_is_down() {
    let mut w = bare();
    register(&mut w, &registration("a", &["x", "y"]));
    register(&mut w, &registration("b", &["z"]));
    let state = |w: &World, id: u64| map(w).targets[&TargetId(id)].state;
    beat(&mut w, 1, vec![target(1, 1 << 40)]);
    assert_eq!([1, 2, 3].map(|id| state(&w, id)), [TargetState::Up, TargetState::Down, TargetState::Up]);
    beat(&mut w, 1, vec![target(1, 1 << 40), target(2, 1 << 40)]);
    assert_eq!(state(&w, 2), TargetState::Up);
}

#[test]
fn a_full_target_is_marked_and_does_not_flicker() {
    let mut w = World::new();
    let small = |free: u64| TargetReport { capacity: 300 << 20, ..target(1, free << 20) };
    let mut full = |free| {
        beat(&mut w, 1, vec![small(free)]);
        map(&w).targets[&TargetId(1)].full
    };
    assert_eq!([250, 33, 31, 40, 47, 49, 33].map(&mut full), [false, false, true, true, true, false, false]);
}

#[test]
fn new_targets_begin_an_era_for_new_blocks_only() {
    let mut w = bare();
    register(&mut w, &registration("a", &["x"]));
    assert!(map(&w).eras.is_empty(), "replica:2 needs two");
    register(&mut w, &registration("b", &["y"]));
    register(&mut w, &registration("c", &["z"]));
    let two = Layout::of(Policy::replica(2).unwrap(), 1);
    let before = map(&w);
    assert_eq!(before.eras.len(), 1, "an unused era is replaced");
    assert_eq!(before.eras[0].tables[&2].members.iter().collect::<BTreeSet<_>>().len(), 3);
    w.session = w.attach();
    let first = w.lease(10);
    register(&mut w, &registration("d", &["u"]));
    register(&mut w, &registration("e", &["v"]));
    let after = map(&w);
    assert_eq!(after.eras.iter().map(|e| e.first_block.0).collect::<Vec<_>>(), [1, first + 10]);
    for block in (first..first + 10).map(BlockId) {
        assert_eq!(before.placement(block, two), after.placement(block, two), "no old block moves");
    }
    let new = &after.eras[1].tables[&2].members;
    assert_eq!(new.iter().collect::<BTreeSet<_>>().len(), 5);
    // Restarting changes nothing, and neither does a server that registers again.
    w.restart();
    register(&mut w, &registration("a", &["x"]));
    assert_eq!(map(&w).eras, after.eras);
}

#[test]
fn an_era_gets_the_tables_it_lacked() {
    let mut w = World::new();
    let dir = w.dir(fjordfs_proto::ROOT_INODE, "d");
    w.lease(5);
    w.setattr(SetAttr { ino: dir.0, policy: Some(1), ..SetAttr::default() }).unwrap();
    register(&mut w, &registration("c", &["z"]));
    w.setattr(SetAttr { ino: dir.0, policy: Some(3), ..SetAttr::default() }).unwrap();
    let map = map(&w);
    assert_eq!(map.eras.len(), 2);
    for era in &map.eras {
        assert_eq!(era.tables.keys().copied().collect::<Vec<_>>(), [1, 2, 3]);
    }
    ClusterMap::from_pb(map.to_pb()).unwrap();
}

#[test]
fn deletions_are_offered_until_they_are_confirmed() {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(3));
    w.write(f, vec![run(0, 3 << 24, b, 0)]).unwrap();
    w.truncate(f, 0).unwrap();
    w.tick();
    let offered = beat(&mut w, 1, vec![target(1, 1 << 39)]);
    assert_eq!(offered.deletes, [DeletedBlocks { target: 1, blocks: vec![b, b + 1, b + 2] }]);
    assert_eq!(beat(&mut w, 1, vec![target(1, 1 << 39)]).deletes, offered.deletes, "not confirmed yet");
    let confirm = |server, target: u64, blocks| HeartbeatRequest {
        server,
        targets: vec![self::target(target, 1 << 39)],
        deleted: vec![DeletedBlocks { target, blocks }],
        ..HeartbeatRequest::default()
    };
    let stranger = confirm(2, 1, vec![b]);
    w.core.heartbeat(&stranger, w.now).unwrap();
    let reply = w.core.heartbeat(&confirm(1, 1, vec![b, b + 2]), w.now).unwrap();
    w.core.commit().unwrap();
    assert!(reply.deletes.is_empty() && reply.more, "the one before those confirmed comes next");
    assert_eq!(beat(&mut w, 1, vec![target(1, 1 << 39)]).deletes[0].blocks, [b + 1]);
    assert_eq!(w.core.status(w.now).blocks_to_delete, 4);
    w.check();
}

#[test]
fn encoded_blocks_have_groups_of_their_own_and_all_their_shards_are_deleted() {
    let mut w = World::new();
    register(&mut w, &registration("c", &["z"]));
    let dir = w.dir(fjordfs_proto::ROOT_INODE, "d");
    let ec = Policy::ec(2, 1).unwrap();
    w.setattr(SetAttr { ino: dir.0, policy: Some(ec.code().into()), ..SetAttr::default() }).unwrap();
    // Of split blocks, and of the copies that small ones are.
    assert!(map(&w).eras.iter().all(|era| era.tables.contains_key(&3) && era.tables.contains_key(&2)));
    let file = w.make(dir, "f", FileKind::Regular).unwrap();
    let b = w.lease(3);
    let extent = |offset, block, length| {
        let addr = BlockAddr { block: BlockId(block), offset: 0 };
        Extent::blocks(addr, length, Layout::of(ec, length as usize)).to_pb(offset)
    };
    w.write(file, vec![extent(0, b, 1 << 24), extent(1 << 24, b + 1, 1000)]).unwrap();
    let stored: Vec<u32> = w.whole_extents(file).iter().map(|extent| extent.layout).collect();
    assert_eq!(stored, [Layout::of(ec, 1 << 24).code(), Layout::of(ec, 1000).code()]);
    w.truncate(file, 0).unwrap();
    w.tick();
    let deleted: Vec<u64> = (1..=3)
        .flat_map(|id| beat(&mut w, id, vec![target(id, 1 << 39)]).deletes)
        .flat_map(|deletes| deletes.blocks)
        .collect();
    let shards = |block| deleted.iter().filter(|of| **of == block).count();
    assert_eq!((shards(b), shards(b + 1)), (3, 2));
    w.check();
    let tables = map(&w).eras.clone();
    w.restart();
    assert_eq!(map(&w).eras, tables);
}

#[test]
fn a_long_queue_comes_in_pieces() {
    let mut w = World::new();
    let f = w.file("f");
    for i in 0..3 {
        let first = w.lease(4096);
        w.write(f, vec![run((i * 4096) << 24, 4096 << 24, first, 0)]).unwrap();
    }
    w.truncate(f, 0).unwrap();
    w.tick();
    let reply = beat(&mut w, 1, vec![target(1, 1 << 39)]);
    assert!(reply.more && reply.deletes[0].blocks.len() == 4096);
    assert_eq!(w.deleted_blocks().len(), 3 * 4096);
    w.check();
}
