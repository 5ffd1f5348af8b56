//! What is seen from inside only: whether what a check reports would survive a power failure.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::SeqCst},
};

use fjordfs_proto::pb::{common as map, data::*, meta::Check};

use crate::testing::{
    FakeMeta, bytes_of,
    peer::{self, Asked, Said},
    start,
};

const POLICY: u32 = 2;
const LENGTH: u32 = 9000;

/// Target 1 of the server with this address and target 2 of another one, in one group.
fn cluster_map(addresses: [String; 2]) -> map::ClusterMap {
    let ids = [1, 2];
    let servers = ids.into_iter().zip(addresses).map(|(id, address)| map::Server {
        id,
        address,
        name: format!("s{id}"),
        state: map::ServerState::Up.into(),
    });
    let targets = ids.map(|id| map::Target {
        id,
        server: id,
        domain: format!("s{id}"),
        state: map::TargetState::Up.into(),
        full: false,
    });
    let table = map::PgTable { width: 2, pg_count: 1, members: ids.to_vec(), moves: vec![] };
    map::ClusterMap {
        cluster_id: "c1".into(),
        epoch: 5,
        servers: servers.collect(),
        targets: targets.into(),
        eras: vec![map::Era { first_block: 1, tables: vec![table] }],
        default_policy: POLICY,
    }
}

#[test]
fn what_a_given_up_check_has_copied_is_synced_before_the_next_one_is_done() {
    let (fake, folder) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let server = start(&fake, folder.path());
    // Lists one block, and whether that is all only at the second attempt.
    let (asked_on, again) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (asking_on, second) = (asked_on.clone(), again.clone());
    let address = peer::start(move |asked| match asked {
        Asked::List(list) if list.after_block == 0 => {
            let shard = ShardInfo { block: 7, shard: 1, policy: POLICY, length: LENGTH };
            Said::List(ListShardsReply { shards: vec![shard], end: second.load(SeqCst) })
        }
        Asked::List(_) => {
            asking_on.store(true, SeqCst);
            Said::Nothing
        }
        Asked::Read(read) => Said::Shard(bytes_of(read.block, LENGTH as usize)),
    });
    let order = |ticket| Check { ticket, target: 1, first_block: 1, width: 2, pg: 0, strays: vec![] };
    {
        let mut state = fake.state.lock().unwrap();
        state.map = Some(cluster_map([server.address().to_string(), address.to_string()]));
        state.checks = vec![order(1)];
    }
    fake.wait("the first attempt to have copied", |_| asked_on.load(SeqCst));
    let store = server.node().store(1).unwrap();
    assert!(!store.is_power_safe(), "there must be something to sync");
    again.store(true, SeqCst);
    fake.state.lock().unwrap().checks = vec![order(2)];
    fake.wait("the second attempt", |s| s.check_reports.iter().any(|r| r.ticket == 2 && r.done));
    let state = fake.state.lock().unwrap();
    let report = state.check_reports.iter().find(|r| r.ticket == 2 && r.done).unwrap();
    assert_eq!((report.problem.as_str(), report.shards_copied), ("", 0), "nothing was missing any more");
    assert!(store.is_power_safe());
}
