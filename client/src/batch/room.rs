//! Memory for results that nobody has taken yet.

use std::sync::{
    Arc,
    atomic::{
        AtomicU64, AtomicUsize,
        Ordering::{AcqRel, Acquire},
    },
};

use tokio::sync::{Notify, futures::Notified};

/// Counts bytes against a bound. Who finds no room comes again when told that some was freed.
#[derive(Debug)]
pub(crate) struct Room {
    max: u64,
    used: AtomicU64,
    freed: Notify,
}

impl Room {
    pub(crate) fn new(max: u64) -> Room {
        Room { max, used: AtomicU64::new(0), freed: Notify::new() }
    }

    /// Ends when bytes are given back, or somebody calls [`Room::wake`].
    pub(super) fn freed(&self) -> Notified<'_> {
        self.freed.notified()
    }

    pub(super) fn wake(&self) {
        self.freed.notify_waiters();
    }

    fn take(&self, bytes: u64, must: bool) -> bool {
        let grown = |used: u64| (must || used + bytes <= self.max).then_some(used + bytes);
        self.used.fetch_update(AcqRel, Acquire, grown).is_ok()
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, AcqRel);
        self.wake();
    }
}

/// What one batch uses of the room.
#[derive(Debug)]
pub(super) struct Account {
    room: Arc<Room>,
    /// Charges that have ended.
    settled: AtomicUsize,
}

impl Account {
    pub(super) fn new(room: Arc<Room>) -> Account {
        Account { room, settled: AtomicUsize::new(0) }
    }

    pub(super) fn room(&self) -> &Room {
        &self.room
    }

    /// Takes `bytes` if there is room, or if all of the `before` charges of this account have ended.
    pub(super) fn charge(self: &Arc<Self>, bytes: u64, before: usize) -> Option<Charge> {
        // More than the whole room can only be read alone: it fills the room.
        let bytes = bytes.min(self.room.max);
        let must = self.settled.load(Acquire) == before;
        self.room.take(bytes, must).then(|| Charge { account: self.clone(), bytes })
    }
}

/// Bytes taken; dropped, they are given back.
#[derive(Debug)]
pub(super) struct Charge {
    account: Arc<Account>,
    bytes: u64,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.account.settled.fetch_add(1, AcqRel);
        self.account.room.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn a_batch_without_results_to_be_taken_always_gets_one_more() {
        let room = Arc::new(Room::new(100));
        let (a, b) = (Arc::new(Account::new(room.clone())), Arc::new(Account::new(room.clone())));
        let first = a.charge(80, 0).unwrap();
        assert!(a.charge(30, 1).is_none());
        let second = b.charge(1 << 40, 0).unwrap();
        assert_eq!(room.used.load(Acquire), 180);
        assert!(b.charge(1, 1).is_none());
        drop(second);
        assert!(b.charge(30, 1).is_some(), "alone again");
        drop(first);
        assert_eq!(room.used.load(Acquire), 0);
    }

    #[test]
    fn who_waits_is_told() {
        let room = Arc::new(Room::new(100));
        let charge = Arc::new(Account::new(room.clone())).charge(100, 0);
        let mut freed = std::pin::pin!(room.freed());
        freed.as_mut().enable();
        assert!(freed.as_mut().now_or_never().is_none());
        drop(charge);
        assert!(freed.now_or_never().is_some());
    }
}
