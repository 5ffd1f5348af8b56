//! What belongs to open files outlives the process: locks, how they were opened, and what was appended.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use fjordfs_tests::{
    Cluster, Setup,
    history::appends,
    locks::{Kind, Owner, flock, lock, try_lock},
    wait::SOON,
    wait_for,
};

use super::{SUPERVISED, errno, kill_worker, open, read_at, upgrade};

#[test]
fn locks_outlive_the_process_and_go_with_their_files() {
    let cluster = Cluster::start("supervised-locks", Setup::default());
    let mut mount = cluster.mount_with(SUPERVISED);
    let other = cluster.mount();
    let (ours, theirs) = (open(&mount.join("f")), open(&other.join("f")));
    let (ours_too, theirs_too) = (open(&mount.join("g")), open(&other.join("g")));
    let again = Err(libc::EAGAIN);
    try_lock(&ours, Owner::OpenFile, Kind::Write, 0, 10).unwrap();
    flock(&ours, Kind::Write, false).unwrap();
    try_lock(&theirs_too, Owner::OpenFile, Kind::Write, 0, 10).unwrap();
    thread::scope(|scope| {
        // In line for a lock when the process is killed.
        let waiting = scope.spawn(|| lock(&ours_too, Owner::OpenFile, Kind::Write, 0, 10));
        cluster.wait_status("one in line", |status| {
            status.list("sessions").iter().filter_map(|s| s["lock_waits"].as_u64()).sum::<u64>() == 1
        });
        kill_worker(&mut mount);
        try_lock(&theirs_too, Owner::OpenFile, Kind::Unlock, 0, 10).unwrap();
        assert_eq!(waiting.join().unwrap(), Ok(()));
    });
    let locks_of_others = || {
        assert_eq!(try_lock(&theirs, Owner::OpenFile, Kind::Read, 5, 1), again);
        assert_eq!(try_lock(&theirs, Owner::OpenFile, Kind::Read, 10, 1), Ok(()));
        assert_eq!(flock(&theirs, Kind::Read, false), again);
        assert_eq!(try_lock(&theirs_too, Owner::OpenFile, Kind::Write, 0, 1), again);
    };
    locks_of_others();
    upgrade(&mount).ok();
    locks_of_others();
    try_lock(&ours, Owner::OpenFile, Kind::Unlock, 0, 5).unwrap();
    assert_eq!(try_lock(&theirs, Owner::OpenFile, Kind::Read, 0, 5), Ok(()));
    drop(ours);
    wait_for("the locks to go with their file", SOON, || {
        try_lock(&theirs, Owner::OpenFile, Kind::Write, 0, 10)
            .and(flock(&theirs, Kind::Write, false))
            .map_err(|e| format!("errno {e}"))
    });
    drop(ours_too);
    mount.unmount();
}

/// Although another open file of the inode stays, which the locks were not taken through.
#[test]
fn locks_of_an_open_file_go_with_it_after_a_take_over() {
    let cluster = Cluster::start("supervised-ofd", Setup::default());
    let mut mount = cluster.mount_with(SUPERVISED);
    let other = cluster.mount();
    let (ours, stays, theirs) = (open(&mount.join("f")), open(&mount.join("f")), open(&other.join("f")));
    try_lock(&ours, Owner::OpenFile, Kind::Write, 0, 10).unwrap();
    try_lock(&stays, Owner::OpenFile, Kind::Write, 10, 10).unwrap();
    // The second process has it from the first, the third from the second.
    for _ in 0..2 {
        kill_worker(&mut mount);
        assert_eq!(try_lock(&theirs, Owner::OpenFile, Kind::Read, 0, 1), Err(libc::EAGAIN));
    }
    drop(ours);
    wait_for("the lock to go with its open file", SOON, || {
        try_lock(&theirs, Owner::OpenFile, Kind::Write, 0, 10).map_err(|e| format!("errno {e}"))
    });
    assert_eq!(try_lock(&theirs, Owner::OpenFile, Kind::Write, 10, 10), Err(libc::EAGAIN));
    drop(stays);
    mount.unmount();
}

#[test]
fn reads_that_leave_the_access_time_go_on_leaving_it() {
    let cluster = Cluster::start("supervised-noatime", Setup::default());
    let mut mount = cluster.mount_with(SUPERVISED);
    let path = mount.join("f");
    fs::write(&path, b"content").unwrap();
    File::open(&path).unwrap().sync_all().unwrap();
    let quiet = File::options().read(true).custom_flags(libc::O_NOATIME).open(&path).unwrap();
    let noted = File::open(&path).unwrap();
    let accessed = || {
        let attr = fs::metadata(&path).unwrap();
        (attr.atime(), attr.atime_nsec())
    };
    let before = accessed();
    for _ in 0..2 {
        kill_worker(&mut mount);
        assert_eq!(read_at(&quiet, 0, 7).unwrap(), b"content");
        assert_eq!(accessed(), before);
    }
    assert_eq!(read_at(&noted, 0, 7).unwrap(), b"content");
    assert_ne!(accessed(), before, "the other file was opened without");
    drop((quiet, noted));
    mount.unmount();
}

/// Whenever the process is killed, and although another client asks for what was appended all the while, so that it is
/// committed at once.
#[test]
fn nothing_is_appended_twice() {
    const WRITERS: u32 = 3;
    let cluster = Cluster::start("supervised-appends", Setup::default());
    let mut mount = cluster.mount_with(SUPERVISED);
    let other = cluster.mount();
    drop(open(&mount.join("log")));
    let (path, elsewhere) = (mount.join("log"), other.join("log"));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let (path, stop) = (&path, &stop);
        for writer in 0..WRITERS {
            scope.spawn(move || {
                let mut log = File::options().append(true).open(path).unwrap();
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    // It is told that earlier ones are lost.
                    let record = appends::record((writer, number), 100);
                    if let Err(e) = log.write_all(&record) {
                        assert_eq!(errno(&e), libc::EIO);
                    }
                }
            });
        }
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                appends::records(&fs::read(&elsewhere).unwrap()).unwrap();
            }
        });
        for _ in 0..4 {
            thread::sleep(Duration::from_millis(400));
            kill_worker(&mut mount);
        }
        thread::sleep(Duration::from_millis(400));
        stop.store(true, Ordering::Relaxed);
    });
    mount.unmount();
    let records = appends::records(&fs::read(&elsewhere).unwrap()).unwrap();
    let mut last = BTreeMap::new();
    for (writer, number) in &records {
        if let Some(before) = last.insert(*writer, *number) {
            assert!(before < *number, "{number} of writer {writer} comes after {before}");
        }
    }
    assert_eq!(last.len(), WRITERS as usize);
    other.unmount();
}
