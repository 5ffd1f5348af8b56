//! Many short histories of concurrent operations of several clients, each of one kind and checked for the promise that applies to it:
//! undisturbed, while the metaserver is killed, and while clients are.
//!
//! A cluster is started once; every history has a directory of its own there. Those of a round run side by side, so that one
//! disturbance meets all of them in different places. `FJORD_HISTORIES` says how many a test does, `FJORD_SEED` repeats
//! what they did, though not when.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use fjordfs_tests::{
    Cluster, MountPoint, Setup,
    rng::{self, TestRng},
};
use rand::Rng;

#[path = "histories/appends.rs"]
mod appends;
#[path = "histories/exclusive.rs"]
mod exclusive;
#[path = "histories/renames.rs"]
mod renames;
#[path = "histories/turns.rs"]
mod turns;

const MOUNTS: usize = 3;
const WORKERS: usize = 2 * MOUNTS;
/// Histories side by side.
const ROUND: usize = 20;
/// The mount that is killed.
const VICTIM: usize = MOUNTS - 1;

/// Why a worker does not go on.
enum Stop {
    /// Its mount was killed.
    Gone,
    /// What must not be.
    Wrong(String),
}

impl<E: std::fmt::Display> From<E> for Stop {
    fn from(error: E) -> Stop {
        Stop::Wrong(error.to_string())
    }
}

/// A history's directory on one mount.
struct Place<'a> {
    dir: PathBuf,
    mount: usize,
    dying: &'a AtomicBool,
}

impl Place<'_> {
    fn join(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// What an operation came to, unless it may be the death of the mount that speaks.
    fn alive<T, E: Into<Stop>>(&self, result: Result<T, E>) -> Result<T, Stop> {
        if self.dying.load(Ordering::SeqCst) { Err(Stop::Gone) } else { result.map_err(Into::into) }
    }
}

/// What is left after a round.
struct Aftermath {
    /// The history's directory on the mounts that live.
    places: Vec<PathBuf>,
    /// A mount was killed, and what it had not synced may be lost.
    lossy: bool,
}

/// One history.
trait Played: Sync {
    /// Makes what is there at the beginning.
    fn prepare(&self, at: &Place<'_>) -> Result<(), Stop>;
    /// What a worker does; those of a mount are `mount` and `mount + MOUNTS`.
    fn work(&self, at: &Place<'_>, worker: usize, random: &mut TestRng) -> Result<(), Stop>;
    /// Whether what must hold did.
    fn check(&self, left: &Aftermath) -> Result<(), String>;
}

fn is_of_victim(worker: usize) -> bool {
    worker % MOUNTS == VICTIM
}

const KINDS: [&str; 8] = [
    "append",
    "append, read elsewhere",
    "create exclusively",
    "rename here and there",
    "rename over",
    "flock",
    "fcntl",
    "lock file",
];

/// The kind of a history; `FJORD_KIND` asks for one only.
fn kind(history: usize) -> &'static str {
    let only = std::env::var("FJORD_KIND").ok();
    let wanted: Vec<_> =
        KINDS.into_iter().filter(|kind| only.as_ref().is_none_or(|only| only == kind)).collect();
    assert!(!wanted.is_empty(), "FJORD_KIND is one of {KINDS:?}");
    wanted[history % wanted.len()]
}

fn history(number: usize) -> Box<dyn Played> {
    match kind(number) {
        "append" => Box::new(appends::Appends::by_all()),
        "append, read elsewhere" => Box::new(appends::Appends::with_readers()),
        "create exclusively" => Box::new(exclusive::Names::default()),
        "rename here and there" => Box::new(renames::HereAndThere::default()),
        "rename over" => Box::new(renames::Over::default()),
        "flock" => Box::new(turns::Counter::new(turns::Lock::Flock)),
        "fcntl" => Box::new(turns::Counter::new(turns::Lock::OpenFile)),
        _ => Box::new(turns::Counter::new(turns::Lock::Name)),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Disturbance {
    Nothing,
    Metaserver,
    Client,
}

struct Stage {
    cluster: Cluster,
    mounts: Vec<MountPoint>,
    seed: u64,
    counts: BTreeMap<&'static str, usize>,
}

impl Stage {
    fn set(name: &str, setup: Setup) -> Stage {
        let seed = rng::seed(name);
        let cluster = Cluster::start(name, setup);
        let mounts = (0..MOUNTS).map(|_| cluster.mount()).collect();
        Stage { cluster, mounts, seed, counts: BTreeMap::new() }
    }

    /// Plays as many histories as are asked for, some at a time.
    fn play(mut self, count: usize, disturbance: Disturbance) {
        let count = std::env::var("FJORD_HISTORIES").ok().and_then(|n| n.parse().ok()).unwrap_or(count);
        for from in (0..count).step_by(ROUND) {
            self.round(from, ROUND.min(count - from), disturbance);
        }
        eprintln!("{:?}", self.counts);
        let Stage { mut cluster, mounts, .. } = self;
        cluster.assert_running();
        mounts.into_iter().for_each(MountPoint::unmount);
        drop(cluster);
    }

    fn round(&mut self, from: usize, count: usize, disturbance: Disturbance) {
        let seed = self.seed;
        let dying: [AtomicBool; MOUNTS] = Default::default();
        let roots: Vec<PathBuf> = self.mounts.iter().map(|mount| mount.path().to_owned()).collect();
        let place = |history: usize, mount: usize| Place {
            dir: roots[mount].join(format!("history-{history}")),
            mount,
            dying: &dying[mount],
        };
        let played: Vec<_> = (from..from + count).map(|n| (n, history(n))).collect();
        for (n, history) in &played {
            // Not by the one that may die with what it has not synced.
            let at = place(*n, n % VICTIM);
            std::fs::create_dir(&at.dir).unwrap();
            not_wrong(history.prepare(&at), *n, seed);
        }
        // Every other victim waits for its commits, so that nothing that it was told is done may be lost.
        let lossy = disturbance == Disturbance::Client && (from / ROUND).is_multiple_of(2);
        thread::scope(|scope| {
            for (n, history) in &played {
                for worker in 0..WORKERS {
                    let at = place(*n, worker % MOUNTS);
                    scope.spawn(move || {
                        let mut random = rng::stream(seed, (n * WORKERS + worker) as u64);
                        thread::sleep(Duration::from_micros(random.random_range(0..20_000)));
                        not_wrong(history.work(&at, worker, &mut random), *n, seed);
                    });
                }
            }
            let mut random = rng::stream(seed, (1 << 40) + from as u64);
            thread::sleep(Duration::from_millis(random.random_range(5..600)));
            match disturbance {
                Disturbance::Nothing => {}
                Disturbance::Metaserver => {
                    self.cluster.kill_meta();
                    thread::sleep(Duration::from_millis(random.random_range(0..200)));
                    self.cluster.start_meta();
                }
                Disturbance::Client => {
                    dying[VICTIM].store(true, Ordering::SeqCst);
                    self.mounts.remove(VICTIM).kill9();
                }
            }
        });
        if disturbance == Disturbance::Client {
            self.mounts.push(self.cluster.mount_with(if lossy { "close=sync" } else { "" }));
        }
        for (n, history) in played {
            let dir = |mount: &MountPoint| mount.join(format!("history-{n}"));
            let left = Aftermath { places: self.mounts.iter().map(dir).collect(), lossy };
            let kind = kind(n);
            history.check(&left).unwrap_or_else(|e| panic!("{kind}, history {n}, FJORD_SEED={seed}: {e}"));
            *self.counts.entry(kind).or_default() += 1;
        }
    }
}

fn not_wrong(result: Result<(), Stop>, history: usize, seed: u64) {
    if let Err(Stop::Wrong(what)) = result {
        panic!("{}, history {history}, FJORD_SEED={seed}: {what}", kind(history));
    }
}

#[test]
fn what_clients_do_at_once_keeps_every_promise() {
    Stage::set("histories", Setup::default()).play(240, Disturbance::Nothing);
}

#[test]
fn what_clients_do_at_once_keeps_every_promise_over_deaths_of_the_metaserver() {
    Stage::set("histories-meta", Setup::default()).play(160, Disturbance::Metaserver);
}

#[test]
fn what_clients_do_at_once_keeps_every_promise_over_deaths_of_clients() {
    let setup = Setup { session_timeout: Duration::from_secs(9), ..Setup::default() };
    Stage::set("histories-client", setup).play(80, Disturbance::Client);
}
