//! How fast this server may rebuild now: it gives way to users, and takes what the devices give when there are none.
//!
//! The rate is steered like the window of a TCP connection that goes by delay (Vegas, LEDBAT). Rebuild's own reads and writes are
//! the probe: each is compared with the **least** that one of that size has lately taken at that place. When the middle
//! one of those of an interval takes too many times as long, there is a queue, so somebody waits in it, and the rate falls.
//!
//! ```text
//!   users are seen here?     too long is      so the rate, each INTERVAL, is
//!   yes                      1.5 x the least  × 0.7 when it took too long, down to the floor
//!   no                       3 x the least    × 1.25 else, up to --rebuild-rate
//! ```
//!
//! Why two bounds: whoever does one thing after the other gets 1/x of the speed when everything takes x times as long, so
//! with 1.5 users keep two thirds. Rebuild makes a queue of its own, too, of those who read and write at the same time; alone, it
//! may. Users are requests of clients to this server. A client that reads volume files itself is only seen when it asks
//! where a shard is; if it has done so before, it counts on the second bound.
//!
//! **Floor.** A rebuild must end, or the next loss finds it unfinished: it goes on at a sixteenth of the limit whatever the
//! users do. **Growth** is from what was really moved, at most twice that: a rate that was not used has shown nothing.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use fjordfs_proto::{ServerId, TargetId};

/// Once in this time the rate changes, if there was anything to go by.
const INTERVAL: Duration = Duration::from_millis(200);

/// Probes that make an interval; with fewer it lasts longer.
const PROBES_MIN: usize = 4;

/// More of one interval tell nothing new.
const PROBES_MAX: usize = 256;

/// So many times the least are too long, while users are seen and while not.
const LATE_FOR_USERS: f64 = 1.5;
const LATE_ALONE: f64 = 3.0;

const DOWN: f64 = 0.7;
const UP: f64 = 1.25;

/// Users count as present so long after their last request.
const USERS_STAY: Duration = Duration::from_secs(1);

/// The floor is this part of the limit, and without one, bytes per second.
const FLOOR_PART: u64 = 16;
const FLOOR_UNLIMITED: u64 = 16 << 20;
/// No limit is divided below this: one shard would take minutes.
const FLOOR_MIN: u64 = 4 << 20;

/// The least of a size and place is of the last [`SPANS`] of these: devices, peers and paths change.
const SPAN: Duration = Duration::from_secs(60);
const SPANS: usize = 5;

/// Where a probe went.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Place {
    /// Read from a server.
    From(ServerId),
    /// Written to a target of this one.
    To(TargetId),
}

/// Least time of late, in spans.
#[derive(Default)]
struct Least(VecDeque<(Instant, Duration)>);

impl Least {
    /// Takes a time in; the least, this one included.
    fn with(&mut self, took: Duration, now: Instant) -> Duration {
        match self.0.back_mut() {
            Some((began, least)) if now.saturating_duration_since(*began) < SPAN => *least = took.min(*least),
            _ => self.0.push_back((now, took)),
        }
        while self.0.len() > SPANS {
            self.0.pop_front();
        }
        self.0.iter().map(|(_, least)| *least).min().unwrap_or(took)
    }
}

/// See the module. Pure: time comes with the calls.
pub(super) struct Pace {
    /// Bytes per second.
    floor: u64,
    /// `u64::MAX` is no limit.
    limit: u64,
    rate: u64,
    least: HashMap<(Place, u32), Least>,
    /// Of the interval: how many times the least each probe took.
    probes: Vec<f64>,
    moved: u64,
    since: Option<Instant>,
    users: Option<Instant>,
    giving_way: bool,
}

impl Pace {
    /// `limit` in bytes per second; 0 is none.
    pub(super) fn new(limit: u64) -> Pace {
        let (floor, limit) = match limit {
            0 => (FLOOR_UNLIMITED, u64::MAX),
            limit => ((limit / FLOOR_PART).max(FLOOR_MIN).min(limit), limit),
        };
        Pace {
            floor,
            limit,
            rate: floor,
            least: HashMap::new(),
            probes: Vec::new(),
            moved: 0,
            since: None,
            users: None,
            giving_way: false,
        }
    }

    /// Bytes per second that may be moved now.
    pub(super) fn rate(&self) -> u64 {
        self.rate
    }

    /// Whether the rate was last lowered, or kept low, for somebody else's sake.
    pub(super) fn gives_way(&self) -> bool {
        self.giving_way
    }

    /// Clients have asked this server for something.
    pub(super) fn users_seen(&mut self, now: Instant) {
        self.users = Some(now);
    }

    /// A shard of `bytes` has been read or written.
    pub(super) fn probe(&mut self, place: Place, bytes: u32, took: Duration, now: Instant) {
        // Sizes within a factor of two are compared with each other.
        let least = self.least.entry((place, bytes.max(1).ilog2())).or_default().with(took, now);
        if self.probes.len() < PROBES_MAX {
            self.probes.push(took.as_secs_f64() / least.as_secs_f64().max(1e-6));
        }
        if matches!(place, Place::From(_)) {
            self.moved += u64::from(bytes);
        }
        let since = *self.since.get_or_insert(now);
        let time = now.saturating_duration_since(since);
        if time >= INTERVAL && self.probes.len() >= PROBES_MIN {
            self.change(time, now);
        }
    }

    fn change(&mut self, time: Duration, now: Instant) {
        let users = self.users.is_some_and(|seen| now.saturating_duration_since(seen) < USERS_STAY);
        let late = if users { LATE_FOR_USERS } else { LATE_ALONE };
        self.probes.sort_unstable_by(f64::total_cmp);
        let middle = self.probes.get(self.probes.len() / 2).copied().unwrap_or(1.0);
        let moved = (self.moved as f64 / time.as_secs_f64()) as u64;
        self.giving_way = middle > late;
        let next = if self.giving_way {
            (self.rate as f64 * DOWN) as u64
        } else {
            let up = (self.rate as f64 * UP) as u64;
            up.min(moved.saturating_mul(2).max(self.rate))
        };
        self.rate = next.clamp(self.floor, self.limit);
        self.probes.clear();
        (self.moved, self.since) = (0, Some(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;
    const LIMIT: u64 = 256 * MIB;

    /// Shards of 1 MiB that come as fast as the pace lets them, for so long, each taking so many milliseconds.
    struct Run {
        pace: Pace,
        now: Instant,
        users: bool,
    }

    impl Run {
        fn new(limit: u64) -> Run {
            Run { pace: Pace::new(limit), now: Instant::now(), users: false }
        }

        fn go(&mut self, time: Duration, millis: u64) -> u64 {
            let end = self.now + time;
            while self.now < end {
                if self.users {
                    self.pace.users_seen(self.now);
                }
                self.pace.probe(
                    Place::From(ServerId(1)),
                    MIB as u32,
                    Duration::from_millis(millis),
                    self.now,
                );
                self.now += Duration::from_secs_f64(MIB as f64 / self.pace.rate() as f64);
            }
            self.pace.rate()
        }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn it_grows_while_nothing_waits_and_falls_while_something_does() {
        let mut run = Run::new(LIMIT);
        assert_eq!(run.pace.rate(), LIMIT / 16);
        assert_eq!(run.go(10 * SECOND, 10), LIMIT);
        assert!(!run.pace.gives_way());
        run.users = true;
        assert_eq!(run.go(SECOND, 14), LIMIT, "what varies a little is no queue");
        assert!(run.go(SECOND, 16) < LIMIT / 2);
        assert!(run.pace.gives_way());
        assert_eq!(run.go(10 * SECOND, 40), LIMIT / 16, "a rebuild goes on, however long it takes");
        assert_eq!(run.go(10 * SECOND, 11), LIMIT, "and takes all again when nobody waits");
    }

    #[test]
    fn its_own_queue_counts_only_where_users_are_seen() {
        let mut run = Run::new(LIMIT);
        run.go(10 * SECOND, 10);
        assert_eq!(run.go(5 * SECOND, 25), LIMIT);
        assert!(run.go(5 * SECOND, 40) < LIMIT, "users who are not seen make queues, too");
        run.go(10 * SECOND, 10);
        run.users = true;
        assert!(run.go(5 * SECOND, 25) < LIMIT);
        run.users = false;
        assert_eq!(run.go(10 * SECOND, 25), LIMIT, "they are gone");
    }

    #[test]
    fn sizes_and_places_are_not_compared_with_each_other() {
        let mut run = Run::new(LIMIT);
        for i in 0..100u64 {
            run.now += Duration::from_millis(20);
            run.pace.probe(
                Place::From(ServerId(i % 2)),
                1 << 20,
                Duration::from_millis(5 + 45 * (i % 2)),
                run.now,
            );
            run.pace.probe(Place::To(TargetId(1)), 8 << 20, Duration::from_millis(90), run.now);
        }
        assert!(!run.pace.gives_way());
    }

    #[test]
    fn the_least_is_forgotten_when_it_is_old() {
        let mut run = Run::new(LIMIT);
        run.go(SECOND, 10);
        assert_eq!(run.go(60 * SECOND, 40), LIMIT / 16, "another disk, or always users");
        assert_eq!(run.go(SPAN * SPANS as u32 + 60 * SECOND, 40), LIMIT);
    }

    #[test]
    fn a_rate_that_is_not_used_does_not_grow() {
        let mut pace = Pace::new(0);
        let mut now = Instant::now();
        for _ in 0..1000 {
            now += Duration::from_millis(100);
            pace.probe(Place::From(ServerId(1)), MIB as u32, Duration::from_millis(1), now);
        }
        assert_eq!(pace.rate(), 20 * MIB, "twice the 10 MiB/s that were used");
    }

    proptest! {
        #[test]
        fn it_stays_between_floor_and_limit(
            limit in prop_oneof![Just(0), 1..1u64 << 34],
            probes in proptest::collection::vec((0..1u64 << 31, 1..1u32 << 24, 0..500u64, any::<bool>()), 1..400),
        ) {
            let mut pace = Pace::new(limit);
            let (ceiling, mut now) = (if limit == 0 { u64::MAX } else { limit }, Instant::now());
            let floor = pace.rate();
            prop_assert!(floor > 0 && floor <= ceiling);
            for (nanos, bytes, after, users) in probes {
                now += Duration::from_millis(after);
                if users {
                    pace.users_seen(now);
                }
                pace.probe(Place::To(TargetId(1)), bytes, Duration::from_nanos(nanos), now);
                prop_assert!((floor..=ceiling).contains(&pace.rate()));
            }
        }
    }
}
