//! Backups and dumps of metadata that is in use on an engine across a network, restored on the same engine and on others.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use fjordfs_tests::{
    Cluster, MountPoint, Run,
    engines::{Etcd, Postgres},
    process::own_descriptors,
    tree::{ALL, Tree, assert_same},
};

use super::{cluster, work};

/// Of everything something.
const KEPT: Tree = Tree {
    directories: 10,
    small: 150,
    small_max: 40_000,
    large: 1,
    large_size: 5 << 20,
    sparse: 2,
    symlinks: 10,
    hard_links: 5,
};

/// The verb that makes a file of all metadata, and the one that makes metadata from it.
type Verbs = [&'static str; 2];

const BACKUP: Verbs = ["backup", "restore"];
const DUMP: Verbs = ["dump", "load"];

fn restore(cluster: &Cluster, verbs: Verbs, file: &Path, to: &str) -> Run {
    let file = file.to_str().unwrap();
    cluster.fjord(["meta", verbs[1], file, "--store", to])
}

fn stop_metaservers(cluster: &mut Cluster) {
    for n in 0..=cluster.setup().standbys {
        if let Some(mut server) = cluster.metaserver(n).take() {
            server.stop();
        }
    }
}

/// Makes a backup while somebody works.
fn back_up_in_use(cluster: &Cluster, verbs: Verbs, mount: &MountPoint, file: &Path) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            own_descriptors();
            work(&mount.join("work"), &stop)
        });
        std::thread::sleep(Duration::from_secs(1));
        let told = cluster.fjord(["meta", verbs[0], file.to_str().unwrap()]).ok().stdout;
        assert!(told.contains("records in"), "{told}");
        stop.store(true, Ordering::Relaxed);
        worker.join().unwrap();
    });
}

/// What somebody was at work on is there as it was at one moment: each file with what had been committed of it by then.
fn assert_was_under_way(folder: &Path) {
    let mut files = 0;
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        let number = name.trim_start_matches(char::is_alphabetic);
        let found = fs::read_to_string(entry.path()).unwrap();
        assert!(format!("first {number}, second").starts_with(&found), "{name}: {found}");
        files += 1;
    }
    assert!(files > 2, "hardly anything was under way");
}

/// A backup of what is on `from`, restored on each of `to`, one after the other.
fn is_restored(name: &str, verbs: Verbs, from: String, to: Vec<String>) {
    let mut cluster = cluster(name, from.clone());
    let kept = cluster.dir("kept");
    KEPT.generate(&kept, 1);
    let mount = cluster.mount();
    KEPT.generate(&mount.join("kept"), 1);
    // Seen by another client, all of it is with the metaserver.
    let other = cluster.mount();
    assert_same(&kept, &other.join("kept"), ALL);
    other.unmount();
    let file = cluster.dir("backup").join("monday");
    back_up_in_use(&cluster, verbs, &mount, &file);
    fs::write(mount.join("later"), "not in the backup").unwrap();
    mount.unmount();
    restore(&cluster, verbs, &file, &from).fails_saying(&["a metaserver runs on", "stop"]);
    stop_metaservers(&mut cluster);
    restore(&cluster, verbs, &file, &from).fails_saying(&["holds metadata already"]);
    let mut made = Vec::new();
    for place in to {
        restore(&cluster, verbs, &file, &place).ok();
        restore(&cluster, verbs, &file, &place).fails_saying(&["holds metadata already"]);
        cluster.set_store(place.clone());
        cluster.start_metaserver(0);
        cluster.wait_healthy();
        let (a, b) = (cluster.mount(), cluster.mount());
        assert_same(&kept, &a.join("kept"), ALL);
        assert_was_under_way(&a.join("work"));
        assert!(!a.join("later").exists());
        // Data servers have seen all that was restored before; nothing of that is met again, and what is new can be read.
        assert!(made.iter().all(|name| !a.join(name).exists()), "{place}");
        let new = format!("new{}", made.len());
        KEPT.generate(&a.join(&new), 2 + made.len() as u64);
        let there = cluster.dir(&format!("{new}-there"));
        KEPT.generate(&there, 2 + made.len() as u64);
        assert_same(&there, &b.join(&new), ALL);
        made.push(new);
        a.unmount();
        b.unmount();
        stop_metaservers(&mut cluster);
    }
}

#[test]
fn a_backup_of_etcd_is_restored_on_each_engine() {
    let (etcd, mut postgres) = (Etcd::start(), Postgres::start());
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let fjall = format!("fjall:{}", folder.path().join("meta").display());
    let to = vec![etcd.url("again"), postgres.url(), fjall];
    is_restored("restore-etcd", BACKUP, etcd.url("fjord"), to);
}

#[test]
fn a_backup_of_postgres_is_restored_on_each_engine() {
    let (etcd, mut postgres) = (Etcd::start(), Postgres::start());
    let (from, again) = (postgres.url(), postgres.url());
    is_restored("restore-postgres", BACKUP, from, vec![again, etcd.url("fjord")]);
}

#[test]
fn a_dump_of_postgres_is_loaded_on_each_engine() {
    let (etcd, mut postgres) = (Etcd::start(), Postgres::start());
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let fjall = format!("fjall:{}", folder.path().join("meta").display());
    let (from, again) = (postgres.url(), postgres.url());
    is_restored("load", DUMP, from, vec![again, etcd.url("fjord"), fjall]);
}
