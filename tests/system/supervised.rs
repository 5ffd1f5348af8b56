//! A supervised mount outlives the process that serves it.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{linux::net::SocketAddrExt, unix::fs::FileExt},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use fjordfs_tests::{Cluster, MountPoint, Setup, fjord, mountpoint, rng, wait::SOON, wait_for};
use rustix::process::{Pid, Signal, kill_process};

#[path = "supervised/kept.rs"]
mod kept;

const SUPERVISED: &str = "supervise=on";

/// The process that serves a supervised mount.
fn worker(mount: &mut MountPoint) -> Pid {
    let supervisor = mount.process().pid();
    wait_for("a process that serves the mount", SOON, || {
        let children = fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children"));
        let children = children.map_err(|e| e.to_string())?;
        let pid = children.split_whitespace().next().and_then(|pid| Pid::from_raw(pid.parse().ok()?));
        pid.ok_or("the supervisor has no child".to_owned())
    })
}

/// kill -9, and waits until another process is there, which need not serve yet.
fn kill_worker(mount: &mut MountPoint) {
    let before = worker(mount);
    kill_process(before, Signal::KILL).unwrap();
    wait_for("another process", SOON, || {
        let now = worker(mount);
        if now == before { Err("still the same") } else { Ok(()) }
    });
}

/// Whether `fjord status` shows the process that serves, and how many there were before.
fn assert_told(cluster: &Cluster, mount: &mut MountPoint, restarts: usize) {
    let plural = if restarts == 1 { "" } else { "s" };
    wait_for("the session to be told anew", SOON, || {
        let expected =
            format!("served by process {}, {restarts} restart{plural}", worker(mount).as_raw_nonzero());
        let status = cluster.try_status()?;
        let told = status
            .list("sessions")
            .iter()
            .any(|s| s["client"].as_str().is_some_and(|c| c.contains(&expected)));
        if told { Ok(()) } else { Err(format!("{expected}: {status}")) }
    });
}

fn upgrade(mount: &MountPoint) -> fjordfs_tests::Run {
    let mut command = fjord(["mount", "--upgrade"]);
    command.arg(mount.path());
    fjordfs_tests::run(command)
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// Without the kernel's cached pages.
fn read_at(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

#[test]
fn open_files_go_on_when_the_process_is_killed() {
    let cluster = Cluster::start("supervised-open", Setup::default());
    let mut mount = cluster.mount_with(SUPERVISED);
    let content = rng::bytes(1, 3 << 20);
    fs::create_dir(mount.join("dir")).unwrap();
    (0..500).for_each(|i| drop(File::create(mount.join(format!("dir/{i}"))).unwrap()));
    let mut file = open(&mount.join("file"));
    file.write_all(&content).unwrap();
    file.sync_all().unwrap();
    let reader = File::open(mount.join("file")).unwrap();
    let mut appender = File::options().append(true).open(mount.join("file")).unwrap();
    let mut unlinked = open(&mount.join("unlinked"));
    unlinked.write_all(b"without a name").unwrap();
    fs::remove_file(mount.join("unlinked")).unwrap();
    unlinked.sync_all().unwrap();
    let mut listing = fs::read_dir(mount.join("dir")).unwrap();
    let first = listing.next().unwrap().unwrap().file_name();
    File::open(mount.path()).unwrap().sync_all().unwrap();
    assert_told(&cluster, &mut mount, 0);

    for round in 0..2 {
        kill_worker(&mut mount);
        assert_told(&cluster, &mut mount, round + 1);
        assert!(read_at(&reader, 0, content.len()).unwrap() == content, "round {round}");
        assert_eq!(read_at(&unlinked, 0, 14).unwrap(), b"without a name");
        let last = format!("line {round}");
        appender.write_all(last.as_bytes()).unwrap();
        appender.sync_all().unwrap();
        let at = (content.len() + round * last.len()) as u64;
        assert_eq!(read_at(&reader, at, last.len()).unwrap(), last.as_bytes());
        file.write_all_at(&[round as u8; 100], 4096).unwrap();
        file.write_all_at(&content[4096..4196], 4096).unwrap();
        file.sync_all().unwrap();
        fs::write(mount.join(format!("new{round}")), b"new").unwrap();
        assert_eq!(fs::read(mount.join(format!("new{round}"))).unwrap(), b"new");
    }
    let mut names: Vec<_> = listing.map(|entry| entry.unwrap().file_name()).collect();
    names.push(first);
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 500, "a directory that is being read is read to its end");
    assert_eq!(cluster.status().list("sessions").len(), 1, "the session is the same");
    drop((file, reader, appender, unlinked));
    mount.unmount();
    let other = cluster.mount();
    assert_eq!(fs::metadata(other.join("file")).unwrap().len(), content.len() as u64 + 12);
    other.unmount();
}

#[test]
fn what_was_asked_is_asked_again() {
    let mut cluster = Cluster::start("supervised-resend", Setup::default());
    // Nothing is decided without the metaserver.
    let mut mount = cluster.mount_with(&format!("{SUPERVISED},close=sync"));
    fs::create_dir(mount.join("dir")).unwrap();
    File::open(mount.path()).unwrap().sync_all().unwrap();
    for round in 0..2 {
        // Nobody answers, so the requests are under way for sure.
        cluster.meta().signal(Signal::STOP);
        let asked = AtomicUsize::new(0);
        thread::scope(|scope| {
            let (path, asked) = (mount.path().to_owned(), &asked);
            let lookups: Vec<_> = (0..8)
                .map(|i| {
                    let path = path.join(format!("dir/{round}-{i}"));
                    scope.spawn(move || {
                        asked.fetch_add(1, Ordering::Relaxed);
                        let found = fs::metadata(&path);
                        (found.unwrap_err().kind(), fs::write(&path, b"x"))
                    })
                })
                .collect();
            wait_for("everybody to ask", SOON, || match asked.load(Ordering::Relaxed) {
                8 => Ok(()),
                n => Err(n.to_string()),
            });
            thread::sleep(Duration::from_millis(200));
            kill_worker(&mut mount);
            thread::sleep(Duration::from_millis(300));
            assert!(lookups.iter().all(|lookup| !lookup.is_finished()));
            cluster.meta().signal(Signal::CONT);
            for lookup in lookups {
                let (found, written) = lookup.join().unwrap();
                assert_eq!(found, io::ErrorKind::NotFound);
                written.unwrap();
            }
        });
    }
    assert_eq!(fs::read_dir(mount.join("dir")).unwrap().count(), 16);
    mount.unmount();
}

/// Each change of a name was made once, whenever the process was killed: no error, and nothing twice.
#[test]
fn names_change_once_however_often_it_is_asked() {
    let cluster = Cluster::start("supervised-once", Setup::default());
    let mut mount = cluster.mount_with(&format!("{SUPERVISED},close=sync"));
    let path = mount.path().to_owned();
    let stop = AtomicBool::new(false);
    let made = thread::scope(|scope| {
        let (path, stop) = (&path, &stop);
        let work = |thread: usize| {
            let dir = path.join(format!("{thread}"));
            fs::create_dir(&dir).unwrap();
            let mut made = 0;
            while !stop.load(Ordering::Relaxed) {
                let names = ["new", "renamed", "link", "sub"].map(|name| dir.join(format!("{name}{made}")));
                let [new, renamed, link, sub] = &names;
                File::options().write(true).create_new(true).open(new).unwrap();
                fs::rename(new, renamed).unwrap();
                fs::hard_link(renamed, link).unwrap();
                fs::create_dir(sub).unwrap();
                fs::remove_file(renamed).unwrap();
                fs::remove_dir(sub).unwrap();
                std::os::unix::fs::symlink("target", new).unwrap();
                fs::remove_file(new).unwrap();
                made += 1;
            }
            made
        };
        let threads: Vec<_> = (0..4).map(|i| scope.spawn(move || work(i))).collect();
        for _ in 0..4 {
            thread::sleep(Duration::from_millis(700));
            kill_worker(&mut mount);
        }
        thread::sleep(Duration::from_millis(700));
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<usize>>()
    });
    for (thread, made) in made.iter().enumerate() {
        assert!(*made > 0);
        assert_eq!(fs::read_dir(mount.join(format!("{thread}"))).unwrap().count(), *made);
    }
    mount.unmount();
}

/// What nobody had read when the process died is read by its successor, among what that one gets again: each once.
#[test]
fn what_waits_while_nobody_serves_is_done_once() {
    const CALLERS: usize = 48;
    let cluster = Cluster::start("supervised-waiting", Setup::default());
    let mut mount = cluster.mount_with(&format!("{SUPERVISED},close=sync"));
    let path = mount.path().to_owned();
    (0..CALLERS).for_each(|caller| fs::create_dir(path.join(caller.to_string())).unwrap());
    let stop = AtomicBool::new(false);
    let made: usize = thread::scope(|scope| {
        let (path, stop) = (&path, &stop);
        let work = |caller: usize| {
            let mut made = 0;
            while !stop.load(Ordering::Relaxed) {
                fs::create_dir(path.join(format!("{caller}/{made}"))).unwrap();
                made += 1;
            }
            made
        };
        let callers: Vec<_> = (0..CALLERS).map(|caller| scope.spawn(move || work(caller))).collect();
        for _ in 0..4 {
            thread::sleep(Duration::from_millis(200));
            kill_worker(&mut mount);
        }
        thread::sleep(Duration::from_millis(200));
        stop.store(true, Ordering::Relaxed);
        callers.into_iter().map(|caller| caller.join().unwrap()).sum()
    });
    let there = (0..CALLERS).map(|caller| fs::read_dir(path.join(caller.to_string())).unwrap().count());
    assert_eq!(there.sum::<usize>(), made);
    mount.unmount();
}

#[test]
fn what_is_lost_with_the_process_is_told() {
    let cluster = Cluster::start("supervised-lost", Setup::default());
    let mut mount = cluster.mount_with(&format!("{SUPERVISED},dirty_age=1h"));
    let (mut safe, mut lost) = (open(&mount.join("safe")), open(&mount.join("lost")));
    safe.write_all(b"safe").unwrap();
    safe.sync_all().unwrap();
    lost.write_all(b"kept").unwrap();
    lost.sync_all().unwrap();
    lost.write_all_at(b"lost", 0).unwrap();
    kill_worker(&mut mount);
    safe.sync_all().unwrap();
    assert_eq!(errno(&lost.sync_all().unwrap_err()), libc::EIO);
    // Once; and what is there is what was synced, also in the kernel's pages.
    lost.sync_all().unwrap();
    let mut seen = String::new();
    File::open(mount.join("lost")).unwrap().read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "kept");
    lost.write_all_at(b"more", 4).unwrap();
    lost.sync_all().unwrap();
    drop((safe, lost));
    mount.unmount();
    let other = cluster.mount();
    assert_eq!(fs::read(other.join("lost")).unwrap(), b"keptmore");
    assert_eq!(fs::read(other.join("safe")).unwrap(), b"safe");
    other.unmount();
}

const RECORD: usize = 64;

fn record(writer: usize, number: usize) -> Vec<u8> {
    let mut record = format!("writer {writer} record {number:>20} ").into_bytes();
    record.resize(RECORD - 1, b'.');
    record.push(b'\n');
    record
}

/// Work in a mount until told to stop: what was synced, and which errors there were.
struct Work<'a> {
    mount: &'a Path,
    stop: &'a AtomicBool,
}

impl Work<'_> {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Writes and syncs records, one after another. How many are synced, and the errors.
    fn sync_records(&self, writer: usize) -> (usize, Vec<io::Error>) {
        let file = open(&self.mount.join(format!("records{writer}")));
        let (mut synced, mut errors) = (0, Vec::new());
        while self.goes_on() {
            let written = file.write_all_at(&record(writer, synced), (synced * RECORD) as u64);
            match written.and_then(|()| file.sync_all()) {
                Ok(()) => synced += 1,
                Err(e) => errors.push(e),
            }
        }
        (synced, errors)
    }

    /// Reads a file again and again. How often.
    fn read(&self, content: &[u8]) -> io::Result<usize> {
        let file = File::open(self.mount.join("content"))?;
        let mut times = 0;
        while self.goes_on() {
            assert!(read_at(&file, 0, content.len())? == content, "wrong bytes");
            times += 1;
        }
        Ok(times)
    }

    /// Makes, fills, renames and removes files. The files that are left, and the errors.
    fn files(&self) -> (Vec<String>, Vec<io::Error>) {
        let (mut left, mut errors) = (Vec::new(), Vec::new());
        let folder = self.mount.join("files");
        for i in 0.. {
            if !self.goes_on() {
                break;
            }
            let name = format!("{i}");
            let made = fs::write(folder.join("new"), &name)
                .and_then(|()| fs::rename(folder.join("new"), folder.join(&name)))
                .and_then(|()| if i % 3 == 0 { fs::remove_file(folder.join(&name)) } else { Ok(()) });
            match made {
                Ok(()) if i % 3 == 0 => {}
                Ok(()) => left.push(name),
                Err(e) => errors.push(e),
            }
        }
        (left, errors)
    }
}

/// What there was under load.
struct Done {
    synced: Vec<usize>,
    errors: Vec<io::Error>,
    left: Vec<String>,
}

fn under_load(cluster: &Cluster, mount: &mut MountPoint, trouble: impl FnOnce(&mut MountPoint)) -> Done {
    let content = rng::bytes(7, 2 << 20);
    fs::write(mount.join("content"), &content).unwrap();
    fs::create_dir(mount.join("files")).unwrap();
    File::open(mount.join("content")).unwrap().sync_all().unwrap();
    File::open(mount.path()).unwrap().sync_all().unwrap();
    let stop = AtomicBool::new(false);
    let path = mount.path().to_owned();
    let work = Work { mount: &path, stop: &stop };
    let done = thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|i| {
                scope.spawn({
                    let work = &work;
                    move || work.sync_records(i)
                })
            })
            .collect();
        let reader = scope.spawn(|| work.read(&content));
        let files = scope.spawn(|| work.files());
        thread::sleep(Duration::from_millis(500));
        trouble(mount);
        thread::sleep(Duration::from_millis(500));
        stop.store(true, Ordering::Relaxed);
        let (left, mut errors) = files.join().unwrap();
        let mut synced = Vec::new();
        for writer in writers {
            let (count, more) = writer.join().unwrap();
            synced.push(count);
            errors.extend(more);
        }
        assert!(reader.join().unwrap().expect("reading an open file never fails") > 0);
        Done { synced, errors, left }
    });
    // From another client, so that nothing is only cached.
    let other = cluster.mount();
    for (writer, count) in done.synced.iter().enumerate() {
        assert!(*count > 0);
        let bytes = fs::read(other.join(format!("records{writer}"))).unwrap();
        for number in 0..*count {
            let found = &bytes[number * RECORD..][..RECORD];
            assert!(found == record(writer, number), "record {number} of {count}, which was synced");
        }
    }
    other.unmount();
    done
}

#[test]
fn what_was_synced_under_load_is_there_after_kills() {
    let cluster = Cluster::start("supervised-load", Setup::policy("replica:2"));
    let mut mount = cluster.mount_with(SUPERVISED);
    let done = under_load(&cluster, &mut mount, |mount| {
        for _ in 0..3 {
            kill_worker(mount);
            thread::sleep(Duration::from_secs(1));
        }
    });
    // EIO: bytes or names of the last moment are lost. The others: names that were made or removed just then are not, or are not yet.
    let stated = [libc::EIO, libc::ESTALE, libc::ENOENT, libc::EEXIST];
    assert!(done.errors.iter().all(|e| stated.contains(&errno(e))), "{:?}", done.errors);
    mount.unmount();
}

#[test]
fn an_upgrade_under_load_loses_nothing() {
    let cluster = Cluster::start("supervised-upgrade", Setup::policy("replica:2"));
    let mut mount = cluster.mount_with(SUPERVISED);
    let done = under_load(&cluster, &mut mount, |mount| {
        for _ in 0..4 {
            let before = worker(mount);
            upgrade(mount).ok();
            assert_ne!(worker(mount), before);
            thread::sleep(Duration::from_millis(200));
        }
    });
    assert!(done.errors.is_empty(), "{:?}", done.errors);
    let other = cluster.mount();
    for name in &done.left {
        assert_eq!(fs::read_to_string(other.join(format!("files/{name}"))).unwrap(), *name);
    }
    assert_eq!(fs::read_dir(other.join("files")).unwrap().count(), done.left.len());
    other.unmount();
    mount.unmount();
}

#[test]
fn a_program_that_cannot_serve_does_not_replace_one_that_can() {
    let cluster = Cluster::start("supervised-bad", Setup::default());
    let mut mount = cluster.mount_with(SUPERVISED);
    fs::write(mount.join("f"), b"content").unwrap();
    let device = {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let path = mount.path().to_str().unwrap();
        let line = table.lines().find(|line| line.split(' ').nth(4) == Some(path)).unwrap();
        line.split(' ').nth(2).unwrap().to_owned()
    };
    // The supervisor listens before it says so; the mount itself is there earlier.
    let said = format!("mounted on {}", mount.path().display());
    wait_for("the supervisor to say that it is mounted", SOON, || {
        let log = mount.process().log();
        if log.lines().any(|line| line == said) { Ok(()) } else { Err(log) }
    });
    for (program, why) in [("/bin/false", "did not come to serve"), ("/nowhere", "/nowhere")] {
        let address = std::os::unix::net::SocketAddr::from_abstract_name(format!("fjord-mount-{device}"));
        let mut stream = std::os::unix::net::UnixStream::connect_addr(&address.unwrap()).unwrap();
        stream.write_all(program.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains(why), "{answer}");
        assert_eq!(fs::read(mount.join("f")).unwrap(), b"content");
    }
    upgrade(&mount).ok();
    // Another user is not heard.
    if rustix::process::geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--clear-groups", "--"]).arg(fjordfs_tests::fjord_bin());
        let refused = command.args(["mount", "--upgrade"]).arg(mount.path()).stdin(Stdio::null()).output();
        assert!(!refused.unwrap().status.success());
    }
    assert!(worker(&mut mount).as_raw_nonzero().get() > 0);
    mount.unmount();
}

#[test]
fn a_mount_whose_processes_keep_dying_is_given_up() {
    let cluster = Cluster::start("supervised-loop", Setup::default());
    let mut mount = cluster.mount_with(SUPERVISED);
    let file = open(&mount.join("f"));
    for _ in 0..4 {
        kill_worker(&mut mount);
    }
    let last = worker(&mut mount);
    kill_process(last, Signal::KILL).unwrap();
    assert!(!mount.process().wait().success());
    let log = mount.process().log();
    assert!(log.contains("Giving up and unmounting") && log.contains("5 times"), "{log}");
    mountpoint::wait_unmounted(mount.path());
    assert_eq!(errno(&file.sync_all().unwrap_err()), libc::ENOTCONN);
    assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 0, "the folder below");
}

#[test]
fn signals_and_the_end_of_the_supervisor_unmount() {
    let cluster = Cluster::start("supervised-end", Setup::default());
    let mut mount = cluster.mount_with(SUPERVISED);
    fs::write(mount.join("f"), b"content").unwrap();
    mount.process().stop();
    mountpoint::wait_unmounted(mount.path());

    let mut mount = cluster.mount_with(SUPERVISED);
    let mut file = File::open(mount.join("f")).unwrap();
    let worker = worker(&mut mount);
    mount.process().kill9();
    let mut content = String::new();
    file.read_to_string(&mut content).unwrap();
    assert_eq!(content, "content", "who uses it goes on");
    drop(file);
    mountpoint::wait_unmounted(mount.path());
    wait_for("the process to end", SOON, || {
        let gone = rustix::process::test_kill_process(worker).is_err();
        if gone { Ok(()) } else { Err("it is there") }
    });
}

#[test]
fn a_mount_can_be_ended_while_one_process_follows_another() {
    let mut cluster = Cluster::start("supervised-between", Setup::default());
    let mut mount = cluster.mount_with(SUPERVISED);
    fs::write(mount.join("f"), b"content").unwrap();
    File::open(mount.join("f")).unwrap().sync_all().unwrap();
    kill_process(worker(&mut mount), Signal::KILL).unwrap();
    mount.unmount();

    let mut mount = cluster.mount_with(SUPERVISED);
    let path = mount.path().to_owned();
    fs::write(mount.join("f"), b"changed").unwrap();
    // The process has something to hand over, and nobody takes it.
    cluster.meta().signal(Signal::STOP);
    thread::scope(|scope| {
        let upgrading = scope.spawn(|| {
            let mut command = fjord(["mount", "--upgrade"]);
            command.arg(&path);
            fjordfs_tests::run(command)
        });
        wait_for("the handover to begin", SOON, || {
            if mount.process().log().contains("handing over to") { Ok(()) } else { Err("not yet") }
        });
        mount.process().signal(Signal::TERM);
        cluster.meta().signal(Signal::CONT);
        let status = mount.process().wait();
        assert!(status.success(), "{status}: {}", mount.process().log());
        let _either_way = upgrading.join().unwrap();
    });
    mountpoint::wait_unmounted(&path);
    let other = cluster.mount();
    assert_eq!(fs::read(other.join("f")).unwrap(), b"changed");
    other.unmount();
}

#[test]
fn only_what_is_possible_is_supervised() {
    let cluster = Cluster::start("supervised-not", Setup::default());
    let dir = cluster.dir("not");
    let mount =
        |options: &str| fjordfs_tests::run(MountPoint::command(&cluster.meta_address(), &dir, options));
    mount("supervise=on,transport=io_uring").fails_saying(&["supervise=on", "io_uring"]);
    mount("supervise=perhaps").fails_saying(&["supervise", "perhaps"]);
    let plain = cluster.mount_with("supervise=off,transport=dev_fuse");
    upgrade(&plain).fails_saying(&["no supervisor", "supervise=off"]);
    plain.unmount();
    // Over /dev/fuse it costs nothing.
    let mut mount = cluster.mount_with("transport=dev_fuse");
    fs::write(mount.join("f"), b"content").unwrap();
    kill_worker(&mut mount);
    fs::write(mount.join("g"), b"content").unwrap();
    mount.unmount();
}
