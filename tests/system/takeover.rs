//! Metaservers on engines across a network: any of them can die at any moment, and mounts only pause.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

#[path = "takeover/faults.rs"]
mod faults;
#[path = "takeover/leaving.rs"]
mod leaving;
#[path = "takeover/restore.rs"]
mod restore;

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
    process::own_descriptors,
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
            scope.spawn(move || {
                own_descriptors();
                (work(&folder, stop), folder)
            })
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
        // Admin verbs pass it over, too: its address is the first of all.
        assert_eq!(owner, 0);
        cluster.fjord(["status"]).ok();
        cluster.fjord(["scrub", "start"]).ok();
        cluster.fjord(["meta", "backup", cluster.folder().join("backup").to_str().unwrap()]).ok();
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

/// Work goes on through `trouble` of the store; then nothing is missing.
fn works_through(cluster: &Cluster, trouble: impl FnOnce()) {
    let (a, b) = (cluster.mount(), cluster.mount());
    let stop = AtomicBool::new(false);
    let folder = a.path().join("work");
    let there = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // Servers of the store are started again while it has files open.
            own_descriptors();
            work(&folder, &stop)
        });
        std::thread::sleep(Duration::from_secs(1));
        trouble();
        // Something that needs the store: it ends only when that is of use again.
        let begun = Instant::now();
        fs::create_dir(b.path().join("after")).unwrap();
        eprintln!("operations went on {:?} after the trouble", begun.elapsed());
        stop.store(true, Ordering::Relaxed);
        worker.join().unwrap()
    });
    assert!(there.len() > 2, "hardly anything was done");
    assert_eq!(found(&folder), there);
    assert_eq!(found(&b.path().join("work")), there);
}

#[test]
fn the_leader_of_etcd_is_killed_and_then_the_quorum() {
    let mut etcd = Etcd::start();
    let cluster = cluster("takeover-etcd-leader", etcd.url("fjord"));
    works_through(&cluster, || {
        let leader = etcd.leader();
        etcd.kill_member(leader);
        std::thread::sleep(Duration::from_secs(3));
        // One of three decides nothing: operations wait.
        let next = etcd.leader();
        etcd.kill_member(next);
        std::thread::sleep(Duration::from_secs(4));
        etcd.start_member(leader);
        etcd.start_member(next);
    });
}

#[test]
fn etcd_stands_still_for_a_while() {
    let etcd = Etcd::start();
    let cluster = cluster("takeover-etcd-still", etcd.url("fjord"));
    works_through(&cluster, || {
        (0..3).for_each(|n| etcd.signal_member(n, Signal::STOP));
        std::thread::sleep(Duration::from_secs(5));
        (0..3).for_each(|n| etcd.signal_member(n, Signal::CONT));
    });
}

/// Longer than reads of the store are tried again. What waits meanwhile goes on, or fails with an error; nothing is lost.
#[test]
fn the_store_is_silent_for_more_than_a_minute() {
    let mut postgres = Postgres::start();
    let url = postgres.url();
    let cluster = cluster("takeover-silent", url);
    works_through(&cluster, || {
        (0..2).for_each(|n| postgres.signal_server(n, Signal::STOP));
        // What nobody has asked for before cannot be answered.
        let asked = fjordfs_tests::fjord(["meta", "status", "--meta", &cluster.meta_address()]).output();
        let said = String::from_utf8(asked.unwrap().stdout).unwrap();
        assert!(said.contains("no answer"), "the store is not silent: {said}");
        std::thread::sleep(Duration::from_secs(70));
        (0..2).for_each(|n| postgres.signal_server(n, Signal::CONT));
    });
}

#[test]
fn the_primary_of_postgres_is_killed_and_its_standby_promoted() {
    let mut postgres = Postgres::start();
    let url = postgres.url();
    let cluster = cluster("takeover-promotion", url);
    works_through(&cluster, || {
        postgres.kill_server(0);
        std::thread::sleep(Duration::from_secs(1));
        postgres.promote();
    });
}

#[test]
fn the_store_is_shown_and_moved() {
    let (etcd, mut postgres) = (Etcd::start(), Postgres::start());
    let (from, to) = (etcd.url("fjord"), postgres.url());
    let mut cluster = cluster("takeover-migrate", from.clone());
    {
        let mount = cluster.mount();
        for n in 0..300 {
            fs::write(mount.path().join(format!("f{n}")), n.to_string()).unwrap();
        }
        mount.unmount();
    }
    let seen = wait_for("both standbys", TAKE_OVER_MAX, || {
        let seen = cluster.fjord(["meta", "status"]).ok().stdout;
        if seen.matches("standby ").count() == 2 { Ok(seen) } else { Err(seen) }
    });
    for what in ["serving", "leader", "follower", "0 batches behind"] {
        assert!(seen.contains(what), "{what}: {seen}");
    }
    let migrate =
        |from: &str, to: &str| fjordfs_tests::fjord(["meta", "migrate", from, to]).output().unwrap();
    let refused = migrate(&from, &to);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("a metaserver runs on"), "{said}");
    for n in 0..3 {
        cluster.metaserver(n).take().unwrap().stop();
    }
    let moved = migrate(&from, &to);
    let said = String::from_utf8_lossy(&moved.stdout).into_owned() + &String::from_utf8_lossy(&moved.stderr);
    assert!(moved.status.success() && said.contains("read back and identical"), "{said}");
    let again = migrate(&from, &postgres.url());
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(!again.status.success() && said.contains("was moved to postgres://"), "{said}");
    let there = migrate(&to, &to.clone());
    assert!(!there.status.success());
    // The old store refuses to be served, the new one serves what was in it.
    cluster.start_metaserver(1);
    wait_for("the refusal", TAKE_OVER_MAX, || {
        let log = cluster.metaserver(1).as_ref().unwrap().log();
        log.contains("was moved to postgres://").then_some(()).ok_or(log)
    });
    *cluster.metaserver(1) = None;
    cluster.set_store(to);
    cluster.start_metaserver(0);
    wait_for("the new store to be served", TAKE_OVER_MAX, || {
        let log = cluster.metaserver(0).as_ref().unwrap().log();
        log.contains("listening on").then_some(()).ok_or(log)
    });
    let mount = cluster.mount();
    for n in 0..300 {
        assert_eq!(fs::read_to_string(mount.path().join(format!("f{n}"))).unwrap(), n.to_string());
    }
}
