//! Waiting with a bound.

use std::{
    fmt::Display,
    time::{Duration, Instant},
};

/// How long anything that should happen "soon" may take. Far more than it takes on an idle machine: the bound is
/// there so that a failure is reported, not to measure.
pub const SOON: Duration = Duration::from_secs(60);

/// Asks `probe` until it answers `Ok`.
///
/// # Panics
/// After `bound`, with `what` and the reason the last probe gave.
pub fn wait_for<T, E: Display>(what: &str, bound: Duration, mut probe: impl FnMut() -> Result<T, E>) -> T {
    let deadline = Instant::now() + bound;
    let mut pause = Duration::from_millis(5);
    loop {
        match probe() {
            Ok(value) => return value,
            Err(last) if Instant::now() >= deadline => {
                panic!("waited {bound:?} for {what}; last seen: {last}")
            }
            Err(_) => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

/// [`wait_for`] with a yes-or-no probe.
///
/// # Panics
/// After `bound`.
pub fn wait_until(what: &str, bound: Duration, mut probe: impl FnMut() -> bool) {
    wait_for(what, bound, || if probe() { Ok(()) } else { Err("not yet") });
}
