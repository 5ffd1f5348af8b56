//! Who may cache what, who may decide what by itself, and how both are taken back.
//!
//! A session holds a lease on every inode it was told something of, until it gives it back or is recalled. An
//! operation is executed at once, but nobody is told of its effect, neither who asked for it nor who reads it, while
//! another session may still use what it has cached of the inodes concerned: the **recalls**. So a holder never shows
//! what somebody else has already seen changed. An operation that changes several inodes is seen in each of them only when the
//! recalls of all of them have ended: who sees that a file has left one directory may look for it in the other.
//!
//! What a session changes that nobody else caches waits for nobody. But the answer may take its time to whoever caches the old there, as the
//! kernel of its host does, and others could see the change before that: such a lease is **unheard**, and recalled when the first other
//! session is about to be told of the inode.
//!
//! A **delegation** is a lease that nobody else has beside it. Its holder decides operations on the inode by itself and sends them
//! later, so what another session asks of the inode is not executed until the delegation has been recalled: it would see
//! what is over already. Delegations are granted to sessions that change something, and not on inodes that
//! were recalled from somebody a moment ago: what several sessions use by turns is better shared.
//!
//! A recall ends when its holder says so, when the holder's session is over, or when the holder has been silent for the
//! length of a lease: by then it has stopped using its leases by its own clock. That does not end delegations of a holder whose stream
//! is whole: what it has decided, and told its programs, may still come, and whoever has been shown the state without it would
//! see it change later. Such a one is waited for until its session is over, when nothing can come of it any more. Where the
//! stream has ended, as it does with its process, a lease's time is enough to come back in. A holder that is heard but does not
//! obey loses its session. A holder that comes back on a new stream has first sent what it had decided, so that it
//! obeys recalls from before as any others.
//!
//! In memory only. After a start nobody knows who caches or decides what. Until every session of before has sent what it had
//! decided, or has been silent for a lease's time, there is a **grace**: only such operations are executed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    time::{Duration, Instant},
};

use fjordfs_proto::{InodeId, SessionId};

/// For this long after a recall an inode is not delegated.
const CONTENDED: Duration = Duration::from_secs(1);

/// Number of a recall.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct RecallId(pub(crate) u64);

impl RecallId {
    /// The end of the grace after a start, which can be waited for as for a recall.
    pub(crate) const GRACE: RecallId = RecallId(0);
    /// The end of the grace for locks, likewise.
    pub(crate) const LOCKS: RecallId = RecallId(u64::MAX);
}

/// A recall that has not ended.
#[derive(Debug)]
struct Recall {
    session: SessionId,
    ino: InodeId,
    began: Instant,
    /// When it was last sent.
    since: Instant,
    /// What must not be shown before it ends: the inode, and others that were changed together with it.
    hides: Vec<InodeId>,
}

/// Leases of one session.
#[derive(Debug, Default)]
struct Held {
    /// With the serial of the last answer that granted it.
    inodes: HashMap<InodeId, u64>,
    recalls: HashMap<InodeId, RecallId>,
    /// How many of the leases are delegations.
    delegations: usize,
}

/// A recall to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pub(crate) session: SessionId,
    pub(crate) id: RecallId,
    pub(crate) ino: InodeId,
    /// The session may have decided something of it.
    pub(crate) delegated: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    holders: HashMap<InodeId, Vec<SessionId>>,
    delegations: HashMap<InodeId, SessionId>,
    sessions: HashMap<SessionId, Held>,
    /// Sessions of before the start that may have something to send.
    unknown: HashSet<SessionId>,
    /// Those of them that have not attached since, and so may cache anything. Whoever attaches caches nothing.
    absent: HashSet<SessionId>,
    recalls: BTreeMap<RecallId, Recall>,
    /// Those that hide something of an inode.
    recalled: HashMap<InodeId, BTreeSet<RecallId>>,
    /// Inodes whose only holder has changed them, so that what it caches may be from before.
    unheard: HashMap<InodeId, SessionId>,
    /// Inodes that were recalled lately, and when.
    contended: HashMap<InodeId, Instant>,
    last_id: u64,
    orders: Vec<Order>,
    ended: Vec<RecallId>,
    /// Inodes whose last recall has ended.
    vacated: Vec<InodeId>,
}

impl Leases {
    /// A session that was there before the start.
    pub(crate) fn add_unknown(&mut self, session: SessionId) {
        self.unknown.insert(session);
        self.absent.insert(session);
    }

    /// Whether sessions of before the start may still have something to send.
    pub(crate) fn in_grace(&self) -> bool {
        !self.unknown.is_empty()
    }

    /// A session was told of an inode, in the answer with this serial.
    pub(crate) fn grant(&mut self, session: SessionId, ino: InodeId, serial: u64) {
        if self.sessions.entry(session).or_default().inodes.insert(ino, serial).is_none() {
            self.holders.entry(ino).or_default().push(session);
        }
    }

    /// Makes a lease a delegation, if nothing speaks against it; whether it is one now.
    pub(crate) fn delegate(&mut self, session: SessionId, ino: InodeId, now: Instant) -> bool {
        if let Some(holder) = self.delegations.get(&ino) {
            return *holder == session;
        }
        let alone = self.holders.get(&ino).is_some_and(|holders| holders[..] == [session]);
        let contended =
            self.contended.get(&ino).is_some_and(|at| now.saturating_duration_since(*at) < CONTENDED);
        if alone && !contended && !self.in_grace() && !self.recalled.contains_key(&ino) {
            self.note_delegation(session, ino);
            return true;
        }
        false
    }

    /// An inode that a session has made by itself: nobody else can have heard of it.
    pub(crate) fn delegate_new(&mut self, session: SessionId, ino: InodeId) {
        // The session has known since before any serial that it has seen.
        self.grant(session, ino, 0);
        self.note_delegation(session, ino);
    }

    fn note_delegation(&mut self, session: SessionId, ino: InodeId) {
        if self.delegations.insert(ino, session).is_none() {
            self.sessions.entry(session).or_default().delegations += 1;
        }
    }

    /// Whether somebody else has a delegation on anything.
    pub(crate) fn may_conflict(&self, session: SessionId) -> bool {
        self.delegations.len() > self.sessions.get(&session).map_or(0, |held| held.delegations)
    }

    /// Of these inodes, the ones that are delegated to somebody else.
    pub(crate) fn conflicts(&self, session: SessionId, inodes: &[InodeId]) -> Vec<InodeId> {
        if !self.may_conflict(session) {
            return Vec::new();
        }
        let foreign = |ino: &&InodeId| self.delegations.get(ino).is_some_and(|holder| *holder != session);
        inodes.iter().filter(foreign).copied().collect()
    }

    /// Recalls delegations; their recalls.
    pub(crate) fn take_back(&mut self, inodes: &[InodeId], now: Instant) -> Vec<RecallId> {
        for ino in inodes {
            if let Some(holder) = self.delegations.get(ino).copied() {
                self.recall(holder, *ino, now);
            }
        }
        self.pending(None, inodes)
    }

    /// Whether another session may cache something of an inode.
    pub(crate) fn others_hold(&self, session: SessionId, ino: InodeId) -> bool {
        let holders = self.holders.get(&ino).into_iter().flatten().chain(&self.absent);
        holders.into_iter().any(|holder| *holder != session)
    }

    /// Whether a session can be told of an inode that it did not ask for: it knows nothing of it, and nobody has to be recalled,
    /// nor has been lately.
    pub(crate) fn is_news(&self, session: SessionId, ino: InodeId) -> bool {
        let knows = self.sessions.get(&session).is_some_and(|held| held.inodes.contains_key(&ino));
        let others = self.delegations.contains_key(&ino)
            || self.unheard.get(&ino).is_some_and(|holder| *holder != session)
            || self.recalled.contains_key(&ino)
            || self.contended.contains_key(&ino);
        !knows && !others
    }

    /// Whether somebody has yet to obey a recall of an inode; when nobody has any more, it is among [`Leases::take_vacated`].
    pub(crate) fn is_recalled(&self, ino: InodeId) -> bool {
        self.recalled.contains_key(&ino)
    }

    /// Inodes whose recalls have all ended since: those who had opened one under a lease have said so.
    pub(crate) fn take_vacated(&mut self) -> Vec<InodeId> {
        std::mem::take(&mut self.vacated)
    }

    /// How many inodes a session may cache something of.
    pub(crate) fn held(&self, session: SessionId) -> usize {
        self.sessions.get(&session).map_or(0, |held| held.inodes.len())
    }

    /// Inodes have been changed by `actor`, or by the server itself: recalls what others hold. Then the actor's own lease goes,
    /// too: its answer will wait, and others may learn of the change before it does.
    pub(crate) fn changed(&mut self, actor: Option<SessionId>, inodes: &[InodeId], now: Instant) {
        for &ino in inodes {
            if actor.is_some() && self.delegations.get(&ino).copied() == actor {
                // Nobody else has a lease, and the change may be one that was decided long ago.
                continue;
            }
            // A session that may hold anything is not known to hold something: it has not attached since.
            let known = self.holders.get(&ino).into_iter().flatten();
            let holders: Vec<SessionId> = known.chain(&self.absent).copied().collect();
            if holders.iter().any(|session| Some(*session) != actor) {
                for session in holders {
                    self.recall(session, ino, now);
                }
            } else if let Some(actor) = actor.filter(|_| !holders.is_empty()) {
                self.unheard.insert(ino, actor);
            }
        }
    }

    /// A session is about to be told of these inodes: who has changed one by itself is recalled first.
    pub(crate) fn shown(&mut self, session: SessionId, inodes: &[InodeId], now: Instant) {
        if self.unheard.is_empty() {
            return;
        }
        for ino in inodes {
            if let Some(holder) = self.unheard.get(ino).copied().filter(|holder| *holder != session) {
                self.recall(holder, *ino, now);
            }
        }
    }

    /// One operation has changed these inodes, and has looked at those besides: what it waits for hides all that it has changed.
    pub(crate) fn changed_together(&mut self, changed: &[InodeId], seen: &[InodeId]) {
        // One alone is hidden by its own recalls.
        if let [] | [_] = changed {
            return;
        }
        for id in self.pending(None, seen) {
            changed.iter().for_each(|ino| self.hide(id, *ino));
        }
    }

    fn hide(&mut self, id: RecallId, ino: InodeId) {
        if self.recalled.entry(ino).or_default().insert(id)
            && let Some(recall) = self.recalls.get_mut(&id)
        {
            recall.hides.push(ino);
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
        self.contended.insert(ino, now);
        self.recalls.insert(id, Recall { session, ino, began: now, since: now, hides: Vec::new() });
        self.hide(id, ino);
        let delegated = self.delegations.get(&ino) == Some(&session);
        self.orders.push(Order { session, id, ino, delegated });
    }

    /// Recalls that must end before anybody is told something of these inodes. `actor` has seen and done more with what is
    /// delegated to it than the server: it need not wait for itself.
    pub(crate) fn pending(&self, actor: Option<SessionId>, inodes: &[InodeId]) -> Vec<RecallId> {
        if self.recalls.is_empty() {
            return Vec::new();
        }
        let foreign = |ino: &&InodeId| actor.is_none() || self.delegations.get(ino).copied() != actor;
        let mut ids: Vec<RecallId> = inodes
            .iter()
            .filter(foreign)
            .filter_map(|ino| self.recalled.get(ino))
            .flatten()
            .copied()
            .collect();
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
            if self.granted_by(session, ino, as_of) {
                self.release(session, ino);
            }
        }
    }

    /// The session decides nothing about these inodes by itself any more, as far as delegated up to `as_of`.
    pub(crate) fn demoted(&mut self, session: SessionId, inodes: &[u64], as_of: u64) {
        for ino in inodes.iter().copied().map(InodeId) {
            if self.granted_by(session, ino, as_of) {
                self.end_delegation(session, ino);
            }
        }
    }

    fn granted_by(&self, session: SessionId, ino: InodeId, as_of: u64) -> bool {
        let granted = self.sessions.get(&session).and_then(|held| held.inodes.get(&ino));
        granted.is_some_and(|serial| *serial <= as_of)
    }

    /// The inode is gone, and the session knows: it was the one that removed it.
    pub(crate) fn gone(&mut self, session: SessionId, ino: InodeId) {
        self.release(session, ino);
    }

    fn end_delegation(&mut self, session: SessionId, ino: InodeId) {
        if self.delegations.get(&ino) == Some(&session) {
            self.delegations.remove(&ino);
            if let Some(held) = self.sessions.get_mut(&session) {
                held.delegations -= 1;
            }
        }
    }

    /// The session caches nothing of the inode any more.
    fn release(&mut self, session: SessionId, ino: InodeId) {
        self.end_delegation(session, ino);
        if self.unheard.get(&ino) == Some(&session) {
            self.unheard.remove(&ino);
        }
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
            self.end(id);
        }
    }

    fn end(&mut self, id: RecallId) {
        for ino in self.recalls.remove(&id).map(|recall| recall.hides).unwrap_or_default() {
            if let Some(ids) = self.recalled.get_mut(&ino) {
                ids.remove(&id);
                if ids.is_empty() {
                    self.recalled.remove(&ino);
                    self.vacated.push(ino);
                }
            }
        }
        self.ended.push(id);
    }

    /// The session has a new stream. Of before a start: it caches nothing any more, but may have something to send.
    /// Otherwise recalls that were sent on the old stream are sent again, and there is as much time again to obey them.
    pub(crate) fn attached(&mut self, session: SessionId, now: Instant) {
        if self.unknown.contains(&session) {
            self.absent.remove(&session);
            self.release_all(session);
            return;
        }
        self.orders.retain(|order| order.session != session);
        let Some(held) = self.sessions.get(&session) else { return };
        let of = |ino| self.delegations.get(&ino) == Some(&session);
        let mut again: Vec<Order> =
            held.recalls.iter().map(|(&ino, &id)| Order { session, id, ino, delegated: of(ino) }).collect();
        again.sort_unstable_by_key(|order| order.id);
        for order in &again {
            if let Some(recall) = self.recalls.get_mut(&order.id) {
                recall.since = now;
            }
        }
        self.orders.append(&mut again);
    }

    /// The session has sent what it had decided before it attached.
    pub(crate) fn settled(&mut self, session: SessionId) {
        self.absent.remove(&session);
        if self.unknown.remove(&session) && self.unknown.is_empty() {
            self.ended.push(RecallId::GRACE);
        }
    }

    /// Whoever has not sent anything by now is not waited for any longer.
    pub(crate) fn end_grace(&mut self) {
        self.absent.clear();
        for session in std::mem::take(&mut self.unknown) {
            self.release_all(session);
        }
        self.ended.push(RecallId::GRACE);
    }

    /// The session caches nothing any more: it is over, or was silent for a lease's time.
    pub(crate) fn end_all(&mut self, session: SessionId) {
        self.settled(session);
        self.release_all(session);
    }

    /// The session was silent for a lease's time, and caches nothing any more. What it has decided may still come.
    pub(crate) fn end_cached(&mut self, session: SessionId) {
        self.settled(session);
        self.release_where(session, |leases, ino| leases.delegations.get(&ino) != Some(&session));
    }

    fn release_where(&mut self, session: SessionId, wanted: impl Fn(&Leases, InodeId) -> bool) {
        let Some(held) = self.sessions.get(&session) else { return };
        let inodes = held.inodes.keys().chain(held.recalls.keys()).copied();
        let inodes: Vec<InodeId> = inodes.filter(|ino| wanted(self, *ino)).collect();
        for ino in inodes {
            self.release(session, ino);
        }
    }

    fn release_all(&mut self, session: SessionId) {
        self.release_where(session, |_, _| true);
        self.sessions.remove(&session);
        self.orders.retain(|order| order.session != session);
    }

    /// Sessions that were told more than `bound` ago and have not obeyed. Whose streams break again and again has twice as long.
    pub(crate) fn disobedient(&self, bound: Duration, now: Instant) -> Vec<SessionId> {
        let age = |of: Instant| now.saturating_duration_since(of);
        let late = |recall: &&Recall| age(recall.since) > bound || age(recall.began) > 2 * bound;
        let mut sessions: Vec<SessionId> =
            self.recalls.values().filter(late).map(|recall| recall.session).collect();
        sessions.sort_unstable();
        sessions.dedup();
        sessions
    }

    /// Forgets what was contended long ago.
    pub(crate) fn calm_down(&mut self, now: Instant) {
        self.contended.retain(|_, at| now.saturating_duration_since(*at) < CONTENDED);
    }

    /// Nobody could be heard for this long.
    pub(crate) fn forgive(&mut self, stalled: Duration) {
        for recall in self.recalls.values_mut() {
            recall.began += stalled;
            recall.since += stalled;
        }
    }

    /// Recalls to be sent, in the order in which they became due.
    pub(crate) fn take_orders(&mut self) -> Vec<Order> {
        std::mem::take(&mut self.orders)
    }

    /// Recalls that have ended since, and the grace if it has.
    pub(crate) fn take_ended(&mut self) -> Vec<RecallId> {
        std::mem::take(&mut self.ended)
    }
}

#[cfg(test)]
mod tests;
