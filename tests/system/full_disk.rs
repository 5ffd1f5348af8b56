//! A full cluster: the writer is told, nothing that was written before suffers, and deleting makes room.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use fjordfs_tests::{Cluster, MountPoint, Scratch, Setup, fault::SmallDisk, rng, wait::SOON, wait_for};

const FILE: usize = 3 << 20;

/// Writes and syncs files until one fails; returns how many are complete.
fn fill(mount: &MountPoint, from: u64, max: u64) -> (u64, Option<io::Error>) {
    for i in from..max {
        if let Err(e) = write_synced(&mount.join(format!("f{i}")), &rng::bytes(i, FILE)) {
            let _ = fs::remove_file(mount.join(format!("f{i}")));
            return (i, Some(e));
        }
    }
    (max, None)
}

fn write_synced(path: &Path, data: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(data)?;
    file.sync_all()
}

fn assert_complete(mount: &MountPoint, files: std::ops::Range<u64>) {
    for i in files {
        assert!(fs::read(mount.join(format!("f{i}"))).unwrap() == rng::bytes(i, FILE), "f{i}");
    }
}

fn fills_and_recovers(mut cluster: Cluster, copies: u64, capacity: u64) {
    let mount = cluster.mount();
    let fit = capacity / copies / FILE as u64;
    let (written, error) = fill(&mount, 0, fit + 50);
    let error = error.expect("a full disk must be reported");
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "after {written} files: {error}");
    assert!(written >= fit / 2, "full after {written} files, {fit} should nearly fit");
    assert_complete(&mount, 0..written);
    // Names still work, small bytes live in the metadata, and reads go on.
    fs::create_dir(mount.join("dir")).unwrap();
    fs::rename(mount.join("f0"), mount.join("dir/f0")).unwrap();
    fs::rename(mount.join("dir/f0"), mount.join("f0")).unwrap();
    cluster.assert_running();
    mount.unmount();
    let mount = cluster.mount();
    assert_complete(&mount, 0..written);
    // Room comes back without a restart of anything.
    let half = written / 2;
    (half..written).for_each(|i| fs::remove_file(mount.join(format!("f{i}"))).unwrap());
    wait_for("room after deleting", 2 * SOON, || {
        let got = write_synced(&mount.join("again"), &rng::bytes(99, FILE));
        got.map_err(|e| format!("{e}; {}", cluster.status()))
    });
    let (refilled, _) = fill(&mount, half, half + (written - half) / 2);
    assert!(refilled > half, "only one file fitted after {} had been deleted", written - half);
    mount.unmount();
    let mount = cluster.mount();
    assert_complete(&mount, 0..refilled);
    assert!(fs::read(mount.join("again")).unwrap() == rng::bytes(99, FILE));
    cluster.assert_running();
}

#[test]
fn the_configured_capacity_is_a_limit() {
    let max = 128 << 20;
    let setup = Setup {
        capacity_max: Some(max),
        volume_size: 64 << 20,
        policy: "replica:1".into(),
        ..Setup::default()
    };
    fills_and_recovers(Cluster::start("capacity", setup), 1, 3 * max);
}

#[test]
fn a_disk_that_is_really_full() {
    let scratch = Scratch::new("disks");
    let disks: Vec<SmallDisk> = (0..2).map(|i| SmallDisk::new(&scratch, &format!("disk{i}"), 200)).collect();
    let roots = disks.iter().map(|d| d.path().to_owned()).collect();
    let setup = Setup { servers: 2, roots, volume_size: 64 << 20, ..Setup::default() };
    fills_and_recovers(Cluster::start("real-disk", setup), 2, 2 * (150 << 20));
}

/// One full target is no reason to refuse while others have room.
#[test]
fn writes_go_to_targets_with_room() {
    let scratch = Scratch::new("uneven");
    let disk = SmallDisk::new(&scratch, "disk", 140);
    let roots =
        vec![disk.path().to_owned(), scratch.dir("roomy1"), scratch.dir("roomy2"), scratch.dir("roomy3")];
    let setup = Setup { servers: 4, roots, volume_size: 64 << 20, ..Setup::default() };
    let mut cluster = Cluster::start("uneven", setup);
    let mount = cluster.mount();
    let files = 400 / 3;
    let (written, error) = fill(&mount, 0, files);
    assert_eq!(written, files, "{error:?}");
    mount.unmount();
    let mount = cluster.mount();
    assert_complete(&mount, 0..files);
    cluster.assert_running();
}

/// Whoever goes on trying at a full cluster leaves nothing behind, unmounted or not.
#[test]
fn what_did_not_fit_takes_no_room() {
    let scratch = Scratch::new("refused");
    let disk = SmallDisk::new(&scratch, "disk", 140);
    let roots = vec![disk.path().to_owned(), scratch.dir("roomy")];
    let setup = Setup { servers: 2, roots, volume_size: 64 << 20, ..Setup::default() };
    let mut cluster = Cluster::start("refused", setup);
    let mount = cluster.mount();
    let mut written = 0;
    for _ in 0..10 {
        let (to, error) = fill(&mount, written, written + 1000);
        assert_eq!(error.expect("a full disk must be reported").raw_os_error(), Some(libc::ENOSPC));
        written = to;
    }
    assert_complete(&mount, 0..written);
    (0..written).for_each(|i| fs::remove_file(mount.join(format!("f{i}"))).unwrap());
    cluster.wait_status("nothing to be left", |s| s.shards() == 0 && s.blocks_to_delete() == 0);
    drop(mount);
    cluster.assert_running();
}
