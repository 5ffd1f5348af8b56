//! What one client does, another one sees: at close for bytes, at once for names.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{ErrorKind, Read, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
    thread,
    time::Duration,
};

use fjordfs_tests::{
    Cluster, MountPoint, Setup,
    locks::{Kind, flock},
    rng,
    wait::SOON,
    wait_for,
};
use rand::Rng;
use rustix::{
    fs::{Mode, OFlags},
    process::Signal,
};

#[test]
fn what_is_closed_is_what_the_other_opens() {
    let seed = rng::seed("close_to_open");
    let mut random = rng::stream(seed, 0);
    let cluster = Cluster::start("close-to-open", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let name = "shared";
    let mut expected = Vec::new();
    for round in 0..60 {
        let (writer, reader) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        match random.random_range(0..4) {
            // The same length again: only the version tells the reader's kernel that its pages are old.
            0 if !expected.is_empty() => {
                expected = rng::bytes(random.random(), expected.len());
                fs::write(writer.join(name), &expected).unwrap();
            }
            1 if !expected.is_empty() => {
                let at = random.random_range(0..expected.len());
                let data = rng::bytes(random.random(), random.random_range(1..9000));
                let file = File::options().write(true).open(writer.join(name)).unwrap();
                file.write_all_at(&data, at as u64).unwrap();
                expected.resize(expected.len().max(at + data.len()), 0);
                expected[at..at + data.len()].copy_from_slice(&data);
            }
            2 => {
                let size = random.random_range(0..300_000);
                let file =
                    File::options().create(true).truncate(false).write(true).open(writer.join(name)).unwrap();
                file.set_len(size as u64).unwrap();
                expected.resize(size, 0);
            }
            _ => {
                expected = rng::bytes(random.random(), random.random_range(0..400_000));
                fs::write(writer.join(name), &expected).unwrap();
            }
        }
        for mount in [reader, writer] {
            let got = fs::read(mount.join(name)).unwrap();
            assert!(
                got == expected,
                "round {round}, FJORD_SEED={seed}: {}",
                first_difference(&got, &expected)
            );
            assert_eq!(fs::metadata(mount.join(name)).unwrap().len(), expected.len() as u64);
        }
    }
    a.unmount();
    b.unmount();
}

fn first_difference(got: &[u8], expected: &[u8]) -> String {
    let at = got.iter().zip(expected).position(|(g, e)| g != e);
    format!("{} bytes instead of {}, first wrong one at {at:?}", got.len(), expected.len())
}

/// While data servers stand still, the other waits rather than see the file as it was before.
#[test]
fn what_is_closed_is_seen_however_slowly_it_is_stored() {
    let mut cluster = Cluster::start("slow-close", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let data = rng::bytes(3, 300_000);
    fs::write(a.join("f"), b"").unwrap();
    let mut file = File::options().append(true).open(a.join("f")).unwrap();
    let servers = 0..Setup::default().servers;
    servers.clone().for_each(|server| cluster.data(server).signal(Signal::STOP));
    file.write_all(&data).unwrap();
    drop(file);
    let read = thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(b.join("f")));
        // Longer than a lease is good for, and shorter than a session.
        thread::sleep(Duration::from_secs(5));
        servers.for_each(|server| cluster.data(server).signal(Signal::CONT));
        reader.join().unwrap()
    });
    assert!(read.unwrap() == data);
    a.unmount();
    b.unmount();
}

#[test]
fn names_change_for_everyone_at_once() {
    let cluster = Cluster::start("names", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let missing = |path: &Path| fs::symlink_metadata(path).is_err_and(|e| e.kind() == ErrorKind::NotFound);
    for i in 0..50 {
        let (x, y) = (format!("x{i}"), format!("y{i}"));
        // The other side looks first, so that whatever it may have cached is wrong afterwards.
        assert!(missing(&b.join(&x)) && missing(&b.join(&y)));
        fs::write(a.join(&x), x.as_bytes()).unwrap();
        assert_eq!(fs::read(b.join(&x)).unwrap(), x.as_bytes());
        fs::rename(a.join(&x), a.join(&y)).unwrap();
        assert!(missing(&b.join(&x)));
        assert_eq!(fs::read(b.join(&y)).unwrap(), x.as_bytes());
        fs::hard_link(b.join(&y), b.join(&x)).unwrap();
        assert_eq!(fs::metadata(a.join(&y)).unwrap().nlink(), 2);
        fs::remove_file(a.join(&y)).unwrap();
        assert!(missing(&b.join(&y)));
        fs::create_dir(b.join(&y)).unwrap();
        assert!(fs::metadata(a.join(&y)).unwrap().is_dir());
        fs::rename(b.join(&x), b.join(&y).join("z")).unwrap();
        let names: Vec<_> = fs::read_dir(a.join(&y)).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["z"]);
        assert_eq!(fs::remove_dir(a.join(&y)).unwrap_err().kind(), ErrorKind::DirectoryNotEmpty);
    }
}

#[test]
fn appenders_on_two_clients_lose_nothing() {
    const RECORDS: usize = 300;
    // Divides a page: the kernel hands a write over page by page when the first of its pages is not cached, so a longer
    // record may be parted by someone else's, as on other network filesystems. Its bytes are not lost either way.
    const LEN: usize = 128;
    let cluster = Cluster::start("append", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let record = |writer: usize, i: usize| {
        let mut text = format!("writer {writer} record {i:06} ");
        text.extend(std::iter::repeat_n('.', LEN - 1 - text.len()));
        text.push('\n');
        text
    };
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let path = [&a, &b][writer % 2].join("log");
            scope.spawn(move || {
                // Reopened now and then: an appender must also survive finding a file that others have extended.
                for chunk in 0..RECORDS / 50 {
                    let mut file = File::options().append(true).create(true).open(&path).unwrap();
                    for i in chunk * 50..(chunk + 1) * 50 {
                        file.write_all(record(writer, i).as_bytes()).unwrap();
                    }
                    if chunk % 2 == 0 {
                        file.sync_all().unwrap();
                    }
                }
            });
        }
    });
    let expected: BTreeSet<String> = (0..4).flat_map(|w| (0..RECORDS).map(move |i| record(w, i))).collect();
    for mount in [&a, &b] {
        let text = fs::read(mount.join("log")).unwrap();
        let got: Vec<String> = text.chunks(LEN).map(|r| String::from_utf8_lossy(r).into_owned()).collect();
        let distinct: BTreeSet<String> = got.iter().cloned().collect();
        let lost: Vec<_> = expected.difference(&distinct).take(5).collect();
        let strange: Vec<_> = distinct.difference(&expected).take(5).collect();
        let mut seen = BTreeSet::new();
        let twice: Vec<_> = got.iter().enumerate().filter(|(_, r)| !seen.insert(*r)).take(5).collect();
        let fine = lost.is_empty() && strange.is_empty() && twice.is_empty();
        assert!(fine, "{} records; lost {lost:#?}, nobody wrote {strange:#?}, twice {twice:#?}", got.len());
    }
}

#[test]
fn an_unlinked_open_file_lives_on_also_across_a_metaserver_restart() {
    let mut cluster = Cluster::start("orphan", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let small = rng::bytes(1, 3000);
    let large = rng::bytes(2, 5 << 20);
    fs::write(a.join("small"), &small).unwrap();
    fs::write(a.join("large"), &large).unwrap();
    let open: Vec<File> = ["small", "large"]
        .iter()
        .map(|name| File::options().read(true).write(true).open(b.join(name)).unwrap())
        .collect();
    fs::remove_file(a.join("small")).unwrap();
    fs::remove_file(a.join("large")).unwrap();
    assert!(fs::read_dir(b.path()).unwrap().next().is_none());
    for restart in [false, true] {
        if restart {
            cluster.kill_meta();
            cluster.start_meta();
            cluster.wait_healthy();
        }
        for (file, expected) in open.iter().zip([&small, &large]) {
            assert_eq!(file.metadata().unwrap().nlink(), 0);
            forget_pages(file);
            let mut got = vec![0; expected.len()];
            file.read_exact_at(&mut got, 0).unwrap();
            assert!(got == *expected, "restart: {restart}");
            // A second open of the nameless file goes all the way to the metaserver.
            let mut again = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
            got.clear();
            again.read_to_end(&mut got).unwrap();
            assert!(got == *expected, "opened again, restart: {restart}");
        }
    }
    assert_eq!(cluster.status().orphans(), 2);
    open[1].write_all_at(b"still writable", 0).unwrap();
    open[1].sync_all().unwrap();
    drop(open);
    wait_for("the files to go with their last close", 2 * SOON, || {
        let s = cluster.status();
        if s.orphans() == 0 && s.shards() == 0 { Ok(()) } else { Err(s.to_string()) }
    });
    a.unmount();
    b.unmount();
}

fn forget_pages(file: &File) {
    // SAFETY: the descriptor is open; the call touches no memory.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

#[test]
fn a_mount_of_one_client_ends_without_the_other() {
    let cluster = Cluster::start("independent", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    fs::write(a.join("f"), b"one").unwrap();
    let held = File::open(a.join("f")).unwrap();
    drop(held);
    a.kill9();
    fs::write(b.join("f"), b"two").unwrap();
    let c: MountPoint = cluster.mount();
    assert_eq!(fs::read(c.join("f")).unwrap(), b"two");
    b.unmount();
    c.unmount();
}

#[test]
fn a_mapping_is_seen_by_others_after_msync() {
    let cluster = Cluster::start("mapped", Setup::default());
    let mounts = [cluster.mount(), cluster.mount()];
    fs::write(mounts[0].join("f"), [20; 4096]).unwrap();
    for turn in 0..10u8 {
        let path = mounts[usize::from(turn) % 2].join("f");
        let file = File::options().read(true).write(true).open(path).unwrap();
        flock(&file, Kind::Write, true).unwrap();
        // SAFETY: nobody truncates the file while the map lives.
        let mut map = unsafe { memmap2::MmapMut::map_mut(&file).unwrap() };
        assert_eq!(map[0], 20 + turn);
        map[0] += 1;
        map.flush().unwrap();
        flock(&file, Kind::Unlock, true).unwrap();
    }
    mounts.into_iter().for_each(MountPoint::unmount);
}

#[test]
fn what_linux_does_not_pass_on() {
    let cluster = Cluster::start("not-passed-on", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let directories = [&a, &b].map(|mount| File::open(mount.path()).unwrap());
    directories.iter().for_each(|directory| flock(directory, Kind::Write, false).unwrap());
    fs::write(a.join("f"), "f").unwrap();
    let held = rustix::fs::open(a.join("f"), OFlags::PATH, Mode::empty()).unwrap();
    fs::remove_file(a.join("f")).unwrap();
    thread::sleep(Duration::from_secs(2));
    assert_eq!(rustix::fs::fstat(&held).map(|_| ()), Err(rustix::io::Errno::STALE));
    drop((held, directories));
    a.unmount();
    b.unmount();
}
