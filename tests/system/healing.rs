//! What is lost is made again: rebuild, reconciliation, drain. Waits on states, asserts no times.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use fjordfs_tests::{
    Cluster, Setup,
    fault::volumes,
    rng,
    status::Status,
    tree::{self, Tree},
};

fn setup(servers: usize) -> Setup {
    Setup {
        servers,
        down_after: Duration::from_secs(2),
        out_after: Duration::from_secs(2),
        ..Setup::policy("replica:2")
    }
}

fn content() -> Tree {
    Tree { directories: 5, small: 60, large: 6, sparse: 1, ..Tree::mixed() }
}

/// Writes a tree into the cluster and beside it.
fn fill(cluster: &Cluster, seed: u64) -> PathBuf {
    let source = cluster.dir("source").join(seed.to_string());
    content().generate(&source, seed);
    let got = cluster.fjord([
        "import".into(),
        source.clone().into_os_string(),
        format!("{}:/{seed}", cluster.meta_address()).into(),
    ]);
    got.ok();
    source
}

fn assert_intact(cluster: &Cluster, source: &std::path::Path, seed: u64) {
    let mount = cluster.mount();
    tree::assert_same(source, &mount.join(seed.to_string()), tree::ALL);
    mount.unmount();
}

fn healing(status: &Status, key: &str) -> u64 {
    status.0["healing"][key].as_u64().unwrap_or_else(|| panic!("no healing.{key} in {status}"))
}

/// The target of a data server of one. Ids are given as servers come, so they do not tell.
fn target_of(status: &Status, server: usize) -> Option<&serde_json::Value> {
    status.list("targets").iter().find(|t| t["domain"] == format!("data{server}"))
}

fn state(status: &Status, server: usize) -> String {
    target_of(status, server).map_or("gone".to_owned(), |t| t["state"].as_str().unwrap().to_owned())
}

/// Every group has all its members, and nothing is left to compare.
fn whole(status: &Status) -> bool {
    let degraded: u64 = status.list("placement").iter().map(|p| p["degraded"].as_u64().unwrap()).sum();
    degraded == 0 && healing(status, "moves_left") == 0 && healing(status, "checks_left") == 0
}

#[test]
fn a_server_lost_for_good_is_rebuilt_and_the_next_one_may_go() {
    let mut cluster = Cluster::start("rebuild", setup(4));
    let source = fill(&cluster, 1);
    cluster.kill_data(3);
    let status = cluster.wait_status("the rebuild", |s| state(s, 3) == "out" && whole(s));
    assert!(healing(&status, "shards_copied") > 0, "{status}");
    assert_eq!(healing(&status, "shards_lost"), 0, "{status}");
    cluster.kill_data(0);
    cluster.wait_status("the second loss to be seen", |s| state(s, 0) != "up");
    assert_intact(&cluster, &source, 1);
    // The third one too, once that is rebuilt.
    cluster.wait_status("the second rebuild", |s| state(s, 0) == "out" && whole(s));
    cluster.kill_data(1);
    cluster.wait_status("the third loss to be seen", |s| state(s, 1) != "up");
    assert_intact(&cluster, &source, 1);
    cluster.assert_running();
}

#[test]
fn a_rebuild_goes_on_after_a_restart_of_everything() {
    let slow = Setup { rebuild_rate: Some(4 << 20), ..setup(4) };
    let mut cluster = Cluster::start("resume", slow);
    let source = fill(&cluster, 2);
    cluster.kill_data(3);
    let under_way = |s: &Status| healing(s, "moves_left") > 0 && healing(s, "bytes_copied") > 0;
    cluster.wait_status("the rebuild to be under way", under_way);
    cluster.kill_meta();
    cluster.start_meta();
    cluster.wait_status("the rebuild to go on", under_way);
    cluster.kill_data(0);
    cluster.start_data(0);
    cluster.wait_status("the rebuild to go on again", under_way);
    cluster.wait_status("the rebuild", |s| state(s, 3) == "out" && whole(s));
    cluster.kill_data(1);
    cluster.wait_status("the second loss to be seen", |s| state(s, 1) != "up");
    assert_intact(&cluster, &source, 2);
    cluster.assert_running();
}

#[test]
fn a_target_that_returns_empty_gets_back_what_it_should_have() {
    let mut cluster = Cluster::start("empty", setup(3));
    let source = fill(&cluster, 3);
    let before = cluster.wait_status("all compared", whole);
    cluster.stop_data(1);
    let folder = cluster.target_folder(1, 0);
    for volume in volumes(&folder) {
        fs::remove_file(volume).unwrap();
    }
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().contains("checkpoint") {
            fs::remove_file(path).unwrap();
        }
    }
    cluster.start_data(1);
    cluster.wait_healthy();
    cluster.wait_status("all shards back", |s| whole(s) && s.shards() == before.shards());
    cluster.kill_data(0);
    cluster.wait_status("a loss to be seen", |s| state(s, 0) != "up");
    assert_intact(&cluster, &source, 3);
    cluster.assert_running();
}

#[test]
fn a_target_is_drained_while_a_client_writes() {
    let mut cluster = Cluster::start("drain", setup(4));
    let source = fill(&cluster, 4);
    let mount = cluster.mount();
    let name = format!("t{}", target_of(&cluster.status(), 1).unwrap()["id"]);
    let refused = cluster.fjord(["target", "remove", &name]);
    let hint = format!("fjord target drain {name}");
    assert!(!refused.status.success() && refused.stderr.contains(&hint), "{}", refused.stderr);
    let stop = AtomicBool::new(false);
    let written = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut written = 0;
            while !stop.load(Ordering::Relaxed) {
                fs::write(mount.join(format!("w{written}")), rng::bytes(written, 1 << 20)).unwrap();
                written += 1;
                thread::sleep(Duration::from_millis(20));
            }
            written
        });
        let drained = cluster.fjord(["target", "drain", &name]);
        drained.ok();
        cluster.wait_status("the drain", |s| {
            let kept = target_of(s, 1).map_or(0, |t| t["groups"].as_u64().unwrap());
            kept == 0 && state(s, 1) == "draining" && whole(s)
        });
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap()
    });
    let removed = cluster.fjord(["target", "remove", &name]);
    removed.ok();
    cluster.kill_data(1);
    cluster.wait_status("it to be gone", |s| state(s, 1) == "gone");
    for n in 0..written {
        assert!(fs::read(mount.join(format!("w{n}"))).unwrap() == rng::bytes(n, 1 << 20), "w{n}");
    }
    mount.unmount();
    assert_intact(&cluster, &source, 4);
    cluster.wait_status("all whole", |s| whole(s) && s.0["healthy"] == true);
    // Its folder is known, and turned away with the reason.
    cluster.start_data(1);
    let log = || fs::read_to_string(cluster.folder().join("data1.log")).unwrap_or_default();
    fjordfs_tests::wait::wait_until("the removed target to be refused", fjordfs_tests::wait::SOON, || {
        log().contains("was removed from the cluster")
    });
}
