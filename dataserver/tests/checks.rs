//! A target is completed from the other member of its placement group.

#![allow(clippy::unwrap_used, reason = "a panic is the report of a test")]

mod common;

use std::{
    fs::OpenOptions,
    num::NonZeroU16,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, Condvar, Mutex},
};

use common::{
    Client, FakeMeta, bytes_of, config,
    peer::{self, Asked, Said},
    put_request, start,
};
use fjordfs_dataserver::{Config, DataServer};
use fjordfs_proto::{
    Layout, PAGE_SIZE, Policy,
    block::page_crcs,
    coding::Code,
    error::Errno,
    frame::Opcode,
    pb::{common as map, data::*, meta},
};

const POLICY: u32 = 2;

/// Targets 1 and 2 on these servers, in one group.
fn cluster_map(epoch: u64, servers: [&DataServer; 2]) -> map::ClusterMap {
    let server = |id: u64| map::Server {
        id,
        address: servers[id as usize - 1].address().to_string(),
        name: format!("s{id}"),
        state: map::ServerState::Up.into(),
    };
    let target = |id: u64| map::Target {
        id,
        server: id,
        domain: format!("s{id}"),
        state: map::TargetState::Up.into(),
        full: false,
    };
    let table = map::PgTable { width: 2, pg_count: 1, members: vec![1, 2], moves: vec![] };
    map::ClusterMap {
        cluster_id: "c1".into(),
        epoch,
        servers: vec![server(1), server(2)],
        targets: vec![target(1), target(2)],
        eras: vec![map::Era { first_block: 1, tables: vec![table] }],
        default_policy: POLICY,
    }
}

fn check(ticket: u64) -> meta::Check {
    meta::Check { ticket, target: 2, first_block: 1, width: 2, pg: 0, strays: vec![] }
}

/// Has a check made, and returns its last report.
fn checked(fake: &FakeMeta, ticket: u64) -> meta::CheckReport {
    fake.state.lock().unwrap().checks = vec![check(ticket)];
    let done = |r: &&meta::CheckReport| r.ticket == ticket && r.done;
    fake.wait("the check", |s| s.check_reports.iter().any(|r| done(&r)));
    let mut state = fake.state.lock().unwrap();
    state.checks.clear();
    let report = state.check_reports.iter().find(done).cloned();
    report.unwrap()
}

fn read_second(client: &mut Client, block: u64) -> Result<Vec<u8>, Errno> {
    let ranges = vec![Range { offset: 0, length: u32::MAX }];
    let body = ReadShardRequest { target: 2, block, shard: 1, ranges, integrity: true };
    let (reply, payload) = client.call::<ReadShardReply>(Opcode::ReadShard, &body, &[]);
    reply.map(|_| payload).map_err(|e| e.errno)
}

#[test]
fn a_target_gets_what_it_lacks_and_nothing_else() {
    let fake = FakeMeta::start("c1");
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, second) = (start(&fake, one.path()), start(&fake, two.path()));
    let (mut has, mut lacks) = (Client::connect(&first, "c1"), Client::connect(&second, "c1"));
    let size = |block: u64| (block as usize * 70_001) % 300_000 + 1;
    for block in 1..=150 {
        has.put(block, &bytes_of(block, size(block))).unwrap();
    }
    {
        let mut state = fake.state.lock().unwrap();
        state.map = Some(cluster_map(5, [&first, &second]));
        state.wanted = meta::WantedReply { dead: vec![7, 100], unsettled: vec![8] };
    }
    let report = checked(&fake, 1);
    assert_eq!(report.problem, "");
    assert_eq!((report.shards_copied, report.shards_missing, report.shards_unsettled), (147, 0, 1));
    let bytes: usize = (1..=150).filter(|b| ![7, 8, 100].contains(b)).map(size).sum();
    assert_eq!(report.bytes_copied, bytes as u64);
    for block in 1..=150 {
        let expected = match block {
            7 | 8 | 100 => Err(Errno::ENOENT),
            _ => Ok(bytes_of(block, size(block))),
        };
        assert!(read_second(&mut lacks, block) == expected, "block {block}");
    }
    // Again: only what is new, and what is wanted by now.
    has.put(151, &bytes_of(151, 5000)).unwrap();
    {
        let mut state = fake.state.lock().unwrap();
        state.wanted = meta::WantedReply { dead: vec![7, 100], unsettled: vec![] };
        state.asked.clear();
    }
    assert_eq!(checked(&fake, 2).shards_copied, 2);
    assert_eq!(fake.state.lock().unwrap().asked, [7, 8, 100, 151]);
    drop((first, second));
}

#[test]
fn who_has_something_without_a_place_is_asked_beside_the_members() {
    let fake = FakeMeta::start("c1");
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (back, second) = (start(&fake, one.path()), start(&fake, two.path()));
    let (mut has, mut lacks) = (Client::connect(&back, "c1"), Client::connect(&second, "c1"));
    has.put(3, &bytes_of(3, 5000)).unwrap();
    let member = peer::start(|asked| match asked {
        Asked::List(_) => Said::List(ListShardsReply { shards: vec![], end: true }),
        Asked::Read(_) => Said::Shard(vec![]),
    });
    let mut map = cluster_map(5, [&back, &second]);
    map.servers.push(map::Server { id: 3, address: member.to_string(), ..map.servers[0].clone() });
    map.targets.push(map::Target { id: 3, server: 3, ..map.targets[0].clone() });
    map.eras[0].tables[0].members = vec![3, 2];
    {
        let mut state = fake.state.lock().unwrap();
        (state.map, state.checks) = (Some(map), vec![meta::Check { strays: vec![1, 2, 77], ..check(1) }]);
    }
    fake.wait("the check", |s| s.check_reports.iter().any(|r| r.done));
    let report = fake.state.lock().unwrap().check_reports.iter().find(|r| r.done).cloned().unwrap();
    assert_eq!((report.problem.as_str(), report.shards_copied, report.shards_missing), ("", 1, 0));
    assert!(read_second(&mut lacks, 3) == Ok(bytes_of(3, 5000)));
    drop((back, second));
}

/// Flips bits of this page in the only volume of a target.
fn rot(folder: &Path, page: &[u8]) {
    let volume = std::fs::read_dir(folder.join("volumes")).unwrap().next().unwrap().unwrap().path();
    let bytes = std::fs::read(&volume).unwrap();
    let at = bytes.chunks(PAGE_SIZE).position(|p| p == page).unwrap() * PAGE_SIZE;
    let file = OpenOptions::new().write(true).open(&volume).unwrap();
    file.write_all_at(&[!page[9]], at as u64 + 9).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_rotten_source_is_told_of_and_copied_from_nowhere() {
    let fake = FakeMeta::start("c1");
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, second) = (start(&fake, one.path()), start(&fake, two.path()));
    let (mut has, mut lacks) = (Client::connect(&first, "c1"), Client::connect(&second, "c1"));
    for block in 1..=3 {
        has.put(block, &bytes_of(block, 3 * PAGE_SIZE)).unwrap();
    }
    rot(one.path(), &bytes_of(2, 3 * PAGE_SIZE)[PAGE_SIZE..2 * PAGE_SIZE]);
    fake.state.lock().unwrap().map = Some(cluster_map(5, [&first, &second]));
    let report = checked(&fake, 1);
    assert_eq!((report.shards_copied, report.shards_lost), (2, 1));
    assert!(report.problem.contains("cannot be restored"), "{}", report.problem);
    assert!(read_second(&mut lacks, 2) == Err(Errno::ENOENT));
    // The source looks for itself, finds that it is so, and has nobody to repair it from.
    fake.wait("the damage to be noticed", |s| {
        let scrubs = s.heartbeats.iter().flat_map(|h| &h.targets).filter_map(|t| t.scrub);
        scrubs.into_iter().any(|s| (s.shards_bad, s.shards_repaired) == (1, 0))
    });
    assert_eq!(has.read(2, &[(0, 4096)]).unwrap().1, bytes_of(2, 4096), "its good pages are left alone");
    drop((first, second));
}

/// Puts a shard of whatever block on whatever target.
fn put_shard(client: &mut Client, target: u64, shard: u32, policy: u32, data: &[u8]) {
    let put = PutShardRequest { target, shard, policy, ..put_request(3, data) };
    client.call::<PutShardReply>(Opcode::PutShard, &put, data).0.unwrap();
}

#[test]
fn what_is_rotten_at_each_source_is_made_of_their_good_pages() {
    const EC: u32 = 0x0201;
    let data: Vec<Vec<u8>> = (0..2).map(|shard| bytes_of(shard + 1, 4 * PAGE_SIZE)).collect();
    let page = |shard: &[u8], no: usize| shard[no * PAGE_SIZE..(no + 1) * PAGE_SIZE].to_vec();
    for policy in [POLICY, EC] {
        let fake = FakeMeta::start("c1");
        let folders: Vec<_> = (0..4).map(|_| tempfile::tempdir().unwrap()).collect();
        let servers: Vec<DataServer> = folders.iter().map(|folder| start(&fake, folder.path())).collect();
        let mut clients: Vec<Client> = servers.iter().map(|server| Client::connect(server, "c1")).collect();
        let code = Policy::from_code(policy).unwrap();
        // Target 3 goes, and 4 is to have what it has.
        let (shards, no) = match code {
            Policy::Replica(_) => (vec![None, Some((0, data[0].clone())), Some((1, data[0].clone()))], 1),
            Policy::Ec { k, m } => {
                let layout = Layout::Ec { k, m, shard_pages: NonZeroU16::new(4).unwrap() };
                let present = [(0, &data[0][..]), (1, &data[1][..])];
                let parity = Code::of(layout).unwrap().restore(&present, 2).unwrap();
                (vec![Some((0, data[0].clone())), Some((1, data[1].clone())), Some((2, parity))], 2)
            }
        };
        for (at, shard) in shards.iter().enumerate() {
            if let Some((no, bytes)) = shard {
                put_shard(&mut clients[at], at as u64 + 1, *no, policy, bytes);
            }
        }
        let lost = &shards[2].as_ref().unwrap().1;
        rot(folders[2].path(), &page(lost, 1));
        rot(folders[1].path(), &page(&shards[1].as_ref().unwrap().1, 2));
        let mut map = cluster_map(5, [&servers[0], &servers[1]]);
        for (id, server) in [(3, &servers[2]), (4, &servers[3])] {
            let address = server.address().to_string();
            map.servers.push(map::Server { id, address, ..map.servers[0].clone() });
            map.targets.push(map::Target { id, server: id, ..map.targets[0].clone() });
        }
        let width = code.width() as u32;
        let members = if width == 2 { vec![2, 3] } else { vec![1, 2, 3] };
        let moves = vec![map::Move { cell: width - 1, target: 4 }];
        map.eras[0].tables = vec![map::PgTable { width, pg_count: 1, members, moves }];
        {
            let mut state = fake.state.lock().unwrap();
            (state.map, state.checks) = (Some(map), vec![meta::Check { target: 4, width, ..check(1) }]);
        }
        fake.wait("the check", |s| s.check_reports.iter().any(|r| r.done));
        let report = fake.state.lock().unwrap().check_reports.iter().find(|r| r.done).cloned().unwrap();
        assert_eq!((report.problem.as_str(), report.shards_copied, report.shards_lost), ("", 1, 0));
        let ranges = vec![Range { offset: 0, length: u32::MAX }];
        let read = ReadShardRequest { target: 4, block: 3, shard: no, ranges, integrity: true };
        let (reply, payload) = clients[3].call::<ReadShardReply>(Opcode::ReadShard, &read, &[]);
        assert!(&payload == lost && reply.unwrap().page_crcs == page_crcs(lost), "{code}");
        drop(servers);
    }
}

#[test]
fn a_rotten_shard_is_replaced_by_a_good_one() {
    let (fake, folder) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let server = start(&fake, folder.path());
    let data = bytes_of(2, 3 * PAGE_SIZE);
    let good = data.clone();
    let peer = peer::start(move |asked| match asked {
        Asked::List(_) => {
            let shard = ShardInfo { block: 2, shard: 1, policy: POLICY, length: good.len() as u32 };
            Said::List(ListShardsReply { shards: vec![shard], end: true })
        }
        Asked::Read(_) => Said::Shard(good.clone()),
    });
    let mut client = Client::connect(&server, "c1");
    client.put(2, &data).unwrap();
    rot(folder.path(), &data[PAGE_SIZE..2 * PAGE_SIZE]);
    assert!(client.read(2, &[(0, u32::MAX)]).unwrap().1 != data);
    let mut map = cluster_map(5, [&server, &server]);
    map.servers[1].address = peer.to_string();
    fake.state.lock().unwrap().map = Some(map);
    fake.wait("the map to arrive", |s| s.heartbeats.last().is_some_and(|beat| beat.epoch == 5));
    let report = ReportShardRequest { target: 1, block: 2, shard: 0 };
    client.call::<ReportShardReply>(Opcode::ReportShard, &report, &[]).0.unwrap();
    fake.wait("the repair", |s| {
        let scrubs = s.heartbeats.iter().flat_map(|h| &h.targets).filter_map(|t| t.scrub);
        scrubs.into_iter().any(|s| (s.shards_bad, s.shards_repaired) == (1, 1))
    });
    assert!(client.read(2, &[(0, u32::MAX)]).unwrap().1 == data);
    assert_eq!(client.list(), [2]);
    server.stop().unwrap();
    let server = start(&fake, folder.path());
    assert!(Client::connect(&server, "c1").read(2, &[(0, u32::MAX)]).unwrap().1 == data);
}

#[test]
fn a_deletion_waits_until_a_copy_of_its_block_is_done() {
    let fake = FakeMeta::start("c1");
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = start(&fake, one.path());
    let slow = Config { rebuild_rate: 10 << 20, ..config(&fake, two.path()) };
    let second = DataServer::start(slow).unwrap();
    let (mut has, mut lacks) = (Client::connect(&first, "c1"), Client::connect(&second, "c1"));
    for block in 1..=30 {
        has.put(block, &bytes_of(block, 1 << 20)).unwrap();
    }
    {
        let mut state = fake.state.lock().unwrap();
        state.map = Some(cluster_map(5, [&first, &second]));
        state.checks = vec![check(1)];
    }
    fake.wait("the copies to begin", |s| s.asked.contains(&20));
    let order = meta::DeletedBlocks { target: 2, blocks: vec![20] };
    fake.state.lock().unwrap().deletes = vec![order.clone()];
    fake.wait("the order to be fetched", |s| s.deletes.is_empty());
    fake.wait("the copies to be done", |s| s.check_reports.iter().any(|r| r.done));
    assert!(fake.state.lock().unwrap().deleted.is_empty(), "it must not be confirmed and undone by the copy");
    assert!(read_second(&mut lacks, 20).is_ok());
    fake.state.lock().unwrap().deletes = vec![order.clone()];
    fake.wait("the deletion", |s| s.deleted.contains(&order));
    assert!(read_second(&mut lacks, 20) == Err(Errno::ENOENT));
    drop((first, second));
}

#[test]
fn a_scrub_goes_on_after_a_restart_where_it_was() {
    let fake = FakeMeta::start("c1");
    let folder = tempfile::tempdir().unwrap();
    let server = start(&fake, folder.path());
    let mut client = Client::connect(&server, "c1");
    for block in 1..=6 {
        client.put(block, &bytes_of(block, 10_000)).unwrap();
    }
    drop(client);
    server.stop().unwrap();
    let place = folder.path().join("scrub.json");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
    let text = format!(
        r#"{{"began_ms":{now},"after_block":4,"bytes_done":40000,"completed_ms":5,"shards_bad":3,"shards_repaired":2}}"#
    );
    std::fs::write(&place, text).unwrap();
    let server = start(&fake, folder.path());
    fake.wait("the rest of the pass", |state| {
        let told = state.heartbeats.last().and_then(|beat| beat.targets.first()?.scrub);
        told.is_some_and(|s| !s.running && s.completed_ms > 5)
    });
    let told = fake.state.lock().unwrap().heartbeats.last().and_then(|b| b.targets[0].scrub).unwrap();
    assert_eq!((told.bytes_done, told.bytes_total), (60_000, 60_000), "the first four are not read again");
    assert_eq!((told.shards_bad, told.shards_repaired), (3, 2));
    server.stop().unwrap();
    assert!(std::fs::read_to_string(&place).unwrap().contains(r#""after_block":null"#));
}

/// Checks wait for a server that takes its time, more of them than there are buffers of a whole block: users, and the reads of
/// that server, get buffers meanwhile. Two servers that copy from each other would wait for each other otherwise.
#[test]
fn copies_that_wait_for_another_server_leave_the_buffers_to_others() {
    // A server with one core has buffers for 15 whole blocks; these shards are just too long for the next smaller size.
    const CHECKS: u32 = 18;
    const LENGTH: usize = 9 << 20;
    let (fake, folder) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let fast = Config { cores: 1, rebuild_rate: 1 << 40, ..config(&fake, folder.path()) };
    let server = DataServer::start(fast).unwrap();
    let reads = Arc::new((Mutex::new((0, false)), Condvar::new()));
    let (held, bytes) = (reads.clone(), bytes_of(1, LENGTH));
    let given = bytes.clone();
    let peer = peer::start(move |asked| match asked {
        Asked::List(list) => {
            let block = 1000 + u64::from(list.group.unwrap().pg);
            let shard = ShardInfo { block, shard: 1, policy: POLICY, length: LENGTH as u32 };
            Said::List(ListShardsReply { shards: vec![shard], end: true })
        }
        Asked::Read(_) => {
            let (state, changed) = &*held;
            let mut state = state.lock().unwrap();
            state.0 += 1;
            while !state.1 {
                state = changed.wait(state).unwrap();
            }
            Said::Shard(given.clone())
        }
    });
    let mut map = cluster_map(5, [&server, &server]);
    map.servers[1].address = peer.to_string();
    let table = &mut map.eras[0].tables[0];
    (table.pg_count, table.members) = (CHECKS, [1, 2].repeat(CHECKS as usize));
    let order = |pg| meta::Check {
        ticket: u64::from(pg) + 1,
        target: 1,
        first_block: 1,
        width: 2,
        pg,
        strays: vec![],
    };
    {
        let mut state = fake.state.lock().unwrap();
        (state.map, state.checks) = (Some(map), (0..CHECKS).map(order).collect());
    }
    fake.wait("all checks to wait for the peer", |_| reads.0.lock().unwrap().0 == CHECKS);
    let mut client = Client::connect(&server, "c1");
    client.put(1, &bytes).unwrap();
    assert!(client.read(1, &[(0, u32::MAX)]).unwrap().1 == bytes);

    reads.0.lock().unwrap().1 = true;
    reads.1.notify_all();
    fake.wait("the checks", |s| {
        (0..CHECKS).all(|pg| s.check_reports.iter().any(|r| r.ticket == order(pg).ticket && r.done))
    });
    let state = fake.state.lock().unwrap();
    for report in state.check_reports.iter().filter(|r| r.done) {
        assert_eq!((report.problem.as_str(), report.shards_copied, report.shards_lost), ("", 1, 0));
    }
    assert_eq!(reads.0.lock().unwrap().0, CHECKS, "each at the first attempt");
    drop(state);
    for pg in 0..CHECKS {
        let block = 1000 + u64::from(pg);
        assert!(client.read(block, &[(0, u32::MAX)]).unwrap().1 == bytes, "{block}");
    }
}
