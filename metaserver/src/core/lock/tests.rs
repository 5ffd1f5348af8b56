//! Locks over restarts, reconnects and the ends of sessions.

use std::time::Duration;

use fjordfs_proto::{
    SessionId,
    error::Errno,
    pb::meta::{self, FileLock, Hello, LockReply, Request, Unlock, request::Op, response::Result as Reply},
};

use crate::{
    core::Outcome,
    leases::RecallId,
    testing::{World, hello},
};

fn file_lock(owner: u64, start: u64, end: u64, write: bool) -> FileLock {
    FileLock { ino: 5, owner, flock: false, start, end, write, pid: 42 }
}

fn lock(lock: FileLock, wait: u64) -> Op {
    Op::Lock(meta::Lock { lock: Some(lock), wait })
}

fn unlock(lock: FileLock) -> Op {
    Op::Unlock(Unlock { lock: Some(lock) })
}

/// What becomes of a request: the error, if it is refused; `None` while it waits.
fn ask(w: &mut World, session: SessionId, id: u64, op: Op) -> Option<Result<LockReply, Errno>> {
    let request = Request { id, op: Some(op), ..Request::default() };
    match w.core.request(session, request, w.now) {
        Outcome::Answered(answer) => {
            assert!(answer.recalls.is_empty() && !answer.sync && answer.response.id == id);
            Some(result(answer.response.result))
        }
        Outcome::Postponed(request, recalls) => {
            assert_eq!((recalls.as_slice(), request.id), (&[RecallId::LOCKS][..], id));
            None
        }
        Outcome::Waiting => None,
    }
}

fn result(reply: Option<Reply>) -> Result<LockReply, Errno> {
    match reply {
        Some(Reply::Lock(reply)) => Ok(reply),
        Some(Reply::Error(e)) => Err(fjordfs_proto::FsError::from(e).errno),
        other => panic!("{other:?}"),
    }
}

fn answers(w: &mut World) -> Vec<(SessionId, u64, Result<(), Errno>)> {
    let answers = w.core.take_lock_answers().into_iter();
    answers.map(|(session, response)| (session, response.id, result(response.result).map(drop))).collect()
}

fn attach_with(w: &mut World, session: SessionId, locks: Vec<FileLock>) {
    w.core.attach(&Hello { locks, ..hello(session.0) }, w.now).unwrap();
    w.core.settled(session);
    w.core.commit().unwrap();
}

const GRANTED: Option<Result<LockReply, Errno>> = Some(Ok(LockReply { conflict: None }));

#[test]
fn a_wait_ends_with_the_lock_or_with_the_clients_patience() {
    let mut w = World::new();
    let (a, b) = (w.session, w.attach());
    let all = file_lock(1, 0, u64::MAX, true);
    assert_eq!(ask(&mut w, a, 1, lock(all, 0)), GRANTED);
    assert_eq!(ask(&mut w, b, 1, lock(all, 0)), Some(Err(Errno::EAGAIN)), "one number, two owners");
    assert_eq!(ask(&mut w, b, 2, lock(file_lock(1, 7, 7, false), 1)), None);
    assert_eq!(ask(&mut w, b, 3, lock(file_lock(2, 8, 8, false), 2)), None);
    let test = |session| Op::TestLock(meta::TestLock { lock: Some(file_lock(9, 3, 3, session == a)) });
    let Some(Ok(LockReply { conflict: Some(held) })) = ask(&mut w, b, 4, test(b)) else { panic!() };
    assert_eq!(
        (held.start, held.end, held.write, held.pid),
        (0, u64::MAX, true, 0),
        "another client's pid means nothing"
    );
    let Some(Ok(LockReply { conflict: Some(held) })) = ask(&mut w, a, 4, test(a)) else { panic!() };
    assert_eq!(held.pid, 42);
    let report = |w: &mut World, session: SessionId| {
        let report = w.core.status(w.now).sessions.into_iter().find(|s| s.session == session.0).unwrap();
        (report.locks, report.lock_waits)
    };
    assert_eq!((report(&mut w, a), report(&mut w, b)), ((1, 0), (0, 2)));
    assert_eq!(ask(&mut w, b, 5, Op::CancelLock(meta::CancelLock { wait: 2 })), GRANTED);
    assert_eq!(answers(&mut w), [(b, 3, Err(Errno::EINTR))]);
    assert_eq!(ask(&mut w, a, 2, unlock(all)), GRANTED);
    assert_eq!(answers(&mut w), [(b, 2, Ok(()))]);
    let backwards = file_lock(1, 2, 1, true);
    assert_eq!(ask(&mut w, a, 6, lock(backwards, 0)), Some(Err(Errno::EINVAL)));
}

#[test]
fn locks_outlive_a_restart_and_nothing_is_granted_before_all_are_declared() {
    let mut w = World::new();
    let (a, b) = (w.session, w.attach());
    let mine = file_lock(1, 0, 9, true);
    assert_eq!(ask(&mut w, b, 1, lock(mine, 0)), GRANTED);
    w.restart();
    attach_with(&mut w, a, vec![]);
    let theirs = file_lock(1, 5, 5, true);
    assert_eq!(ask(&mut w, a, 1, lock(theirs, 0)), None, "b may hold it");
    assert_eq!(ask(&mut w, a, 2, lock(theirs, 3)), None);
    assert_eq!(ask(&mut w, a, 3, Op::CancelLock(meta::CancelLock { wait: 3 })), GRANTED);
    assert_eq!(ask(&mut w, a, 4, unlock(theirs)), GRANTED);
    w.core.take_ended_recalls();
    attach_with(&mut w, b, vec![mine]);
    assert_eq!(w.core.take_ended_recalls(), [RecallId::GRACE, RecallId::LOCKS]);
    assert_eq!(ask(&mut w, a, 1, lock(theirs, 0)), Some(Err(Errno::EAGAIN)));
    assert_eq!(ask(&mut w, a, 2, lock(theirs, 3)), Some(Err(Errno::EINTR)), "given up meanwhile");
    assert_eq!(ask(&mut w, a, 5, lock(theirs, 3)), None, "that was another request");
    assert_eq!(ask(&mut w, b, 2, unlock(mine)), GRANTED);
    assert_eq!(answers(&mut w), [(a, 5, Ok(()))]);
}

#[test]
fn a_client_that_does_not_come_back_loses_its_locks() {
    let mut w = World::new();
    let (a, b) = (w.session, w.attach());
    let all = file_lock(1, 0, u64::MAX, true);
    assert_eq!(ask(&mut w, b, 1, lock(all, 0)), GRANTED);
    assert_eq!(ask(&mut w, a, 1, lock(all, 1)), None);
    w.core.detach(b, w.now);
    w.idle(Duration::from_secs(29));
    assert_eq!(answers(&mut w), []);
    w.idle(Duration::from_secs(3));
    assert_eq!(answers(&mut w), [(a, 1, Ok(()))]);
    // And after a restart.
    let c = w.attach();
    w.restart();
    attach_with(&mut w, a, vec![all]);
    assert_eq!(ask(&mut w, a, 2, lock(file_lock(2, 0, 0, true), 0)), None);
    w.idle(Duration::from_secs(32));
    assert!(w.core.take_ended_recalls().contains(&RecallId::LOCKS), "{c} is over");
    assert_eq!(ask(&mut w, a, 2, lock(file_lock(2, 0, 0, true), 0)), Some(Err(Errno::EAGAIN)));
    w.core.goodbye(a, w.now);
    w.session = w.attach();
    let d = w.session;
    assert_eq!(ask(&mut w, d, 1, lock(all, 0)), GRANTED);
}

#[test]
fn what_a_client_was_not_told_it_does_not_have() {
    let mut w = World::new();
    let (a, b) = (w.session, w.attach());
    let all = file_lock(1, 0, u64::MAX, true);
    assert_eq!(ask(&mut w, a, 1, lock(all, 0)), GRANTED);
    assert_eq!(ask(&mut w, b, 1, lock(all, 1)), None);
    assert_eq!(ask(&mut w, b, 2, lock(file_lock(1, 0, 0, true), 2)), None);
    // The stream breaks before b hears anything; a gives its lock up meanwhile.
    w.core.detach(b, w.now);
    assert_eq!(ask(&mut w, a, 2, unlock(all)), GRANTED);
    assert_eq!(answers(&mut w), [], "nobody is granted what it will ask for again");
    attach_with(&mut w, b, vec![]);
    assert_eq!(ask(&mut w, b, 1, lock(all, 1)), GRANTED);
    // It hears of that, gives up a part, and is cut off again: the part is not its any more, whatever came of the request.
    attach_with(&mut w, b, vec![file_lock(1, 1, u64::MAX, true)]);
    assert_eq!(ask(&mut w, a, 3, lock(file_lock(1, 0, 1, true), 0)), Some(Err(Errno::EAGAIN)));
    assert_eq!(ask(&mut w, a, 4, lock(file_lock(1, 0, 0, true), 0)), GRANTED);
}
