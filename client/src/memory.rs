//! The bound on dirty data: writers wait when it is reached.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

/// Counts bytes of dirty data against a fixed bound.
#[derive(Debug)]
pub(crate) struct DirtyBudget {
    max: u64,
    used: AtomicU64,
    released: Notify,
    /// Told when a writer has to wait, so that somebody makes room.
    pub(crate) pressure: Notify,
}

impl DirtyBudget {
    pub(crate) fn new(max: u64) -> DirtyBudget {
        DirtyBudget { max, used: AtomicU64::new(0), released: Notify::new(), pressure: Notify::new() }
    }

    /// Most bytes that one reservation should ask for, so that several writers make progress.
    pub(crate) fn portion_max(&self) -> usize {
        usize::try_from(self.max / 4).unwrap_or(usize::MAX)
    }

    /// Waits until `bytes` more are allowed. A single reservation above the bound is let through when it is alone.
    pub(crate) async fn reserve(&self, bytes: u64) {
        loop {
            let released = self.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            let taken = self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                (used == 0 || used + bytes <= self.max).then_some(used + bytes)
            });
            if taken.is_ok() {
                return;
            }
            self.pressure.notify_one();
            released.await;
        }
    }

    /// Gives bytes back.
    pub(crate) fn release(&self, bytes: u64) {
        if bytes > 0 {
            self.used.fetch_sub(bytes, Ordering::AcqRel);
            self.released.notify_waiters();
        }
    }

    /// Bytes in use.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn a_writer_waits_for_room_and_then_goes_on() {
        let budget = Arc::new(DirtyBudget::new(100));
        budget.reserve(80).await;
        let waiter = tokio::spawn({
            let budget = budget.clone();
            async move { budget.reserve(50).await }
        });
        budget.pressure.notified().await;
        assert!(!waiter.is_finished());
        budget.release(80);
        waiter.await.unwrap();
        assert_eq!(budget.used(), 50);
    }

    #[tokio::test]
    async fn more_than_the_bound_passes_alone() {
        let budget = DirtyBudget::new(100);
        budget.reserve(500).await;
        assert_eq!(budget.used(), 500);
    }
}
