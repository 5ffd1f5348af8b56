//! Locks hold across clients, as they do across processes of one machine.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use fjordfs_tests::{
    Cluster, MountPoint, Setup,
    locks::{Kind, Owner, flock, in_the_way, lock, try_lock},
    rng, wait,
    wait::SOON,
    wait_for,
};
use rand::Rng;
use rustix::process::Signal;

use Kind::{Read as R, Unlock, Write as W};
use Owner::{OpenFile, Process};

const AGAIN: Result<(), i32> = Err(libc::EAGAIN);

fn open(mount: &MountPoint, name: &str) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(mount.join(name)).unwrap()
}

/// Until somebody else's close is noticed, which is a moment after it returns.
fn soon_free(what: &str, attempt: impl Fn() -> Result<(), i32>) {
    wait_for(what, SOON, || attempt().map_err(|e| format!("errno {e}")));
}

/// Waits until that many requests are in line.
fn in_line(cluster: &Cluster, count: u64) {
    cluster.wait_status("requests in line for locks", |status| {
        status.list("sessions").iter().filter_map(|s| s["lock_waits"].as_u64()).sum::<u64>() == count
    });
}

fn held(cluster: &Cluster) -> u64 {
    cluster.status().list("sessions").iter().filter_map(|s| s["locks"].as_u64()).sum()
}

/// A process that runs a few lines of Python in a folder, says when it has come to a point, and goes on when it is told to.
struct Script(Child);

impl Script {
    fn start(dir: &Path, lines: &str) -> Script {
        Script::with(dir, lines, &[])
    }

    fn with(dir: &Path, lines: &str, arguments: &[&str]) -> Script {
        let prelude = "import fcntl, os, signal, struct, sys\n\
            def point(what):\n    print(what, flush=True); sys.stdin.readline()\n";
        let child = Command::new("python3")
            .args(["-c", &format!("{prelude}{lines}")])
            .args(arguments)
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Script(child)
    }

    /// The next line that it says.
    fn says(&mut self) -> String {
        let mut said = String::new();
        let mut byte = [0];
        while self.0.stdout.as_mut().unwrap().read(&mut byte).unwrap() == 1 && byte != *b"\n" {
            said.push(byte[0].into());
        }
        said
    }

    fn go_on(&mut self) {
        self.0.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }

    fn ends_well(mut self) {
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn random_locks_of_three_open_files_go_as_on_a_local_filesystem() {
    let seed = rng::seed("locks");
    let mut random = rng::stream(seed, 0);
    let cluster = Cluster::start("locks-random", Setup::default());
    let mounts = [cluster.mount(), cluster.mount()];
    let local = cluster.dir("local");
    let files: Vec<File> = (0..3).map(|i| open(&mounts[i % 2], "f")).collect();
    let options = File::options().read(true).write(true).create(true).truncate(false).clone();
    let local: Vec<File> = (0..3).map(|_| options.open(local.join("f")).unwrap()).collect();
    let kinds = [R, W, Unlock];
    for step in 0..3000 {
        let who = random.random_range(0..3);
        let kind = kinds[random.random_range(0..3)];
        let (start, len) = (random.random_range(0..30), random.random_range(0..12));
        let told = |files: &[File]| match step % 10 {
            0..5 => format!("{:?}", try_lock(&files[who], OpenFile, kind, start, len)),
            // Which one of several is shown is up to the filesystem.
            5..8 if kind != Unlock => {
                let found = in_the_way(&files[who], OpenFile, kind, start, len).unwrap();
                format!("{:?}", found.map(|found| (found.pid, found.start < start + len || len == 0)))
            }
            _ => format!("{:?}", flock(&files[who], kind, false)),
        };
        let (found, expected) = (told(&files), told(&local));
        assert_eq!(found, expected, "step {step}: {kind:?} {start}+{len} of {who}, FJORD_SEED={seed}");
    }
    drop(files);
    cluster.wait_status("no locks left", |s| s.list("sessions").iter().all(|s| s["locks"] == 0));
    mounts.into_iter().for_each(MountPoint::unmount);
}

#[test]
fn locks_of_processes_conflict_across_clients_and_are_shown() {
    let cluster = Cluster::start("locks-process", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let (fa, fb) = (open(&a, "f"), open(&b, "f"));
    try_lock(&fa, Process, W, 10, 10).unwrap();
    assert_eq!(try_lock(&fb, Process, R, 0, 0), AGAIN);
    try_lock(&fb, Process, R, 0, 10).unwrap();
    let way = in_the_way(&fb, Process, R, 0, 0).unwrap().unwrap();
    assert_eq!((way.kind, way.start, way.len, way.pid), (W, 10, 10, 0), "a process that is not here");
    try_lock(&fa, Process, R, 12, 3).unwrap();
    try_lock(&fb, Process, R, 12, 3).unwrap();
    assert_eq!(try_lock(&fb, Process, R, 12, 4), AGAIN);
    assert_eq!(in_the_way(&fb, Process, W, 0, 0).unwrap().unwrap().len, 2);
    // Another process on the same mount is told who has it.
    let mut script = Script::start(
        a.path(),
        "f = open('f', 'r+')\n\
         t, _, start, length, pid = struct.unpack('hhqqi4x', fcntl.fcntl(f, fcntl.F_GETLK, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 12, 0, 0)))\n\
         print(t == fcntl.F_RDLCK, start, length, pid)",
    );
    assert_eq!(script.says(), format!("True 12 3 {}", std::process::id()));
    script.ends_well();
    assert_eq!(held(&cluster), 5);
    try_lock(&fa, Process, Unlock, 0, 0).unwrap();
    try_lock(&fb, Process, W, 0, 0).unwrap();
    assert_eq!(held(&cluster), 1);
    // flock is another world.
    flock(&fa, W, false).unwrap();
    assert_eq!(flock(&fb, R, false), AGAIN);
    drop(fa);
    soon_free("the flock of a closed file", || flock(&fb, W, false));
    drop(fb);
    a.unmount();
    b.unmount();
}

#[test]
fn closing_gives_locks_up() {
    let cluster = Cluster::start("locks-close", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let other = open(&b, "f");
    // Any descriptor of the file, also one for reading.
    let first = open(&a, "f");
    try_lock(&first, Process, W, 0, 1).unwrap();
    assert_eq!(try_lock(&other, Process, W, 0, 1), AGAIN);
    drop(File::open(a.join("f")).unwrap());
    try_lock(&other, Process, W, 0, 1).unwrap();
    drop(open(&b, "f"));
    // The descriptor of another process, which has inherited it, does not.
    try_lock(&first, Process, W, 0, 1).unwrap();
    let child = Command::new("true").stdin(Stdio::from(first.try_clone().unwrap())).spawn().unwrap();
    let mut child = child;
    assert!(child.wait().unwrap().success());
    // `try_clone` was closed in this process when the child had it.
    soon_free("the locks of a process that closed a copy", || try_lock(&other, Process, W, 0, 1));
    drop(open(&b, "f"));
    // An open file keeps its locks until its last descriptor is closed, and whatever happens to others.
    try_lock(&first, OpenFile, W, 0, 1).unwrap();
    flock(&first, W, false).unwrap();
    drop(first.try_clone().unwrap());
    drop(open(&a, "f"));
    assert_eq!((try_lock(&other, OpenFile, W, 0, 1), flock(&other, W, false)), (AGAIN, AGAIN));
    drop(first);
    soon_free("the locks of an open file", || try_lock(&other, OpenFile, W, 0, 1));
    soon_free("the flock of an open file", || flock(&other, W, false));
    // The first lock of a file, through a descriptor for reading.
    fs::write(b.join("g"), "g").unwrap();
    let reader = File::open(a.join("g")).unwrap();
    try_lock(&reader, Process, R, 0, 0).unwrap();
    let other = open(&b, "g");
    assert_eq!(try_lock(&other, Process, W, 0, 0), AGAIN);
    drop(reader);
    soon_free("a lock for reading", || try_lock(&other, Process, W, 0, 0));
    drop(other);
    // And a later one, at once.
    let reader = File::open(a.join("g")).unwrap();
    try_lock(&reader, Process, R, 0, 0).unwrap();
    drop(reader);
    try_lock(&open(&b, "g"), Process, W, 0, 0).unwrap();
}

#[test]
fn who_waits_gets_it_in_turn() {
    let cluster = Cluster::start("locks-wait", Setup::default());
    let mounts = [cluster.mount(), cluster.mount(), cluster.mount()];
    let first = open(&mounts[0], "f");
    try_lock(&first, OpenFile, W, 0, 0).unwrap();
    let order = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for (i, kind) in [W, W, R, R, W].into_iter().enumerate() {
            let (mount, order) = (&mounts[i % 3], &order);
            scope.spawn(move || {
                let file = open(mount, "f");
                lock(&file, OpenFile, kind, 0, 0).unwrap();
                order.lock().unwrap().push(i);
                if i == 2 || i == 3 {
                    // Both readers at once.
                    wait::wait_until("the other reader", SOON, || order.lock().unwrap().len() == 4);
                }
            });
            in_line(&cluster, i as u64 + 1);
        }
        try_lock(&first, OpenFile, Unlock, 0, 0).unwrap();
    });
    let mut order = order.into_inner().unwrap();
    order[2..4].sort_unstable();
    assert_eq!(order, [0, 1, 2, 3, 4]);
    // More than a queue of the kernel has places, with the one they wait for on any of its CPUs.
    flock(&first, W, false).unwrap();
    let done = AtomicUsize::new(0);
    thread::scope(|scope| {
        for i in 0..60 {
            let (mount, done) = (&mounts[i % 2], &done);
            scope.spawn(move || {
                flock(&open(mount, "f"), W, true).unwrap();
                done.fetch_add(1, Ordering::Relaxed);
            });
        }
        in_line(&cluster, 60);
        fs::write(mounts[0].join("others"), "work").unwrap();
        assert_eq!(done.load(Ordering::Relaxed), 0);
        flock(&first, Unlock, false).unwrap();
    });
    assert_eq!(done.into_inner(), 60);
    drop(first);
    mounts.into_iter().for_each(MountPoint::unmount);
}

#[test]
fn waits_are_interrupted_and_given_up() {
    let cluster = Cluster::start("locks-interrupt", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let first = open(&a, "f");
    for call in ["fcntl.flock(f, fcntl.LOCK_EX)", "fcntl.lockf(f, fcntl.LOCK_EX)"] {
        flock(&first, W, true).unwrap();
        lock(&first, Process, W, 0, 0).unwrap();
        // A handler that raises makes Python's call fail; one that does not makes it try again.
        let mut script = Script::start(
            b.path(),
            &format!(
                "class Enough(Exception): pass\n\
                 def handler(*_): raise Enough\n\
                 signal.signal(signal.SIGUSR1, handler)\n\
                 f = open('f', 'r+')\n\
                 print('waiting', flush=True)\n\
                 try:\n    {call}\n\
                 except Enough:\n    point('interrupted')\n\
                 {call}\n\
                 point('locked')"
            ),
        );
        assert_eq!(script.says(), "waiting");
        in_line(&cluster, 1);
        kill(&script.0, libc::SIGUSR1);
        assert_eq!(script.says(), "interrupted");
        in_line(&cluster, 0);
        script.go_on();
        in_line(&cluster, 1);
        // Somebody in line behind it who dies leaves the line.
        let mut dies =
            Script::start(b.path(), &format!("f = open('f', 'r+'); print('waiting', flush=True); {call}"));
        assert_eq!(dies.says(), "waiting");
        in_line(&cluster, 2);
        dies.0.kill().unwrap();
        dies.0.wait().unwrap();
        in_line(&cluster, 1);
        flock(&first, Unlock, false).unwrap();
        try_lock(&first, Process, Unlock, 0, 0).unwrap();
        assert_eq!(script.says(), "locked");
        script.go_on();
        script.ends_well();
    }
    soon_free("locks of processes that are gone", || try_lock(&first, Process, W, 0, 0));
    drop(first);
    a.unmount();
    b.unmount();
}

fn kill(child: &Child, signal: libc::c_int) {
    // SAFETY: a child that has not been waited for, so its id is its own.
    assert_eq!(unsafe { libc::kill(child.id().cast_signed(), signal) }, 0);
}

#[test]
fn processes_that_wait_for_each_other_are_told() {
    let cluster = Cluster::start("locks-deadlock", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let (fa, fb) = (open(&a, "f"), open(&b, "f"));
    let (ga, gb) = (open(&a, "g"), open(&b, "g"));
    try_lock(&fa, Process, W, 0, 0).unwrap();
    try_lock(&gb, Process, W, 5, 1).unwrap();
    thread::scope(|scope| {
        let waits = scope.spawn(|| lock(&ga, Process, R, 0, 0));
        in_line(&cluster, 1);
        assert_eq!(lock(&fb, Process, W, 1, 1), Err(libc::EDEADLK));
        try_lock(&gb, Process, Unlock, 0, 0).unwrap();
        waits.join().unwrap().unwrap();
    });
}

#[test]
fn locks_go_with_their_client() {
    let cluster = Cluster::start("locks-death", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let theirs = open(&b, "f");
    flock(&theirs, W, false).unwrap();
    try_lock(&theirs, Process, W, 0, 0).unwrap();
    let mine = open(&a, "f");
    assert_eq!(flock(&mine, R, false), AGAIN);
    b.kill9();
    // Waits, but not for ever.
    flock(&mine, W, true).unwrap();
    lock(&mine, Process, W, 0, 0).unwrap();
    // With an orderly end, at once.
    let c = cluster.mount();
    let file = open(&c, "g");
    flock(&file, W, false).unwrap();
    drop(file);
    c.unmount();
    flock(&open(&a, "g"), W, false).unwrap();
}

/// Nothing that was written under a lock comes after what the next owner of the lock has written, and who lost it is told.
#[test]
fn what_was_written_under_a_lost_lock_is_void() {
    for (case, length) in [("inline", 1000), ("blocks", 300_000)] {
        let setup = Setup { session_timeout: Duration::from_secs(3), ..Setup::default() };
        let cluster = Cluster::start(&format!("locks-void-{case}"), setup);
        // Nothing is committed before it is asked for.
        let (mut a, b) = (cluster.mount_with("dirty_age=1h"), cluster.mount());
        let [locked, other] = ["locked", "other"].map(|name| open(&a, name));
        for file in [&locked, &other] {
            file.write_all_at(&vec![1; length], 0).unwrap();
            file.sync_all().unwrap();
        }
        lock(&locked, OpenFile, W, 0, 10).unwrap();
        for file in [&locked, &other] {
            file.write_all_at(&vec![2; length], 0).unwrap();
        }
        a.process().signal(Signal::STOP);
        let next = open(&b, "locked");
        soon_free("the lock of a session that is over", || try_lock(&next, OpenFile, W, 0, 10));
        next.write_all_at(&[3; 10], 0).unwrap();
        next.sync_all().unwrap();
        a.process().signal(Signal::CONT);
        let told = locked.sync_all().unwrap_err();
        assert_eq!(told.raw_os_error(), Some(libc::EIO), "{case}");
        locked.sync_all().unwrap_or_else(|e| panic!("{case}: it was told: {e}"));
        other.sync_all().unwrap_or_else(|e| panic!("{case}: nothing was locked: {e}"));
        assert_eq!(try_lock(&locked, OpenFile, W, 0, 10), AGAIN, "{case}: it is the other's");
        let expected = [vec![3; 10], vec![1; length - 10]].concat();
        for mount in [&a, &b] {
            assert!(
                fs::read(mount.join("locked")).unwrap() == expected,
                "{case}: {}",
                mount.path().display()
            );
            assert!(fs::read(mount.join("other")).unwrap() == vec![2; length], "{case}: not locked");
        }
        drop((locked, other, next));
        a.unmount_after_trouble();
        b.unmount();
    }
}

#[test]
fn locks_outlive_the_metaserver() {
    let mut cluster = Cluster::start("locks-restart", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let (fa, fb) = (open(&a, "f"), open(&b, "f"));
    try_lock(&fa, Process, W, 0, 10).unwrap();
    try_lock(&fb, Process, R, 20, 10).unwrap();
    flock(&fa, R, false).unwrap();
    flock(&fb, R, false).unwrap();
    thread::scope(|scope| {
        let waits = scope.spawn(|| lock(&fb, Process, W, 5, 1));
        in_line(&cluster, 1);
        cluster.kill_meta();
        // Asked while nobody is there: answered when somebody is.
        let asks = scope.spawn(|| try_lock(&fa, Process, W, 15, 10));
        thread::sleep(Duration::from_millis(300));
        cluster.start_meta();
        assert_eq!(asks.join().unwrap(), AGAIN);
        cluster.wait_healthy();
        in_line(&cluster, 1);
        assert_eq!(flock(&fb, W, false), AGAIN);
        try_lock(&fb, Process, W, 30, 1).unwrap();
        // That flock was given up for the one that could not be had.
        flock(&fa, W, false).unwrap();
        try_lock(&fa, Process, Unlock, 5, 1).unwrap();
        waits.join().unwrap().unwrap();
    });
    drop((fa, fb));
    a.unmount();
    b.unmount();
}

/// Takes a lock, reads a number, adds one, writes, and says when it came and went, until it is told to stop. In a process of
/// its own: one that starts others closes what it has open in them, and waits then for the metaserver that it is about to start.
const WORKER: &str = "
import random, select, time
rng = random.Random(sys.argv[1])
f = os.open('f', os.O_RDWR)
whole, span = sys.argv[2] == 'flock', struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 8, 0)
none = struct.pack('hhqqi4x', fcntl.F_UNLCK, 0, 0, 8, 0)
while not select.select([sys.stdin], [], [], 0)[0]:
    # Some take both, in one order, so that each kind is waited for.
    if whole: fcntl.flock(f, fcntl.LOCK_EX)
    fcntl.fcntl(f, fcntl.F_SETLKW, span)
    entered = time.monotonic_ns()
    count = int.from_bytes(os.pread(f, 8, 0), 'little')
    if rng.random() < 0.2: time.sleep(0.001)
    os.pwrite(f, (count + 1).to_bytes(8, 'little'), 0)
    left = time.monotonic_ns()
    fcntl.fcntl(f, fcntl.F_SETLK, none)
    if whole: fcntl.flock(f, fcntl.LOCK_UN)
    print(count, entered, left, flush=True)
";

/// Who has the lock is alone, and sees what others wrote in a file that stays open everywhere.
#[test]
fn who_has_the_lock_is_alone_and_sees_what_others_wrote() {
    const WORKERS: usize = 6;
    let seed = rng::seed("lock_history");
    let mut random = rng::stream(seed, 0);
    let mut cluster = Cluster::start("locks-history", Setup::default());
    let mounts = [cluster.mount(), cluster.mount(), cluster.mount()];
    fs::write(mounts[0].join("f"), [0; 16]).unwrap();
    let history = Mutex::new(BTreeMap::new());
    let said = AtomicUsize::new(0);
    thread::scope(|scope| {
        let workers: Vec<Script> = (0..WORKERS)
            .map(|worker| {
                let kind = if worker < 3 { "fcntl" } else { "flock" };
                let random = format!("{seed}-{worker}");
                Script::with(mounts[worker % 3].path(), WORKER, &[&random, kind])
            })
            .collect();
        let (mut inputs, listeners): (Vec<_>, Vec<_>) = workers
            .into_iter()
            .map(|mut worker| {
                let input = worker.0.stdin.take();
                let (history, said) = (&history, &said);
                let listener = scope.spawn(move || {
                    loop {
                        let line = worker.says();
                        if line.is_empty() {
                            return worker.ends_well();
                        }
                        let numbers: Vec<u64> = line.split(' ').map(|word| word.parse().unwrap()).collect();
                        let before = history.lock().unwrap().insert(numbers[0], (numbers[1], numbers[2]));
                        assert_eq!(before, None, "{} was seen twice, FJORD_SEED={seed}", numbers[0]);
                        said.fetch_add(1, Ordering::Relaxed);
                    }
                });
                (input, listener)
            })
            .unzip();
        let more = |count: usize| {
            let before = said.load(Ordering::Relaxed);
            wait::wait_until("locks to be taken", SOON, || said.load(Ordering::Relaxed) > before + count);
        };
        for _ in 0..4 {
            more(10);
            thread::sleep(Duration::from_millis(random.random_range(0..500)));
            cluster.kill_meta();
            thread::sleep(Duration::from_millis(random.random_range(0..500)));
            cluster.start_meta();
        }
        more(50);
        inputs.clear();
        for listener in listeners {
            listener.join().unwrap();
        }
    });
    let in_order: Vec<_> = history.into_inner().unwrap().into_iter().collect();
    eprintln!("{} times", in_order.len());
    for (i, pair) in in_order.windows(2).enumerate() {
        let ((count, (_, left)), (next, (entered, _))) = (pair[0], pair[1]);
        assert_eq!((count, next), (i as u64, i as u64 + 1), "FJORD_SEED={seed}");
        assert!(left <= entered, "{next} entered at {entered}, {count} left at {left}, FJORD_SEED={seed}");
    }
    let count = fs::read(mounts[1].join("f")).unwrap();
    assert_eq!(count[..8], (in_order.len() as u64).to_le_bytes());
    mounts.into_iter().for_each(MountPoint::unmount);
}

/// What is mapped and cached by the kernel is looked at anew, too.
#[test]
fn a_lock_brings_the_others_bytes_into_an_open_file() {
    let cluster = Cluster::start("locks-pages", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let size = 300_000;
    fs::write(a.join("f"), vec![0; size]).unwrap();
    let (fa, fb) = (open(&a, "f"), open(&b, "f"));
    let mut seen = vec![0; size];
    for round in 1..20u8 {
        let (writer, reader) = if round % 2 == 0 { (&fa, &fb) } else { (&fb, &fa) };
        lock(writer, Process, W, 0, 0).unwrap();
        writer.write_all_at(&vec![round; size + usize::from(round)], 0).unwrap();
        lock(writer, Process, Unlock, 0, 0).unwrap();
        lock(reader, Process, R, 0, 0).unwrap();
        seen.resize(size + usize::from(round), 0);
        reader.read_exact_at(&mut seen, 0).unwrap();
        assert!(seen.iter().all(|byte| *byte == round), "round {round}");
        assert_eq!(reader.metadata().unwrap().size(), seen.len() as u64);
        lock(reader, Process, Unlock, 0, 0).unwrap();
    }
}

/// The kernel closes an open file in the background, and gives the next one the place in memory that it takes for its owner.
#[test]
fn a_close_under_way_takes_no_lock_from_the_next_open_file() {
    let cluster = Cluster::start("closing", Setup::default());
    let mount = cluster.mount();
    let probe = open(&mount, "f");
    for round in 0..100 {
        for owner in [None, Some(OpenFile)] {
            let wait = |file: &File| match owner {
                None => flock(file, W, true),
                Some(owner) => lock(file, owner, W, 0, 0),
            };
            let attempt = |file: &File, kind| match owner {
                None => flock(file, kind, false),
                Some(owner) => try_lock(file, owner, kind, 0, 0),
            };
            let mut first = open(&mount, "f");
            wait(&first).unwrap();
            // So that there is something to commit before the lock is given up.
            first.write_all(b"x").unwrap();
            drop(first);
            let second = open(&mount, "f");
            wait(&second).unwrap();
            thread::sleep(Duration::from_millis(10));
            assert_eq!(attempt(&probe, W), AGAIN, "round {round}, {owner:?}");
            attempt(&second, Unlock).unwrap();
            attempt(&probe, W).unwrap();
            attempt(&probe, Unlock).unwrap();
        }
    }
}

#[test]
fn a_crowd_that_waits_for_a_lock_does_not_hold_up_the_unlock() {
    let cluster = Cluster::start("crowd", Setup::default());
    let mount = cluster.mount();
    let holder = open(&mount, "f");
    flock(&holder, W, true).unwrap();
    let (waiting, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..700 {
            let file = open(&mount, "f");
            let (waiting, done) = (&waiting, &done);
            thread::Builder::new()
                .stack_size(64 << 10)
                .spawn_scoped(scope, move || {
                    waiting.fetch_add(1, Ordering::SeqCst);
                    match flock(&file, W, true) {
                        Ok(()) => flock(&file, Unlock, true).unwrap(),
                        Err(errno) => assert_eq!(errno, libc::ENOLCK),
                    }
                    done.fetch_add(1, Ordering::SeqCst);
                })
                .unwrap();
        }
        wait::wait_until("all to wait", SOON, || waiting.load(Ordering::SeqCst) == 700);
        thread::sleep(Duration::from_secs(2));
        flock(&holder, Unlock, true).unwrap();
        wait::wait_until("all to have had it", 3 * SOON, || done.load(Ordering::SeqCst) == 700);
    });
    drop(holder);
    mount.unmount();
}
