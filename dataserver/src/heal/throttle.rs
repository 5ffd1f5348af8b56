//! Keeping copies to a rate.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// How far the pace may lag behind the clock: after a pause no more than this is made up for.
const SLACK: Duration = Duration::from_millis(100);

/// Lets bytes through at a rate. Those who wait do so in the order in which they came.
pub(super) struct Throttle {
    /// Bytes per second; 0 is no limit.
    rate: AtomicU64,
    /// When what has been let through so far is due to be over.
    due: Mutex<Option<Instant>>,
}

impl Throttle {
    pub(super) fn new(rate: u64) -> Throttle {
        Throttle { rate: rate.into(), due: Mutex::new(None) }
    }

    /// For all who come from now on.
    pub(super) fn set(&self, rate: u64) {
        self.rate.store(rate, Ordering::Relaxed);
    }

    /// Waits for the turn of `bytes`.
    pub(super) async fn take(&self, bytes: u64) {
        let wait = self.reserve(bytes, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// Enters `bytes` and says how long to wait before them.
    fn reserve(&self, bytes: u64, now: Instant) -> Duration {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return Duration::ZERO;
        }
        let mut due = self.due.lock();
        let oldest = now.checked_sub(SLACK).unwrap_or(now);
        let start = due.unwrap_or(now).max(oldest);
        let takes = Duration::from_nanos((u128::from(bytes) * 1_000_000_000 / u128::from(rate)) as u64);
        *due = Some(start + takes);
        start.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_pass_at_the_rate_and_not_all_at_once_after_a_pause() {
        let throttle = Throttle::new(1000);
        let start = Instant::now();
        assert_eq!(throttle.reserve(500, start), Duration::ZERO);
        assert_eq!(throttle.reserve(500, start), Duration::from_millis(500));
        assert_eq!(throttle.reserve(1, start + Duration::from_millis(400)), Duration::from_millis(600));
        let later = start + Duration::from_secs(100);
        assert_eq!(throttle.reserve(1100, later), Duration::ZERO);
        assert_eq!(throttle.reserve(1, later), Duration::from_secs(1));
        throttle.set(500);
        assert_eq!(
            throttle.reserve(500, later),
            Duration::from_millis(1001),
            "what has passed, did so at the old rate"
        );
        assert_eq!(throttle.reserve(1, later), Duration::from_millis(2001));
        assert_eq!(Throttle::new(0).reserve(u64::MAX, start), Duration::ZERO);
    }
}
