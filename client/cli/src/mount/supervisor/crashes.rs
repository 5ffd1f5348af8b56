//! How often a worker may crash.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// So many crashes within a time, and it is given up: the next would not fare better, and those who wait in the mount are to hear.
const CRASHES_MAX: usize = 5;
pub(super) const WITHIN: Duration = Duration::from_secs(60);

/// Those of the last minute.
#[derive(Debug, Default)]
pub(super) struct Crashes(VecDeque<Instant>);

impl Crashes {
    /// Another one. Whether that is too often.
    pub(super) fn too_often(&mut self, now: Instant) -> bool {
        self.0.push_back(now);
        while self.0.pop_front_if(|at| now.duration_since(*at) > WITHIN).is_some() {}
        self.0.len() >= CRASHES_MAX
    }

    /// How many there were.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_crashes_close_together_are_too_many() {
        let mut crashes = Crashes::default();
        let begin = Instant::now();
        let after = |seconds| begin + Duration::from_secs(seconds);
        assert!((0..20).all(|i| !crashes.too_often(after(i * 20))));
        assert_eq!(crashes.count(), 4);
        assert!(crashes.too_often(after(380)));
    }
}
