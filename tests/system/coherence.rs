//! What clients cache never contradicts what others have already seen: histories of attributes, names and bytes that
//! several mounts read and change at once are checked for an order that explains them.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    fs::{self, File, FileTimes},
    io,
    os::unix::fs::{FileExt, symlink},
    path::Path,
    sync::{
        RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, UNIX_EPOCH},
};

use fjordfs_tests::{Cluster, Setup, history::History, rng};
use rand::Rng;
use rustix::process::Signal;

/// Three registers in one directory, each kept another way: a time of a file, what a name leads to, and bytes.
#[derive(Default)]
struct Registers {
    time: History,
    name: History,
    bytes: History,
    /// One a mount: what is written is seen on its own mount at once, by others at close. Readers beside a writer would
    /// see it too early for a register.
    writing: [RwLock<()>; MOUNTS],
    values: AtomicU64,
}

impl Registers {
    fn prepare(root: &Path) -> io::Result<()> {
        File::create_new(root.join("time"))?.set_times(FileTimes::new().set_modified(UNIX_EPOCH))?;
        symlink("0", root.join("name"))?;
        fs::write(root.join("bytes"), 0u64.to_be_bytes())
    }

    fn value(&self) -> u64 {
        self.values.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// One random operation. Who reads looks through caches as warm as they can be.
    fn step(&self, mount: usize, root: &Path, choice: u32) -> io::Result<()> {
        match choice {
            0 => {
                let value = self.value();
                self.time.write(value, || set_time(&root.join("time"), value))
            }
            1 => {
                let value = self.value();
                let new = root.join(format!("new-{value}"));
                symlink(value.to_string(), &new)?;
                self.name.write(value, || fs::rename(&new, root.join("name")))
            }
            2 => {
                let _alone = self.writing[mount].write().unwrap();
                let value = self.value();
                self.bytes.write(value, || {
                    let file = File::options().write(true).open(root.join("bytes"))?;
                    file.write_all_at(&value.to_be_bytes(), 0)?;
                    close(file)
                })
            }
            3..=5 => self.time.read(|| time(&root.join("time"))).map(drop),
            6..=8 => self
                .name
                .read(|| {
                    let target = fs::read_link(root.join("name"))?;
                    target.to_string_lossy().parse().map_err(io::Error::other)
                })
                .map(drop),
            9 => fs::read_dir(root)?.count().checked_sub(3).map(drop).ok_or(io::ErrorKind::NotFound.into()),
            10 => forget_inodes(),
            _ => {
                let _no_writer = self.writing[mount].read().unwrap();
                self.bytes.read(|| whole_value(fs::read(root.join("bytes"))?)).map(drop)
            }
        }
    }

    #[track_caller]
    fn check(&self, seed: u64) {
        for (what, history) in [("time", &self.time), ("name", &self.name), ("bytes", &self.bytes)] {
            eprintln!("{what}: {} operations", history.len());
            assert!(history.len() > 50, "too few operations on {what} to mean anything");
            history.check().unwrap_or_else(|e| panic!("{what}, FJORD_SEED={seed}: {e}"));
        }
    }
}

fn whole_value(bytes: Vec<u8>) -> io::Result<u64> {
    let bytes: [u8; 8] =
        bytes.try_into().map_err(|bytes| io::Error::other(format!("not a whole value: {bytes:?}")))?;
    Ok(u64::from_be_bytes(bytes))
}

fn set_time(path: &Path, value: u64) -> io::Result<()> {
    let times = FileTimes::new().set_modified(UNIX_EPOCH + Duration::from_nanos(value));
    File::open(path)?.set_times(times)
}

/// By `stat(2)`: the standard library asks for the birth time too, which kernels do not take from every answer.
fn time(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::stat(path)?;
    Ok(stat.st_mtime.unsigned_abs() * 1_000_000_000 + stat.st_mtime_nsec)
}

/// Answers that bring an inode anew, FORGETs and recalls meet when the kernel drops what it does not need.
fn forget_inodes() -> io::Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "2")
}

/// `close(2)` with its result, which dropping a file swallows.
fn close(file: File) -> io::Result<()> {
    let fd = std::os::fd::IntoRawFd::into_raw_fd(file);
    // SAFETY: the descriptor was the file's and is nobody's now.
    match unsafe { libc::close(fd) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

const MOUNTS: usize = 3;
const THREADS_PER_MOUNT: usize = 2;

/// Works on the registers from all mounts; `disturb` does what it wants meanwhile.
fn histories(name: &str, setup: Setup, steps: usize, disturb: impl FnOnce(&mut Cluster, &AtomicBool, u64)) {
    let seed = rng::seed(name);
    let mut cluster = Cluster::start(name, setup);
    let mounts: Vec<_> = (0..MOUNTS).map(|_| cluster.mount()).collect();
    Registers::prepare(mounts[0].path()).unwrap();
    let registers = Registers::default();
    let finished = AtomicBool::new(false);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..MOUNTS * THREADS_PER_MOUNT)
            .map(|worker| {
                let mount = worker % MOUNTS;
                let (root, registers) = (mounts[mount].path(), &registers);
                scope.spawn(move || {
                    let mut random = rng::stream(seed, 1 + worker as u64);
                    for step in 0..steps {
                        let what = random.random_range(0..14);
                        registers
                            .step(mount, root, what)
                            .unwrap_or_else(|e| panic!("worker {worker}, step {step}, which is {what}: {e}"));
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            let outcomes: Vec<_> = workers.into_iter().map(thread::ScopedJoinHandle::join).collect();
            finished.store(true, Ordering::Release);
            outcomes.into_iter().for_each(Result::unwrap);
        });
        disturb(&mut cluster, &finished, seed);
    });
    registers.check(seed);
}

#[test]
fn nobody_sees_what_others_have_seen_replaced() {
    histories("coherence", Setup::default(), 400, |_, _, _| {});
}

#[test]
fn a_dying_metaserver_makes_nobody_see_old_things() {
    histories("coherence-meta", Setup::default(), 400, |cluster, finished, seed| {
        let mut random = rng::stream(seed, 0);
        while !finished.load(Ordering::Acquire) {
            thread::sleep(Duration::from_millis(random.random_range(300..1500)));
            cluster.kill_meta();
            thread::sleep(Duration::from_millis(random.random_range(0..300)));
            cluster.start_meta();
        }
    });
}

/// Its leases, which nobody can recall any more, must not let others pass before they have run out; and then they must.
#[test]
fn a_dead_client_holds_others_up_for_a_while_only() {
    let cluster = Cluster::start("coherence-dead", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    fs::create_dir(a.join("d")).unwrap();
    fs::write(a.join("d/f"), b"x").unwrap();
    assert_eq!(fs::metadata(b.join("d/f")).unwrap().len(), 1);
    assert!(fs::metadata(b.join("d/g")).is_err());
    b.kill9();
    fs::rename(a.join("d/f"), a.join("d/g")).unwrap();
    let again = cluster.mount();
    assert!(fs::metadata(again.join("d/f")).is_err());
    assert_eq!(fs::metadata(again.join("d/g")).unwrap().len(), 1);
}

/// A client that stands still, and does not know it, shows nothing old when it goes on.
#[test]
fn what_goes_while_its_client_stands_still_is_never_read_as_something_else() {
    let cluster = Cluster::start("coherence-gone", Setup::default());
    let (a, mut b) = (cluster.mount(), cluster.mount());
    let bytes: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    fs::write(a.join("f"), &bytes).unwrap();
    fs::metadata(b.join("f")).unwrap();
    // Under the lease that came with the name.
    let file = File::open(b.join("f")).unwrap();
    b.process().signal(Signal::STOP);
    // Takes as long as that lease.
    fs::remove_file(a.join("f")).unwrap();
    fs::write(a.join("other"), vec![7; bytes.len()]).unwrap();
    b.process().signal(Signal::CONT);
    let mut read = vec![0; bytes.len()];
    assert!(file.read_exact_at(&mut read, 0).is_err() || read == bytes);
}

#[test]
fn a_client_that_stood_still_forgets_what_it_cached() {
    let cluster = Cluster::start("coherence-frozen", Setup::default());
    let (a, mut b) = (cluster.mount(), cluster.mount());
    fs::write(a.join("f"), b"x").unwrap();
    for round in 2..5 {
        assert!(fs::metadata(b.join("f")).is_ok() && fs::metadata(b.join("absent")).is_err());
        b.process().signal(Signal::STOP);
        fs::write(a.join("f"), vec![b'y'; round]).unwrap();
        b.process().signal(Signal::CONT);
        assert_eq!(fs::metadata(b.join("f")).unwrap().len(), round as u64);
    }
}
