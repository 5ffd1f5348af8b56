//! Sessions: mounted clients. The record is durable, so that a client finds its slots, leases and orphans again after a
//! restart; whether it is attached and when it was last heard is not.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use fjordfs_proto::{FsResult, SessionId, pb::meta::SessionReport};

use crate::{
    keys,
    leases::Leases,
    locks::Locks,
    opens::Opens,
    ops::InodeRanges,
    records::{self, SessionRecord},
    store::Order,
    txn::Txn,
};

/// Slots of a session: mutations that can be under way at once.
pub(crate) const SLOTS: u32 = 256;

/// A client.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    pub(crate) client: String,
    pub(crate) heard: Instant,
    pub(crate) attached: bool,
    /// When its last stream ended, if one has.
    pub(crate) detached: Option<Instant>,
    /// Known from before the start, and not heard of since: it may have files open that we do not know.
    pub(crate) missing: bool,
    /// It wants delegations.
    pub(crate) delegations: bool,
    /// Numbers for inodes that it makes by itself.
    pub(crate) inodes: InodeRanges,
}

/// All clients.
#[derive(Default)]
pub(crate) struct Sessions {
    sessions: BTreeMap<SessionId, Session>,
}

impl Sessions {
    /// What the store knows. Everybody gets a whole timeout to come back.
    pub(crate) fn load(txn: &mut Txn, now: Instant) -> FsResult<Sessions> {
        let mut sessions = BTreeMap::new();
        for (key, value) in txn.scan(&keys::all(keys::SESSION), Order::Ascending, usize::MAX)? {
            let id = keys::first_id(&key).ok_or_else(|| records::damaged("a session without an id"))?;
            let record: SessionRecord = records::decode(value, || format!("session {id}"))?;
            let inodes = record.ranges();
            let session = Session {
                client: record.client,
                heard: now,
                attached: false,
                detached: None,
                missing: true,
                delegations: false,
                inodes,
            };
            sessions.insert(SessionId(id), session);
        }
        Ok(Sessions { sessions })
    }

    pub(crate) fn add(&mut self, id: SessionId, client: String, now: Instant) {
        let session = Session {
            client,
            heard: now,
            attached: true,
            detached: None,
            missing: false,
            delegations: false,
            inodes: Vec::new(),
        };
        self.sessions.insert(id, session);
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = SessionId> {
        self.sessions.keys().copied()
    }

    pub(crate) fn remove(&mut self, id: SessionId) {
        self.sessions.remove(&id);
    }

    pub(crate) fn get_mut(&mut self, id: SessionId) -> Option<&mut Session> {
        self.sessions.get_mut(&id)
    }

    /// Sessions that have been silent for too long.
    pub(crate) fn expired(&self, timeout: Duration, now: Instant) -> Vec<SessionId> {
        let silent = |session: &Session| now.saturating_duration_since(session.heard) > timeout;
        self.sessions.iter().filter(|(_, session)| silent(session)).map(|(id, _)| *id).collect()
    }

    /// Whether what a session has decided by itself may still come after it was silent for a lease's time: its stream is whole as far
    /// as this end knows, or has ended a moment ago, and it may be coming back.
    pub(crate) fn may_return(&self, id: SessionId, lease: Duration, now: Instant) -> bool {
        self.sessions.get(&id).is_some_and(|session| {
            session.attached || session.detached.is_some_and(|at| now.saturating_duration_since(at) <= lease)
        })
    }

    /// Nobody could be heard for this long.
    pub(crate) fn forgive(&mut self, stalled: Duration) {
        for session in self.sessions.values_mut() {
            session.heard += stalled;
            session.detached = session.detached.map(|at| at + stalled);
        }
    }

    /// Whether some session of before the start has not been heard of.
    pub(crate) fn any_missing(&self) -> bool {
        self.sessions.values().any(|session| session.missing)
    }

    pub(crate) fn reports(
        &self,
        opens: &Opens,
        leases: &Leases,
        locks: &Locks,
        now: Instant,
    ) -> Vec<SessionReport> {
        self.sessions
            .iter()
            .map(|(id, session)| SessionReport {
                session: id.0,
                client: session.client.clone(),
                attached: session.attached,
                handles: opens.handles(*id) as u32,
                leases: leases.held(*id) as u64,
                locks: (locks.ranges(*id) - locks.waits(*id)) as u64,
                lock_waits: locks.waits(*id) as u64,
                idle_ms: now.saturating_duration_since(session.heard).as_millis() as u64,
            })
            .collect()
    }
}
