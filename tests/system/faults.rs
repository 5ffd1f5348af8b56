//! Everything goes wrong, and nothing that was promised is lost. See `tests/harness/chaos.rs`.
//!
//! `FJORD_SEED=N cargo nextest run --test faults` runs the schedules of one seed; `tests/run soak MINUTES` runs new
//! ones for that long. `tests/harness/plant` shows that planted bugs are found.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::time::{Duration, Instant};

use fjordfs_tests::{
    chaos::{self, Counts},
    rng,
};

/// The schedule that a landing has to hold; the soak looks for others that do not.
const SEED: u64 = 5;

#[test]
fn a_schedule_of_faults_breaks_no_promise() {
    chaos::run(rng::given().unwrap_or(SEED));
}

/// Of the schedules of racks.
const SEED_OF_RACKS: u64 = 2;

#[test]
fn racks_that_are_lost_as_a_whole_break_no_promise() {
    chaos::run_racks(rng::given().unwrap_or(SEED_OF_RACKS));
}

#[test]
#[ignore = "takes as long as FJORD_SOAK_MINUTES says: tests/run soak MINUTES"]
fn soak() {
    let minutes: u64 = std::env::var("FJORD_SOAK_MINUTES").unwrap().parse().unwrap();
    let until = Instant::now() + Duration::from_secs(60 * minutes);
    let first = rng::seed("soak");
    let mut total = Counts::default();
    let mut runs = 0;
    while Instant::now() < until {
        let seed = first + runs;
        // Every third of racks.
        total.add(&if runs % 3 == 2 { chaos::run_racks(seed) } else { chaos::run(seed) });
        runs += 1;
        eprintln!("soak: {runs} schedules held, the last of seed {}: {total:#?}", first + runs - 1);
    }
}
