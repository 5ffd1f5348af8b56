//! Against an oracle that keeps who holds each single byte, and the rules one by one.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const BYTES: u64 = 8;

fn owner(session: u64, flock: bool, id: u64) -> Owner {
    Owner { session: SessionId(session), flock, id }
}

fn lock(ino: u64, owner: Owner, start: u64, end: u64, write: bool) -> Lock {
    Lock { ino: InodeId(ino), owner, span: Span { start, end }, write, pid: 7 }
}

const A: Owner = Owner { session: SessionId(1), flock: false, id: 1 };
const B: Owner = Owner { session: SessionId(2), flock: false, id: 1 };
const C: Owner = Owner { session: SessionId(2), flock: false, id: 2 };

const R: bool = false;
const W: bool = true;

fn wait(number: u64) -> Option<Wait> {
    Some(Wait { number, request: number + 100 })
}

fn granted(session: u64, number: u64) -> Ended {
    Ended { session: SessionId(session), request: number + 100, result: Ok(()) }
}

fn spans(locks: &Locks, ino: u64, owner: Owner) -> Vec<(u64, u64, bool)> {
    let held = locks.files.get(&(InodeId(ino), owner.flock)).into_iter().flat_map(|file| &file.held);
    let mut spans: Vec<_> = held
        .filter(|held| held.owner == owner)
        .map(|held| (held.span.start, held.span.end, held.write))
        .collect();
    spans.sort_unstable();
    spans
}

#[test]
fn ranges_are_cut_replaced_and_joined() {
    let mut locks = Locks::default();
    let mut take = |start, end, write| locks.lock(lock(1, A, start, end, write), None).unwrap();
    take(0, 9, W);
    take(10, u64::MAX, W);
    take(3, 5, R);
    assert_eq!(spans(&locks, 1, A), [(0, 2, W), (3, 5, R), (6, u64::MAX, W)]);
    locks.unlock(InodeId(1), A, Span { start: 8, end: 8 });
    locks.lock(lock(1, A, 3, 5, W), None).unwrap();
    assert_eq!(spans(&locks, 1, A), [(0, 7, W), (9, u64::MAX, W)]);
    assert_eq!(locks.ranges(A.session), 2);
    locks.unlock(InodeId(1), A, Span { start: 0, end: u64::MAX });
    assert_eq!(locks.ranges(A.session), 0);
    assert!(locks.files.is_empty() && locks.owners.is_empty() && locks.sessions.is_empty());
}

#[test]
fn readers_that_come_later_do_not_overtake_a_writer() {
    let mut locks = Locks::default();
    locks.lock(lock(1, A, 0, 0, R), None).unwrap();
    assert_eq!(locks.lock(lock(1, B, 0, 0, W), wait(1)), Ok(Taken::Waits));
    assert_eq!(locks.lock(lock(1, C, 0, 0, R), wait(2)), Ok(Taken::Waits));
    // Who does not wait is refused only for what is held.
    let d = owner(3, false, 1);
    assert_eq!(locks.lock(lock(1, d, 0, 0, R), None), Ok(Taken::Granted));
    locks.unlock(InodeId(1), d, Span { start: 0, end: 0 });
    locks.unlock(InodeId(1), A, Span { start: 0, end: 0 });
    assert_eq!(locks.take_ended(), [granted(2, 1)]);
    locks.unlock(InodeId(1), B, Span { start: 0, end: 0 });
    assert_eq!(locks.take_ended(), [granted(2, 2)]);
}

#[test]
fn a_holder_passes_those_who_may_be_waiting_for_it() {
    let mut locks = Locks::default();
    locks.lock(lock(1, A, 0, 0, R), None).unwrap();
    locks.lock(lock(1, B, 0, 1, W), wait(1)).unwrap();
    assert_eq!(locks.lock(lock(1, A, 1, 1, R), wait(2)), Ok(Taken::Granted), "in line it would never end");
}

#[test]
fn waiting_for_oneself_is_refused() {
    let mut locks = Locks::default();
    locks.lock(lock(1, A, 0, 0, W), None).unwrap();
    locks.lock(lock(2, B, 0, 0, W), None).unwrap();
    locks.lock(lock(3, C, 0, 0, W), None).unwrap();
    assert_eq!(locks.lock(lock(2, A, 0, 0, W), wait(1)), Ok(Taken::Waits));
    assert_eq!(locks.lock(lock(3, B, 0, 0, W), wait(2)), Ok(Taken::Waits));
    assert_eq!(locks.lock(lock(1, C, 0, 0, R), wait(3)), Err(Denied::Deadlock));
    assert_eq!(locks.lock(lock(1, C, 0, 0, R), None), Err(Denied::Conflict));
    // Two that share a lock and both want it alone.
    let (d, e) = (owner(3, false, 1), owner(4, false, 1));
    locks.lock(lock(4, d, 0, 0, R), None).unwrap();
    locks.lock(lock(4, e, 0, 0, R), None).unwrap();
    assert_eq!(locks.lock(lock(4, d, 0, 0, W), wait(4)), Ok(Taken::Waits));
    assert_eq!(locks.lock(lock(4, e, 0, 0, W), wait(5)), Err(Denied::Deadlock));
    // Open files are no processes: Linux lets them wait.
    let (f, g) = (owner(1, true, 5), owner(2, true, 6));
    locks.lock(lock(5, f, 0, u64::MAX, W), None).unwrap();
    locks.lock(lock(6, g, 0, u64::MAX, W), None).unwrap();
    locks.lock(lock(6, f, 0, u64::MAX, W), wait(6)).unwrap();
    assert_eq!(locks.lock(lock(5, g, 0, u64::MAX, W), wait(7)), Ok(Taken::Waits));
}

#[test]
fn a_flock_that_changes_its_kind_is_given_up_first() {
    let mut locks = Locks::default();
    let (f, g) = (owner(1, true, 5), owner(2, true, 6));
    locks.lock(lock(1, f, 0, u64::MAX, R), None).unwrap();
    locks.lock(lock(1, g, 0, u64::MAX, R), None).unwrap();
    assert_eq!(locks.lock(lock(1, f, 0, u64::MAX, W), None), Err(Denied::Conflict));
    assert_eq!(spans(&locks, 1, f), [], "as on a local filesystem");
    assert_eq!(locks.lock(lock(1, A, 0, u64::MAX, W), None), Ok(Taken::Granted), "fcntl is another world");
}

#[test]
fn what_is_cancelled_is_not_granted() {
    let mut locks = Locks::default();
    locks.lock(lock(1, A, 0, 5, W), None).unwrap();
    locks.lock(lock(1, B, 0, 3, W), wait(1)).unwrap();
    locks.lock(lock(1, C, 0, 3, R), wait(2)).unwrap();
    assert_eq!(locks.cancel(C.session, 9), None);
    assert_eq!(locks.cancel(A.session, 1), None, "another session's");
    assert_eq!(locks.cancel(B.session, 1), Some(()));
    assert_eq!(locks.take_ended()[0].result, Err(Denied::Cancelled));
    locks.unlock(InodeId(1), A, Span { start: 0, end: 5 });
    assert_eq!(locks.take_ended(), [granted(2, 2)]);
    assert_eq!(locks.cancel(C.session, 2), None, "granted already");
}

#[test]
fn a_declaration_is_all_that_a_session_holds() {
    let mut locks = Locks::default();
    locks.lock(lock(1, A, 0, 9, W), None).unwrap();
    locks.lock(lock(1, B, 5, 5, W), wait(1)).unwrap();
    locks.lock(lock(2, C, 0, 0, W), None).unwrap();
    locks.lock(lock(2, A, 0, 0, W), wait(2)).unwrap();
    let theirs = lock(2, A, 0, 0, R);
    assert_eq!(locks.declare(A.session, vec![lock(1, A, 0, 3, R), theirs]), [theirs]);
    assert_eq!(spans(&locks, 1, A), [(0, 3, R)]);
    assert_eq!(locks.take_ended(), [granted(2, 1)]);
    assert_eq!((locks.waits(A.session), locks.ranges(A.session), locks.ranges(B.session)), (0, 1, 2));
    locks.end(A.session);
    locks.end(B.session);
    assert!(locks.files.is_empty() && locks.owners.is_empty() && locks.sessions.is_empty());
}

#[test]
fn one_session_cannot_take_all_memory() {
    let mut locks = Locks::default();
    locks.sessions.entry(A.session).or_default().insert((InodeId(9), false), RANGES_MAX);
    assert_eq!(locks.lock(lock(1, A, 0, 0, W), None), Err(Denied::TooMany));
    assert_eq!(locks.lock(lock(1, B, 0, 0, W), None), Ok(Taken::Granted));
}

/// Who holds each byte, and everybody who waits, in the order in which they came.
#[derive(Default)]
struct Oracle {
    bytes: BTreeMap<(FileKey, u64, Owner), bool>,
    waiting: Vec<(Wait, Lock)>,
    ended: Vec<Ended>,
}

impl Oracle {
    /// Who is in the way.
    fn blockers(&self, lock: &Lock) -> Vec<Owner> {
        let in_way = |((key, byte, holder), write): (&(FileKey, u64, Owner), &bool)| {
            let conflicts = *key == lock.file()
                && (lock.span.start..=lock.span.end).contains(byte)
                && *holder != lock.owner
                && (*write || lock.write);
            conflicts.then_some(*holder)
        };
        self.bytes.iter().filter_map(in_way).collect()
    }

    fn may_pass(&self, lock: &Lock, before: &[(Wait, Lock)]) -> bool {
        let holds = self.bytes.keys().any(|(.., holder)| *holder == lock.owner);
        let in_way = |earlier: &Lock| earlier.file() == lock.file() && earlier.conflicts(lock);
        holds || !before.iter().any(|(_, earlier)| in_way(earlier))
    }

    /// Whether its owner would wait for whom that owner waits for, and so on, up to itself.
    fn waits_for_itself(&self, lock: &Lock) -> bool {
        let mut all: BTreeSet<Owner> = self.blockers(lock).into_iter().collect();
        loop {
            let waiting = self.waiting.iter().filter(|(_, waiting)| all.contains(&waiting.owner));
            let more: Vec<Owner> = waiting.flat_map(|(_, waiting)| self.blockers(waiting)).collect();
            let before = all.len();
            all.extend(more);
            if all.len() == before {
                return !lock.owner.flock && all.contains(&lock.owner);
            }
        }
    }

    fn set(&mut self, key: FileKey, owner: Owner, span: Span, write: Option<bool>) {
        for byte in span.start..=span.end {
            match write {
                Some(write) => self.bytes.insert((key, byte, owner), write),
                None => self.bytes.remove(&(key, byte, owner)),
            };
        }
    }

    fn grant(&mut self, lock: Lock) {
        self.set(lock.file(), lock.owner, lock.span, Some(lock.write));
        if !self.waiting.iter().any(|(_, waiting)| waiting.owner == lock.owner) {
            return;
        }
        let mut at = 0;
        while let Some((wait, waiting)) = self.waiting.get(at).copied() {
            if waiting.file() == lock.file() && waiting.conflicts(&lock) && self.waits_for_itself(&waiting) {
                self.end(at, wait, waiting, Err(Denied::Deadlock));
            } else {
                at += 1;
            }
        }
    }

    fn end(&mut self, at: usize, wait: Wait, lock: Lock, result: Result<(), Denied>) {
        self.waiting.remove(at);
        self.ended.push(Ended { session: lock.owner.session, request: wait.request, result });
    }

    fn grantable(&self) -> Vec<usize> {
        let can = |at: &usize| {
            let lock = &self.waiting[*at].1;
            self.blockers(lock).is_empty() && self.may_pass(lock, &self.waiting[..*at])
        };
        (0..self.waiting.len()).filter(can).collect()
    }

    /// File by file, in each the first in line first: for one who waits in several, that order makes a difference.
    fn settle(&mut self) {
        while let Some(key) = self.grantable().into_iter().map(|at| self.waiting[at].1.file()).min() {
            let here = |oracle: &Oracle| {
                oracle.grantable().into_iter().find(|at| oracle.waiting[*at].1.file() == key)
            };
            while let Some(at) = here(self) {
                let (wait, lock) = self.waiting[at];
                self.end(at, wait, lock, Ok(()));
                self.grant(lock);
            }
        }
    }

    fn lock(&mut self, lock: Lock, wait: Option<Wait>) -> Result<Taken, Denied> {
        let own = |(key, _, holder): &(FileKey, u64, Owner)| *key == lock.file() && *holder == lock.owner;
        if lock.owner.flock && self.bytes.iter().any(|(at, write)| own(at) && *write != lock.write) {
            self.set(lock.file(), lock.owner, lock.span, None);
            self.settle();
        }
        let is_free = self.blockers(&lock).is_empty();
        if is_free && (wait.is_none() || self.may_pass(&lock, &self.waiting)) {
            self.grant(lock);
            self.settle();
            return Ok(Taken::Granted);
        }
        let Some(wait) = wait else { return Err(Denied::Conflict) };
        if self.waits_for_itself(&lock) {
            return Err(Denied::Deadlock);
        }
        self.waiting.push((wait, lock));
        Ok(Taken::Waits)
    }
}

#[derive(Clone, Debug)]
enum Step {
    Lock(Lock, bool),
    Unlock(Lock),
    Cancel(usize),
    EndWaits(u64),
    End(u64),
}

fn any_lock() -> impl Strategy<Value = Lock> {
    let posix = (1u64..4, 1u64..3, 1u64..3, 0..BYTES, 0..BYTES, any::<bool>()).prop_map(
        |(session, id, ino, one, other, write)| {
            lock(ino, owner(session, false, id), one.min(other), one.max(other), write)
        },
    );
    let flock = (1u64..4, 1u64..3, 1u64..3, any::<bool>())
        .prop_map(|(session, id, ino, write)| lock(ino, owner(session, true, id), 0, BYTES - 1, write));
    prop_oneof![4 => posix, 1 => flock]
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => (any_lock(), any::<bool>()).prop_map(|(lock, wait)| Step::Lock(lock, wait)),
        6 => any_lock().prop_map(Step::Unlock),
        2 => (0usize..8).prop_map(Step::Cancel),
        1 => (1u64..4).prop_map(Step::EndWaits),
        1 => (1u64..4).prop_map(Step::End),
    ]
}

fn sorted(mut ended: Vec<Ended>) -> Vec<Ended> {
    ended.sort_by_key(|ended| ended.request);
    ended
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_table_is_what_its_bytes_say(steps in prop::collection::vec(any_step(), 1..60)) {
        let (mut locks, mut oracle) = (Locks::default(), Oracle::default());
        for (at, step) in steps.into_iter().enumerate() {
            match step {
                Step::Lock(lock, waits) => {
                    let wait = wait(at as u64).filter(|_| waits);
                    prop_assert_eq!(locks.lock(lock, wait), oracle.lock(lock, wait), "step {}", at);
                }
                Step::Unlock(lock) => {
                    locks.unlock(lock.ino, lock.owner, lock.span);
                    oracle.set(lock.file(), lock.owner, lock.span, None);
                }
                Step::Cancel(nth) => {
                    let Some((wait, lock)) = oracle.waiting.get(nth).copied() else { continue };
                    oracle.end(nth, wait, lock, Err(Denied::Cancelled));
                    prop_assert_eq!(locks.cancel(lock.owner.session, wait.number), Some(()));
                }
                Step::EndWaits(session) => {
                    locks.end_waits(SessionId(session));
                    oracle.waiting.retain(|(_, lock)| lock.owner.session.0 != session);
                }
                Step::End(session) => {
                    locks.end(SessionId(session));
                    oracle.waiting.retain(|(_, lock)| lock.owner.session.0 != session);
                    oracle.bytes.retain(|(.., holder), _| holder.session.0 != session);
                }
            }
            oracle.settle();
            prop_assert_eq!(sorted(locks.take_ended()), sorted(std::mem::take(&mut oracle.ended)), "step {}", at);
            let mut bytes = BTreeMap::new();
            for (key, file) in &locks.files {
                prop_assert!(!file.held.is_empty() || !file.waiting.is_empty());
                for held in &file.held {
                    for byte in held.span.start..=held.span.end {
                        prop_assert_eq!(bytes.insert((*key, byte, held.owner), held.write), None);
                    }
                }
            }
            prop_assert_eq!(&bytes, &oracle.bytes, "step {}", at);
            for session in 1..4 {
                let waits = oracle.waiting.iter().filter(|(_, lock)| lock.owner.session.0 == session).count();
                prop_assert_eq!(locks.waits(SessionId(session)), waits);
            }
        }
    }
}
