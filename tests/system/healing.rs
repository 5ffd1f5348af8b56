//! What is lost is made again: rebuild, reconciliation, drain. Waits on states, asserts no times.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    fs,
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use fjordfs_tests::{
    Cluster, Process, Setup,
    engines::free_port,
    fault::{find_pages, flip, volumes},
    process::fjord,
    rng,
    status::Status,
    tree::{self, Tree},
    wait::{SOON, wait_for},
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
    lose_three(setup(4));
}

#[test]
fn a_server_lost_for_good_is_rebuilt_by_decoding() {
    lose_three(Setup { policy: "ec:2+1".into(), ..setup(5) });
}

/// One server after the other, each rebuilt before the next one goes.
fn lose_three(setup: Setup) {
    let mut cluster = Cluster::start("rebuild", setup);
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

#[test]
fn a_target_that_comes_back_late_drops_what_is_dead_or_has_moved() {
    let mut cluster = Cluster::start("late", setup(4));
    let source = fill(&cluster, 5);
    fill(&cluster, 6);
    cluster.kill_data(2);
    cluster.wait_status("the rebuild", |s| state(s, 2) == "out" && whole(s));
    let mount = cluster.mount();
    fs::remove_dir_all(mount.join("6")).unwrap();
    mount.unmount();
    let others = |s: &Status| -> u64 {
        let up = s.list("targets").iter().filter(|t| t["domain"] != "data2");
        up.map(|t| t["shards"].as_u64().unwrap()).sum()
    };
    // What is queued for the one that is out stays queued.
    let absent = |s: &Status| target_of(s, 2).unwrap()["shards"].as_u64().unwrap();
    let last = AtomicU64::new(0);
    cluster.wait_status("the deletions on the others", |s| {
        let now = others(s);
        thread::sleep(Duration::from_millis(1500));
        last.swap(now, Ordering::Relaxed) == now
    });
    let before = cluster.status();
    assert!(absent(&before) > 0, "{before}");
    cluster.start_data(2);
    cluster.wait_status("the surplus to be gone", |s| {
        state(s, 2) == "up" && absent(s) == 0 && s.blocks_to_delete() == 0 && whole(s)
    });
    assert_eq!(others(&cluster.status()), others(&before));
    assert_intact(&cluster, &source, 5);
    cluster.assert_running();
}

#[test]
fn what_a_reader_finds_damaged_is_repaired() {
    let mut cluster = Cluster::start("report", setup(2));
    let mount = cluster.mount();
    let mut data = rng::bytes(8, 9 << 20);
    let marker = b"<the page that is read>";
    data[5 << 20..(5 << 20) + marker.len()].copy_from_slice(marker);
    fs::write(mount.join("file"), &data).unwrap();
    mount.unmount();
    let copies: Vec<_> = (0..2).flat_map(|s| find_pages(&cluster.target_folder(s, 0), marker)).collect();
    assert_eq!(copies.len(), 2, "{copies:?}");
    let read = || {
        let mount = cluster.mount();
        assert!(fs::read(mount.join("file")).unwrap() == data);
        mount.unmount();
    };
    // Which copy is asked first depends on the position only: it is the one or the other.
    flip(&copies[0], 3);
    read();
    thread::sleep(Duration::from_secs(4));
    if scrubs(&cluster.status(), "shards_bad") == 0 {
        flip(&copies[0], 3);
        flip(&copies[1], 3);
        read();
    }
    let status = cluster.wait_status("the repair", |s| scrubs(s, "shards_repaired") > 0);
    assert_eq!(scrubs(&status, "shards_bad"), scrubs(&status, "shards_repaired"), "{status}");
    cluster.assert_running();
}

#[test]
fn a_scrub_repairs_a_piece_of_an_encoded_block_by_decoding() {
    let mut cluster = Cluster::start("decode", Setup { policy: "ec:2+1".into(), ..setup(4) });
    let mount = cluster.mount();
    let mut data = rng::bytes(9, 9 << 20);
    let marker = b"<the page of one shard>";
    data[5 << 20..(5 << 20) + marker.len()].copy_from_slice(marker);
    fs::write(mount.join("file"), &data).unwrap();
    mount.unmount();
    let find = || (0..4).flat_map(|s| find_pages(&cluster.target_folder(s, 0), marker)).collect::<Vec<_>>();
    let places = find();
    assert_eq!(places.len(), 1, "{places:?}");
    flip(&places[0], 3);
    assert!(find().is_empty());
    cluster.fjord(["scrub", "start"]).ok();
    let status = cluster.wait_status("the scrub", |s| scrubbed(s) && scrubs(s, "shards_repaired") == 1);
    assert_eq!(scrubs(&status, "shards_bad"), 1, "{status}");
    assert_eq!(find().len(), 1, "the page as it was");
    let mount = cluster.mount();
    assert!(fs::read(mount.join("file")).unwrap() == data);
    mount.unmount();
    cluster.assert_running();
}

/// Sums over what scrubs have found.
fn scrubs(status: &Status, key: &str) -> u64 {
    status.list("targets").iter().map(|t| t["scrub"][key].as_u64().unwrap()).sum()
}

fn scrubbed(status: &Status) -> bool {
    let done = |t: &serde_json::Value| t["scrub"]["running"] == false && t["scrub"]["completed_ms"] != 0;
    status.list("targets").iter().all(done)
}

#[test]
fn a_scrub_finds_what_has_rotted_and_repairs_it_from_another_copy() {
    let mut cluster = Cluster::start("scrub", setup(3));
    let mount = cluster.mount();
    let mut data = rng::bytes(7, 9 << 20);
    let marker = b"<the page that rots>";
    data[5 << 20..(5 << 20) + marker.len()].copy_from_slice(marker);
    fs::write(mount.join("file"), &data).unwrap();
    mount.unmount();
    let copies: Vec<_> = (0..3).flat_map(|s| find_pages(&cluster.target_folder(s, 0), marker)).collect();
    assert_eq!(copies.len(), 2, "{copies:?}");
    let before = cluster.wait_status("both copies to be reported", |s| s.shards() == 2).shards();
    flip(&copies[0], 3);
    cluster.fjord(["scrub", "start"]).ok();
    let status = cluster.wait_status("the scrub", |s| scrubbed(s) && scrubs(s, "shards_repaired") == 1);
    assert_eq!((scrubs(&status, "shards_bad"), status.shards()), (1, before), "{status}");
    assert!(cluster.fjord(["status"]).stdout.contains("found damaged, 1 repaired"));
    assert!(cluster.fjord(["scrub", "status"]).ok().stdout.contains("REPAIRED"));
    // The other copy rots: what is read now is the repaired one.
    flip(&copies[1], 3);
    let mount = cluster.mount();
    assert!(fs::read(mount.join("file")).unwrap() == data);
    mount.unmount();
    // With no good copy left, it is told and left alone.
    let repaired: Vec<_> = (0..3).flat_map(|s| find_pages(&cluster.target_folder(s, 0), marker)).collect();
    for place in repaired.iter().filter(|place| !copies[1..].contains(place)) {
        flip(place, 3);
    }
    cluster.fjord(["scrub", "start"]).ok();
    let lost = cluster
        .wait_status("the second scrub", |s| scrubs(s, "shards_bad") >= scrubs(s, "shards_repaired") + 2);
    assert_eq!(lost.shards(), before, "{lost}");
    cluster.assert_running();
}

#[test]
fn a_target_is_added_to_a_server_in_use() {
    let mut cluster = Cluster::start("target-add", Setup { ..setup(3) });
    let mount = cluster.mount();
    let stop = AtomicBool::new(false);
    let path = cluster.dir("disk").join("added");
    let add = |path: &std::path::Path| {
        cluster.fjord(["target", "add", "--server", "data1", path.to_str().unwrap()])
    };
    let written = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut written = 0;
            while !stop.load(Ordering::Relaxed) {
                fs::write(mount.join(format!("f{written}")), rng::bytes(written, 300_000)).unwrap();
                if written >= 3 {
                    let old = fs::read(mount.join(format!("f{}", written - 3))).unwrap();
                    assert!(old == rng::bytes(written - 3, 300_000), "f{}", written - 3);
                }
                written += 1;
            }
            written
        });
        // Whatever is wrong is said, and changes nothing.
        let ambiguous = cluster.fjord(["target", "add", path.to_str().unwrap()]);
        assert!(ambiguous.code() != 0 && ambiguous.stderr.contains("data0"), "{}", ambiguous.stderr);
        let used = cluster.dir("used");
        fs::write(used.join("thesis.txt"), "mine").unwrap();
        let refused = add(&used);
        assert!(refused.code() != 0 && refused.stderr.contains("is not empty"), "{}", refused.stderr);
        let list = cluster.target_folder(1, 0).join("targets.json");
        add(&cluster.target_folder(0, 0)).fails_saying(&["in use by another data server"]);
        assert!(!list.exists(), "what cannot be added is not listed");
        let told = add(&path).ok().stdout;
        assert!(told.contains("is target t4 of data1"), "{told}");
        let again = add(&path);
        assert!(again.code() != 0 && again.stderr.contains("is target t4"), "{}", again.stderr);
        cluster.wait_status("the new target to be used", |status| {
            let shards = |t: &serde_json::Value| t["shards"].as_u64().unwrap();
            status.targets_up() == 4 && status.list("targets").iter().any(|t| t["id"] == 4 && shards(t) > 0)
        });
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap()
    });
    assert!(written > 5);
    // It is there after a crash, too, though nobody names it.
    cluster.kill_data(1);
    cluster.start_data(1);
    cluster.wait_status("all four targets", |status| status.targets_up() == 4);
    let other = cluster.mount();
    for n in 0..written {
        assert!(fs::read(other.join(format!("f{n}"))).unwrap() == rng::bytes(n, 300_000), "f{n}");
    }
    // A disk that is not there keeps nobody from the others.
    cluster.stop_data(1);
    fs::rename(&path, path.with_extension("gone")).unwrap();
    // Nor does a target of another server, or one that is named twice.
    let listed = [&path, &cluster.target_folder(0, 0), &cluster.target_folder(1, 0)];
    let listed: Vec<_> = listed.map(|path| serde_json::json!({ "path": path })).into();
    let list = cluster.target_folder(1, 0).join("targets.json");
    fs::write(&list, serde_json::json!(listed).to_string()).unwrap();
    cluster.start_data(1);
    cluster
        .wait_status("the server without it", |status| status.servers_up() == 3 && status.targets_up() == 3);
    assert!(!path.exists(), "nothing is written to the disk below");
    let log = cluster.data(1).log();
    assert!(log.contains("in use by another data server") && log.contains(list.to_str().unwrap()), "{log}");
    other.unmount();
    mount.unmount();
    cluster.assert_running();
}

/// Nothing is kept on a target, and it is out.
fn out_of_use(status: &Status, name: &str) -> bool {
    let found = status.list("targets").iter().find(|t| format!("t{}", t["id"]) == name);
    found.is_some_and(|t| t["groups"] == 0 && t["state"] == "out")
}

/// A server, a target and a disk in the place of another one are new, and blocks have moved to all of them: a backup of before does not
/// know of that, and is restored.
#[test]
fn a_backup_that_is_older_than_the_targets_is_restored_and_everything_found() {
    let mut cluster = Cluster::start("old-backup", setup(3));
    let source = fill(&cluster, 7);
    let file = cluster.dir("backup").join("monday");
    cluster.fjord(["meta", "backup", file.to_str().unwrap()]).ok();
    let last = AtomicU64::new(0);
    let before = cluster.wait_status("every shard to be told of", |s| {
        thread::sleep(Duration::from_millis(1500));
        // None of them yet is not all of them.
        let told = s.sum("shards");
        last.swap(told, Ordering::Relaxed) == told && told > 0
    });
    let before = before.sum("shards");
    let (name, folder) = ("data9", cluster.dir("data9"));
    let (address, listen) = (cluster.meta_address(), format!("127.0.0.1:{}", free_port()));
    let size = cluster.setup().volume_size.to_string();
    let start = |log: &str| {
        let mut command = fjord(["data", "--meta", &address, "--listen", &listen, "--name", name]);
        command.args(["--cores", "1", "--volume-size", &size, "--target"]).arg(&folder);
        Process::start("the new data server", command, &folder.with_file_name(log))
    };
    let mut new = start("data9.log");
    let added = cluster.dir("disk").join("added");
    cluster.fjord(["target", "add", "--server", "data0", added.to_str().unwrap()]).ok();
    let old = format!("t{}", target_of(&cluster.status(), 1).unwrap()["id"]);
    cluster.kill_data(1);
    fs::remove_dir_all(cluster.target_folder(1, 0)).unwrap();
    cluster.wait_status("it to be missed", |s| state(s, 1) == "down");
    cluster.start_data(1);
    let id = |t: &serde_json::Value| format!("t{}", t["id"]);
    cluster.wait_status("the new disk", |s| {
        s.targets_up() == 5 && s.list("targets").iter().any(|t| t["domain"] == "data1" && id(t) != old)
    });
    cluster.fjord(["target", "replace", &old]).ok();
    cluster.wait_status("the new disk to be filled", whole);
    cluster.fjord(["target", "remove", &old]).ok();
    cluster.fjord(["rebalance"]).ok();
    // Those that have lost a place have dropped what they had.
    wait_for("the balance", 4 * SOON, || {
        let s = cluster.try_status()?;
        let balanced = whole(&s) && s.0["healing"]["rebalancing"] == false && s.sum("shards") == before;
        if balanced { Ok(()) } else { Err(s.to_string()) }
    });
    assert_intact(&cluster, &source, 7);
    new.stop();
    cluster.stop();
    let meta = cluster.meta_folder();
    fs::rename(&meta, cluster.dir("old").join("meta")).unwrap();
    cluster
        .fjord([
            "meta".into(),
            "restore".into(),
            file.into_os_string(),
            "--data".into(),
            meta.into_os_string(),
        ])
        .ok();
    cluster.start_meta();
    for server in 0..3 {
        cluster.start_data(server);
    }
    let mut new = start("data9-again.log");
    // The disk that was replaced is in the metadata of then.
    cluster.wait_status("all that there are", |s| s.targets_up() == 5 && whole(s) && out_of_use(s, &old));
    cluster.fjord(["target", "remove", &old]).ok();
    wait_for("everything to be where the restored metadata has it", 4 * SOON, || {
        let s = cluster.try_status()?;
        let got = cluster.fjord(["fsck", "--json"]);
        if got.code() == 0 { Ok(()) } else { Err(format!("{}\n{s}", got.stdout)) }
    });
    assert_intact(&cluster, &source, 7);
    new.assert_running();
    cluster.assert_running();
}
