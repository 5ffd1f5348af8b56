//! Metaservers on engines across a network: any of them can die at any moment, and mounts only pause.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use fjordfs_tests::{
    Cluster, Setup,
    engines::{Etcd, Postgres},
    wait::wait_for,
};
use rustix::process::Signal;

/// A take-over ends within five seconds on an idle machine; this one may be busy.
const TAKE_OVER_MAX: Duration = Duration::from_secs(60);

fn cluster(name: &str, store: String) -> Cluster {
    let setup = Setup { servers: 2, store: Some(store), standbys: 2, ..Setup::default() };
    Cluster::start(name, setup)
}

/// Makes, appends, renames and removes until told to stop. Any operation that is lost or done twice shows: as an error
/// of it or a later one, or in what is there in the end.
fn work(folder: &Path, stop: &AtomicBool) -> BTreeSet<(String, String)> {
    fs::create_dir(folder).unwrap();
    let mut there = BTreeSet::new();
    for n in 0u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let (made, named) = (folder.join(format!("new{n}")), format!("file{n}"));
        let mut file = fs::File::create_new(&made).unwrap();
        write!(file, "first {n}").unwrap();
        if n % 3 == 0 {
            file.sync_all().unwrap();
        }
        drop(file);
        fs::rename(&made, folder.join(&named)).unwrap();
        let mut file = fs::OpenOptions::new().append(true).open(folder.join(&named)).unwrap();
        write!(file, ", second").unwrap();
        drop(file);
        there.insert((named, format!("first {n}, second")));
        if n % 4 == 1 {
            let old = there.pop_first().unwrap();
            fs::remove_file(folder.join(old.0)).unwrap();
        }
    }
    there
}

fn found(folder: &Path) -> BTreeSet<(String, String)> {
    let entries = fs::read_dir(folder).unwrap().map(Result::unwrap);
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read_to_string(e.path()).unwrap())).collect()
}

/// Waits until another than `before` serves, and returns its number.
fn wait_owner(cluster: &Cluster, before: usize) -> usize {
    wait_for("another owner", TAKE_OVER_MAX, || match cluster.owner() {
        Some(owner) if owner != before => Ok(owner),
        other => Err(format!("owner: {other:?}")),
    })
}

/// `how` makes the owner fall silent; `back` makes it a standby again.
fn owners_come_and_go(
    cluster: &mut Cluster,
    rounds: usize,
    how: impl Fn(&mut Cluster, usize),
    back: impl Fn(&mut Cluster, usize),
) {
    let (a, b) = (cluster.mount(), cluster.mount());
    let stop = AtomicBool::new(false);
    let worked = std::thread::scope(|scope| {
        let (one, two) = (a.path().join("one"), b.path().join("two"));
        let workers = [one, two].map(|folder| {
            let stop = &stop;
            scope.spawn(move || (work(&folder, stop), folder))
        });
        for round in 0..rounds {
            std::thread::sleep(Duration::from_secs(1));
            let owner = cluster.owner().expect("nobody serves");
            let begun = Instant::now();
            how(cluster, owner);
            let next = wait_owner(cluster, owner);
            eprintln!("round {round}: {next} took over from {owner} after {:?}", begun.elapsed());
            back(cluster, owner);
        }
        std::thread::sleep(Duration::from_secs(1));
        stop.store(true, Ordering::Relaxed);
        workers.map(|worker| worker.join().unwrap())
    });
    for (there, folder) in worked {
        assert!(there.len() > 2, "hardly anything was done in {}", folder.display());
        assert_eq!(found(&folder), there);
        // Through the other mount, too, which has nothing of it cached.
        let name = folder.file_name().unwrap();
        let other = if folder.starts_with(a.path()) { &b } else { &a };
        assert_eq!(found(&other.path().join(name)), there);
    }
}

fn kill(cluster: &mut Cluster, owner: usize) {
    *cluster.metaserver(owner) = None;
}

fn restart(cluster: &mut Cluster, owner: usize) {
    cluster.start_metaserver(owner);
}

#[test]
fn owners_on_etcd_are_killed() {
    let etcd = Etcd::start();
    owners_come_and_go(&mut cluster("takeover-etcd", etcd.url("fjord")), 4, kill, restart);
}

#[test]
fn owners_on_postgres_are_killed() {
    let mut postgres = Postgres::start();
    let url = postgres.url();
    owners_come_and_go(&mut cluster("takeover-postgres", url), 4, kill, restart);
}

#[test]
fn an_owner_that_stands_still_is_fenced_and_stands_by() {
    let etcd = Etcd::start();
    let mut cluster = cluster("takeover-stopped", etcd.url("fjord"));
    let pause = |cluster: &mut Cluster, owner: usize| {
        // The kernel goes on accepting connections for a stopped process: ask its log instead.
        cluster.metaserver(owner).as_mut().unwrap().signal(Signal::STOP);
        wait_for("another owner", TAKE_OVER_MAX, || {
            let others = (0..3).filter(|n| *n != owner);
            let mut serving =
                others.filter(|n| cluster.metaserver(*n).as_ref().unwrap().log().contains("listening on"));
            serving.next().ok_or("nobody took over".to_owned())
        });
        let old = cluster.metaserver(owner).as_mut().unwrap();
        old.signal(Signal::CONT);
        wait_for("the old owner to notice", TAKE_OVER_MAX, || {
            let said = old.log().contains("another metaserver took over the store");
            said.then_some(()).ok_or("it says nothing".to_owned())
        });
    };
    owners_come_and_go(&mut cluster, 1, pause, |_, _| {});
}

#[test]
fn the_store_is_handed_over() {
    let etcd = Etcd::start();
    let mut cluster = cluster("takeover-handover", etcd.url("fjord"));
    let hand_over = |cluster: &mut Cluster, _: usize| drop(cluster.fjord(["meta", "handover"]).ok());
    owners_come_and_go(&mut cluster, 2, hand_over, |_, _| {});
    for n in 0..3 {
        cluster.metaserver(n).as_mut().unwrap().assert_running();
    }
}
