//! Requests for locks: from the protocol to the table and back. They touch no store, so they wait for no recall, and their
//! answers leave in the order in which they took effect: from that a client knows what it holds.

use std::{collections::HashSet, ops::ControlFlow};

use fjordfs_proto::{
    FsError, FsResult, InodeId, SessionId,
    error::Errno,
    pb::meta::{self, FileLock, LockReply, Request, Response, request::Op, response::Result as Reply},
};

use super::{Answer, Core, Outcome, request::response};
use crate::{
    leases::RecallId,
    locks::{Denied, Lock, Owner, Span, Taken, Wait},
};

#[cfg(test)]
mod tests;

/// After a start, the time in which sessions of before may still declare locks.
#[derive(Debug, Default)]
pub(super) struct Grace {
    under_way: bool,
    /// Waits given up by their clients before they were looked at.
    cancelled: HashSet<(SessionId, u64)>,
}

impl Grace {
    pub(super) fn begin(&mut self) {
        self.under_way = true;
    }
}

impl Core {
    /// Serves a request for a lock; gives back any other.
    pub(super) fn lock_request(
        &mut self,
        session: SessionId,
        request: Request,
    ) -> ControlFlow<Outcome, Request> {
        let result = match &request.op {
            Some(Op::Lock(_) | Op::TestLock(_)) if self.lock_grace.under_way => {
                return ControlFlow::Break(Outcome::Postponed(request, vec![RecallId::LOCKS]));
            }
            Some(Op::Lock(op)) => match self.lock(session, request.id, op).transpose() {
                Some(result) => result,
                None => return ControlFlow::Break(Outcome::Waiting),
            },
            Some(Op::Unlock(op)) => lock_of(session, op.lock.as_ref()).map(|lock| {
                self.locks.unlock(lock.ino, lock.owner, lock.span);
                LockReply::default()
            }),
            Some(Op::TestLock(op)) => self.test_lock(session, op.lock.as_ref()),
            Some(Op::CancelLock(op)) => {
                self.cancel_lock(session, op.wait);
                Ok(LockReply::default())
            }
            _ => return ControlFlow::Continue(request),
        };
        let response = response(request.id, result.map(Reply::Lock));
        ControlFlow::Break(Outcome::Answered(Answer { response, sync: false, recalls: Vec::new() }))
    }

    /// `None` when it waits.
    fn lock(&mut self, session: SessionId, request: u64, op: &meta::Lock) -> FsResult<Option<LockReply>> {
        let lock = lock_of(session, op.lock.as_ref())?;
        if self.lock_grace.cancelled.remove(&(session, op.wait)) {
            return Err(given_up());
        }
        let wait = (op.wait != 0).then_some(Wait { number: op.wait, request });
        match self.locks.lock(lock, wait) {
            Ok(Taken::Granted) => Ok(Some(LockReply::default())),
            Ok(Taken::Waits) => Ok(None),
            Err(denied) => Err(refusal(denied)),
        }
    }

    fn test_lock(&self, session: SessionId, lock: Option<&FileLock>) -> FsResult<LockReply> {
        let lock = lock_of(session, lock)?;
        let conflict = self.locks.conflict(&lock).map(|held| FileLock {
            ino: held.ino.0,
            owner: 0,
            flock: held.owner.flock,
            start: held.span.start,
            end: held.span.end,
            write: held.write,
            pid: if held.owner.session == session { held.pid } else { 0 },
        });
        Ok(LockReply { conflict })
    }

    fn cancel_lock(&mut self, session: SessionId, wait: u64) {
        if self.lock_grace.under_way {
            self.lock_grace.cancelled.insert((session, wait));
        } else {
            self.locks.cancel(session, wait);
        }
    }

    /// The session holds what it says.
    pub(super) fn declare_locks(&mut self, session: SessionId, declared: &[FileLock]) {
        self.lock_grace.cancelled.retain(|(of, _)| *of != session);
        let locks = declared.iter().filter_map(|lock| lock_of(session, Some(lock)).ok()).collect();
        for lock in self.locks.declare(session, locks) {
            tracing::warn!(%session, ino = %lock.ino, pid = lock.pid, "declares a lock that somebody else holds");
        }
    }

    pub(super) fn forget_lock_waits(&mut self, session: SessionId) {
        self.lock_grace.cancelled.retain(|(of, _)| *of != session);
        self.locks.end_waits(session);
    }

    pub(super) fn end_locks(&mut self, session: SessionId) {
        self.lock_grace.cancelled.retain(|(of, _)| *of != session);
        self.locks.end(session);
    }

    /// Answers to requests that have waited, with whose they are, in the order in which they took effect.
    pub(crate) fn take_lock_answers(&mut self) -> Vec<(SessionId, Response)> {
        let ended = self.locks.take_ended().into_iter();
        ended
            .map(|ended| {
                let result = ended.result.map(|()| Reply::Lock(LockReply::default()));
                (ended.session, response(ended.request, result.map_err(refusal)))
            })
            .collect()
    }

    /// Everybody who may hold locks has said so.
    pub(super) fn end_lock_grace(&mut self) -> Option<RecallId> {
        if !self.lock_grace.under_way || self.sessions.any_missing() {
            return None;
        }
        self.lock_grace.under_way = false;
        Some(RecallId::LOCKS)
    }
}

fn lock_of(session: SessionId, lock: Option<&FileLock>) -> FsResult<Lock> {
    let FileLock { ino, owner, flock, start, end, write, pid } =
        *lock.filter(|lock| lock.start <= lock.end).ok_or_else(|| {
            FsError::new(Errno::EINVAL, "a lock needs a range that does not end before it begins")
        })?;
    let owner = Owner { session, flock, id: owner };
    let span = if flock { Span { start: 0, end: u64::MAX } } else { Span { start, end } };
    Ok(Lock { ino: InodeId(ino), owner, span, write, pid })
}

fn given_up() -> FsError {
    FsError::new(Errno::EINTR, "the wait for a lock was given up")
}

fn refusal(denied: Denied) -> FsError {
    match denied {
        Denied::Conflict => FsError::new(Errno::EAGAIN, "somebody else has it locked"),
        Denied::Deadlock => FsError::new(Errno::EDEADLK, "the owner of the lock would wait for itself"),
        Denied::Cancelled => given_up(),
        Denied::TooMany => FsError::new(Errno::ENOLCK, "this client holds too many locks: give some up"),
    }
}
