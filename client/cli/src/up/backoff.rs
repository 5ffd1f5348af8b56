//! How long to wait before a child is started again.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(200);
const MOST: Duration = Duration::from_secs(10);

/// A child that ran for this long was well: the next end counts as the first.
const WELL_AFTER: Duration = Duration::from_secs(30);

/// Doubles from 200 ms to 10 s; a long healthy run begins anew.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff { next: FIRST }
    }
}

impl Backoff {
    /// The wait after a run of this length.
    pub(crate) fn next(&mut self, ran: Duration) -> Duration {
        let delay = if ran >= WELL_AFTER { FIRST } else { self.next };
        self.next = (2 * delay).min(MOST);
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_up_to_its_bound_and_forgets_after_a_good_run() {
        let mut backoff = Backoff::default();
        let millis: Vec<_> = (0..8).map(|_| backoff.next(Duration::from_secs(1)).as_millis()).collect();
        assert_eq!(millis, [200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        assert_eq!(backoff.next(WELL_AFTER), FIRST);
        assert_eq!(backoff.next(Duration::ZERO), 2 * FIRST);
    }
}
