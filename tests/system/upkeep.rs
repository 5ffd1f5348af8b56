//! Looking whether everything is there: fsck, gc, backups of the metadata, and what is refused. Waits on states, asserts no times.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

#[path = "upkeep/dump.rs"]
mod dump;

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use fjordfs_tests::{
    Cluster, Run, Setup,
    fault::volumes,
    rng,
    wait::{SOON, wait_for},
};
use serde_json::Value;

const FILE: usize = 3 << 20;

fn write(folder: &Path, files: std::ops::Range<u64>) {
    for i in files {
        fs::write(folder.join(format!("f{i}")), rng::bytes(i, FILE)).unwrap();
    }
}

fn assert_same(folder: &Path, files: std::ops::Range<u64>) {
    for i in files {
        assert!(fs::read(folder.join(format!("f{i}"))).unwrap() == rng::bytes(i, FILE), "f{i}");
    }
}

fn json(run: &Run) -> Value {
    serde_json::from_str(&run.stdout).unwrap_or_else(|e| panic!("{e}: {} {}", run.stdout, run.stderr))
}

#[test]
fn a_check_of_a_filesystem_in_use_finds_nothing() {
    let mut cluster = Cluster::start("fsck-busy", Setup::policy("replica:2"));
    let mount = cluster.mount_with("close=sync");
    write(mount.path(), 0..8);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for worker in 0..2u64 {
            let (stop, mount) = (&stop, &mount);
            scope.spawn(move || {
                let dir = mount.join(format!("w{worker}"));
                for i in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    fs::create_dir_all(dir.join(format!("d{}", i % 5))).unwrap();
                    fs::write(dir.join(format!("a{}", i % 7)), rng::bytes(i, 200_000)).unwrap();
                    fs::hard_link(dir.join(format!("a{}", i % 7)), dir.join(format!("d{}/l{i}", i % 5)))
                        .unwrap();
                    if i % 3 == 0 {
                        fs::remove_dir_all(dir.join(format!("d{}", i % 5))).unwrap();
                    }
                }
            });
        }
        for _ in 0..6 {
            let got = cluster.fjord(["fsck", "--json"]);
            let told = json(&got);
            assert_eq!((got.code(), &told["clean"]), (0, &Value::Bool(true)), "{told}");
            assert!(
                told["metadata"]["inodes"].as_u64().unwrap() >= 9
                    && told["shards"]["shards"].as_u64().unwrap() > 0
            );
        }
        stop.store(true, Ordering::Relaxed);
    });
    mount.unmount();
    let told = cluster.fjord(["fsck"]).ok().stdout;
    assert!(told.contains("all is well"), "{told}");
    cluster.assert_running();
}

#[test]
fn lost_blocks_are_told_and_what_can_be_is_restored() {
    let mut cluster = Cluster::start("fsck-lost", Setup { servers: 2, ..Setup::policy("replica:2") });
    let mount = cluster.mount();
    fs::create_dir(mount.join("once")).unwrap();
    cluster.fjord(["layout", "set", mount.join("once").to_str().unwrap(), "replica:1"]).ok();
    write(mount.path(), 0..3);
    // Each in a block of its own, so that some are on either server.
    for i in 0..8 {
        write(&mount.join("once"), i..i + 1);
        fs::File::open(mount.join(format!("once/f{i}"))).and_then(|file| file.sync_all()).unwrap();
    }
    mount.unmount();
    cluster.fjord(["fsck"]).ok();
    // One of the two disks comes back empty.
    cluster.stop_data(1);
    let got = cluster.fjord(["fsck"]);
    assert_eq!(got.code(), 1);
    fs::remove_dir_all(cluster.target_folder(1, 0).join("volumes")).unwrap();
    for entry in fs::read_dir(cluster.target_folder(1, 0)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() && !["label.json", "lock"].contains(&path.file_name().unwrap().to_str().unwrap()) {
            fs::remove_file(path).unwrap();
        }
    }
    cluster.start_data(1);
    cluster.wait_healthy();
    let told = wait_for("what has a second copy to be restored", 2 * SOON, || {
        let told = json(&cluster.fjord(["fsck", "--repair", "--json"]));
        match told["shards"]["missing"].as_array().map(Vec::len) {
            Some(0) => Ok(told),
            _ => Err(told.to_string()),
        }
    });
    let lost = told["shards"]["lost"].as_array().unwrap().len();
    assert!(lost > 0 && told["clean"] == false && told["metadata"]["problem_count"] == 0, "{told}");
    let got = cluster.fjord(["fsck"]);
    assert!(got.code() == 1 && got.stdout.contains("LOST"), "{}", got.stdout);
    let mount = cluster.mount();
    assert_same(mount.path(), 0..3);
    let unreadable: Vec<String> = (0..8)
        .map(|i| format!("once/f{i}"))
        .filter(|name| fs::read(mount.join(name)).is_err())
        .map(|name| format!("/{name}"))
        .collect();
    assert!(!unreadable.is_empty());
    assert_eq!(told["shards"]["lost_files"], serde_json::json!(unreadable), "{}", got.stdout);
    assert!(unreadable.iter().all(|file| got.stdout.contains(file)), "{}", got.stdout);
    fs::remove_dir_all(mount.join("once")).unwrap();
    mount.unmount();
    wait_for("nothing to be lost any more", 2 * SOON, || {
        let got = cluster.fjord(["fsck"]);
        if got.code() == 0 { Ok(()) } else { Err(got.stdout) }
    });
}

#[test]
fn a_backup_made_in_use_is_restored_and_what_came_later_is_garbage() {
    let mut cluster = Cluster::start("backup", Setup::policy("replica:2"));
    let mount = cluster.mount();
    write(mount.path(), 0..5);
    mount.unmount();
    let file = cluster.dir("backup").join("monday");
    let backup = ["meta".into(), "backup".into(), file.clone().into_os_string()];
    let told = cluster.fjord(backup.clone()).ok().stdout;
    assert!(told.contains("records in"), "{told}");
    let mount = cluster.mount();
    write(mount.path(), 5..9);
    mount.unmount();
    let folder = cluster.meta_folder();
    let restore = |cluster: &Cluster, file: &Path, more: Option<&str>| {
        let args = ["meta".into(), "restore".into(), file.to_owned().into_os_string(), "--data".into()];
        let more = more.map(std::ffi::OsString::from);
        cluster.fjord(args.into_iter().chain([folder.clone().into_os_string()]).chain(more))
    };
    let is_refused = |cluster: &Cluster| {
        for more in [None, Some("--force")] {
            restore(cluster, &file, more).fails_saying(&["holds metadata already"]);
        }
    };
    is_refused(&cluster);
    cluster.stop();
    is_refused(&cluster);
    fs::rename(&folder, cluster.dir("old").join("meta")).unwrap();
    // A torn and a damaged one are refused, and leave nothing behind.
    let good = fs::read(&file).unwrap();
    let bad = cluster.dir("backup").join("bad");
    fs::write(&bad, &good[..good.len() - 9]).unwrap();
    restore(&cluster, &bad, None).fails_saying(&["not complete"]);
    let mut flipped = good;
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    fs::write(&bad, flipped).unwrap();
    restore(&cluster, &bad, None).fails_saying(&["is damaged"]);
    assert!(!folder.exists());
    restore(&cluster, &file, None).ok();
    is_refused(&cluster);
    cluster.start_all();
    let mount = cluster.mount();
    assert_same(mount.path(), 0..5);
    assert!(!mount.join("f5").exists());
    write(mount.path(), 20..23);
    let dry = json(&cluster.fjord(["gc", "run", "--dry-run", "--json"]));
    assert!(dry["garbage_shards"].as_u64().unwrap() >= 2 && dry["deletions"] == 0, "{dry}");
    assert_eq!(cluster.fjord(["fsck"]).code(), 1, "garbage is a problem");
    let run = json(&cluster.fjord(["gc", "run", "--json"]));
    assert_eq!(run["deletions"], dry["garbage_shards"], "{run}");
    wait_for("the garbage to be gone", 2 * SOON, || {
        let got = cluster.fjord(["fsck", "--json"]);
        if got.code() == 0 { Ok(()) } else { Err(got.stdout) }
    });
    wait_for("all deletions to be confirmed", 2 * SOON, || {
        let told = json(&cluster.fjord(["gc", "status", "--json"]));
        if told["deletions"] == 0 { Ok(()) } else { Err(told.to_string()) }
    });
    assert_same(mount.path(), 0..5);
    assert_same(mount.path(), 20..23);
    mount.unmount();
    cluster.assert_running();
}

#[test]
fn a_metaserver_whose_store_is_gone_does_not_begin_anew() {
    let mut cluster = Cluster::start("store-gone", Setup { servers: 1, ..Setup::policy("replica:1") });
    let mount = cluster.mount();
    write(mount.path(), 0..1);
    mount.unmount();
    cluster.stop();
    let store = cluster.meta_folder().join("store");
    let kept = cluster.dir("kept").join("store");
    fs::rename(&store, &kept).unwrap();
    fjordfs_tests::run(cluster.meta_command()).fails_saying(&["batches", "fjord meta restore"]);
    fs::remove_dir_all(&store).unwrap();
    fs::rename(&kept, &store).unwrap();
    cluster.start_all();
    let mount = cluster.mount();
    assert_same(mount.path(), 0..1);
    mount.unmount();
}

/// Bytes that the volumes of three data servers take: less by those of deleted shards.
fn taken(cluster: &Cluster) -> u64 {
    let volumes = (0..3).flat_map(|server| volumes(&cluster.target_folder(server, 0)));
    volumes.map(|path| 512 * fs::metadata(path).unwrap().blocks()).sum()
}

#[test]
fn what_is_left_of_mostly_dead_blocks_is_moved_while_files_change() {
    const SMALL: usize = 30_000;
    let mut cluster = Cluster::start("gc-compact", Setup::policy("ec:2+1"));
    let mount = cluster.mount();
    let name = |i: u64| mount.join(format!("s{i}"));
    let content = |i: u64| rng::bytes(i, SMALL + i as usize);
    for i in 0..600 {
        fs::write(name(i), content(i)).unwrap();
    }
    // A file of many pieces, which are not in the order in which they were written.
    let scattered = rng::bytes(7, 200 * 8192);
    {
        let file = fs::File::create(mount.join("scattered")).unwrap();
        for n in 0..200u64 {
            let at = (n * 73 % 200) as usize * 8192;
            file.write_all_at(&scattered[at..at + 8192], at as u64).unwrap();
            file.sync_data().unwrap();
        }
    }
    // So that all are stored, many in a block: it takes a client a second.
    thread::sleep(3 * Duration::from_secs(1));
    let open = fs::File::open(name(20)).unwrap();
    let times = fs::metadata(name(40)).unwrap();
    for i in (0..600).filter(|i| i % 20 != 0) {
        fs::remove_file(name(i)).unwrap();
    }
    // A block whose bytes two files share.
    let copied =
        Command::new("cp").args(["--reflink=auto"]).arg(name(60)).arg(mount.join("shared")).status().unwrap();
    assert!(copied.success());
    // What a client decides by itself reaches the metaserver within a second, whatever sync(2) says.
    let seen = wait_for("the removals to be sent", SOON, || {
        let seen = json(&cluster.fjord(["gc", "compact", "--dry-run", "--json"]));
        let is_sparse = seen["sparse_blocks"].as_u64().unwrap() > 0 && seen["scattered_files"] == 1;
        if is_sparse { Ok(seen) } else { Err(seen.to_string()) }
    });
    assert_eq!(seen["moved_bytes"], 0);
    let before = taken(&cluster);
    // Some files are changed all the while, and keep what they were given.
    let stop = AtomicBool::new(false);
    let (done, last) = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut last = 0;
            for n in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                for i in [100, 200, 300] {
                    fs::write(name(i), rng::bytes(1000 * i + n, SMALL)).unwrap();
                }
                last = n;
            }
            last
        });
        let done = json(&cluster.fjord(["gc", "compact", "--json"]));
        stop.store(true, Ordering::Relaxed);
        (done, writer.join().unwrap())
    });
    assert!(done["moved_pieces"].as_u64().unwrap() > 10 && done["unreadable_pieces"] == 0, "{done}");
    let check = |mount: &Path| {
        for i in (0..600).step_by(20) {
            let expected =
                if [100, 200, 300].contains(&i) { rng::bytes(1000 * i + last, SMALL) } else { content(i) };
            assert!(fs::read(mount.join(format!("s{i}"))).unwrap() == expected, "s{i}");
        }
        assert!(fs::read(mount.join("shared")).unwrap() == content(60));
        assert!(fs::read(mount.join("scattered")).unwrap() == scattered);
    };
    let now = fs::metadata(name(40)).unwrap();
    assert_eq!(
        (now.modified().unwrap(), now.accessed().unwrap()),
        (times.modified().unwrap(), times.accessed().unwrap())
    );
    assert_eq!(now.ctime_nsec(), times.ctime_nsec());
    check(mount.path());
    // Also those who had it open, after the old block has gone.
    wait_for("the old blocks to be deleted", 2 * SOON, || {
        let freed = before.saturating_sub(taken(&cluster));
        let enough = freed > done["dead_bytes"].as_u64().unwrap();
        if enough { Ok(()) } else { Err(format!("{freed} bytes freed, {done}")) }
    });
    let mut bytes = vec![0; SMALL + 20];
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == content(20));
    let other = cluster.mount();
    check(other.path());
    let again = json(&cluster.fjord(["gc", "compact", "--json"]));
    assert_eq!(again["scattered_files"], 0, "{again}");
    let told = cluster.fjord(["fsck"]).ok().stdout;
    assert!(told.contains("all is well"), "{told}");
    drop(open);
    other.unmount();
    mount.unmount();
    cluster.assert_running();
}

/// The metaserver's own collections, as `fjord gc status` shows them.
fn background(cluster: &Cluster) -> Value {
    json(&cluster.fjord(["gc", "status", "--json"]))["background"].clone()
}

fn number(of: &Value, key: &str) -> u64 {
    of[key].as_u64().unwrap_or_else(|| panic!("{key} of {of}"))
}

#[test]
fn the_metaserver_collects_what_an_old_disk_brings_back_when_it_is_told_to() {
    let setup = Setup { gc_interval: Some(Duration::ZERO), ..Setup::policy("replica:2") };
    let mut cluster = Cluster::start("gc-start", setup);
    let mount = cluster.mount_with("close=sync");
    write(mount.path(), 0..12);
    // The disk as it is now.
    cluster.stop_data(1);
    let (folder, kept) = (cluster.target_folder(1, 0), cluster.dir("kept"));
    let copy = |from: &Path, to: &Path| {
        let copied = Command::new("cp").args(["-a", "--sparse=always"]).arg(from.join(".")).arg(to).status();
        assert!(copied.unwrap().success());
    };
    copy(&folder, &kept);
    cluster.start_data(1);
    cluster.wait_healthy();
    let before = taken(&cluster);
    (0..8).for_each(|i| fs::remove_file(mount.join(format!("f{i}"))).unwrap());
    wait_for("all deletions to be confirmed", 2 * SOON, || {
        let told = json(&cluster.fjord(["gc", "status", "--json"]));
        let freed = before.saturating_sub(taken(&cluster));
        if number(&told, "deletions") == 0 && freed >= 8 * 2 * FILE as u64 {
            Ok(())
        } else {
            Err(told.to_string())
        }
    });
    cluster.stop_data(1);
    fs::remove_dir_all(&folder).unwrap();
    fs::create_dir(&folder).unwrap();
    copy(&kept, &folder);
    cluster.start_data(1);
    cluster.wait_healthy();
    let before = background(&cluster);
    assert_eq!((number(&before, "runs"), number(&before, "interval_ms")), (0, 0), "nobody has told it to");
    let dry = json(&cluster.fjord(["gc", "run", "--dry-run", "--json"]));
    assert!(number(&dry, "garbage_shards") > 0, "{dry}");
    let told = cluster.fjord(["gc", "start"]).ok().stdout;
    assert!(told.contains("begins now"), "{told}");
    let done = wait_for("a collection", 2 * SOON, || {
        let told = background(&cluster);
        if number(&told, "runs") > 0 { Ok(told) } else { Err(told.to_string()) }
    });
    assert_eq!(number(&done, "garbage_shards"), number(&dry, "garbage_shards"), "{done}");
    assert_eq!(done["problem"], "", "{done}");
    wait_for("the garbage to be gone", 2 * SOON, || {
        let got = cluster.fjord(["fsck", "--json"]);
        if got.code() == 0 { Ok(()) } else { Err(got.stdout) }
    });
    assert_same(mount.path(), 8..12);
    assert_eq!(number(&background(&cluster), "runs"), 1);
    mount.unmount();
    cluster.assert_running();
}

#[test]
fn mostly_dead_blocks_are_compacted_on_schedule() {
    const SMALL: usize = 40_000;
    let setup = Setup { gc_interval: Some(Duration::ZERO), ..Setup::policy("replica:2") };
    let mut cluster = Cluster::start("gc-schedule", setup);
    let mount = cluster.mount();
    // So that every target has its volume, which takes all its space when it is begun.
    let has_volume = |server| !volumes(&cluster.target_folder(server, 0)).is_empty();
    for i in (0..).take_while(|_| !(0..3).all(has_volume)) {
        write(mount.path(), i..i + 1);
        fs::File::open(mount.join(format!("f{i}"))).unwrap().sync_all().unwrap();
    }
    // What is written now is in other blocks.
    mount.unmount();
    let mount = cluster.mount();
    for i in 0..300 {
        fs::write(mount.join(format!("s{i}")), rng::bytes(i, SMALL)).unwrap();
    }
    mount.unmount();
    let before = taken(&cluster);
    let mount = cluster.mount();
    (0..300).filter(|i| i % 10 != 0).for_each(|i| fs::remove_file(mount.join(format!("s{i}"))).unwrap());
    // A run among the deletions could find blocks that are just not sparse enough in the end, and leave them.
    mount.unmount();
    cluster.kill_meta();
    cluster.set_gc_interval(Duration::from_secs(1));
    cluster.start_meta();
    cluster.wait_healthy();
    let mount = cluster.mount();
    let sparse = wait_for("what is left to be moved", 2 * SOON, || {
        let dry = json(&cluster.fjord(["gc", "compact", "--dry-run", "--json"]));
        let told = background(&cluster);
        let moved = number(&told, "runs") > 2 && number(&dry, "sparse_blocks") == 0;
        if moved { Ok(told) } else { Err(format!("{dry} {told}")) }
    });
    assert_eq!(sparse["problem"], "", "{sparse}");
    wait_for("the old blocks to be deleted", 2 * SOON, || {
        let freed = before.saturating_sub(taken(&cluster));
        if freed >= 2 * 270 * SMALL as u64 { Ok(()) } else { Err(format!("{freed} bytes")) }
    });
    for i in (0..300).step_by(10) {
        assert!(fs::read(mount.join(format!("s{i}"))).unwrap() == rng::bytes(i, SMALL), "s{i}");
    }
    cluster.fjord(["fsck"]).ok();
    mount.unmount();
    cluster.assert_running();
}
