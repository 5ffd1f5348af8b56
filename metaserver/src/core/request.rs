//! Executing a client's request: exactly once when it is a mutation.

use std::ops::ControlFlow;

use bytes::Bytes;
use fjordfs_proto::{
    FsError, FsResult, InodeId, SessionId,
    error::Errno,
    operation::is_mutation,
    pb::meta::{Attr, Empty, GivenBack, Request, Response, request::Op, response::Result as Reply},
};
use prost::Message;

use super::{Answer, Core, Moment, Outcome};
use crate::{
    keys,
    leases::RecallId,
    ops::{self, Ctx},
    records,
    records::SlotRecord,
    session::SLOTS,
};

/// Most inodes that a session may cache something of; a client gives back what it has no room for long before.
const LEASES_MAX: usize = 1 << 20;

impl Core {
    /// Whether the session exists; it was heard of now.
    pub(crate) fn hear(&mut self, session: SessionId, now: Moment) -> bool {
        let Some(session) = self.sessions.get_mut(session) else { return false };
        session.heard = now.mono;
        true
    }

    /// The session has obeyed recalls, and has no use for some of its leases and delegations.
    pub(crate) fn let_go(
        &mut self,
        session: SessionId,
        recalled: &[u64],
        given_back: Option<&GivenBack>,
        demoted: Option<&GivenBack>,
    ) {
        for id in recalled {
            self.leases.obeyed(session, RecallId(*id));
        }
        if let Some(GivenBack { inos, as_of }) = demoted {
            self.leases.demoted(session, inos, *as_of);
        }
        if let Some(GivenBack { inos, as_of }) = given_back {
            self.leases.given_back(session, inos, *as_of);
        }
    }

    /// What the session had decided before it attached has arrived.
    pub(crate) fn settled(&mut self, session: SessionId) {
        self.leases.settled(session);
    }

    /// Executes a request, or repeats the answer of its first execution.
    pub(crate) fn request(&mut self, session: SessionId, request: Request, now: Moment) -> Outcome {
        let request = match self.lock_request(session, request) {
            ControlFlow::Break(outcome) => return outcome,
            ControlFlow::Continue(other) => other,
        };
        let Request { id, slot, sequence, deferred, op } = request;
        let Some(op) = op else {
            let e = FsError::new(Errno::ENOSYS, "this metaserver does not know that operation: upgrade it");
            return Outcome::Answered(Answer {
                response: error_response(id, e),
                sync: false,
                recalls: Vec::new(),
            });
        };
        self.txn.begin();
        let sync = ops::needs_sync(&op);
        if let Some(repeated) = self.repeat(session, (slot, sequence), deferred, &op) {
            // What the first answer waited for may still be under way.
            let recalls = if deferred { Vec::new() } else { self.leases.all_pending() };
            return Outcome::Answered(Answer { response: response(id, repeated), sync, recalls });
        }
        if self.leases.in_grace() && !ops::goes_on_in_grace(&op, deferred) {
            let request = Request { id, slot, sequence, deferred, op: Some(op) };
            return Outcome::Postponed(request, vec![RecallId::GRACE]);
        }
        let tells = !ops::never_conflicts(&op);
        let postponable = tells && self.leases.may_conflict(session);
        let again = postponable.then(|| op.clone());
        let told = if deferred { ops::Told::default() } else { ops::Told::by(&op) };
        let made = if let Op::Make(make) = &op { make.ino } else { 0 };
        let removes = matches!(op, Op::Remove(_) | Op::Rename(_));
        // Files that are committed together only travel together.
        let is_atomic = !matches!(op, Op::Commit(_));
        let is_mutation = is_mutation(&op);
        let result = if is_mutation {
            self.mutate(session, (slot, sequence), deferred, op, now)
        } else {
            self.read(session, op, now)
        };
        if !self.conflicts.is_empty() {
            let conflicts = std::mem::take(&mut self.conflicts);
            let recalls = self.leases.take_back(&conflicts, now.mono);
            return Outcome::Postponed(Request { id, slot, sequence, deferred, op: again }, recalls);
        }
        let sync = sync && result.is_ok();
        if tells && !deferred {
            self.leases.shown(session, self.txn.seen(), now.mono);
        }
        self.leases.changed(Some(session), self.txn.changed(), now.mono);
        if is_atomic {
            let changed = self.txn.changed().to_vec();
            self.leases.changed_together(&changed, self.txn.seen());
        }
        if removes {
            self.release_gone(session);
        }
        if deferred {
            if made != 0 && result.is_ok() {
                self.leases.delegate_new(session, InodeId(made));
            }
            return Outcome::Answered(Answer { response: response(id, result), sync, recalls: Vec::new() });
        }
        let recalls = self.leases.pending(Some(session), self.txn.seen());
        let told = told.and(&result);
        let changed = self.changed_besides(&told.attributes);
        let mut response = response(id, result);
        response.changed = changed;
        // One that waits is passed by others: what it says may be old when it arrives. And what is being recalled from the session
        // itself must not be granted again before it has let go.
        let recalled = !self.leases.pending(None, self.txn.seen()).is_empty();
        if recalls.is_empty()
            && !recalled
            && !sync
            && told.cacheable()
            && self.leases.held(session) < LEASES_MAX
        {
            self.serial += 1;
            response.serial = self.serial;
            let delegations = is_mutation && self.sessions.get_mut(session).is_some_and(|s| s.delegations);
            for ino in told.inodes() {
                self.leases.grant(session, ino, self.serial);
                if delegations && self.leases.delegate(session, ino, now.mono) {
                    response.delegated.push(ino.0);
                }
            }
        }
        Outcome::Answered(Answer { response, sync, recalls })
    }

    /// Who has removed an inode keeps no lease on it.
    fn release_gone(&mut self, session: SessionId) {
        for ino in self.txn.changed().to_vec() {
            if matches!(self.txn.find_inode(ino), Ok(None)) {
                self.leases.gone(session, ino);
            }
        }
    }

    /// Attributes of what the operation has changed and its answer does not show.
    fn changed_besides(&mut self, shown: &[InodeId]) -> Vec<Attr> {
        let changed: Vec<InodeId> =
            self.txn.changed().iter().filter(|ino| !shown.contains(ino)).copied().collect();
        let attr = |ino: InodeId| match self.txn.find_inode(ino) {
            Ok(Some(inode)) => inode.attr(ino),
            // Gone; an engine's error is noted and comes up again at the next use.
            Ok(None) | Err(_) => Attr { ino: ino.0, ..Attr::default() },
        };
        changed.into_iter().map(attr).collect()
    }

    fn read(&mut self, session: SessionId, op: Op, now: Moment) -> FsResult<Reply> {
        if matches!(op, Op::Sync(_))
            && let Some(e) = &self.failed
        {
            return Err(e.clone());
        }
        // Two of these may write: the last close of an orphan, and an access time. A failed store keeps what it has.
        self.txn.begin();
        let result = self.run(session, op, now);
        match &result {
            Ok(_) if self.failed.is_none() => self.txn.accept(),
            _ => self.txn.reject(),
        }
        self.note_engine_error();
        result
    }

    /// The answer to a mutation that was executed before, or the refusal of one that cannot be told.
    fn repeat(
        &mut self,
        session: SessionId,
        at: (u32, u64),
        deferred: bool,
        op: &Op,
    ) -> Option<FsResult<Reply>> {
        if !is_mutation(op) {
            return None;
        }
        let (slot, sequence) = at;
        let refuse = |message| Some(Err(FsError::new(Errno::EINVAL, message)));
        if slot >= SLOTS || sequence == 0 {
            return refuse(format!(
                "a mutation needs a slot below {SLOTS} and a sequence from 1, not slot {slot} sequence {sequence}"
            ));
        }
        let last = match self.txn.record::<SlotRecord>(&keys::slot(session, slot)) {
            Ok(last) => last?,
            Err(e) => return Some(Err(e)),
        };
        if last.sequence == sequence {
            let reply = repeated(&last, session, slot).and_then(|reply| match (reply, op) {
                // Decided by a process that was killed before it could say so; its successor knows nothing of it.
                (Reply::Empty(_), Op::Make(make)) if !deferred => ops::made(&mut self.txn, make),
                (reply, _) => Ok(reply),
            });
            if let Ok(reply) = &reply {
                ops::replay(&mut self.opens, session, op, reply);
            }
            return Some(reply);
        }
        if last.sequence > sequence {
            let last = last.sequence;
            return refuse(format!("slot {slot} of {session} is at sequence {last}, {sequence} is over"));
        }
        None
    }

    fn mutate(
        &mut self,
        session: SessionId,
        at: (u32, u64),
        deferred: bool,
        op: Op,
        now: Moment,
    ) -> FsResult<Reply> {
        let (slot, sequence) = at;
        let key = keys::slot(session, slot);
        if let Some(why) = self.low_space.as_ref().filter(|_| ops::needs_space(&op)) {
            return Err(FsError::new(Errno::ENOSPC, why.clone()));
        }
        self.operation(|core| {
            let reply = core.run(session, op, now)?;
            // Who has decided it knows the rest.
            let reply = if deferred { Reply::Empty(Empty {}) } else { reply };
            let response = Response { result: Some(reply), ..Response::default() };
            let record = SlotRecord { sequence, response: Bytes::from(response.encode_to_vec()) };
            core.txn.put_record(key, &record);
            response.result.ok_or_else(|| FsError::new(Errno::EIO, "an answer without a result"))
        })
    }

    /// One operation; refused when it has met something that is delegated to another session, which `conflicts` names then.
    fn run(&mut self, session: SessionId, op: Op, now: Moment) -> FsResult<Reply> {
        let opened = self.opens.mark();
        let postponable = !ops::never_conflicts(&op);
        let mut none = Vec::new();
        let inodes = self.sessions.get_mut(session).map_or(&mut none, |session| &mut session.inodes);
        let mut ctx = Ctx {
            facts: self.members.facts(),
            txn: &mut self.txn,
            opens: &mut self.opens,
            leases: &self.leases,
            inodes,
            session,
            now: now.wall,
            start: self.start,
            policy_wanted: None,
            missed: Vec::new(),
        };
        let reply = ops::run(&mut ctx, op);
        let (policy_wanted, missed) = (ctx.policy_wanted, ctx.missed);
        if postponable {
            self.conflicts = self.leases.conflicts(session, self.txn.seen());
        }
        if !self.conflicts.is_empty() {
            self.opens.undo_to(opened);
            return Err(FsError::new(Errno::EAGAIN, "postponed until a delegation is back"));
        }
        if reply.is_ok() && !missed.is_empty() {
            self.healing.missed(self.members.map(), &missed, now.mono);
        }
        if let Some(policy) = policy_wanted.filter(|_| reply.is_ok()) {
            self.save_members();
            self.members.want_policy(&mut self.txn, policy);
        }
        reply
    }
}

pub(super) fn response(id: u64, result: FsResult<Reply>) -> Response {
    match result {
        Ok(reply) => Response { id, result: Some(reply), ..Response::default() },
        Err(e) => error_response(id, e),
    }
}

fn error_response(id: u64, e: FsError) -> Response {
    Response { id, result: Some(Reply::Error(e.into())), ..Response::default() }
}

fn repeated(last: &SlotRecord, session: SessionId, slot: u32) -> FsResult<Reply> {
    let what = || format!("slot {slot} of {session}");
    let response: Response = records::decode(last.response.clone(), what)?;
    response.result.ok_or_else(|| records::damaged(&what()))
}
