//! The data server in its cluster: registration, labels, deletions, a metaserver that comes and goes; and refusals at
//! start.

#![allow(clippy::unwrap_used, reason = "a panic is the report of a test")]

mod common;

use std::{
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use common::{Client, FakeMeta, bytes_of, config, start};
use fjordfs_dataserver::{Config, DataServer, StartError, TargetConfig};
use fjordfs_proto::{Domain, error::Errno, pb::meta::DeletedBlocks};

fn refusal(config: Config) -> String {
    match DataServer::start(config) {
        Ok(_) => panic!("it started"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn a_server_registers_once_and_is_recognised_again() {
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let two = |name: &str| TargetConfig {
        path: dir.path().join(name),
        domain: (name == "b").then(|| Domain::of_server("rack=2", "host 1").unwrap()),
    };
    let both =
        || Config { targets: vec![two("a"), two("b")], name: "host 1".into(), ..config(&meta, dir.path()) };
    let server = DataServer::start(both()).unwrap();
    let address = server.address().to_string();
    meta.wait("heartbeats", |s| s.heartbeats.len() > 2);
    server.stop().unwrap();
    DataServer::start(both()).unwrap().stop().unwrap();

    let state = meta.state.lock().unwrap();
    let [first, again] = &state.registrations[..] else {
        panic!("{} registrations", state.registrations.len())
    };
    assert_eq!((first.cluster_id.as_str(), first.server, first.address.clone()), ("", 0, address));
    assert_eq!((again.cluster_id.as_str(), again.server), ("c1", 1));
    assert_eq!(again.targets.iter().map(|t| t.target).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(
        again.targets.iter().map(|t| t.domain.as_str()).collect::<Vec<_>>(),
        ["host 1", "rack=2,host=host 1"]
    );
    let beat = state.heartbeats.last().unwrap();
    assert!(
        beat.targets.len() == 2 && beat.targets.iter().all(|t| t.capacity > 0 && t.free > 0 && !t.failed)
    );
}

#[test]
fn deletions_of_the_metaserver_are_done_and_acknowledged() {
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let server = start(&meta, dir.path());
    let mut client = Client::connect(&server, "c1");
    (1..=3).for_each(|block| client.put(block, &bytes_of(block, 9000)).unwrap());
    let order = DeletedBlocks { target: 1, blocks: vec![1, 3, 77] };
    meta.state.lock().unwrap().deletes = vec![order.clone(), DeletedBlocks { target: 9, blocks: vec![2] }];
    meta.wait("the acknowledgement", |s| s.deleted.contains(&order));
    assert_eq!(client.list(), [2]);
    // A metaserver that has forgotten us is told again.
    meta.state.lock().unwrap().forget = true;
    meta.wait("a second registration", |s| s.registrations.len() == 2);
    assert!(!meta.state.lock().unwrap().deleted.iter().any(|d| d.target == 9));
}

#[test]
fn a_restart_without_a_metaserver_serves_what_it_has() {
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let config = config(&meta, dir.path());
    let server = DataServer::start(config.clone()).unwrap();
    Client::connect(&server, "c1").put(1, b"one").unwrap();
    server.stop().unwrap();
    let (address, ids) = (meta.address, meta.stop());

    let server = DataServer::start(config).unwrap();
    let mut client = Client::connect(&server, "c1");
    assert_eq!(client.read(1, &[(0, 4096)]).unwrap().1, b"one");
    client.put(2, b"two").unwrap();
    let meta = FakeMeta::start_at("c1", address);
    meta.state.lock().unwrap().target_ids = ids;
    meta.wait("heartbeats", |s| !s.heartbeats.is_empty());
    assert_eq!(meta.state.lock().unwrap().heartbeats[0].targets[0].shards, 2);
    server.stop().unwrap();
}

#[test]
fn a_new_target_waits_for_its_metaserver() {
    let dir = tempfile::tempdir().unwrap();
    let probe = TcpListener::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = probe.local_addr().unwrap();
    drop(probe);
    let begun = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let config = Config::new(address.to_string(), [dir.path().to_owned()]);
            DataServer::start(Config { cores: 1, ..config }).inspect(|_| begun.store(true, Ordering::SeqCst))
        });
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!begun.load(Ordering::SeqCst));
        let _meta = FakeMeta::start_at("c1", address);
        let server = waiting.join().unwrap().unwrap();
        Client::connect(&server, "c1").put(1, b"one").unwrap();
    });
}

fn edit_label(folder: &Path, from: &str, to: &str) {
    let label = std::fs::read_to_string(folder.join("label.json")).unwrap();
    assert!(label.contains(from), "{label}");
    std::fs::write(folder.join("label.json"), label.replace(from, to)).unwrap();
}

#[test]
fn what_cannot_work_is_refused_at_start_with_a_reason() {
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let server = start(&meta, &a);

    // Two servers on one folder, or on one address.
    assert!(refusal(config(&meta, &a)).contains("in use by another data server"));
    let taken = Config { listen: server.address(), ..config(&meta, &b) };
    assert!(matches!(DataServer::start(taken), Err(StartError::Listen { .. })));
    server.stop().unwrap();

    // Another cluster's folder, found out by the metaserver.
    let other = FakeMeta::start("c2");
    let e = refusal(config(&other, &a));
    assert!(e.contains("refused") && e.contains("this is cluster c2, not c1"), "{e}");
    // Targets of two clusters.
    start(&other, &b).stop().unwrap();
    let target = |path: &Path| TargetConfig { path: path.to_owned(), domain: None };
    let both = Config { targets: vec![target(&a), target(&b)], ..config(&meta, &a) };
    let e = refusal(both);
    assert!(e.contains("cluster c1") && e.contains("cluster c2"), "{e}");

    // A newer format.
    edit_label(&a, "\"format_version\": 1", "\"format_version\": 2");
    assert!(refusal(config(&meta, &a)).contains("format version 2"));

    // Nothing of that has harmed anything.
    edit_label(&a, "\"format_version\": 2", "\"format_version\": 1");
    let server = start(&meta, &a);
    let e = Client::connect(&server, "c1").read(1, &[(0, 1)]).unwrap_err();
    assert_eq!(e.errno, Errno::ENOENT);
}

#[test]
fn an_address_that_is_no_metaserver_is_told_apart() {
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let nowhere = Config { meta: "no such host:1".into(), ..config(&meta, dir.path()) };
    assert!(refusal(nowhere).contains("no such host:1"));
}
