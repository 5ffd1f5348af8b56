//! Answers that the kernel takes in whatever was invalidated meanwhile, and that it may not have taken in yet.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fjordfs_proto::InodeId;
use parking_lot::Mutex;

/// An answer counts as taken in after this time: the thread that waits for it was woken and has nothing left to wait for.
const TAKEN_IN: Duration = Duration::from_secs(1);

/// More creations than this are not remembered; their attributes are not to be cached then.
const CREATIONS_MAX: usize = 4096;

/// A directory whose names were recalled counts as contended for so long.
const CONTENDED: Duration = Duration::from_secs(5);

/// Beyond so many contended directories those that are not any more are forgotten.
const CONTENDED_MANY: usize = 1024;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Unsettled {
    creations: Mutex<HashMap<InodeId, Instant>>,
    /// Of `creations`, for a look without the lock.
    creation_count: AtomicUsize,
    /// By directory and handle, of which there are as many as open directories.
    listings: Mutex<BTreeMap<(InodeId, u64), Instant>>,
    /// Directories whose names were recalled, and when.
    contended: Mutex<HashMap<InodeId, Instant>>,
}

impl Unsettled {
    /// Attributes are going to be given with the answer that makes an inode. False when that cannot be remembered.
    pub(crate) fn create(&self, ino: InodeId) -> bool {
        let mut creations = self.creations.lock();
        if creations.len() >= CREATIONS_MAX {
            creations.retain(|_, given| given.elapsed() < TAKEN_IN);
        }
        let fits = creations.len() < CREATIONS_MAX;
        if fits {
            creations.insert(ino, Instant::now());
        }
        self.creation_count.store(creations.len(), Ordering::Release);
        fits
    }

    /// Whether there is any creation to be settled.
    pub(crate) fn has_creations(&self) -> bool {
        self.creation_count.load(Ordering::Acquire) > 0
    }

    /// The kernel has taken in the answer that made the inode, or will never.
    pub(crate) fn settle_creation(&self, ino: InodeId) {
        let mut creations = self.creations.lock();
        creations.remove(&ino);
        self.creation_count.store(creations.len(), Ordering::Release);
    }

    /// Whether the answer that made the inode may be on its way.
    pub(crate) fn is_created(&self, ino: InodeId) -> bool {
        self.has_creations()
            && self.creations.lock().get(&ino).is_some_and(|given| given.elapsed() < TAKEN_IN)
    }

    /// The names of a directory are recalled: others change it.
    pub(crate) fn contend(&self, directory: InodeId) {
        let mut contended = self.contended.lock();
        if contended.len() >= CONTENDED_MANY {
            contended.retain(|_, since| since.elapsed() < CONTENDED);
        }
        contended.insert(directory, Instant::now());
    }

    /// Whether others have changed the directory lately, and are likely to do it again.
    pub(crate) fn is_contended(&self, directory: InodeId) -> bool {
        self.contended.lock().get(&directory).is_some_and(|since| since.elapsed() < CONTENDED)
    }

    /// Names are going to be given with the answer to a READDIRPLUS on this handle. There is one at a time: the kernel has the
    /// position of an open directory locked while it is read.
    pub(crate) fn list(&self, directory: InodeId, handle: u64) {
        self.listings.lock().insert((directory, handle), Instant::now());
    }

    /// The next request on the handle came.
    pub(crate) fn settle_listing(&self, directory: InodeId, handle: u64) {
        self.listings.lock().remove(&(directory, handle));
    }

    /// Whether names of the directory may be on their way.
    pub(crate) fn is_listed(&self, directory: InodeId) -> bool {
        let listings = self.listings.lock();
        listings.range((directory, 0)..=(directory, u64::MAX)).any(|(_, given)| given.elapsed() < TAKEN_IN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn creations_are_settled_one_by_one() {
        let unsettled = Unsettled::default();
        assert!(unsettled.create(InodeId(1)) && unsettled.create(InodeId(2)));
        unsettled.settle_creation(InodeId(1));
        assert!(!unsettled.is_created(InodeId(1)) && unsettled.is_created(InodeId(2)));
        unsettled.settle_creation(InodeId(2));
        assert!(!unsettled.has_creations());
    }

    #[test]
    fn old_answers_count_as_taken_in_and_make_room() {
        let unsettled = Unsettled::default();
        for ino in 0..CREATIONS_MAX as u64 {
            assert!(unsettled.create(InodeId(ino)));
        }
        assert!(!unsettled.create(InodeId(u64::MAX)));
        let old = Instant::now().checked_sub(TAKEN_IN).unwrap();
        unsettled.creations.lock().values_mut().for_each(|given| *given = old);
        assert!(!unsettled.is_created(InodeId(0)));
        assert!(unsettled.create(InodeId(u64::MAX)));
        assert_eq!(unsettled.creations.lock().len(), 1);
    }

    #[test]
    fn a_directory_is_listed_while_any_handle_is() {
        let unsettled = Unsettled::default();
        for (directory, handle) in [(5, 1), (5, 2), (6, 3)] {
            unsettled.list(InodeId(directory), handle);
        }
        unsettled.settle_listing(InodeId(5), 1);
        assert!(unsettled.is_listed(InodeId(5)));
        unsettled.settle_listing(InodeId(5), 2);
        assert!(!unsettled.is_listed(InodeId(5)) && unsettled.is_listed(InodeId(6)));
        assert!(!unsettled.is_listed(InodeId(4)) && !unsettled.is_listed(InodeId(7)));
    }

    #[test]
    fn a_directory_is_contended_for_a_while() {
        let unsettled = Unsettled::default();
        unsettled.contend(InodeId(5));
        assert!(unsettled.is_contended(InodeId(5)) && !unsettled.is_contended(InodeId(6)));
        let old = Instant::now().checked_sub(CONTENDED).unwrap();
        unsettled.contended.lock().insert(InodeId(5), old);
        assert!(!unsettled.is_contended(InodeId(5)));
        for ino in 0..3 * CONTENDED_MANY as u64 {
            unsettled.contended.lock().insert(InodeId(ino), old);
        }
        unsettled.contend(InodeId(7));
        assert_eq!(unsettled.contended.lock().len(), 1);
    }
}
