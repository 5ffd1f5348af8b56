//! Locks that this client's programs hold, as far as the metaserver has told.
//!
//! The metaserver keeps locks in memory only. This is what it is told when the session attaches anew: all that was granted, less
//! what has been given up, even when nobody has answered that yet; the requests without an answer follow.
//!
//! # Order
//! The driver of the session's stream shows every answer before its caller gets it, and the answers come in the order in which
//! they took effect. So what is still unanswered when a lock is granted took effect after it, or will.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use fjordfs_proto::{
    FsResult, InodeId,
    pb::meta::{FileLock, request::Op, response::Result as Reply},
};
use parking_lot::Mutex;

use crate::handover::Handover;

/// Whose locks, on what: the inode, flock or not, and the owner's number.
type Key = (u64, bool, u64);

fn key(lock: &FileLock) -> Key {
    (lock.ino, lock.flock, lock.owner)
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Locks {
    state: Mutex<State>,
    wait_next: AtomicU64,
    handover: Option<Arc<Handover>>,
}

#[derive(Debug, Default)]
struct State {
    held: HashMap<Key, Vec<FileLock>>,
    /// Asked for and given up, without an answer.
    asked: Vec<FileLock>,
    given_up: Vec<FileLock>,
}

impl Locks {
    /// Those that a former process has left are held from the start.
    pub(crate) fn new(handover: Option<Arc<Handover>>) -> Locks {
        let legacy = handover.as_ref().and_then(|handover| handover.legacy());
        let mut state = State::default();
        for lock in legacy.into_iter().flat_map(|legacy| &legacy.locks) {
            state.held.entry(key(lock)).or_default().push(*lock);
        }
        let wait_next = handover.as_ref().map_or(1, |handover| handover.first_number());
        Locks { state: Mutex::new(state), wait_next: AtomicU64::new(wait_next), handover }
    }

    /// What an owner holds now is left to a successor.
    fn leave(&self, state: &State, key: Key) {
        if let Some(handover) = &self.handover {
            let (ino, flock, owner) = key;
            handover.locked(ino, flock, owner, state.held.get(&key).map_or(&[], Vec::as_slice));
        }
    }

    /// A number for a wait, by which it can be cancelled.
    pub(crate) fn new_wait(&self) -> u64 {
        self.wait_next.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether an owner may hold any lock on an inode.
    pub(crate) fn may_hold(&self, ino: InodeId, flock: bool, owner: u64) -> bool {
        let state = self.state.lock();
        let is_its = |lock: &FileLock| key(lock) == (ino.0, flock, owner);
        state.held.contains_key(&(ino.0, flock, owner)) || state.asked.iter().any(is_its)
    }

    /// Whether any owner may hold a `flock` on an inode.
    pub(crate) fn has_flock(&self, ino: InodeId) -> bool {
        let state = self.state.lock();
        state.held.keys().any(|key| (key.0, key.1) == (ino.0, true))
    }

    /// Owners of locks other than those of `flock`.
    pub(crate) fn owners(&self) -> Vec<(InodeId, u64)> {
        let state = self.state.lock();
        state.held.keys().filter(|key| !key.1).map(|&(ino, _, owner)| (InodeId(ino), owner)).collect()
    }

    /// An operation is about to be sent.
    pub(crate) fn sent(&self, op: &Op) {
        let mut state = self.state.lock();
        match op {
            Op::Lock(op) => {
                let Some(lock) = op.lock else { return };
                state.asked.push(lock);
                // A flock that changes its kind is given up first, and may be lost.
                let held = state.held.get(&key(&lock)).into_iter().flatten();
                if lock.flock && held.clone().any(|held| held.write != lock.write) {
                    state.held.remove(&key(&lock));
                    self.leave(&state, key(&lock));
                }
            }
            Op::Unlock(op) => {
                let Some(lock) = op.lock else { return };
                state.given_up.push(lock);
                state.cut(&lock);
                self.leave(&state, key(&lock));
            }
            _ => {}
        }
    }

    /// An operation is answered, or never will be.
    pub(crate) fn answered(&self, op: &Op, result: &FsResult<Reply>) {
        let mut state = self.state.lock();
        match op {
            Op::Lock(op) => {
                let Some(lock) = op.lock else { return };
                forget(&mut state.asked, &lock);
                if result.is_ok() {
                    state.cut(&lock);
                    state.held.entry(key(&lock)).or_default().push(lock);
                    let later: Vec<FileLock> =
                        state.given_up.iter().filter(|up| key(up) == key(&lock)).copied().collect();
                    later.iter().for_each(|up| state.cut(up));
                    self.leave(&state, key(&lock));
                }
            }
            Op::Unlock(op) => {
                if let Some(lock) = op.lock {
                    forget(&mut state.given_up, &lock);
                }
            }
            _ => {}
        }
    }

    /// What the session declares when it attaches.
    pub(crate) fn declared(&self) -> Vec<FileLock> {
        let state = self.state.lock();
        let mut locks: Vec<FileLock> = state.held.values().flatten().copied().collect();
        // Whoever wants less than it has may have been given it already, and others the rest.
        for asked in state.asked.iter().filter(|asked| !asked.write) {
            let weaker: Vec<FileLock> = locks
                .extract_if(.., |held| held.write && key(held) == key(asked) && overlap(held, asked))
                .flat_map(|held| {
                    let both = FileLock {
                        start: held.start.max(asked.start),
                        end: held.end.min(asked.end),
                        write: false,
                        ..held
                    };
                    without(&held, asked).chain([both])
                })
                .collect();
            locks.extend(weaker);
        }
        locks
    }

    /// The session is over, and with it everything it held. On which inodes that was.
    pub(crate) fn lost(&self) -> Vec<InodeId> {
        let mut state = self.state.lock();
        let held = std::mem::take(&mut state.held);
        held.keys().for_each(|key| self.leave(&state, *key));
        let inodes: BTreeSet<u64> = held.keys().map(|key| key.0).collect();
        inodes.into_iter().map(InodeId).collect()
    }
}

impl State {
    /// The owner has nothing in this range any more.
    fn cut(&mut self, span: &FileLock) {
        let Some(held) = self.held.get_mut(&key(span)) else { return };
        let parts: Vec<FileLock> =
            held.extract_if(.., |held| overlap(held, span)).flat_map(|held| without(&held, span)).collect();
        held.extend(parts);
        if held.is_empty() {
            self.held.remove(&key(span));
        }
    }
}

fn overlap(one: &FileLock, other: &FileLock) -> bool {
    one.start <= other.end && other.start <= one.end
}

/// What is left of a lock beside a range that overlaps it.
fn without(lock: &FileLock, span: &FileLock) -> impl Iterator<Item = FileLock> + use<> {
    let before = (lock.start < span.start).then(|| FileLock { end: span.start - 1, ..*lock });
    let behind = (lock.end > span.end).then(|| FileLock { start: span.end + 1, ..*lock });
    before.into_iter().chain(behind)
}

fn forget(list: &mut Vec<FileLock>, lock: &FileLock) {
    if let Some(at) = list.iter().position(|listed| listed == lock) {
        list.swap_remove(at);
    }
}

#[cfg(test)]
mod tests {
    use fjordfs_proto::{
        FsError,
        error::Errno,
        pb::meta::{Lock, LockReply, Unlock},
    };

    use super::*;

    fn file_lock(start: u64, end: u64, write: bool) -> FileLock {
        FileLock { ino: 1, owner: 2, flock: false, start, end, write, pid: 3 }
    }

    fn lock(lock: FileLock) -> Op {
        Op::Lock(Lock { lock: Some(lock), wait: 0 })
    }

    fn unlock(lock: FileLock) -> Op {
        Op::Unlock(Unlock { lock: Some(lock) })
    }

    fn granted() -> FsResult<Reply> {
        Ok(Reply::Lock(LockReply::default()))
    }

    fn refused() -> FsResult<Reply> {
        Err(FsError::new(Errno::EAGAIN, "held"))
    }

    fn declared(locks: &Locks) -> Vec<(u64, u64, bool)> {
        let mut declared: Vec<_> = locks.declared().iter().map(|l| (l.start, l.end, l.write)).collect();
        declared.sort_unstable();
        declared
    }

    fn take(locks: &Locks, what: FileLock) {
        locks.sent(&lock(what));
        locks.answered(&lock(what), &granted());
    }

    #[test]
    fn what_was_granted_is_declared_and_what_was_given_up_is_not() {
        let locks = Locks::new(None);
        let all = file_lock(0, u64::MAX, true);
        locks.sent(&lock(all));
        assert_eq!(declared(&locks), []);
        assert!(locks.may_hold(InodeId(1), false, 2));
        locks.answered(&lock(all), &granted());
        assert_eq!(declared(&locks), [(0, u64::MAX, true)]);
        locks.sent(&unlock(file_lock(4, 7, false)));
        assert_eq!(declared(&locks), [(0, 3, true), (8, u64::MAX, true)], "though nobody has answered");
        locks.answered(&unlock(file_lock(4, 7, false)), &granted());
        locks.sent(&lock(file_lock(5, 5, true)));
        locks.answered(&lock(file_lock(5, 5, true)), &refused());
        assert_eq!(declared(&locks), [(0, 3, true), (8, u64::MAX, true)]);
        assert_eq!(locks.lost(), [InodeId(1)]);
        assert!(!locks.may_hold(InodeId(1), false, 2));
    }

    #[test]
    fn a_lock_that_is_given_up_before_it_is_granted_is_not_kept() {
        let locks = Locks::new(None);
        let (all, part) = (file_lock(0, 9, true), file_lock(5, 9, false));
        locks.sent(&lock(all));
        locks.sent(&unlock(part));
        locks.answered(&lock(all), &granted());
        assert_eq!(declared(&locks), [(0, 4, true)]);
        locks.answered(&unlock(part), &granted());
        assert_eq!(declared(&locks), [(0, 4, true)]);
        // Answered before: it took effect before.
        locks.sent(&unlock(part));
        locks.answered(&unlock(part), &granted());
        take(&locks, all);
        assert_eq!(declared(&locks), [(0, 9, true)]);
    }

    #[test]
    fn who_asks_for_less_declares_less() {
        let locks = Locks::new(None);
        take(&locks, file_lock(0, 9, true));
        locks.sent(&lock(file_lock(3, 20, false)));
        assert_eq!(declared(&locks), [(0, 2, true), (3, 9, false)]);
        locks.answered(&lock(file_lock(3, 20, false)), &refused());
        assert_eq!(declared(&locks), [(0, 9, true)]);
    }

    #[test]
    fn a_successor_holds_what_was_held() {
        let memory = Handover::memory().unwrap();
        let take_over = || Some(Arc::new(Handover::take_over(memory.try_clone().unwrap()).unwrap()));
        let handover = take_over();
        handover.as_ref().unwrap().set_session(fjordfs_proto::SessionId(1), "");
        let locks = Locks::new(handover);
        take(&locks, file_lock(0, 9, true));
        take(&locks, file_lock(3, 4, false));
        locks.sent(&unlock(file_lock(8, 9, false)));
        locks.sent(&lock(file_lock(20, 29, true)));
        let next = Locks::new(take_over());
        assert_eq!(declared(&next), [(0, 2, true), (3, 4, false), (5, 7, true)]);
        assert!(next.may_hold(InodeId(1), false, 2));
        locks.lost();
        assert_eq!(declared(&Locks::new(take_over())), []);
    }

    #[test]
    fn a_flock_that_changes_its_kind_is_not_held_meanwhile() {
        let locks = Locks::new(None);
        let flock = |write| FileLock { flock: true, ..file_lock(0, u64::MAX, write) };
        take(&locks, flock(false));
        locks.sent(&lock(flock(false)));
        assert_eq!(declared(&locks).len(), 1);
        locks.sent(&lock(flock(true)));
        assert_eq!(declared(&locks), []);
        locks.answered(&lock(flock(true)), &refused());
        assert_eq!(declared(&locks), []);
    }
}
