//! Advisory locks of all sessions: byte ranges of `fcntl(2)` and whole files of `flock(2)`, who holds them and who waits.
//! A pure table: no I/O, no clock.
//!
//! # Rules
//! - Two locks conflict when they belong to different owners, overlap, and one of them is a write lock. `fcntl` and `flock`
//!   locks of a file know nothing of each other.
//! - An owner's newer lock replaces what it had in that range: parts are cut, and joined where they agree. A `flock` that
//!   changes its kind is given up first and then asked for anew, as Linux does; an `fcntl` lock is kept until the new one is granted.
//! - Who asks without waiting is refused only for what others hold. Who waits gets in line: the first that can have its lock
//!   gets it. Who holds no lock at all does not overtake an earlier one that it conflicts with, so no stream of readers starves
//!   a writer; who holds some may, because others can be waiting for it.
//! - Waiting for an `fcntl` lock is refused when its owner would wait for itself, however many files that goes over.
//!
//! # Why in memory only
//! A lock that the disk has to remember costs a write each time, and still a power failure would lose the last ones while their
//! holders live on. The clients know what they hold. Each declares it when it attaches, and then sends again what was not
//! answered: its declaration stands for everything that it has been told, and nothing else. A lock that was granted to it
//! unheard is free again until the repeated request takes it. After a start, nobody is granted anything until every session of
//! before has declared its locks or is over ([`crate::core`]).

use std::collections::{BTreeSet, HashMap, HashSet};

use fjordfs_proto::{InodeId, SessionId};

#[cfg(test)]
mod tests;

/// Most ranges that one session holds and waits for: some 10 MiB here.
const RANGES_MAX: usize = 1 << 17;

/// Who a lock belongs to: for `fcntl` a process or an open file, for `flock` an open file, as its client numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Owner {
    pub(crate) session: SessionId,
    pub(crate) flock: bool,
    pub(crate) id: u64,
}

/// Bytes of a file, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Span {
    fn overlaps(self, other: Span) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    fn touches(self, other: Span) -> bool {
        self.start <= other.end.saturating_add(1) && other.start <= self.end.saturating_add(1)
    }
}

/// A lock, held or wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lock {
    pub(crate) ino: InodeId,
    pub(crate) owner: Owner,
    pub(crate) span: Span,
    pub(crate) write: bool,
    /// For people, and `F_GETLK`.
    pub(crate) pid: u32,
}

impl Lock {
    fn conflicts(&self, other: &Lock) -> bool {
        self.owner != other.owner && (self.write || other.write) && self.span.overlaps(other.span)
    }

    fn file(&self) -> FileKey {
        (self.ino, self.owner.flock)
    }
}

/// A request that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wait {
    /// By which the client gives it up.
    pub(crate) number: u64,
    /// By which it is answered.
    pub(crate) request: u64,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    Granted,
    /// Its end will be among [`Locks::take_ended`].
    Waits,
}

/// Why a lock cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Denied {
    /// Somebody else holds it.
    Conflict,
    /// Its owner would wait for itself.
    Deadlock,
    /// Its client has given it up.
    Cancelled,
    /// The session has too many.
    TooMany,
}

/// A wait that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) session: SessionId,
    pub(crate) request: u64,
    pub(crate) result: Result<(), Denied>,
}

/// Locks of one file of one of the two kinds.
type FileKey = (InodeId, bool);

#[derive(Debug, Default)]
struct File {
    held: Vec<Lock>,
    /// First come, first in line.
    waiting: Vec<(Wait, Lock)>,
}

#[derive(Debug, Default)]
struct OwnerState {
    ranges: usize,
    /// Where it waits, once for each wait.
    waits: Vec<FileKey>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Locks {
    files: HashMap<FileKey, File>,
    owners: HashMap<Owner, OwnerState>,
    /// Files in which a session has ranges or waits, with how many.
    sessions: HashMap<SessionId, HashMap<FileKey, usize>>,
    ended: Vec<Ended>,
}

impl Locks {
    /// Takes a lock, or gets in line for it.
    pub(crate) fn lock(&mut self, lock: Lock, wait: Option<Wait>) -> Result<Taken, Denied> {
        if self.ranges(lock.owner.session) >= RANGES_MAX {
            return Err(Denied::TooMany);
        }
        if lock.owner.flock {
            let held = self.files.get(&lock.file()).into_iter().flat_map(|file| &file.held);
            if held.clone().any(|held| held.owner == lock.owner && held.write != lock.write) {
                self.unlock(lock.ino, lock.owner, lock.span);
            }
        }
        let in_line = self.files.get(&lock.file()).map_or(0, |file| file.waiting.len());
        let is_held = self.conflict(&lock).is_some();
        if !is_held && (wait.is_none() || self.may_pass(&lock, in_line)) {
            let unsettled = self.take(lock);
            self.settle(unsettled);
            return Ok(Taken::Granted);
        }
        let Some(wait) = wait else { return Err(Denied::Conflict) };
        if self.would_deadlock(&lock) {
            return Err(Denied::Deadlock);
        }
        self.files.entry(lock.file()).or_default().waiting.push((wait, lock));
        self.owners.entry(lock.owner).or_default().waits.push(lock.file());
        self.count(lock.owner, lock.file(), 1);
        Ok(Taken::Waits)
    }

    /// Gives up what the owner has in a range. Others that waited for it may have it.
    pub(crate) fn unlock(&mut self, ino: InodeId, owner: Owner, span: Span) {
        let key = (ino, owner.flock);
        self.replace(key, owner, span, None);
        self.settle([key]);
    }

    /// The first lock that is in the way.
    pub(crate) fn conflict(&self, lock: &Lock) -> Option<Lock> {
        let held = self.files.get(&lock.file())?.held.iter();
        held.filter(|held| held.conflicts(lock)).min_by_key(|held| held.span.start).copied()
    }

    /// A client waits no longer; `None` when it does not: that has ended already.
    pub(crate) fn cancel(&mut self, session: SessionId, number: u64) -> Option<()> {
        let keys: Vec<FileKey> = self.sessions.get(&session)?.keys().copied().collect();
        let is_it = |(wait, lock): &(Wait, Lock)| wait.number == number && lock.owner.session == session;
        let (key, at) = keys
            .into_iter()
            .find_map(|key| Some((key, self.files.get(&key)?.waiting.iter().position(is_it)?)))?;
        self.leave_line(key, at, Err(Denied::Cancelled));
        self.settle([key]);
        Some(())
    }

    /// The session will send again what it waits for.
    pub(crate) fn end_waits(&mut self, session: SessionId) {
        let files = self.files_of(session);
        self.forget_waits(session, &files);
        self.settle(files);
    }

    /// The session holds and waits for nothing any more.
    pub(crate) fn end(&mut self, session: SessionId) {
        let files = self.files_of(session);
        self.forget_waits(session, &files);
        self.forget_held(session, &files);
        self.settle(files);
    }

    /// The session has attached: what it holds is what it says. Answers with locks that it cannot have, because others hold
    /// them.
    pub(crate) fn declare(&mut self, session: SessionId, locks: Vec<Lock>) -> Vec<Lock> {
        let before = self.files_of(session);
        self.forget_waits(session, &before);
        self.forget_held(session, &before);
        let mut refused = Vec::new();
        for lock in locks {
            match self.conflict(&lock) {
                Some(_) => refused.push(lock),
                None => self.replace(lock.file(), lock.owner, lock.span, Some(lock)),
            }
        }
        self.settle(before);
        refused
    }

    /// Waits that are over, in the order in which they ended.
    pub(crate) fn take_ended(&mut self) -> Vec<Ended> {
        std::mem::take(&mut self.ended)
    }

    /// Ranges that a session holds or waits for.
    pub(crate) fn ranges(&self, session: SessionId) -> usize {
        self.sessions.get(&session).map_or(0, |files| files.values().sum())
    }

    /// How many of them it waits for.
    pub(crate) fn waits(&self, session: SessionId) -> usize {
        let files = self.sessions.get(&session).into_iter().flat_map(HashMap::keys);
        let waiting = files.filter_map(|key| self.files.get(key)).flat_map(|file| &file.waiting);
        waiting.filter(|(_, lock)| lock.owner.session == session).count()
    }

    fn forget_waits(&mut self, session: SessionId, files: &[FileKey]) {
        for key in files {
            let waits = |file: &File| file.waiting.iter().position(|(_, lock)| lock.owner.session == session);
            while let Some(at) = self.files.get(key).and_then(waits) {
                self.forget_wait(*key, at);
            }
        }
    }

    fn forget_held(&mut self, session: SessionId, files: &[FileKey]) {
        for key in files {
            let Some(file) = self.files.get_mut(key) else { continue };
            let gone: Vec<Lock> = file.held.extract_if(.., |lock| lock.owner.session == session).collect();
            for lock in gone {
                self.owned(lock.owner, *key, -1);
            }
        }
    }

    fn files_of(&self, session: SessionId) -> Vec<FileKey> {
        self.sessions.get(&session).into_iter().flat_map(HashMap::keys).copied().collect()
    }

    /// Whether those in line before `place` are no reason to wait.
    fn may_pass(&self, lock: &Lock, place: usize) -> bool {
        if self.owners.get(&lock.owner).is_some_and(|owner| owner.ranges > 0) {
            return true;
        }
        let waiting = self.files.get(&lock.file()).into_iter().flat_map(|file| &file.waiting);
        !waiting.take(place).any(|(_, earlier)| earlier.conflicts(lock))
    }

    /// Whether an owner, were it to wait for this lock, would wait for itself.
    fn would_deadlock(&self, lock: &Lock) -> bool {
        if lock.owner.flock {
            return false;
        }
        let mut todo = self.holders(lock);
        let mut seen = HashSet::new();
        while let Some(owner) = todo.pop() {
            if owner == lock.owner {
                return true;
            }
            if !seen.insert(owner) {
                continue;
            }
            let waits = self.owners.get(&owner).into_iter().flat_map(|state| &state.waits);
            let files = waits.filter_map(|key| self.files.get(key));
            let locks = files.flat_map(|file| &file.waiting).filter(|(_, lock)| lock.owner == owner);
            todo.extend(locks.flat_map(|(_, lock)| self.holders(lock)));
        }
        false
    }

    /// Owners of locks that are in the way.
    fn holders(&self, lock: &Lock) -> Vec<Owner> {
        let held = self.files.get(&lock.file()).into_iter().flat_map(|file| &file.held);
        held.filter(|held| held.conflicts(lock)).map(|held| held.owner).collect()
    }

    /// Grants what can be granted, now that this has changed in these files.
    fn settle(&mut self, keys: impl IntoIterator<Item = FileKey>) {
        let mut todo: BTreeSet<FileKey> = keys.into_iter().collect();
        while let Some(key) = todo.pop_first() {
            let mut at = 0;
            while let Some((_, lock)) = self.in_line(key, at) {
                if self.conflict(&lock).is_some() || !self.may_pass(&lock, at) {
                    at += 1;
                    continue;
                }
                self.leave_line(key, at, Ok(()));
                todo.extend(self.take(lock));
                at = 0;
            }
            if self.files.get(&key).is_some_and(|file| file.held.is_empty() && file.waiting.is_empty()) {
                self.files.remove(&key);
            }
        }
    }

    /// The lock is its owner's, who may be waiting elsewhere at the same time. Answers with the files to be settled: this one,
    /// since what it replaced may have been stronger, and where its owner, a holder now, may pass others.
    fn take(&mut self, lock: Lock) -> Vec<FileKey> {
        let key = lock.file();
        self.replace(key, lock.owner, lock.span, Some(lock));
        let waits = self.owners.get(&lock.owner).map_or_else(Vec::new, |state| state.waits.clone());
        if !waits.is_empty() {
            // Those in line for it wait for this owner now, and with it for whom it waits.
            let mut at = 0;
            while let Some((_, waiting)) = self.in_line(key, at) {
                if waiting.conflicts(&lock) && self.would_deadlock(&waiting) {
                    self.leave_line(key, at, Err(Denied::Deadlock));
                } else {
                    at += 1;
                }
            }
        }
        waits.into_iter().chain([key]).collect()
    }

    fn in_line(&self, key: FileKey, at: usize) -> Option<(Wait, Lock)> {
        self.files.get(&key)?.waiting.get(at).copied()
    }

    /// A wait is over, and how is noted.
    fn leave_line(&mut self, key: FileKey, at: usize, result: Result<(), Denied>) {
        if let Some(wait) = self.forget_wait(key, at) {
            let (Wait { request, .. }, Lock { owner, .. }) = wait;
            self.ended.push(Ended { session: owner.session, request, result });
        }
    }

    fn forget_wait(&mut self, key: FileKey, at: usize) -> Option<(Wait, Lock)> {
        let file = self.files.get_mut(&key).filter(|file| at < file.waiting.len())?;
        let (wait, lock) = file.waiting.remove(at);
        if let Some(owner) = self.owners.get_mut(&lock.owner)
            && let Some(at) = owner.waits.iter().position(|wait| *wait == key)
        {
            owner.waits.swap_remove(at);
        }
        self.count(lock.owner, key, -1);
        Some((wait, lock))
    }

    /// What the owner has in a range becomes this lock, or none.
    fn replace(&mut self, key: FileKey, owner: Owner, span: Span, lock: Option<Lock>) {
        let file = self.files.entry(key).or_default();
        let mut new = lock;
        let mut parts: Vec<Lock> = Vec::new();
        let affected: Vec<Lock> =
            file.held.extract_if(.., |held| held.owner == owner && held.span.touches(span)).collect();
        let before = affected.len();
        for held in affected {
            if let Some(new) = new.as_mut().filter(|new| new.write == held.write) {
                new.span.start = new.span.start.min(held.span.start);
                new.span.end = new.span.end.max(held.span.end);
                continue;
            }
            if held.span.start < span.start {
                let end = held.span.end.min(span.start - 1);
                parts.push(Lock { span: Span { start: held.span.start, end }, ..held });
            }
            if held.span.end > span.end {
                let start = held.span.start.max(span.end + 1);
                parts.push(Lock { span: Span { start, end: held.span.end }, ..held });
            }
        }
        parts.extend(new);
        let delta = parts.len() as isize - before as isize;
        file.held.extend(parts);
        self.owned(owner, key, delta);
    }

    /// An owner has so many ranges more.
    fn owned(&mut self, owner: Owner, key: FileKey, delta: isize) {
        let state = self.owners.entry(owner).or_default();
        state.ranges = state.ranges.saturating_add_signed(delta);
        self.count(owner, key, delta);
    }

    /// A session has so many ranges and waits more in a file.
    fn count(&mut self, owner: Owner, key: FileKey, delta: isize) {
        if self.owners.get(&owner).is_some_and(|state| state.ranges == 0 && state.waits.is_empty()) {
            self.owners.remove(&owner);
        }
        let files = self.sessions.entry(owner.session).or_default();
        let count = files.entry(key).or_default();
        *count = count.saturating_add_signed(delta);
        if *count == 0 {
            files.remove(&key);
        }
        if files.is_empty() {
            self.sessions.remove(&owner.session);
        }
    }
}
