//! Attributes that a thread was told a moment ago, so that the kernel's next question costs no round trip.
//!
//! With attribute timeouts of 0 the kernel looks a name up and, in the same system call, asks for the attributes that came
//! with the answer: for the permission check of every directory on a path, and for `stat`. That would be nearly half
//! of all requests to the metadata server.
//!
//! So the attributes that LOOKUP brought answer GETATTR when all of this holds:
//! - the same thread asks, about the same inode, and it is the thread's next request: attributes serve once;
//! - no more than [`FRESH_FOR`] has passed;
//! - since before the LOOKUP was sent, nothing on this mount has changed the inode.
//!
//! # Consistency
//! In one system call the LOOKUP and the GETATTR are concurrent with whatever another client does meanwhile, so either
//! order is right. A thread can be shown attributes up to [`FRESH_FOR`] old only by looking a name up without using the
//! answer (`mkdir` of what exists, `O_PATH`) and then, with no request in between, asking through a descriptor it had
//! already. What OPEN brings is not used: a program may well open a file, let another client write, and ask for the size.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fjordfs_proto::InodeId;
use fjordfs_proto::pb::meta::Attr;
use parking_lot::Mutex;

/// The kernel's next question follows the answer by some ten microseconds, by more when the thread has to wait for a core.
const FRESH_FOR: Duration = Duration::from_millis(1);

const SHARDS: usize = 16;
/// Threads end without a word; a full shard is emptied.
const SHARD_THREADS_MAX: usize = 1024;
/// Inodes share these by their number; a collision costs one question more.
const CHANGE_SLOTS: usize = 1024;

/// A point in time, in nanoseconds since the mount began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(u64);

#[derive(Debug)]
struct Told {
    attr: Attr,
    /// Before the question was sent.
    asked: Moment,
    answered: Moment,
}

/// What each thread was told last.
#[derive(Debug)]
pub(crate) struct FreshAttrs {
    began: Instant,
    threads: [Mutex<HashMap<u32, Told>>; SHARDS],
    /// When an inode of this slot was last changed through this mount.
    changed: Vec<AtomicU64>,
    /// When a name was last removed or replaced: that changes an inode whose number is not known here.
    removed: AtomicU64,
}

impl FreshAttrs {
    pub(crate) fn new() -> FreshAttrs {
        FreshAttrs {
            began: Instant::now(),
            threads: std::array::from_fn(|_| Mutex::default()),
            changed: (0..CHANGE_SLOTS).map(|_| AtomicU64::new(0)).collect(),
            removed: AtomicU64::new(0),
        }
    }

    pub(crate) fn now(&self) -> Moment {
        Moment(u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Thread `pid` is being told `attr`, for a question that was sent after `asked`.
    pub(crate) fn told(&self, pid: u32, attr: &Attr, asked: Moment) {
        if pid == 0 {
            return;
        }
        let told = Told { attr: *attr, asked, answered: self.now() };
        let mut threads = self.shard(pid).lock();
        if threads.len() >= SHARD_THREADS_MAX {
            threads.clear();
        }
        threads.insert(pid, told);
    }

    /// What thread `pid` was told in answer to its last request, if that was about `ino` and still holds. To be called for every
    /// request of a thread, whatever it is.
    pub(crate) fn take(&self, pid: u32, ino: InodeId) -> Option<Attr> {
        let told = self.shard(pid).lock().remove(&pid)?;
        let age = Duration::from_nanos(self.now().0.saturating_sub(told.answered.0));
        let last_change = self.slot(ino).load(Ordering::Acquire).max(self.removed.load(Ordering::Acquire));
        (told.attr.ino == ino.0 && age <= FRESH_FOR && last_change < told.asked.0).then_some(told.attr)
    }

    /// An inode has been changed. To be called before the change is answered.
    pub(crate) fn inode_changed(&self, ino: InodeId) {
        self.slot(ino).fetch_max(self.now().0, Ordering::AcqRel);
    }

    /// A name has been removed or replaced. To be called before that is answered.
    pub(crate) fn name_removed(&self) {
        self.removed.fetch_max(self.now().0, Ordering::AcqRel);
    }

    fn shard(&self, pid: u32) -> &Mutex<HashMap<u32, Told>> {
        &self.threads[pid as usize % SHARDS]
    }

    fn slot(&self, ino: InodeId) -> &AtomicU64 {
        &self.changed[(ino.0 % CHANGE_SLOTS as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INO: InodeId = InodeId(77);

    fn attr() -> Attr {
        Attr { ino: INO.0, ..Attr::default() }
    }

    /// Time passes between two moments however coarse the clock is.
    fn tick(fresh: &FreshAttrs) -> Moment {
        let before = fresh.now();
        while fresh.now() == before {}
        fresh.now()
    }

    #[test]
    fn the_next_question_is_answered_once() {
        let fresh = FreshAttrs::new();
        fresh.told(5, &attr(), tick(&fresh));
        assert!(fresh.take(6, INO).is_none(), "another thread");
        assert_eq!(fresh.take(5, INO), Some(attr()));
        assert!(fresh.take(5, INO).is_none(), "once");
        fresh.told(5, &attr(), tick(&fresh));
        assert!(fresh.take(5, InodeId(1)).is_none(), "another inode");
        assert!(fresh.take(5, INO).is_none(), "another request was in between");
        fresh.told(0, &attr(), tick(&fresh));
        assert!(fresh.take(0, INO).is_none(), "no thread is known");
    }

    #[test]
    fn age_and_changes_end_it() {
        let fresh = FreshAttrs::new();
        fresh.told(5, &attr(), tick(&fresh));
        std::thread::sleep(FRESH_FOR + Duration::from_millis(1));
        assert!(fresh.take(5, INO).is_none());
        // Changed while the question was under way.
        let asked = tick(&fresh);
        tick(&fresh);
        fresh.inode_changed(INO);
        fresh.told(5, &attr(), asked);
        assert!(fresh.take(5, INO).is_none());
        // Changed after the answer.
        fresh.told(5, &attr(), tick(&fresh));
        fresh.name_removed();
        assert!(fresh.take(5, INO).is_none());
        // Changed before the question.
        fresh.told(5, &attr(), tick(&fresh));
        assert!(fresh.take(5, INO).is_some());
    }

    #[test]
    fn threads_that_ended_do_not_pile_up() {
        let fresh = FreshAttrs::new();
        for pid in 1..100_000 {
            fresh.told(pid, &attr(), Moment(0));
        }
        assert!(fresh.threads.iter().all(|shard| shard.lock().len() <= SHARD_THREADS_MAX));
    }
}
