//! A data server that is killed (kill -9) in the middle of its work keeps every put it has acknowledged, and a small disk
//! that is really full loses nothing.
//!
//! The server to be killed is this very test program, run again with the ignored test `child`.

#![allow(clippy::unwrap_used, reason = "a panic is the report of a test")]

mod common;

use std::{
    collections::BTreeSet,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use common::{Client, FakeMeta, bytes_of, config, put_request, start};
use fjordfs_dataserver::{Config, DataServer};
use fjordfs_proto::{PROTOCOL_VERSION, error::Errno, frame::Opcode, pb::data::PutShardReply};

const FOLDER: &str = "FJORD_TEST_FOLDER";
const META: &str = "FJORD_TEST_META";

#[test]
#[ignore = "the other half of a_killed_server_keeps_what_it_has_acknowledged"]
fn child() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let folder = Path::new(&folder);
    let config = Config {
        cores: 2,
        volume_size: 64 << 20,
        // Often, so that some kill meets a checkpoint.
        checkpoint_interval: Duration::from_millis(30),
        ..Config::new(std::env::var(META).unwrap(), [folder.to_owned()])
    };
    let server = DataServer::start(config).unwrap();
    std::fs::write(folder.join("address.new"), server.address().to_string()).unwrap();
    std::fs::rename(folder.join("address.new"), folder.join("address")).unwrap();
    std::thread::sleep(Duration::from_secs(120));
}

/// A child that does not outlive its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn start_child(meta: &FakeMeta, folder: &Path) -> (Killed, Client) {
    let _ = std::fs::remove_file(folder.join("address"));
    let child = Killed(
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored"])
            .env(FOLDER, folder)
            .env(META, meta.address.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let begun = Instant::now();
    loop {
        if let Ok(address) = std::fs::read_to_string(folder.join("address")) {
            let mut client = Client::raw(address.parse().unwrap());
            client.hello(PROTOCOL_VERSION, "c1").unwrap();
            return (child, client);
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "the child does not start");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_killed_server_keeps_what_it_has_acknowledged() {
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let length = |block: u64| (fjordfs_proto::cluster::mix(block) % 200_000) as usize + 1;
    let (mut acknowledged, mut next) = (BTreeSet::new(), 0);
    for round in 0..5 {
        let (child, mut client) = start_child(&meta, dir.path());
        let listed: BTreeSet<u64> = client.list().into_iter().collect();
        assert!(acknowledged.is_subset(&listed), "round {round}: lost {:?}", &acknowledged - &listed);
        for block in &listed {
            assert!(client.read(*block, &[(0, u32::MAX)]).unwrap().1 == bytes_of(*block, length(*block)));
        }
        // What was stored but not acknowledged may be repeated, and is there from now on.
        acknowledged = listed;
        let mut first = None;
        let base = next;
        for _ in 0..150 {
            next += 1;
            let data = bytes_of(next, length(next));
            first.get_or_insert(client.send(Opcode::PutShard, &put_request(next, &data), &data));
        }
        for _ in 0..100 {
            let reply = client.receive().unwrap();
            reply.result::<PutShardReply>().unwrap();
            acknowledged.insert(base + 1 + reply.header.request - first.unwrap());
        }
        drop(child);
    }
    let server = start(&meta, dir.path());
    let listed = Client::connect(&server, "c1").list().into_iter().collect();
    assert!(acknowledged.is_subset(&listed));
    assert!(acknowledged.len() >= 500);
}

/// Fills a real filesystem, for which `FJORD_TEST_SMALL_DISK` must name a folder on one of some hundred MB that is not
/// used otherwise.
#[test]
fn a_disk_that_is_really_full_loses_nothing() {
    let Ok(disk) = std::env::var("FJORD_TEST_SMALL_DISK") else {
        eprintln!("skipped: FJORD_TEST_SMALL_DISK is not set");
        return;
    };
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir_in(disk).unwrap());
    let large = || Config { volume_size: 1 << 30, ..config(&meta, dir.path()) };
    let server = DataServer::start(large()).unwrap();
    let mut client = Client::connect(&server, "c1");
    let before = client.stat();
    let put = |client: &mut Client, from: u64| {
        (from..)
            .find_map(|block| client.put(block, &bytes_of(block, 3 << 20)).err().map(|e| (block, e)))
            .unwrap()
    };
    let (end, e) = put(&mut client, 1);
    assert_eq!(e.errno, Errno::ENOSPC, "{e}");
    let stored = (end - 1) * (3 << 20);
    assert!(stored * 10 > before.free * 8, "only {stored} of {} bytes could be used", before.free);
    client.sync();
    server.stop().unwrap();

    let server = DataServer::start(large()).unwrap();
    let mut client = Client::connect(&server, "c1");
    for block in 1..end {
        assert!(client.read(block, &[(0, u32::MAX)]).unwrap().1 == bytes_of(block, 3 << 20));
    }
    // What is deleted can be used again, all of it.
    let all: Vec<u64> = (1..end).collect();
    assert_eq!(client.delete(&all) as usize, all.len());
    assert!(client.stat().free * 10 > before.free * 9, "{:?} after {before:?}", client.stat());
    let (again, _) = put(&mut client, 1000);
    assert!((again - 1000) * 10 >= (end - 1) * 8, "{} after {}", again - 1000, end - 1);
}
