//! What was learnt of each target: how long its answers take, and whether it is worth asking first.
//!
//! # Hedging
//! A read that takes clearly longer than this target's answers usually do is asked of others as well. The usual time is
//! a running estimate of the 95th percentile, for small and large answers apart: one that was slower raises it by 19 %,
//! any other lowers it by 1 %, which is in balance when one in twenty is slower. Answers that nobody waited for to
//! the end count with the time for which they were waited for, so that a cluster that is slow altogether raises its own
//! bounds and does not hedge everything. Whatever was learnt, hedges before [`Options::hedge_delay`] are at most a
//! twentieth of all reads.
//!
//! # Trouble
//! A target that failed, or was overtaken several times in a row, is not asked first for a while. Then one read probes
//! it, and its answer makes it as good as the others.
//!
//! A target that did not say a word to who has put a block is silent: it gets no blocks for a while. Then one put probes it, and
//! any answer ends the silence. Slow reads do not count here: a block would lack a shard for them.
//!
//! [`Options::hedge_delay`]: crate::Options::hedge_delay

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use fjordfs_proto::TargetId;
use parking_lot::Mutex;

/// Answers up to this size count as small, bytes.
const SMALL: usize = 128 << 10;

/// A read is late after this many times the estimate, but not before `BOUND_MIN`, which is longer than a busy machine
/// keeps a thread waiting.
const LATE: f64 = 3.0;
const BOUND_MIN: Duration = Duration::from_millis(20);

const RAISE: f64 = 1.19;
const LOWER: f64 = 0.99;

/// How long a target in trouble is not asked first.
const PAUSE: Duration = Duration::from_secs(1);

/// How long a silent target gets no blocks.
const SILENCE: Duration = Duration::from_secs(2);

/// So many reads in a row that others answered first are trouble.
const OVERTAKEN_MAX: u32 = 3;

/// One hedge per so many reads, and as many hedges saved up at most.
const READS_PER_HEDGE: u32 = 20;
const HEDGES_SAVED: u32 = 10;

/// All targets.
pub(super) struct Health {
    bound_max: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    targets: BTreeMap<TargetId, Target>,
    /// In reads: a hedge costs [`READS_PER_HEDGE`].
    saved: u32,
}

struct Target {
    /// Estimates in seconds, for small and large answers.
    usual: [f64; 2],
    overtaken: u32,
    /// Not asked first before then.
    avoid_until: Option<Instant>,
    /// Gets no blocks before then.
    silent_until: Option<Instant>,
}

/// A read under way. Dropped without a word, it was overtaken or nobody wants it any more.
pub(super) struct Asked<'a> {
    health: &'a Health,
    target: TargetId,
    bytes: usize,
    since: Instant,
    told: bool,
}

impl Health {
    /// Nothing is known yet: everything is late after `bound_max` only.
    pub(super) fn new(bound_max: Duration) -> Health {
        Health { bound_max, state: Mutex::default() }
    }

    fn with<T>(&self, target: TargetId, what: impl FnOnce(&mut Target) -> T) -> T {
        let mut state = self.state.lock();
        what(state.targets.entry(target).or_insert_with(|| Target {
            usual: [self.bound_max.as_secs_f64() / LATE; 2],
            overtaken: 0,
            avoid_until: None,
            silent_until: None,
        }))
    }

    /// How long an answer of so many bytes may take before others are asked.
    pub(super) fn bound(&self, target: TargetId, bytes: usize) -> Duration {
        let usual = self.with(target, |t| t.usual[class(bytes)]);
        Duration::from_secs_f64(usual * LATE).max(BOUND_MIN).min(self.bound_max)
    }

    /// Takes a hedge from what was saved up, if there is one.
    pub(super) fn may_hedge(&self) -> bool {
        let mut state = self.state.lock();
        let left = state.saved.checked_sub(READS_PER_HEDGE);
        state.saved = left.unwrap_or(state.saved);
        left.is_some()
    }

    /// A read begins.
    pub(super) fn ask(&self, target: TargetId, bytes: usize) -> Asked<'_> {
        let saved = &mut self.state.lock().saved;
        *saved = (*saved + 1).min(HEDGES_SAVED * READS_PER_HEDGE);
        Asked { health: self, target, bytes, since: Instant::now(), told: false }
    }

    /// Whether it is in trouble. Asks for no probe.
    pub(super) fn is_avoided(&self, target: TargetId) -> bool {
        self.with(target, |t| t.avoid_until.is_some_and(|until| Instant::now() < until))
    }

    /// Whether to ask another one first. From time to time says no to one caller, whose read is the probe.
    pub(super) fn in_trouble(&self, target: TargetId) -> bool {
        self.with(target, |t| rests(&mut t.avoid_until, PAUSE))
    }

    /// It let a put go unanswered.
    pub(super) fn said_nothing(&self, target: TargetId) {
        self.with(target, |t| t.silent_until = Some(Instant::now() + SILENCE));
    }

    /// It answered a put.
    pub(super) fn heard(&self, target: TargetId) {
        self.with(target, |t| t.silent_until = None);
    }

    /// Whether to put nothing there. From time to time says no to one caller, whose put is the probe.
    pub(super) fn is_silent(&self, target: TargetId) -> bool {
        self.with(target, |t| rests(&mut t.silent_until, SILENCE))
    }
}

/// Whether a pause lasts. Whoever asks when it is over is the probe, and it lasts once more for others.
fn rests(until: &mut Option<Instant>, pause: Duration) -> bool {
    let now = Instant::now();
    match *until {
        None => false,
        Some(end) if now < end => true,
        Some(_) => {
            *until = Some(now + pause);
            false
        }
    }
}

impl Target {
    fn took(&mut self, bytes: usize, seconds: f64) {
        let usual = &mut self.usual[class(bytes)];
        *usual *= if seconds > *usual { RAISE } else { LOWER };
    }
}

fn class(bytes: usize) -> usize {
    usize::from(bytes > SMALL)
}

impl Asked<'_> {
    /// It was answered well.
    pub(super) fn answered(mut self) {
        self.told = true;
        let seconds = self.since.elapsed().as_secs_f64();
        self.health.with(self.target, |t| {
            t.took(self.bytes, seconds);
            (t.overtaken, t.avoid_until, t.silent_until) = (0, None, None);
        });
    }

    /// It failed: no connection, an error of the device, bytes that do not verify.
    pub(super) fn failed(mut self) {
        self.told = true;
        self.health.with(self.target, |t| t.avoid_until = Some(Instant::now() + PAUSE));
    }

    /// It was answered, and the answer was that there is no such shard.
    pub(super) fn absent(mut self) {
        self.told = true;
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if self.told {
            return;
        }
        let seconds = self.since.elapsed().as_secs_f64();
        self.health.with(self.target, |t| {
            // Sooner than usual says nothing.
            if seconds > t.usual[class(self.bytes)] {
                t.took(self.bytes, seconds);
                t.overtaken += 1;
                if t.overtaken >= OVERTAKEN_MAX {
                    t.avoid_until = Some(Instant::now() + PAUSE);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: TargetId = TargetId(1);
    const MAX: Duration = Duration::from_millis(500);

    #[test]
    fn the_bound_follows_the_answers_between_floor_and_ceiling() {
        let health = Health::new(MAX);
        assert_eq!(health.bound(T, 4096), MAX);
        let answers = |seconds: f64, n| (0..n).for_each(|_| health.with(T, |t| t.took(4096, seconds)));
        answers(0.030, 400);
        let bound = health.bound(T, 4096).as_secs_f64();
        assert!((0.08..0.13).contains(&bound), "{bound}");
        assert_eq!(health.bound(T, 1 << 20), MAX, "large answers were not seen");
        answers(0.0001, 1000);
        assert_eq!(health.bound(T, 4096), BOUND_MIN);
        answers(3.0, 100);
        assert_eq!(health.bound(T, 4096), MAX);
    }

    #[test]
    fn one_slow_answer_in_twenty_is_usual() {
        let mut target = Target { usual: [0.1; 2], overtaken: 0, avoid_until: None, silent_until: None };
        (0..4000).for_each(|i| target.took(1, if i % 40 == 0 { 0.050 } else { 0.001 }));
        assert!(target.usual[0] < 0.010, "one in forty is late: {}", target.usual[0]);
        (0..4000).for_each(|i| target.took(1, if i % 10 == 0 { 0.050 } else { 0.001 }));
        assert!(target.usual[0] > 0.040, "one in ten is not: {}", target.usual[0]);
    }

    #[test]
    fn a_failed_target_is_probed_by_one_and_comes_back() {
        let health = Health::new(MAX);
        health.ask(T, 1).failed();
        assert!(health.in_trouble(T) && health.in_trouble(T) && health.is_avoided(T));
        health.with(T, |t| t.avoid_until = Some(Instant::now()));
        assert!(!health.in_trouble(T), "the probe");
        assert!(health.in_trouble(T), "and nobody else");
        health.ask(T, 1).answered();
        assert!(!health.in_trouble(T) && !health.in_trouble(T));
    }

    #[test]
    fn who_is_always_overtaken_is_not_asked_first() {
        let health = Health::new(MAX);
        let overtaken = || {
            health.with(T, |t| t.usual = [0.0; 2]);
            drop(health.ask(T, 1));
        };
        overtaken();
        health.ask(T, 1).answered();
        (0..OVERTAKEN_MAX - 1).for_each(|_| overtaken());
        assert!(!health.in_trouble(T));
        overtaken();
        assert!(health.in_trouble(T));
    }

    #[test]
    fn a_silent_target_is_probed_by_one_put_and_any_answer_ends_the_silence() {
        let health = Health::new(MAX);
        for answer in [true, false] {
            assert!(!health.is_silent(T));
            health.said_nothing(T);
            assert!(health.is_silent(T) && health.is_silent(T));
            assert!(!health.in_trouble(T), "reads have their own word");
            health.with(T, |t| t.silent_until = Some(Instant::now()));
            assert!(!health.is_silent(T), "the probe");
            assert!(health.is_silent(T), "and nobody else");
            if answer { health.heard(T) } else { health.ask(T, 1).answered() }
        }
        assert!(!health.is_silent(T));
    }

    #[test]
    fn hedges_are_a_share_of_the_reads() {
        let health = Health::new(MAX);
        assert!(!health.may_hedge());
        let reads = |n| (0..n).for_each(|_| health.ask(T, 1).absent());
        reads(READS_PER_HEDGE);
        assert!(health.may_hedge() && !health.may_hedge());
        reads(100 * READS_PER_HEDGE);
        assert_eq!((0..1000).filter(|_| health.may_hedge()).count() as u32, HEDGES_SAVED);
    }
}
