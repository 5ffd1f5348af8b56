//! Semantics that random operations on small trees do not meet: large directories, races, special files, huge sparse
//! files, shared maps, unusual times, other users.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, FileTimes, OpenOptions},
    io::{self, Read, Write},
    os::fd::AsRawFd,
    os::unix::{
        fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::Path,
    process::Command,
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use fjordfs_tests::{
    Cluster, Setup,
    aio::Aio,
    process::{Run, have, sh},
    rng, run,
    wait::{SOON, wait_until},
};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Timespec, Timestamps};

#[test]
fn a_large_directory_lists_every_entry_once_also_while_it_changes() {
    // More than a page of a listing, on the wire and in the kernel's buffer.
    const ENTRIES: usize = 1200;
    let cluster = Cluster::start("large-directory", Setup::default());
    let mount = cluster.mount();
    let dir = mount.join("dir");
    fs::create_dir(&dir).unwrap();
    let name = |i: usize| format!("entry number {i:05} {}", "x".repeat(i % 60));
    thread::scope(|scope| {
        for part in 0..4 {
            let dir = &dir;
            scope.spawn(move || {
                (part..ENTRIES).step_by(4).for_each(|i| drop(File::create_new(dir.join(name(i))).unwrap()));
            });
        }
    });
    let list = |dir: &Path| {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for entry in fs::read_dir(dir).unwrap() {
            *seen.entry(entry.unwrap().file_name().into_string().unwrap()).or_default() += 1;
        }
        seen
    };
    let seen = list(&dir);
    assert_eq!(seen.len(), ENTRIES);
    assert!(seen.values().all(|n| *n == 1));
    // Odd ones go and new ones come while the directory is read: what stays is seen exactly once, nothing twice.
    thread::scope(|scope| {
        let changer = scope.spawn(|| {
            for i in (1..ENTRIES).step_by(2) {
                fs::remove_file(dir.join(name(i))).unwrap();
                fs::write(dir.join(format!("new {i}")), b"").unwrap();
            }
        });
        while !changer.is_finished() {
            let seen = list(&dir);
            assert!(seen.values().all(|n| *n == 1), "an entry is listed twice");
            let lost = (0..ENTRIES).step_by(2).find(|i| !seen.contains_key(&name(*i)));
            assert_eq!(lost, None, "an entry that was there all the time is not listed");
        }
    });
    // Deleting while reading, as rm does, reaches everything.
    fs::remove_dir_all(&dir).unwrap();
    mount.unmount();
}

#[test]
fn of_all_who_create_exclusively_one_wins() {
    const RACERS: usize = 6;
    let cluster = Cluster::start("races", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    for round in 0..40 {
        let start = Barrier::new(RACERS);
        let wins = |work: &(dyn Fn(&Path, usize) -> bool + Sync)| {
            thread::scope(|scope| {
                let racers: Vec<_> = (0..RACERS)
                    .map(|i| {
                        let (root, start) = (if i % 2 == 0 { a.path() } else { b.path() }, &start);
                        scope.spawn(move || {
                            start.wait();
                            work(root, i)
                        })
                    })
                    .collect();
                racers.into_iter().map(|r| r.join().unwrap()).filter(|won| *won).count()
            })
        };
        assert_eq!(wins(&|root, _| File::create_new(root.join(format!("file{round}"))).is_ok()), 1);
        assert_eq!(wins(&|root, _| fs::create_dir(root.join(format!("dir{round}"))).is_ok()), 1);
        let moved = |root: &Path, i: usize| {
            fs::rename(root.join(format!("file{round}")), root.join(format!("moved{round}-{i}"))).is_ok()
        };
        assert_eq!(wins(&moved), 1);
        assert_eq!(wins(&|root, _| fs::remove_dir(root.join(format!("dir{round}"))).is_ok()), 1);
    }
    assert_eq!(fs::read_dir(b.path()).unwrap().count(), 40);
}

#[test]
fn special_files() {
    let cluster = Cluster::start("special", Setup::default());
    let mount = cluster.mount();
    let make = |name: &str, kind, device| {
        rustix::fs::mknodat(CWD, mount.join(name), kind, Mode::from_raw_mode(0o640), device).unwrap();
        fs::symlink_metadata(mount.join(name)).unwrap()
    };
    let fifo = make("fifo", FileType::Fifo, 0);
    assert!(fifo.file_type().is_fifo());
    assert!(make("socket", FileType::Socket, 0).file_type().is_socket());
    let null = make("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    assert!(null.file_type().is_char_device());
    assert_eq!(null.rdev(), rustix::fs::makedev(1, 3));
    let block = make("block", FileType::BlockDevice, rustix::fs::makedev(259, 1_000));
    assert!(block.file_type().is_block_device());
    assert_eq!(block.rdev(), rustix::fs::makedev(259, 1_000));
    assert_eq!(block.mode() & 0o777, 0o640);
    thread::scope(|scope| {
        scope.spawn(|| fs::write(mount.join("fifo"), b"through the pipe").unwrap());
        assert_eq!(fs::read(mount.join("fifo")).unwrap(), b"through the pipe");
    });
    // Socket paths are at most 108 bytes long.
    let holder = File::open(mount.path()).unwrap();
    let short = format!("/proc/self/fd/{}/s", holder.as_raw_fd());
    let listener = UnixListener::bind(&short).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| UnixStream::connect(&short).unwrap().write_all(b"hello").unwrap());
        let mut got = String::new();
        listener.accept().unwrap().0.read_to_string(&mut got).unwrap();
        assert_eq!(got, "hello");
    });
    drop((listener, holder));
    mount.unmount();
    let mount = cluster.mount();
    let names: BTreeSet<String> =
        fs::read_dir(mount.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(names, BTreeSet::from(["fifo", "socket", "null", "block", "s"].map(String::from)));
    names.iter().for_each(|name| fs::remove_file(mount.join(name)).unwrap());
    mount.unmount();
}

#[test]
fn a_huge_sparse_file() {
    let cluster = Cluster::start("huge", Setup::default());
    let mount = cluster.mount();
    let size: u64 = 5 << 40;
    let path = mount.join("huge");
    let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
    file.set_len(size).unwrap();
    let data = rng::bytes(1, 100_000);
    let places = [123, (16 << 20) - 5, 1 << 32, (3 << 40) + 77, size - 100_000];
    places.iter().for_each(|at| file.write_all_at(&data, *at).unwrap());
    file.sync_all().unwrap();
    drop(file);
    mount.unmount();
    let mount = cluster.mount();
    let file = File::open(mount.join("huge")).unwrap();
    let attr = file.metadata().unwrap();
    assert_eq!(attr.len(), size);
    assert!(attr.blocks() * 512 < 10 << 20, "{} bytes are allocated for 500 kB", attr.blocks() * 512);
    let mut got = vec![1; 300_000];
    for at in places {
        let take = got.len().min((size - at) as usize);
        file.read_exact_at(&mut got[..take], at).unwrap();
        assert!(got[..100_000] == data, "data at {at}");
        assert!(got[100_000..take].iter().all(|b| *b == 0), "hole after {at}");
    }
    assert_eq!(file.read_at(&mut got, size).unwrap(), 0);
    // Cut off in the middle and grown again: what was cut reads as zeros.
    drop(file);
    let file = File::options().read(true).write(true).open(mount.join("huge")).unwrap();
    file.set_len(500).unwrap();
    file.set_len(200_000).unwrap();
    file.read_exact_at(&mut got[..200_000], 0).unwrap();
    assert!(got[123..500] == data[..377] && got[500..200_000].iter().all(|b| *b == 0));
    drop(file);
    mount.unmount();
}

#[test]
fn maps_and_descriptors_see_each_other() {
    let cluster = Cluster::start("maps", Setup::default());
    let mount = cluster.mount();
    let path = mount.join("mapped");
    let mut expected = rng::bytes(1, 3 << 20);
    fs::write(&path, &expected).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    // SAFETY: nobody truncates the file while the maps live.
    let (mut map, other) =
        unsafe { (memmap2::MmapMut::map_mut(&file).unwrap(), memmap2::Mmap::map(&file).unwrap()) };
    assert!(map[..] == expected[..]);
    file.write_all_at(b"by write", 5000).unwrap();
    expected[5000..5008].copy_from_slice(b"by write");
    assert!(map[..] == expected[..] && other[..] == expected[..]);
    map[2_000_000..2_000_006].copy_from_slice(b"by map");
    expected[2_000_000..2_000_006].copy_from_slice(b"by map");
    assert!(fs::read(&path).unwrap() == expected && other[..] == expected[..]);
    // The file has no name any more and its map is written once more.
    fs::hard_link(&path, mount.join("kept")).unwrap();
    fs::remove_file(&path).unwrap();
    map[7] ^= 1;
    expected[7] ^= 1;
    map.flush().unwrap();
    drop((map, other, file));
    mount.unmount();
    let mount = cluster.mount();
    assert!(fs::read(mount.join("kept")).unwrap() == expected);
    mount.unmount();
}

#[test]
fn times_and_what_changes_them() {
    let cluster = Cluster::start("times", Setup::default());
    let mount = cluster.mount();
    let path = mount.join("f");
    fs::write(&path, b"x").unwrap();
    for (sec, nsec) in [(0, 1), (-1, 999_999_999), (-2_147_483_649, 0), (16_725_225_600, 5), (1 << 40, 0)] {
        let time = Timespec { tv_sec: sec, tv_nsec: nsec };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, &path, &times, AtFlags::empty()).unwrap();
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (sec, nsec));
        assert_eq!((meta.atime(), meta.atime_nsec()), (sec, nsec));
    }
    let omit = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
    let now = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
    let old = fs::metadata(&path).unwrap();
    let times = Timestamps { last_access: now, last_modification: omit };
    rustix::fs::utimensat(CWD, &path, &times, AtFlags::empty()).unwrap();
    let new = fs::metadata(&path).unwrap();
    assert_eq!(new.mtime(), old.mtime());
    assert_ne!(new.atime(), old.atime());
    // Directories: their times and link counts follow their entries.
    let dir = mount.join("d");
    fs::create_dir(&dir).unwrap();
    let mut last = stamp(&dir);
    let mut changes = |what: &str, work: &dyn Fn()| {
        work();
        let now = stamp(&dir);
        assert!(now > last, "{what} does not change the directory's times: {last:?} {now:?}");
        last = now;
    };
    changes("create", &|| fs::write(dir.join("a"), b"").unwrap());
    changes("rename", &|| fs::rename(dir.join("a"), dir.join("b")).unwrap());
    changes("link", &|| fs::hard_link(dir.join("b"), dir.join("c")).unwrap());
    changes("unlink", &|| fs::remove_file(dir.join("b")).unwrap());
    changes("mkdir", &|| fs::create_dir(dir.join("sub")).unwrap());
    assert_eq!(fs::metadata(&dir).unwrap().nlink(), 3);
    changes("rename of a directory out of it", &|| fs::rename(dir.join("sub"), mount.join("sub")).unwrap());
    assert_eq!(fs::metadata(&dir).unwrap().nlink(), 2);
    mount.unmount();
}

fn stamp(path: &Path) -> (i64, i64, i64, i64) {
    let meta = fs::metadata(path).unwrap();
    (meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec())
}

fn set_accessed(path: &Path, time: SystemTime) {
    File::open(path).unwrap().set_times(FileTimes::new().set_accessed(time)).unwrap();
}

fn forget_pages(path: &Path) {
    let file = File::open(path).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

fn accessed(path: &Path) -> SystemTime {
    fs::symlink_metadata(path).unwrap().accessed().unwrap()
}

#[test]
fn access_times_follow_the_rules_of_relatime() {
    let cluster = Cluster::start("atime", Setup::default());
    let (a, b, c) = (cluster.mount(), cluster.mount(), cluster.mount_with("noatime"));
    fs::create_dir(a.join("d")).unwrap();
    fs::write(a.join("d/f"), "text").unwrap();
    std::os::unix::fs::symlink("f", a.join("d/l")).unwrap();
    let long_ago = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let (file, folder, link) = (b.join("d/f"), b.join("d"), b.join("d/l"));
    // Not where nobody wants it, in either way.
    set_accessed(&a.join("d/f"), long_ago);
    assert_eq!(fs::read(c.join("d/f")).unwrap(), b"text");
    let noatime = OpenOptions::new().read(true).custom_flags(libc::O_NOATIME).open(&file).unwrap();
    assert_eq!(io::read_to_string(noatime).unwrap(), "text");
    assert_eq!(accessed(&file), long_ago);
    // The first read, the first listing, and the first time that a link is followed.
    let began = SystemTime::now();
    forget_pages(&file);
    fs::read(&file).unwrap();
    let ctime = fs::metadata(&file).unwrap().ctime_nsec();
    assert!(accessed(&file) >= began);
    let (folder_before, link_before) = (accessed(&folder), accessed(&link));
    fs::read_dir(&folder).unwrap().for_each(drop);
    fs::read_link(&link).unwrap();
    assert!(accessed(&folder) > folder_before && accessed(&link) > link_before);
    // Not the next ones.
    let first = [&file, &folder, &link].map(|path| accessed(path));
    forget_pages(&file);
    fs::read(&file).unwrap();
    fs::read_dir(&folder).unwrap().for_each(drop);
    fs::read_link(&link).unwrap();
    assert_eq!([&file, &folder, &link].map(|path| accessed(path)), first);
    assert_eq!(fs::metadata(&file).unwrap().ctime_nsec(), ctime, "reading is no change");
    // Who has cached nothing hears of it once it has been sent.
    wait_until("another client to see it", SOON, || {
        let other = cluster.mount();
        let seen = ["d/f", "d", "d/l"].map(|name| accessed(&other.join(name)));
        other.unmount();
        seen == first
    });
    // After a change, it counts again; what is set stays as set.
    fs::write(a.join("d/f"), "more").unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"more");
    assert!(accessed(&file) > first[0]);
    set_accessed(&file, long_ago);
    assert_eq!(accessed(&file), long_ago);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(accessed(&file), long_ago);
    for mount in [a, b, c] {
        mount.unmount();
    }
}

#[test]
fn deep_paths_long_links_and_odd_names() {
    let cluster = Cluster::start("names", Setup::default());
    let mount = cluster.mount();
    let mut deep = mount.path().to_owned();
    for level in 0..120 {
        deep.push(format!("level{level}"));
    }
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("bottom"), b"deep").unwrap();
    let up: String = "../".repeat(120);
    assert_eq!(
        fs::read(
            deep.join(up)
                .join("level0")
                .join(deep.strip_prefix(mount.join("level0")).unwrap())
                .join("bottom")
        )
        .unwrap(),
        b"deep"
    );
    let target = "t".repeat(4095);
    std::os::unix::fs::symlink(&target, mount.join("link")).unwrap();
    assert_eq!(fs::read_link(mount.join("link")).unwrap().to_str().unwrap(), target);
    let odd: Vec<Vec<u8>> =
        vec![b"\xff\xfe".to_vec(), b"new\nline".to_vec(), b"...".to_vec(), b"-rf".to_vec(), vec![b'\\'; 255]];
    for name in &odd {
        let path = mount.join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name));
        fs::write(&path, name).unwrap();
        assert_eq!(fs::read(&path).unwrap(), *name);
    }
    assert_eq!(fs::read_dir(mount.path()).unwrap().count(), odd.len() + 2);
    fs::rename(mount.join("level0"), mount.join("moved")).unwrap();
    fs::remove_dir_all(mount.join("moved")).unwrap();
    mount.unmount();
}

#[test]
fn other_users_meet_the_permissions() {
    if !have("setpriv") {
        return;
    }
    let cluster = Cluster::start("users", Setup::default());
    fs::set_permissions(cluster.folder(), fs::Permissions::from_mode(0o755)).unwrap();
    let mount = cluster.mount_with("allow_other");
    let make = |name: &str, mode: u32| {
        fs::write(mount.join(name), b"content").unwrap();
        fs::set_permissions(mount.join(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    fs::set_permissions(mount.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    make("private", 0o600);
    make("readable", 0o644);
    make("setuid", 0o6777);
    let as_user = |line: &str| -> Run {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--inh-caps=-all",
            "bash",
            "-c",
            line,
        ]);
        command.current_dir(mount.path());
        run(command)
    };
    as_user("cat readable").ok();
    as_user("cat private").fails_saying(&["denied"]);
    as_user("echo x >>readable").fails_saying(&["denied"]);
    // The sticky bit: others' files in a shared directory stay.
    as_user("rm -f readable").fails_saying(&["permitted"]);
    as_user("echo mine >mine && mv mine mine2 && rm mine2").ok();
    as_user("chmod 777 readable").fails_saying(&["permitted"]);
    // A write by someone without the right to keep them drops the setuid and setgid bits.
    as_user("echo more >>setuid").ok();
    assert_eq!(fs::metadata(mount.join("setuid")).unwrap().mode() & 0o7777, 0o777);
    // What the superuser writes keeps them.
    fs::set_permissions(mount.join("setuid"), fs::Permissions::from_mode(0o6777)).unwrap();
    File::options().append(true).open(mount.join("setuid")).unwrap().write_all(b"x").unwrap();
    assert_eq!(fs::metadata(mount.join("setuid")).unwrap().mode() & 0o7777, 0o6777);
    mount.unmount();
}

#[test]
fn direct_io_and_buffered_io_agree() {
    let cluster = Cluster::start("direct", Setup::default());
    let mount = cluster.mount();
    let data = rng::bytes(1, 4 << 20);
    fs::write(mount.join("f"), &data).unwrap();
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    let direct = File::from(rustix::fs::open(mount.join("f"), flags, Mode::empty()).unwrap());
    let buffered = File::options().read(true).write(true).open(mount.join("f")).unwrap();
    // Aligned memory, as O_DIRECT wants it.
    let mut map = memmap2::MmapMut::map_anon(1 << 20).unwrap();
    direct.read_exact_at(&mut map, 1 << 20).unwrap();
    assert!(map[..] == data[1 << 20..2 << 20]);
    map.fill(7);
    direct.write_all_at(&map, 2 << 20).unwrap();
    let mut got = vec![0; 1 << 20];
    buffered.read_exact_at(&mut got, 2 << 20).unwrap();
    assert!(got.iter().all(|b| *b == 7));
    buffered.write_all_at(&[9; 8192], 2 << 20).unwrap();
    direct.read_exact_at(&mut map, 2 << 20).unwrap();
    assert!(map[..8192].iter().all(|b| *b == 9) && map[8192..].iter().all(|b| *b == 7));
    drop((direct, buffered));
    mount.unmount();
}

/// xfstests' generic/074. A commit that took time by the square of its extents ended in ETIMEDOUT.
#[test]
fn a_file_of_many_pieces_is_committed_and_written_anew() {
    const PIECES: u64 = 12_288;
    let cluster = Cluster::start("pieces", Setup::default());
    let mount = cluster.mount();
    for byte in [1, 2] {
        let file = File::create(mount.join("f")).unwrap();
        for i in 0..PIECES {
            file.write_all_at(&[byte; 512], i * 1024).unwrap();
        }
        file.sync_all().unwrap();
    }
    mount.unmount();
    let mount = cluster.mount();
    let data = fs::read(mount.join("f")).unwrap();
    assert_eq!(data.len() as u64, PIECES * 1024 - 512);
    for (i, half) in data.chunks(512).enumerate() {
        let expected = if i % 2 == 0 { 2 } else { 0 };
        assert!(half.iter().all(|b| *b == expected), "byte {} or one of the next", i * 512);
    }
    mount.unmount();
}

/// xfstests' generic/451. The kernel drops cached pages before a direct write, and after one that is not asynchronous.
#[test]
fn what_is_written_directly_and_asynchronously_is_read_also_by_who_was_reading_meanwhile() {
    const SIZE: usize = 640 << 10;
    let cluster = Cluster::start("aio", Setup::default());
    let mount = cluster.mount();
    let path = mount.join("f");
    fs::write(&path, vec![0; SIZE]).unwrap();
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    let direct = File::from(rustix::fs::open(&path, flags, Mode::empty()).unwrap());
    let buffered = File::open(&path).unwrap();
    let done = AtomicBool::new(false);
    let stale = thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut into = vec![0; SIZE];
                while !done.load(Relaxed) {
                    buffered.read_exact_at(&mut into, 0).unwrap();
                }
            });
        }
        let rounds = || -> io::Result<Option<u8>> {
            let aio = Aio::new()?;
            // Aligned memory, as O_DIRECT wants it.
            let mut map = memmap2::MmapMut::map_anon(SIZE)?;
            let mut found = vec![0; SIZE];
            for byte in (1..=250).chain(1..=150) {
                map.fill(byte);
                aio.write_at(&direct, &map, 0)?;
                buffered.read_exact_at(&mut found, 0)?;
                if found.iter().any(|b| *b != byte) {
                    return Ok(Some(byte));
                }
            }
            Ok(None)
        };
        let stale = rounds();
        done.store(true, Relaxed);
        stale.unwrap()
    });
    assert_eq!(stale, None, "bytes that were not all read after they had been written");
    drop((direct, buffered));
    mount.unmount();
}

#[test]
fn sync_of_everything() {
    let cluster = Cluster::start("sync", Setup::default());
    let mount = cluster.mount();
    let open = File::create(mount.join("f")).unwrap();
    open.write_all_at(&rng::bytes(1, 1 << 20), 0).unwrap();
    sh(mount.path(), "sync -f . && sync -d f && sync .");
    // Synced by someone else's syncfs: also the file that is still open is there after the client died.
    mount.kill9();
    drop(open);
    let mount = cluster.mount();
    assert!(fs::read(mount.join("f")).unwrap() == rng::bytes(1, 1 << 20));
    mount.unmount();
}

/// Others open and close the file meanwhile, which may make the kernel read its pages anew.
#[test]
fn a_process_reads_what_it_has_written_while_others_open_the_file() {
    let cluster = Cluster::start("counter", Setup::default());
    let mount = cluster.mount();
    let path = mount.join("counter");
    fs::write(&path, 0u64.to_le_bytes()).unwrap();
    let over = AtomicBool::new(false);
    let number = |file: &File| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 0).unwrap();
        u64::from_le_bytes(bytes)
    };
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut last = 0;
                while !over.load(Relaxed) {
                    let now = number(&File::open(&path).unwrap());
                    assert!(now >= last, "{now} after {last}");
                    last = now;
                }
            });
        }
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let began = std::time::Instant::now();
        let mut count = 0;
        while began.elapsed() < Duration::from_secs(8) {
            let read = number(&file);
            if read != count {
                over.store(true, Relaxed);
                panic!("{read} was read, {count} written");
            }
            count += 1;
            file.write_all_at(&u64::to_le_bytes(count), 0).unwrap();
        }
        over.store(true, Relaxed);
    });
    mount.unmount();
}

/// How many pages of a file are in the page cache.
fn cached_pages(path: &Path) -> usize {
    let file = File::open(path).unwrap();
    // SAFETY: nobody truncates the file while the map lives.
    let map = unsafe { memmap2::Mmap::map(&file).unwrap() };
    let mut pages = vec![0u8; map.len().div_ceil(4096)];
    // SAFETY: the map is as long as is said, and the vector has a byte for each of its pages.
    let asked = unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), pages.as_mut_ptr()) };
    assert_eq!(asked, 0);
    pages.iter().filter(|page| **page & 1 == 1).count()
}

/// Its commit comes after the close, and makes a version that the pages are not known to have.
#[test]
fn what_was_written_here_is_not_fetched_again() {
    let cluster = Cluster::start("written-here", Setup::default());
    let mount = cluster.mount();
    let path = mount.join("f");
    let data = rng::bytes(1, 4 << 20);
    fs::write(&path, &data).unwrap();
    assert_eq!(cached_pages(&path), 1024);
    // Until it is committed, and forgotten here.
    cluster.wait_status("the file to be committed", |s| s.shards() > 0);
    thread::sleep(Duration::from_secs(2));
    // The machine may need memory meanwhile; an open that drops pages leaves none.
    let cached = cached_pages(&path);
    assert!(cached > 0, "the first open has thrown it away");
    let other = cluster.mount();
    fs::write(other.join("f"), rng::bytes(2, 4 << 20)).unwrap();
    assert!(fs::read(&path).unwrap() == rng::bytes(2, 4 << 20), "what others have written is");
    other.unmount();
    mount.unmount();
}
