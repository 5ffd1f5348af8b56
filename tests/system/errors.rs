//! Errors that come late, and those of limits that only a large filesystem has.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{fd::IntoRawFd, unix::fs::FileExt},
    process::Command,
    thread,
    time::Duration,
};

use fjordfs_tests::{
    Cluster, MountPoint, Process, Run, Setup, mountpoint, rng,
    wait::{SOON, wait_until},
    wait_for,
};
use rustix::{
    fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, fallocate, ftruncate, linkat, openat},
    io::Errno,
    process::Signal,
};

/// Larger than what is kept inside an inode.
const SIZE: usize = 200_000;

fn close(file: File) -> io::Result<()> {
    // SAFETY: the descriptor was the file's and is nobody's now.
    match unsafe { libc::close(file.into_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whoever comes next is told, once, and the file is as it was committed.
#[test]
fn a_failed_write_back_is_told_once_and_what_was_committed_stays() {
    let mut cluster = Cluster::start("write-back", Setup::default());
    let mount = cluster.mount_with("timeout=3s,dirty_age=200ms");
    let names = ["write", "fsync", "close"];
    let old: Vec<Vec<u8>> = (0..3).map(|seed| rng::bytes(seed, SIZE)).collect();
    let files =
        names.map(|name| File::options().read(true).write(true).create_new(true).open(mount.join(name)));
    let files = files.map(Result::unwrap);
    for (file, bytes) in files.iter().zip(&old) {
        file.write_all_at(bytes, 0).unwrap();
        file.sync_all().unwrap();
    }
    (0..Setup::default().servers).for_each(|server| cluster.kill_data(server));
    for (seed, file) in files.iter().enumerate() {
        file.write_all_at(&rng::bytes(100 + seed as u64, SIZE), 0).unwrap();
    }
    // Long enough for the attempt to fail, in the background.
    thread::sleep(Duration::from_secs(10));
    let [write, fsync, closed] = files;
    let failed = |result: io::Result<()>| {
        let errno = result.unwrap_err().raw_os_error();
        assert!(matches!(errno, Some(libc::EIO | libc::ETIMEDOUT)), "{errno:?}");
    };
    failed(write.write_all_at(b"next", 0));
    failed(fsync.sync_all());
    fsync.sync_all().expect("it was told");
    failed(close(closed));
    drop((write, fsync));
    (0..Setup::default().servers).for_each(|server| cluster.start_data(server));
    cluster.wait_healthy();
    let other = cluster.mount();
    for (name, bytes) in names.iter().zip(&old) {
        assert!(fs::read(other.join(name)).unwrap() == *bytes, "{name} for others");
        assert!(fs::read(mount.join(name)).unwrap() == *bytes, "{name} here");
    }
    other.unmount();
    mount.unmount();
}

/// As on a local filesystem: that somebody else has asked, or has closed the file, takes no report from who wrote.
#[test]
fn a_failed_write_back_is_told_through_every_descriptor() {
    let mut cluster = Cluster::start("write-back-each", Setup::default());
    let mount = cluster.mount_with("timeout=3s");
    let path = mount.join("f");
    let open = || File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
    let [writer, asks, closes] = [open(), open(), open()];
    writer.write_all_at(&rng::bytes(1, SIZE), 0).unwrap();
    writer.sync_all().unwrap();
    (0..Setup::default().servers).for_each(|server| cluster.kill_data(server));
    writer.write_all_at(&rng::bytes(2, SIZE), 0).unwrap();
    asks.sync_all().unwrap_err();
    asks.sync_all().expect("it was told");
    drop(asks);
    close(closes).unwrap_err();
    writer.sync_all().unwrap_err();
    (0..Setup::default().servers).for_each(|server| cluster.start_data(server));
    cluster.wait_healthy();
    writer.sync_all().unwrap();
    assert!(fs::read(&path).unwrap() == rng::bytes(1, SIZE));
    drop(writer);
    mount.unmount();
}

/// With a bound of an hour for each operation: what is detached has nothing to wait for, and what has says so and can be told to give up.
#[test]
fn a_detached_mount_ends_although_nobody_answers() {
    let mut cluster = Cluster::start("detached", Setup::default());
    let (mut idle, mut busy) =
        (cluster.mount_with("timeout=1h"), cluster.mount_with("timeout=1h,dirty_age=1h"));
    fs::write(idle.join("f"), b"text").unwrap();
    File::open(idle.join("f")).unwrap().sync_all().unwrap();
    File::open(idle.path()).unwrap().sync_all().unwrap();
    fs::write(busy.join("unsent"), rng::bytes(1, SIZE)).unwrap();
    cluster.kill_meta();
    (0..Setup::default().servers).for_each(|server| cluster.kill_data(server));
    mountpoint::detach(idle.path());
    mountpoint::detach(busy.path());
    let status = idle.process().wait();
    let log = idle.process().log();
    assert!(status.code() == Some(1) && log.contains("the servers do not answer"), "{status}: {log}");
    wait_for("the mount to say what it waits for", SOON, || {
        let log = busy.process().log();
        if log.contains("A signal gives it up") { Ok(()) } else { Err(log) }
    });
    assert!(busy.process().running());
    busy.process().signal(Signal::TERM);
    let status = busy.process().wait();
    let log = busy.process().log();
    assert!(
        status.code() == Some(1) && log.contains("told to stop while they did not answer"),
        "{status}: {log}"
    );
}

/// Closing a file may have to commit it, and the end of a mount closes what is open.
#[test]
fn a_file_closed_while_nobody_answers_does_not_keep_a_detached_mount() {
    let mut cluster = Cluster::start("detached-open", Setup::default());
    let mut mount = cluster.mount_with("timeout=1h,dirty_age=1h");
    fs::write(mount.join("f"), rng::bytes(1, SIZE)).unwrap();
    let file = File::options().read(true).write(true).open(mount.join("f")).unwrap();
    // SAFETY: nobody truncates it.
    let map = unsafe { memmap2::Mmap::map(&file).unwrap() };
    drop(file);
    cluster.kill_meta();
    wait_for("the client to notice", SOON, || {
        let log = mount.process().log();
        if log.contains("session stream broke") { Ok(()) } else { Err(log) }
    });
    mountpoint::detach(mount.path());
    drop(map);
    wait_for("the mount to say what it waits for", SOON, || {
        let log = mount.process().log();
        if log.contains("A signal gives it up") { Ok(()) } else { Err(log) }
    });
    mount.process().signal(Signal::TERM);
    let status = mount.process().wait();
    assert_eq!(status.code(), Some(1), "{}", mount.process().log());
}

fn unmount(cluster: &Cluster, mount: &MountPoint) -> Run {
    cluster.fjord(["umount".as_ref(), mount.path().as_os_str()])
}

/// Whether the one process of the mount says so, or a supervised one.
#[test]
fn unmounting_tells_what_could_not_be_written() {
    let mut cluster = Cluster::start("umount", Setup::default());
    let mounts = ["supervise=off", "transport=dev_fuse,supervise=on"]
        .map(|options| cluster.mount_with(&format!("timeout=15s,{options}")));
    let fine = cluster.mount();
    fs::write(fine.join("f"), rng::bytes(1, SIZE)).unwrap();
    unmount(&cluster, &fine).ok();
    (0..Setup::default().servers).for_each(|server| cluster.kill_data(server));
    for mut mount in mounts {
        fs::write(mount.join("lost"), rng::bytes(2, SIZE)).unwrap();
        let dir = mount.path().to_str().unwrap();
        unmount(&cluster, &mount).fails_saying(&["not everything written below", dir]);
        assert_eq!(mount.process().wait().code(), Some(1));
    }
}

/// What it could not write by then is lost, and who unmounts hears that nobody knows of it.
#[test]
fn unmounting_tells_of_a_process_that_dies_meanwhile() {
    let mut cluster = Cluster::start("umount-dies", Setup::default());
    let mut mount = cluster.mount_with("timeout=1h,dirty_age=1h");
    fs::write(mount.join("unsent"), rng::bytes(1, SIZE)).unwrap();
    (0..Setup::default().servers).for_each(|server| cluster.kill_data(server));
    let command = cluster.command(["umount".as_ref(), mount.path().as_os_str()]);
    let mut unmounting = Process::start("fjord umount", command, &cluster.folder().join("umount.log"));
    wait_for("the mount to say what it waits for", SOON, || {
        let log = mount.process().log();
        if log.contains("A signal gives it up") { Ok(()) } else { Err(log) }
    });
    unmounting.assert_running();
    mount.process().kill9();
    let status = unmounting.wait();
    let log = unmounting.log();
    assert!(status.code() == Some(1) && log.contains("died before it could say"), "{status}: {log}");
}

/// A container that was started meanwhile has mounts of its own, this one among them.
#[test]
fn unmounting_tells_who_else_has_it_mounted() {
    let cluster = Cluster::start("umount-elsewhere", Setup::default());
    let mut mount = cluster.mount();
    fs::write(mount.join("f"), rng::bytes(1, SIZE)).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sleep", "600"]);
    let mut container = Process::start("container", command, &cluster.folder().join("container.log"));
    let name = format!("/proc/{}/comm", container.pid());
    wait_until("the container to have mounts of its own", SOON, || {
        fs::read_to_string(&name).is_ok_and(|name| name == "sleep\n")
    });
    let holder = format!("still mounted for sleep (process {}, {})", container.pid(), mount.path().display());
    let told = unmount(&cluster, &mount).ok().stderr;
    assert!(told.contains(&holder), "{told}");
    assert!(!mountpoint::is_mounted(mount.path()));
    mount.process().assert_running();
    container.kill9();
    assert!(mount.process().wait().success());
}

/// A mount that was detached while in use has nothing to do with the next one on its folder.
#[test]
fn a_detached_mount_and_the_next_one_leave_each_other_alone() {
    let cluster = Cluster::start("umount-again", Setup::default());
    let mut old = cluster.mount();
    fs::write(old.join("f"), "f").unwrap();
    let held = File::open(old.join("f")).unwrap();
    let dir = old.path().to_str().unwrap().to_owned();
    cluster.fjord(["umount", "--lazy", &dir]).ok();
    let again = || MountPoint::start(&cluster.meta_address(), dir.as_ref(), "", &cluster.dir("again"));
    let new = again();
    let told = unmount(&cluster, &new).ok().stderr;
    assert!(!told.contains("waiting"), "{told}");
    old.process().assert_running();
    drop(new);
    let new = again();
    old.process().signal(Signal::TERM);
    assert!(old.process().wait().success());
    assert_eq!(fs::read_to_string(new.join("f")).unwrap(), "f");
    drop(held);
    new.unmount();
}

#[test]
fn no_file_is_larger_than_an_offset_can_say() {
    let cluster = Cluster::start("efbig", Setup::default());
    let mount = cluster.mount();
    let path = mount.join("f");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    let end = i64::MAX.cast_unsigned();
    file.write_all_at(b"last", (16 << 40) - 4).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 16 << 40);
    ftruncate(&file, end).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), end);
    let mut at_end = File::options().append(true).open(&path).unwrap();
    for result in [
        at_end.write(b"x").map(drop),
        fallocate(&file, FallocateFlags::empty(), end - 10, 100).map_err(io::Error::from),
    ] {
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EFBIG));
    }
    assert_eq!(ftruncate(&file, end + 1), Err(Errno::INVAL));
    let mut last = [0; 4];
    file.read_exact_at(&mut last, (16 << 40) - 4).unwrap();
    assert_eq!(&last, b"last");
    file.sync_all().unwrap();
    drop((file, at_end));
    mount.unmount();
}

/// What was open, or is a process's directory, and has gone by another client.
#[test]
fn what_others_have_removed_is_missing_and_not_something_else() {
    let cluster = Cluster::start("removed", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    fs::create_dir(a.join("d")).unwrap();
    fs::write(a.join("d/f"), b"text").unwrap();
    let folder = openat(CWD, a.join("d"), OFlags::DIRECTORY | OFlags::RDONLY, Mode::empty()).unwrap();
    let file = File::open(a.join("d/f")).unwrap();
    fs::remove_file(b.join("d/f")).unwrap();
    fs::remove_dir(b.join("d")).unwrap();
    fs::create_dir(b.join("d")).unwrap();
    fs::write(b.join("d/f"), b"other").unwrap();
    // A file stays as long as somebody has it open, and can be read; it has no name to come back by.
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"text");
    assert_eq!(linkat(&file, "", CWD, a.join("again"), AtFlags::EMPTY_PATH), Err(Errno::NOENT));
    assert_eq!(openat(&folder, "f", OFlags::RDONLY, Mode::empty()).unwrap_err(), Errno::STALE);
    let made = openat(&folder, "new", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR);
    assert_eq!(made.unwrap_err(), Errno::STALE);
    assert_eq!(fs::read(a.join("d/f")).unwrap(), b"other");
    drop((file, folder));
    a.unmount();
    b.unmount();
}
