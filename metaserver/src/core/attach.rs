//! A client comes, comes back, or leaves.

use fjordfs_proto::{
    FsError, HandleId, InodeId, PROTOCOL_VERSION, ROOT_INODE, SessionId,
    pb::meta::{Hello, SlotAnswered, Welcome},
};

use super::{Core, Event, Moment};
use crate::{
    block_ids, keys, orphans,
    records::{SessionRecord, SlotRecord},
    refusal::Refusal,
    session::SLOTS,
    store::Order,
};

impl Core {
    /// A new session, or a known one with the handles it holds. The welcome must not leave before the log is synced: a
    /// session that a power failure forgets could not come back.
    pub(crate) fn attach(&mut self, hello: &Hello, now: Moment) -> Result<Welcome, Refusal> {
        if hello.protocol_version != PROTOCOL_VERSION {
            return Err(Refusal::Precondition(format!(
                "client {} speaks protocol version {}, this metaserver {PROTOCOL_VERSION}: use the same release on both",
                hello.client, hello.protocol_version
            )));
        }
        let cluster_id = self.members.map().cluster_id.clone();
        if !hello.cluster_id.is_empty() && hello.cluster_id != cluster_id {
            return Err(Refusal::Precondition(format!(
                "client {} expects cluster {}, this is cluster {cluster_id}: check the metaserver address",
                hello.client, hello.cluster_id
            )));
        }
        let (session, lost) = match hello.session {
            0 => (self.new_session(hello, now)?, false),
            id => {
                let session = self.known_session(SessionId(id), &hello.client, now)?;
                (session, self.has_lost(session, &hello.answered)?)
            }
        };
        self.leases.attached(session, now.mono);
        if let Some(session) = self.sessions.get_mut(session) {
            session.delegations = hello.delegations;
        }
        self.declare_locks(session, &hello.locks);
        for open in &hello.handles {
            let ino = InodeId(open.ino);
            // One that is gone shows itself as ESTALE when it is used.
            if self.txn.find_inode(ino)?.is_some() {
                self.opens.open(session, HandleId(open.handle), ino)?;
            }
        }
        Ok(Welcome {
            session: session.0,
            cluster_id,
            map: Some(self.members.map().to_pb()),
            root: ROOT_INODE.0,
            session_timeout_ms: self.session_timeout.as_millis() as u64,
            slots: SLOTS,
            lease_ms: self.lease_time.as_millis() as u64,
            lost,
        })
    }

    fn new_session(&mut self, hello: &Hello, now: Moment) -> Result<SessionId, FsError> {
        let id = self.operation(|core| {
            let id = SessionId(core.txn.counters().next_session);
            core.txn.counters().next_session += 1;
            let record = SessionRecord {
                client: hello.client.clone(),
                created: Some(now.wall),
                ..SessionRecord::default()
            };
            core.txn.put_record(keys::session(id), &record);
            Ok::<_, FsError>(id)
        })?;
        self.sessions.add(id, hello.client.clone(), now.mono);
        self.sessions_added.push(id);
        Ok(id)
    }

    fn known_session(&mut self, id: SessionId, client: &str, now: Moment) -> Result<SessionId, Refusal> {
        let Some(session) = self.sessions.get_mut(id) else {
            return Err(Refusal::NotFound(format!(
                "{id} is not known: it was silent for too long, or the metadata was replaced; mount again"
            )));
        };
        (session.attached, session.missing, session.heard) = (true, false, now.mono);
        if session.client != client {
            // Another process serves the mount.
            client.clone_into(&mut session.client);
            self.operation(|core| {
                let key = keys::session(id);
                if let Some(record) = core.txn.record::<SessionRecord>(&key)? {
                    core.txn.put_record(key, &SessionRecord { client: client.to_owned(), ..record });
                }
                Ok::<_, FsError>(())
            })?;
        }
        Ok(id)
    }

    /// Whether a mutation that the session was told was done is not in the store. Every one leaves its sequence in its slot, and what
    /// a power failure takes is the end of the log; so when the last of each slot is there, all are.
    fn has_lost(&mut self, session: SessionId, answered: &[SlotAnswered]) -> Result<bool, FsError> {
        for SlotAnswered { slot, sequence } in answered {
            let stored: Option<SlotRecord> = self.txn.record(&keys::slot(session, *slot))?;
            if stored.is_none_or(|stored| stored.sequence < *sequence) {
                tracing::warn!(%session, "operations that were answered and not synced are lost: its next fsync fails");
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The stream of a session is gone; the session waits for another.
    pub(crate) fn detach(&mut self, session: SessionId, now: Moment) {
        if let Some(session) = self.sessions.get_mut(session) {
            (session.attached, session.detached) = (false, Some(now.mono));
        }
        // What waits is sent again on the next stream.
        self.forget_lock_waits(session);
    }

    /// The client is done.
    pub(crate) fn goodbye(&mut self, session: SessionId, now: Moment) {
        if self.sessions.get_mut(session).is_some() {
            self.end_session(session, Refusal::Aborted("the session ended".into()), now);
        }
    }

    /// The session is over: handles closed, unused block ids swept, slots forgotten.
    pub(super) fn end_session(&mut self, session: SessionId, why: Refusal, now: Moment) {
        let result = self.operation(|core| {
            for ino in core.opens.end(session) {
                orphans::closed(&mut core.txn, &core.opens, &core.leases, ino)?;
            }
            block_ids::sweep(&mut core.txn, session)?;
            for (key, _) in core.txn.scan(&keys::slots(session), Order::Ascending, usize::MAX)? {
                core.txn.remove(key);
            }
            core.txn.remove(keys::session(session));
            Ok::<_, FsError>(())
        });
        self.leases.changed(None, self.txn.changed(), now.mono);
        match result {
            Ok(()) => {
                self.leases.end_all(session);
                self.end_locks(session);
                self.sessions.remove(session);
                self.events.push(Event::SessionEnded(session, why));
            }
            Err(e) => tracing::error!(%session, error = %e, "session could not be ended"),
        }
    }
}
