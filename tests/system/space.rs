//! Deleting gives space back: on the data servers' disks, for whole blocks and for shared ones.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::fs;

use fjordfs_tests::{Cluster, Setup, fault::allocated, rng, wait::SOON, wait_for};

/// Waits until the targets hold exactly so many shards and nothing waits for deletion.
fn wait_shards(cluster: &Cluster, what: &str, fits: impl Fn(u64) -> bool) {
    wait_for(what, 2 * SOON, || {
        let s = cluster.status();
        if s.blocks_to_delete() == 0 && fits(s.shards()) { Ok(()) } else { Err(s.to_string()) }
    });
}

fn disk(cluster: &Cluster) -> u64 {
    (0..3).map(|server| allocated(&cluster.target_folder(server, 0))).sum()
}

#[test]
fn deleted_files_give_their_space_back() {
    let cluster = Cluster::start("space", Setup::default());
    let mount = cluster.mount();
    assert_eq!(cluster.status().shards(), 0);
    let total = 96u64 << 20;
    for i in 0..3 {
        fs::write(mount.join(format!("large{i}")), rng::bytes(i, total as usize / 3)).unwrap();
    }
    wait_shards(&cluster, "shards of the large files to be reported", |n| n >= 12);
    let (shards, free, used) = (cluster.status().shards(), cluster.status().sum("free"), disk(&cluster));
    // Overwriting in place frees what was there before.
    fs::write(mount.join("large0"), rng::bytes(9, total as usize / 3)).unwrap();
    wait_shards(&cluster, "the overwritten blocks to go", |n| n == shards);
    for i in 0..3 {
        fs::remove_file(mount.join(format!("large{i}"))).unwrap();
    }
    wait_shards(&cluster, "all shards to go", |n| n == 0);
    // Two copies of everything; the free space on the targets' own disk tells.
    let given_back = used.saturating_sub(disk(&cluster));
    assert!(given_back >= 2 * total * 9 / 10, "{given_back} of {} bytes given back", 2 * total);
    wait_for("free space to be reported", SOON, || {
        let now = cluster.status().sum("free");
        if now >= free + total { Ok(()) } else { Err(format!("{now}, was {free}")) }
    });
}

#[test]
fn a_block_shared_by_small_files_goes_with_the_last_of_them() {
    const FILES: u64 = 200;
    let cluster = Cluster::start("packed", Setup::default());
    let mount = cluster.mount();
    // Closed one after the other, but too large for the inline path: they go into blocks.
    for i in 0..FILES {
        fs::write(mount.join(format!("small{i}")), rng::bytes(i, 20_000)).unwrap();
    }
    fjordfs_tests::process::sh(mount.path(), "sync -f .");
    wait_shards(&cluster, "shards of the small files to be reported", |n| n > 0);
    for i in (0..FILES).filter(|i| i % 10 != 0) {
        fs::remove_file(mount.join(format!("small{i}"))).unwrap();
    }
    // What is left must be untouched by the deletion of its neighbours, also for a client without memory.
    mount.unmount();
    let mount = cluster.mount();
    for i in (0..FILES).step_by(10) {
        assert!(fs::read(mount.join(format!("small{i}"))).unwrap() == rng::bytes(i, 20_000), "small{i}");
        fs::remove_file(mount.join(format!("small{i}"))).unwrap();
    }
    wait_shards(&cluster, "all shards to go", |n| n == 0);
}

#[test]
fn parts_of_a_file_die_one_by_one() {
    let cluster = Cluster::start("parts", Setup::default());
    let mount = cluster.mount();
    let path = mount.join("file");
    let len = 48 << 20;
    let mut data = rng::bytes(1, len);
    fs::write(&path, &data).unwrap();
    wait_shards(&cluster, "the file's shards", |n| n >= 6);
    let whole = cluster.status().shards();
    // The last block goes with a truncation, the first is overwritten bit by bit and goes when nothing of it is left.
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len((len - (16 << 20)) as u64).unwrap();
    file.sync_all().unwrap();
    data.truncate(len - (16 << 20));
    wait_shards(&cluster, "the truncated block to go", |n| n < whole);
    for part in 0..16 {
        use std::os::unix::fs::FileExt;
        let fresh = rng::bytes(100 + part, 1 << 20);
        let at = (part as usize) << 20;
        file.write_all_at(&fresh, at as u64).unwrap();
        file.sync_all().unwrap();
        data[at..at + (1 << 20)].copy_from_slice(&fresh);
    }
    drop(file);
    mount.unmount();
    let mount = cluster.mount();
    assert!(fs::read(mount.join("file")).unwrap() == data);
    fs::remove_file(mount.join("file")).unwrap();
    wait_shards(&cluster, "all shards to go", |n| n == 0);
}
