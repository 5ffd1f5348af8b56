//! Mounts that come and go while owners do: an unmount ends whatever happens to the owner meanwhile, and what was written is there.

use std::{
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use fjordfs_tests::{process::own_descriptors, rng};
use rand::{Rng, seq::SliceRandom};

use super::{
    faults::{Engine, OF_OWNERS, Stage},
    found, work,
};

/// Each fault of owners so often, each time with a mount that leaves within the seconds that it takes, with things that it has decided and
/// not told; `until` ends it early.
fn run(engine: Engine, seed: u64, times: usize, until: Option<Instant>) {
    let mut rng = rng::stream(seed, 0x1ea7e);
    let mut faults = OF_OWNERS.repeat(times);
    faults.shuffle(&mut rng);
    eprintln!("leaving on {engine:?}: seed {seed}: {faults:?}");
    let mut stage = Stage::new(engine, seed);
    let stays = stage.mount(0);
    for (round, fault) in faults.into_iter().enumerate() {
        if until.is_some_and(|until| Instant::now() >= until) {
            break;
        }
        let owner = stage.wait_settled();
        let leaves = stage.mount(1);
        let folder = format!("round{round}");
        let (works, lasts) = (rng.random_range(100..1500), rng.random_range(1000..3000));
        let (begins, pause) = (rng.random_range(0..100), rng.random_range(0..3000));
        let stop = AtomicBool::new(false);
        let (done, has_worked) = mpsc::channel();
        let there = std::thread::scope(|scope| {
            let leaver = scope.spawn(|| {
                own_descriptors();
                let there = std::thread::scope(|scope| {
                    let worker = scope.spawn(|| work(&leaves.join(&folder), &stop));
                    std::thread::sleep(Duration::from_millis(works));
                    stop.store(true, Ordering::Relaxed);
                    worker.join().unwrap()
                });
                done.send(()).unwrap();
                std::thread::sleep(Duration::from_millis(pause));
                let begun = Instant::now();
                leaves.unmount();
                (there, begun.elapsed())
            });
            has_worked.recv().unwrap();
            std::thread::sleep(Duration::from_millis(begins));
            stage.suffer(fault, owner, Duration::from_millis(lasts));
            let (there, took) = leaver.join().unwrap();
            eprintln!("round {round}: {fault:?}, left within {took:?}");
            there
        });
        assert_eq!(found(&stays.join(&folder)), there, "round {round}, {fault:?}");
    }
    stays.unmount();
    eprintln!("seed {seed} held");
}

/// The order that a landing has to hold; the soak looks for others that do not.
const SEED: u64 = 1;

#[test]
fn mounts_leave_while_owners_on_etcd_come_and_go() {
    run(Engine::Etcd, rng::given().unwrap_or(SEED), 1, None);
}

#[test]
fn mounts_leave_while_owners_on_postgres_come_and_go() {
    run(Engine::Postgres, rng::given().unwrap_or(SEED), 1, None);
}

#[test]
#[ignore = "takes as long as FJORD_SOAK_MINUTES says: tests/run soak MINUTES leaving"]
fn soak() {
    let minutes: u64 = std::env::var("FJORD_SOAK_MINUTES").unwrap().parse().unwrap();
    let until = Instant::now() + Duration::from_secs(60 * minutes);
    for (seed, engine) in (rng::seed("soak")..).zip([Engine::Etcd, Engine::Postgres].into_iter().cycle()) {
        if Instant::now() >= until {
            break;
        }
        run(engine, seed, 2, Some(until));
    }
}
