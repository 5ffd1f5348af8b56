//! Bytes are verified or refused: never wrong ones, never zeros for lost ones.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

use fjordfs_tests::{
    Cluster, MountPoint, Setup,
    fault::{Place, find_pages, flip, truncate, volumes},
    rng,
    tree::{self, Tree},
};

const PAGE: usize = 4096;
const PAGES: usize = 2048;

/// A file in which every page begins with a marker of its own, so that its copies are found on the targets.
struct Marked {
    data: Vec<u8>,
}

impl Marked {
    fn write(mount: &MountPoint, name: &str) -> Marked {
        let mut data = rng::bytes(name.len() as u64, PAGES * PAGE);
        for page in 0..PAGES {
            let marker = Marked::marker(name, page);
            data[page * PAGE..page * PAGE + marker.len()].copy_from_slice(&marker);
        }
        let file = File::create(mount.join(name)).unwrap();
        file.write_all_at(&data, 0).unwrap();
        file.sync_all().unwrap();
        Marked { data }
    }

    fn marker(name: &str, page: usize) -> Vec<u8> {
        format!("<fjord {name} page {page:06}>").into_bytes()
    }

    fn page(&self, page: usize) -> &[u8] {
        &self.data[page * PAGE..(page + 1) * PAGE]
    }
}

/// Where every copy of a page lies.
fn copies(cluster: &Cluster, servers: usize, name: &str, page: usize) -> Vec<Place> {
    let marker = Marked::marker(name, page);
    (0..servers).flat_map(|s| find_pages(&cluster.target_folder(s, 0), &marker)).collect()
}

#[test]
fn a_rotten_page_is_read_from_another_copy() {
    rotten_pages("rot", "replica:2", 2);
}

#[test]
fn a_rotten_page_is_decoded_from_other_shards() {
    rotten_pages("rot-ec", "ec:2+1", 1);
}

fn rotten_pages(name: &str, policy: &str, copies_expected: usize) {
    let mut cluster = Cluster::start(name, Setup::policy(policy));
    let mount = cluster.mount();
    let file = Marked::write(&mount, "file");
    mount.unmount();
    for (n, page) in (0..PAGES).step_by(PAGES / 32).enumerate() {
        // Of the halves of the block, which are its data shards, other pages: no page is lost on two targets.
        let page = if page < PAGES / 2 { page } else { page + 5 };
        let places = copies(&cluster, 3, "file", page);
        assert_eq!(places.len(), copies_expected, "page {page} should lie in so many places: {places:?}");
        // One bit's worth at the start, the middle or the end of a page, of either copy in turn.
        let place = &places[n % copies_expected];
        let place = Place { offset: place.offset + [0, 2000, 4095][n % 3], ..place.clone() };
        flip(&place, 1);
    }
    let mount = cluster.mount();
    assert!(fs::read(mount.join("file")).unwrap() == file.data);
    cluster.assert_running();
}

#[test]
fn with_all_copies_rotten_a_read_fails_and_its_neighbours_do_not() {
    for (policy, copies_expected) in [("replica:1", 1), ("replica:2", 2)] {
        let mut cluster = Cluster::start("lost", Setup::policy(policy));
        let mount = cluster.mount();
        let file = Marked::write(&mount, "file");
        mount.unmount();
        let rotten = 777;
        let places = copies(&cluster, 3, "file", rotten);
        assert_eq!(places.len(), copies_expected, "{policy}: {places:?}");
        places.iter().for_each(|place| flip(place, 64));
        let mount = cluster.mount();
        let error = fs::read(mount.join("file")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{policy}: {error}");
        let (mut good, mut bad) = (0, 0);
        let open = File::open(mount.join("file")).unwrap();
        for page in 0..PAGES {
            let mut got = [0; PAGE];
            match open.read_exact_at(&mut got, (page * PAGE) as u64) {
                Ok(()) => {
                    assert!(got == file.page(page), "{policy}: wrong bytes in page {page}");
                    assert_ne!(page, rotten, "{policy}: the rotten page cannot have been read");
                    good += 1;
                }
                Err(e) => {
                    assert_eq!(e.raw_os_error(), Some(libc::EIO), "{policy}, page {page}: {e}");
                    bad += 1;
                }
            }
        }
        assert!((1..=256).contains(&bad), "{policy}: {bad} pages unreadable, {good} readable");
        cluster.assert_running();
    }
}

/// One loss is decoded around; where a second one meets it, there is an error and nothing else.
#[test]
fn with_a_server_gone_and_a_page_rotten_every_byte_read_is_right() {
    let mut cluster = Cluster::start("rot-and-gone", Setup::policy("ec:2+1"));
    let mount = cluster.mount();
    let file = Marked::write(&mount, "file");
    mount.unmount();
    let rotten = 777;
    let places = copies(&cluster, 3, "file", rotten);
    places.iter().for_each(|place| flip(place, 64));
    let holder = (0..3).find(|server| places[0].file.starts_with(cluster.target_folder(*server, 0))).unwrap();
    cluster.kill_data((holder + 1) % 3);
    // The server may come back, so the first to miss it waits as long as an operation may take.
    let mount = cluster.mount_with("timeout=20s");
    let open = File::open(mount.join("file")).unwrap();
    let mut bad = 0;
    for page in 0..PAGES {
        let mut got = [0; PAGE];
        match open.read_exact_at(&mut got, (page * PAGE) as u64) {
            Ok(()) => {
                assert!(got == file.page(page), "wrong bytes in page {page}");
                assert_ne!(page, rotten, "the rotten page cannot have been read");
            }
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(libc::EIO), "page {page}: {e}");
                bad += 1;
            }
        }
    }
    // The page's own chunk, and the one that would be decoded from it.
    assert!((1..=512).contains(&bad), "{bad} pages unreadable");
}

#[test]
fn a_truncated_volume_is_reported_and_the_other_copies_serve() {
    let seed = rng::seed("truncated");
    let mut cluster = Cluster::start("truncated", Setup::policy("replica:2"));
    let source = cluster.dir("source");
    Tree::mixed().generate(&source, seed);
    let mount = cluster.mount();
    fjordfs_tests::process::sh(cluster.folder(), &format!("cp -a source {}", mount.path().display()));
    mount.unmount();
    for (server, hard) in [(0, false), (0, true)] {
        // Once after a clean stop (the index is checkpointed), once after kill -9 (it is scanned).
        if hard {
            cluster.kill_data(server);
        } else {
            cluster.stop_data(server);
        }
        let target = cluster.target_folder(server, 0);
        let volume = volumes(&target).first().expect("a volume").clone();
        truncate(&volume, written_end(&volume) / 2);
        cluster.start_data(server);
        cluster.wait_healthy();
        let log = cluster.data(server).log();
        assert!(log.contains("truncated"), "the log does not tell of it:\n{log}");
        let mount = cluster.mount();
        tree::assert_same(&source, &mount.join("source"), tree::ALL);
        // The damaged target takes new data again.
        let after = rng::bytes(seed, 3 << 20);
        for i in 0..8 {
            fs::write(mount.join(format!("after{i}")), &after).unwrap();
        }
        mount.unmount();
        let mount = cluster.mount();
        for i in 0..8 {
            assert!(fs::read(mount.join(format!("after{i}"))).unwrap() == after);
        }
        mount.unmount();
    }
    cluster.assert_running();
}

/// Where the last written byte of a preallocated volume may lie: its allocation is of no use for that.
fn written_end(volume: &Path) -> u64 {
    let file = File::open(volume).unwrap();
    let mut end = 0;
    while let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(end)) {
        end = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data)).unwrap();
    }
    assert!(end > 1 << 20, "{} holds only {end} bytes", volume.display());
    end
}
