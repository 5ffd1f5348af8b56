//! Access times, by the rules of `relatime`: the first read after a change is noted, and one a day. What is noted travels with other
//! operations.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::{Handle, View, now};

/// What a handle knows of its reads.
pub(super) struct Accesses {
    /// They are to be noted.
    noted: AtomicBool,
    was_read: AtomicBool,
}

impl Accesses {
    pub(super) fn new(noted: bool) -> Accesses {
        Accesses { noted: AtomicBool::new(noted), was_read: AtomicBool::new(false) }
    }

    pub(super) fn keep(&self) {
        self.noted.store(false, Relaxed);
    }

    pub(super) fn are_kept(&self) -> bool {
        !self.noted.load(Relaxed)
    }
}

impl Handle {
    /// The file is being read: what `look` finds out of it, under the one lock that a read in memory takes. Only the first read of a
    /// handle looks at the clock: nobody keeps a file open for days to read it once in a while and be found by its access time.
    pub(super) fn look<T>(&self, look: impl FnOnce(&View) -> T) -> T {
        let mut file = self.state.lock();
        let found = look(&file.view);
        let Accesses { noted, was_read } = &self.accesses;
        if !noted.load(Relaxed) {
            return found;
        }
        let is_first = !was_read.load(Relaxed) && !was_read.swap(true, Relaxed);
        if let Some(before) = file.view.access_due(is_first.then(now)) {
            let time = now();
            file.view.set_access_time(time);
            drop(file);
            self.client.meta.leases().note_access(self.state.ino, time, before);
        }
        found
    }
}
