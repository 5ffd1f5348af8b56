//! The rate of this server's copies: what sets it, who waits for it, and what is told of it.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use fjordfs_proto::pb::meta::RebuildPace;
use parking_lot::Mutex;

use super::{
    pace::{Pace, Place},
    throttle::Throttle,
};

/// A rebuild that has copied nothing for so long is over, and its rate tells nothing.
const OVER: Duration = Duration::from_secs(5);

/// See the module.
pub(crate) struct RebuildRate {
    limit: u64,
    throttle: Throttle,
    /// A client has asked for something since the last probe.
    users: AtomicBool,
    pace: Mutex<(Pace, Option<Instant>)>,
}

impl RebuildRate {
    /// `limit` in bytes per second; 0 is none.
    pub(crate) fn new(limit: u64) -> RebuildRate {
        let pace = Pace::new(limit);
        let throttle = Throttle::new(pace.rate());
        RebuildRate { limit, throttle, users: AtomicBool::new(false), pace: Mutex::new((pace, None)) }
    }

    /// A client wants bytes from here, or brings some.
    pub(crate) fn user_seen(&self) {
        // Most find it set: then its cache line stays with all cores.
        if !self.users.load(Ordering::Relaxed) {
            self.users.store(true, Ordering::Relaxed);
        }
    }

    /// Waits for the turn of `bytes`.
    pub(super) async fn take(&self, bytes: u64) {
        self.throttle.take(bytes).await;
    }

    /// A shard has been copied from or to that place.
    pub(super) fn took(&self, place: Place, bytes: u32, began: Instant) {
        let now = Instant::now();
        let mut guard = self.pace.lock();
        let (pace, last) = &mut *guard;
        if self.users.swap(false, Ordering::Relaxed) {
            pace.users_seen(now);
        }
        pace.probe(place, bytes, now.saturating_duration_since(began), now);
        *last = Some(now);
        self.throttle.set(pace.rate());
    }

    /// For a heartbeat; `None` while nothing is copied.
    pub(crate) fn report(&self) -> Option<RebuildPace> {
        let guard = self.pace.lock();
        let (pace, last) = &*guard;
        last.is_some_and(|last| last.elapsed() < OVER).then(|| RebuildPace {
            rate: pace.rate(),
            limit: self.limit,
            gives_way: pace.gives_way(),
            server: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fjordfs_proto::ServerId;

    #[test]
    fn a_rate_is_told_while_something_is_copied() {
        let rate = RebuildRate::new(64 << 20);
        assert_eq!(rate.report(), None);
        rate.user_seen();
        rate.took(Place::From(ServerId(1)), 1 << 20, Instant::now());
        let told = RebuildPace { rate: 4 << 20, limit: 64 << 20, gives_way: false, server: 0 };
        assert_eq!(rate.report(), Some(told));
        assert!(!rate.users.load(Ordering::Relaxed));
    }
}
