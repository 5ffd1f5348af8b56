//! Who may cache what, and how it is taken back.
//!
//! A session holds a lease on every inode it was told something of, until it gives it back or is recalled. An
//! operation is executed at once, but nobody is told of its effect, neither who asked for it nor who reads it, while
//! another session may still use what it has cached of the inodes concerned: the **recalls**. So a holder never shows
//! what somebody else has already seen changed.
//!
//! A recall ends when its holder says so, when the holder's session or stream is over, or when the holder has been
//! silent for the length of a lease: by then it has stopped using its leases by its own clock. A holder that is heard
//! but does not obey loses its session.
//!
//! In memory only. After a start nobody knows who caches what, so every session of before counts as a holder of everything
//! until it attaches again, which ends its leases, or a lease's time has passed.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::{Duration, Instant},
};

use fjordfs_proto::{InodeId, SessionId};

/// Number of a recall.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RecallId(pub(crate) u64);

/// A recall that has not ended.
#[derive(Debug)]
struct Recall {
    session: SessionId,
    ino: InodeId,
    since: Instant,
}

/// Leases of one session.
#[derive(Debug, Default)]
struct Held {
    /// With the serial of the last answer that granted it.
    inodes: HashMap<InodeId, u64>,
    recalls: HashMap<InodeId, RecallId>,
}

/// A recall to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) session: SessionId,
    pub(crate) id: RecallId,
    pub(crate) ino: InodeId,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    holders: HashMap<InodeId, Vec<SessionId>>,
    sessions: HashMap<SessionId, Held>,
    /// Sessions of before the start that may hold anything.
    unknown: HashSet<SessionId>,
    recalls: BTreeMap<RecallId, Recall>,
    recalled: HashMap<InodeId, Vec<RecallId>>,
    last_id: u64,
    orders: Vec<Order>,
    ended: Vec<RecallId>,
}

impl Leases {
    /// A session that was there before the start.
    pub(crate) fn add_unknown(&mut self, session: SessionId) {
        self.unknown.insert(session);
    }

    /// A session was told of an inode, in the answer with this serial.
    pub(crate) fn grant(&mut self, session: SessionId, ino: InodeId, serial: u64) {
        if self.sessions.entry(session).or_default().inodes.insert(ino, serial).is_none() {
            self.holders.entry(ino).or_default().push(session);
        }
    }

    /// How many inodes a session may cache something of.
    pub(crate) fn held(&self, session: SessionId) -> usize {
        self.sessions.get(&session).map_or(0, |held| held.inodes.len())
    }

    /// Inodes have been changed by `actor`, or by the server itself: recalls what others hold. Then the actor's own lease goes,
    /// too: its answer will wait, and others may learn of the change before it does.
    pub(crate) fn changed(&mut self, actor: Option<SessionId>, inodes: &[InodeId], now: Instant) {
        for &ino in inodes {
            // A session that may hold anything is not known to hold something: it has not attached since.
            let known = self.holders.get(&ino).into_iter().flatten();
            let holders: Vec<SessionId> = known.chain(&self.unknown).copied().collect();
            if holders.iter().any(|session| Some(*session) != actor) {
                for session in holders {
                    self.recall(session, ino, now);
                }
            }
        }
    }

    fn recall(&mut self, session: SessionId, ino: InodeId, now: Instant) {
        let held = self.sessions.entry(session).or_default();
        if held.recalls.contains_key(&ino) {
            return;
        }
        self.last_id += 1;
        let id = RecallId(self.last_id);
        held.recalls.insert(ino, id);
        self.recalled.entry(ino).or_default().push(id);
        self.recalls.insert(id, Recall { session, ino, since: now });
        self.orders.push(Order { session, id, ino });
    }

    /// Recalls that must end before anybody is told something of these inodes.
    pub(crate) fn pending(&self, inodes: &[InodeId]) -> Vec<RecallId> {
        if self.recalls.is_empty() {
            return Vec::new();
        }
        let mut ids: Vec<RecallId> =
            inodes.iter().filter_map(|ino| self.recalled.get(ino)).flatten().copied().collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// All recalls that have not ended.
    pub(crate) fn all_pending(&self) -> Vec<RecallId> {
        self.recalls.keys().copied().collect()
    }

    /// The session has obeyed a recall.
    pub(crate) fn obeyed(&mut self, session: SessionId, id: RecallId) {
        // One that has ended otherwise, or was never the session's, is nothing to it.
        if let Some(recall) = self.recalls.get(&id).filter(|recall| recall.session == session) {
            let ino = recall.ino;
            self.release(session, ino);
        }
    }

    /// The session has dropped what it was told of these inodes up to `as_of`.
    pub(crate) fn given_back(&mut self, session: SessionId, inodes: &[u64], as_of: u64) {
        for ino in inodes.iter().copied().map(InodeId) {
            let granted = self.sessions.get(&session).and_then(|held| held.inodes.get(&ino));
            if granted.is_some_and(|serial| *serial <= as_of) {
                self.release(session, ino);
            }
        }
    }

    /// The session caches nothing of the inode any more.
    fn release(&mut self, session: SessionId, ino: InodeId) {
        let Some(held) = self.sessions.get_mut(&session) else { return };
        held.inodes.remove(&ino);
        let recall = held.recalls.remove(&ino);
        if let Some(holders) = self.holders.get_mut(&ino) {
            holders.retain(|holder| *holder != session);
            if holders.is_empty() {
                self.holders.remove(&ino);
            }
        }
        if let Some(id) = recall {
            self.end(id, ino);
        }
    }

    fn end(&mut self, id: RecallId, ino: InodeId) {
        self.recalls.remove(&id);
        if let Some(ids) = self.recalled.get_mut(&ino) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.recalled.remove(&ino);
            }
        }
        self.ended.push(id);
    }

    /// The session caches nothing any more: it is over, came back on a new stream, or was silent for a lease's time.
    pub(crate) fn end_all(&mut self, session: SessionId) {
        self.unknown.remove(&session);
        let Some(held) = self.sessions.get(&session) else { return };
        let inodes: Vec<InodeId> = held.inodes.keys().chain(held.recalls.keys()).copied().collect();
        for ino in inodes {
            self.release(session, ino);
        }
        self.sessions.remove(&session);
        self.orders.retain(|order| order.session != session);
    }

    /// Sessions that were recalled more than `bound` ago and have not obeyed.
    pub(crate) fn disobedient(&self, bound: Duration, now: Instant) -> Vec<SessionId> {
        let late = |recall: &&Recall| now.saturating_duration_since(recall.since) > bound;
        let mut sessions: Vec<SessionId> =
            self.recalls.values().filter(late).map(|recall| recall.session).collect();
        sessions.sort_unstable();
        sessions.dedup();
        sessions
    }

    /// Nobody could be heard for this long.
    pub(crate) fn forgive(&mut self, stalled: Duration) {
        for recall in self.recalls.values_mut() {
            recall.since += stalled;
        }
    }

    /// Recalls to be sent, in the order in which they became due.
    pub(crate) fn take_orders(&mut self) -> Vec<Order> {
        std::mem::take(&mut self.orders)
    }

    /// Recalls that have ended since.
    pub(crate) fn take_ended(&mut self) -> Vec<RecallId> {
        std::mem::take(&mut self.ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);
    const I: InodeId = InodeId(7);

    #[test]
    fn who_changes_what_nobody_else_caches_waits_for_nobody() {
        let mut leases = Leases::default();
        leases.grant(A, I, 1);
        leases.changed(Some(A), &[I], Instant::now());
        assert_eq!((leases.pending(&[I]), leases.take_orders()), (vec![], vec![]));
    }

    #[test]
    fn a_change_waits_for_every_holder_and_recalls_the_actor_too() {
        let mut leases = Leases::default();
        let now = Instant::now();
        leases.grant(A, I, 1);
        leases.grant(B, I, 1);
        leases.changed(Some(A), &[I], now);
        let orders = leases.take_orders();
        assert_eq!(orders.iter().map(|o| o.session).collect::<Vec<_>>(), [A, B]);
        leases.changed(Some(A), &[I], now);
        assert!(leases.take_orders().is_empty(), "recalled already");
        assert_eq!(leases.pending(&[I, I, InodeId(8)]).len(), 2);
        leases.obeyed(A, orders[1].id);
        assert_eq!(leases.pending(&[I]).len(), 2, "B's recall is not A's to obey");
        leases.obeyed(A, orders[0].id);
        leases.obeyed(B, orders[1].id);
        assert_eq!(leases.take_ended(), [orders[0].id, orders[1].id]);
        assert!(leases.pending(&[I]).is_empty() && leases.held(A) + leases.held(B) == 0);
    }

    #[test]
    fn a_lease_granted_after_it_was_given_back_stays() {
        let mut leases = Leases::default();
        leases.grant(A, I, 5);
        leases.given_back(A, &[I.0], 4);
        assert_eq!(leases.held(A), 1);
        leases.given_back(A, &[I.0], 5);
        assert_eq!(leases.held(A), 0);
    }

    #[test]
    fn silence_and_ends_end_recalls() {
        let mut leases = Leases::default();
        let now = Instant::now();
        leases.grant(B, I, 1);
        leases.changed(None, &[I], now);
        assert!(leases.disobedient(Duration::from_secs(1), now).is_empty());
        assert_eq!(leases.disobedient(Duration::from_secs(1), now + Duration::from_secs(2)), [B]);
        leases.end_all(B);
        assert_eq!(leases.take_ended().len(), 1);
        assert!(leases.take_orders().is_empty(), "nobody is left to send it to");
    }

    #[test]
    fn after_a_start_everybody_of_before_may_hold_anything() {
        let mut leases = Leases::default();
        leases.add_unknown(B);
        leases.changed(Some(A), &[I], Instant::now());
        assert_eq!(leases.pending(&[I]).len(), 1);
        leases.end_all(B);
        leases.changed(Some(A), &[I], Instant::now());
        assert!(leases.pending(&[I]).is_empty());
    }
}
