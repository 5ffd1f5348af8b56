//! Deterministic simulation: the metaserver and the clients, whole, with their gRPC and frames, on a network, on data servers
//! and on a store that are simulated, in one thread and in virtual time.
//!
//! | module | what it is |
//! |---|---|
//! | `fate` | the clock, the randomness and the waiting of the process, all of them from the seed |
//! | `process` | a process of its own for each seed |
//! | `network` | connections that delay, stand still, break, and lose what is under way |
//! | `disk` | the metadata engine: what a kill and what a power failure leave of it |
//! | `data_server` | shards in memory behind the real protocol; a power failure takes what was not synced |
//! | `cluster` | who runs, killing and starting |
//! | `programs`, `moves` | what the clients do |
//! | `dentries` | names that a kernel would cache above the library |
//! | `overwrites` | what was synced and then overwritten, in a power failure of everything |
//! | `record` | what was promised and what was seen |
//! | `run` | one seed from its first to its last moment |
//!
//! # Real and simulated
//! Real: everything of the client library (stream driver, leases, delegations, keeper, write-back, packing, block ids, data
//! connections, hedged and verified reads), gRPC at both ends, the metaserver (streams, executor, core, operations,
//! leases, membership, liveness, syncer). Simulated: byte streams instead of TCP, an engine instead of fjall, and the data
//! servers' side of the data protocol, with their store.
//!
//! # Determinism
//! Each seed runs in a forked process with one thread, on a tokio runtime with one thread, whose queue is in order. What else
//! could differ between two runs comes from three calls into the C library, which this binary defines itself: `clock_gettime`
//! (every `Instant` and `SystemTime`), `getrandom` (the keys of hash maps, and through them the order in which `select!`
//! looks) and `epoll_wait` (where an idle runtime sleeps: time jumps ahead instead). So nothing in the product knows that it
//! is simulated, and a month of leases passes as fast as it is computed. turmoil would give the network and a runtime per
//! host, but neither the standard library's clocks nor hash maps, and steps all hosts through every millisecond. That the
//! same seed gives the same trace is tested.
//!
//! # Use
//! `FJORD_SIMULATIONS=10000` says how many seeds the test runs, `FJORD_SEED=7` with which it begins (0 by default), and
//! `FJORD_TRACE=1` prints what happens; it ends after `FJORD_FAILURES` (20). `tests/simulation/plant` shows that planted bugs are found.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]
#![allow(clippy::print_stdout, reason = "how far it is, and the seeds that fail")]

mod cluster;
mod data_server;
mod dentries;
mod disk;
mod fate;
mod moves;
mod network;
mod overwrites;
mod process;
mod programs;
mod record;
mod run;

use std::time::{Duration, Instant};

/// Seeds in a usual run of the tests.
const SEEDS: u64 = 300;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not '{text}'")))
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in [1, 2, 3] {
        let traces: Vec<_> = (0..2).map(|_| process::run(seed).unwrap().trace).collect();
        assert_eq!(traces[0], traces[1], "seed {seed}");
    }
    assert_ne!(process::run(1).unwrap().trace, process::run(2).unwrap().trace);
}

#[test]
fn what_was_synced_and_then_overwritten_survives_a_power_failure() {
    for seed in 0..8 {
        process::run_this(overwrites::run, seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    }
}

#[test]
fn promises_hold_whatever_fails() {
    let first = number("FJORD_SEED").unwrap_or(0);
    let count = number("FJORD_SIMULATIONS").unwrap_or(SEEDS);
    let (began, mut said) = (Instant::now(), Instant::now());
    let mut total = run::Outcome::default();
    let mut bad = Vec::new();
    let seeds: Vec<u64> = (first..first + count).collect();
    for (done, (seed, result)) in process::run_all(&seeds).enumerate() {
        match result {
            Ok(outcome) => total.add(&outcome),
            Err(why) => {
                println!("seed {seed}, repeat with FJORD_SIMULATIONS=1 FJORD_SEED={seed}:\n{why}");
                bad.push(seed);
                if bad.len() as u64 == number("FJORD_FAILURES").unwrap_or(20) {
                    break;
                }
            }
        }
        if said.elapsed() > Duration::from_secs(60) {
            said = Instant::now();
            println!("{} of {count} seeds in {} s", done + 1, began.elapsed().as_secs());
        }
    }
    println!("{count} seeds in {:.1} s: {total}", began.elapsed().as_secs_f64());
    assert!(bad.is_empty(), "{} seeds failed: {bad:?}", bad.len());
    assert!(total.operations > 50 * count && total.faults > count, "hardly anything happened: {total}");
}
