//! Executing a client's request: exactly once when it is a mutation.

use bytes::Bytes;
use fjordfs_proto::{
    FsError, FsResult, SessionId,
    error::Errno,
    pb::meta::{Request, Response, request::Op, response::Result as Reply},
};
use prost::Message;

use super::{Answer, Core, Moment};
use crate::{
    keys,
    ops::{self, Ctx},
    records,
    records::SlotRecord,
    session::SLOTS,
};

impl Core {
    /// Whether the session exists; it was heard of now.
    pub(crate) fn hear(&mut self, session: SessionId, now: Moment) -> bool {
        let Some(session) = self.sessions.get_mut(session) else { return false };
        session.heard = now.mono;
        true
    }

    /// Executes a request, or repeats the answer of its first execution.
    pub(crate) fn request(&mut self, session: SessionId, request: Request, now: Moment) -> Answer {
        let Request { id, slot, sequence, op } = request;
        let Some(op) = op else {
            let e = FsError::new(Errno::ENOSYS, "this metaserver does not know that operation: upgrade it");
            return Answer { response: error_response(id, e), sync: false };
        };
        let sync = ops::needs_sync(&op);
        let result = if ops::is_mutation(&op) {
            self.mutate(session, (slot, sequence), op, now)
        } else {
            self.read(session, op, now)
        };
        match result {
            Ok(reply) => Answer { response: Response { id, result: Some(reply) }, sync },
            Err(e) => Answer { response: error_response(id, e), sync: false },
        }
    }

    fn read(&mut self, session: SessionId, op: Op, now: Moment) -> FsResult<Reply> {
        if matches!(op, Op::Sync(_))
            && let Some(e) = &self.failed
        {
            return Err(e.clone());
        }
        // Close is the one of these that may write: the last close of an orphan. A failed store keeps the orphan.
        self.txn.begin();
        let result = self.run(session, op, now);
        match &result {
            Ok(_) if self.failed.is_none() => self.txn.accept(),
            _ => self.txn.reject(),
        }
        self.note_engine_error();
        result
    }

    fn mutate(&mut self, session: SessionId, at: (u32, u64), op: Op, now: Moment) -> FsResult<Reply> {
        let (slot, sequence) = at;
        if slot >= SLOTS || sequence == 0 {
            return Err(FsError::new(
                Errno::EINVAL,
                format!(
                    "a mutation needs a slot below {SLOTS} and a sequence from 1, not slot {slot} sequence {sequence}"
                ),
            ));
        }
        let key = keys::slot(session, slot);
        if let Some(last) = self.txn.record::<SlotRecord>(&key)? {
            if last.sequence == sequence {
                let reply = repeated(&last, session, slot)?;
                ops::replay(&mut self.opens, session, &op, &reply);
                return Ok(reply);
            }
            if last.sequence > sequence {
                let last = last.sequence;
                return Err(FsError::new(
                    Errno::EINVAL,
                    format!("slot {slot} of {session} is at sequence {last}, {sequence} is over"),
                ));
            }
        }
        if let Some(why) = self.low_space.as_ref().filter(|_| ops::needs_space(&op)) {
            return Err(FsError::new(Errno::ENOSPC, why.clone()));
        }
        self.operation(|core| {
            let reply = core.run(session, op, now)?;
            let response = Response { id: 0, result: Some(reply) };
            let record = SlotRecord { sequence, response: Bytes::from(response.encode_to_vec()) };
            core.txn.put_record(key, &record);
            response.result.ok_or_else(|| FsError::new(Errno::EIO, "an answer without a result"))
        })
    }

    fn run(&mut self, session: SessionId, op: Op, now: Moment) -> FsResult<Reply> {
        let mut ctx = Ctx {
            facts: self.members.facts(),
            txn: &mut self.txn,
            opens: &mut self.opens,
            session,
            now: now.wall,
            width_wanted: None,
        };
        let reply = ops::run(&mut ctx, op)?;
        if let Some(width) = ctx.width_wanted {
            self.save_members();
            self.members.want_width(&mut self.txn, width);
        }
        Ok(reply)
    }
}

fn error_response(id: u64, e: FsError) -> Response {
    Response { id, result: Some(Reply::Error(e.into())) }
}

fn repeated(last: &SlotRecord, session: SessionId, slot: u32) -> FsResult<Reply> {
    let what = || format!("slot {slot} of {session}");
    let response: Response = records::decode(last.response.clone(), what)?;
    response.result.ok_or_else(|| records::damaged(&what()))
}
