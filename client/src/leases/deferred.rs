//! Operations that nobody waits for, until they are sent.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use fjordfs_proto::pb::meta::request::Op;

/// How long what was decided here may wait before it is sent. Whoever asks the server meanwhile has it sent at once.
pub(super) const DEFERRED_MAX: Duration = Duration::from_millis(750);

/// How long other operations that nobody waits for may wait to travel with the next request.
const QUIET_MAX: Duration = Duration::from_millis(20);

/// So many operations are sent at once.
const SENT_FROM: usize = 4096;

/// Decided operations that may be unanswered; beyond, callers ask the server, and so wait for it. A few hundred bytes each.
const UNANSWERED_MAX: usize = 1 << 15;

/// An operation that nobody waits for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Unasked {
    pub(crate) op: Op,
    /// It was decided here, and reported as done.
    pub(crate) decided: bool,
    /// The request of the kernel that it was decided for, or 0.
    pub(crate) request: u64,
}

impl Unasked {
    /// Something of less moment.
    pub(super) fn undecided(op: Op) -> Unasked {
        Unasked { op, decided: false, request: 0 }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Deferred {
    operations: VecDeque<Unasked>,
    /// Where in `operations` the last access of an inode is, unless its times were set since.
    accessed: HashMap<u64, usize>,
    due: Option<Instant>,
    /// Decided operations that are queued or unanswered.
    unanswered: usize,
}

impl Deferred {
    /// Adds an operation; says whether [`Deferred::due`] has changed.
    pub(super) fn push(&mut self, operation: Unasked) -> bool {
        let Unasked { op, decided, .. } = &operation;
        let decided = *decided;
        match op {
            Op::Accessed(access) => {
                let queued = self.accessed.get(&access.ino).and_then(|at| self.operations.get_mut(*at));
                if let Some(Unasked { op: Op::Accessed(queued), .. }) = queued {
                    queued.time = access.time;
                    return false;
                }
                self.accessed.insert(access.ino, self.operations.len());
            }
            Op::SetAttr(set) => {
                self.accessed.remove(&set.ino);
            }
            _ => {}
        }
        let may_wait = decided || matches!(op, Op::Accessed(_));
        self.operations.push_back(operation);
        self.unanswered += usize::from(decided);
        let wait = match self.operations.len() {
            SENT_FROM.. => Duration::ZERO,
            _ if may_wait => DEFERRED_MAX,
            // Behind something that was decided, it can wait as well.
            _ if self.unanswered > 0 => DEFERRED_MAX,
            _ => QUIET_MAX,
        };
        let due = Instant::now() + wait;
        let sooner = self.due.is_none_or(|current| due < current);
        if sooner {
            self.due = Some(due);
        }
        sooner
    }

    pub(super) fn is_full(&self) -> bool {
        self.unanswered >= UNANSWERED_MAX
    }

    /// Decided operations that are queued or unanswered.
    pub(super) fn unanswered(&self) -> usize {
        self.unanswered
    }

    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    pub(super) fn take(&mut self) -> impl Iterator<Item = Unasked> + use<> {
        self.due = None;
        self.accessed.clear();
        std::mem::take(&mut self.operations).into_iter()
    }

    /// A decided operation was answered, or will never be.
    pub(super) fn answered(&mut self) {
        self.unanswered = self.unanswered.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use fjordfs_proto::pb::meta::{Accessed, Close, Make, SetAttr, Time};

    use super::*;

    fn close() -> Unasked {
        Unasked::undecided(Op::Close(Close { handle: 1 }))
    }

    fn make() -> Unasked {
        Unasked { op: Op::Make(Make::default()), decided: true, request: 0 }
    }

    #[test]
    fn what_was_decided_waits_longer_than_the_rest_and_many_do_not_wait() {
        let mut deferred = Deferred::default();
        assert!(deferred.push(make()));
        let due = deferred.due().unwrap();
        assert!(!deferred.push(close()) && deferred.due() == Some(due), "behind the other");
        assert_eq!(deferred.take().map(|operation| operation.decided).collect::<Vec<_>>(), [true, false]);
        assert_eq!(deferred.due(), None);
        deferred.answered();
        deferred.push(close());
        assert!(deferred.due().unwrap() < due);
        for _ in 0..SENT_FROM {
            deferred.push(make());
        }
        assert!(deferred.due().unwrap() <= Instant::now());
    }

    #[test]
    fn accesses_of_an_inode_are_one_unless_its_times_were_set_between() {
        let access = |ino, sec, before| {
            let time = |sec| Some(Time { sec, nsec: 0 });
            Op::Accessed(Accessed { ino, time: time(sec), before: time(before) })
        };
        let set = Op::SetAttr(SetAttr { ino: 1, ..SetAttr::default() });
        let mut deferred = Deferred::default();
        for op in [access(1, 10, 1), access(2, 11, 1), access(1, 12, 10), set.clone(), access(1, 13, 5)] {
            deferred.push(Unasked::undecided(op));
        }
        let taken: Vec<Op> = deferred.take().map(|operation| operation.op).collect();
        assert_eq!(taken, [access(1, 12, 1), access(2, 11, 1), set, access(1, 13, 5)]);
        deferred.push(Unasked::undecided(access(1, 14, 13)));
        assert_eq!(deferred.take().count(), 1);
    }

    #[test]
    fn callers_ask_once_too_much_is_unanswered() {
        let mut deferred = Deferred::default();
        for _ in 0..UNANSWERED_MAX {
            assert!(!deferred.is_full());
            deferred.push(make());
        }
        assert!(deferred.is_full());
        let _ = deferred.take();
        assert!(deferred.is_full(), "sent is not answered");
        deferred.answered();
        assert!(!deferred.is_full());
    }
}
