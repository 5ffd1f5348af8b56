//! Reads that end where the file ends, and the sizes that must not overtake them.
//!
//! The kernel fills the rest of a page that a READ leaves short with zeros. When another client has extended the file meanwhile and
//! the kernel learns of the new size first, it takes those zeros for bytes of the file, until it drops the page.
//! So a short answer is only given if the file still ends there, and from that look until the kernel has taken the
//! answer in, no answer with attributes of that inode is given.
//!
//! What remains is the kernel's own: it shows a new size for some microseconds before it drops the last page that it has
//! cached.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fjordfs_proto::InodeId;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Short answers that the kernel may not have taken in.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    answers: Mutex<HashMap<InodeId, usize>>,
    /// Inodes in `answers`, for a look without the lock.
    count: AtomicUsize,
    fewer: Notify,
}

/// A short answer on its way; to be dropped when the kernel has taken it in.
#[derive(Debug)]
pub(crate) struct ShortAnswer {
    ends: Arc<Ends>,
    ino: InodeId,
}

impl Ends {
    /// A short answer is going to be given. Look at the file's size after this, not before.
    pub(crate) fn short_answer(self: &Arc<Ends>, ino: InodeId) -> ShortAnswer {
        let mut answers = self.answers.lock();
        *answers.entry(ino).or_default() += 1;
        self.count.store(answers.len(), Ordering::Release);
        ShortAnswer { ends: Arc::clone(self), ino }
    }

    fn is_awaited(&self, ino: InodeId) -> bool {
        self.count.load(Ordering::Acquire) > 0 && self.answers.lock().contains_key(&ino)
    }

    /// Resolves when the kernel has taken in every short answer about the inode. The caller has its attributes already.
    pub(crate) async fn taken_in(&self, ino: InodeId) {
        while self.is_awaited(ino) {
            let mut fewer = std::pin::pin!(self.fewer.notified());
            fewer.as_mut().enable();
            if self.is_awaited(ino) {
                fewer.await;
            }
        }
    }
}

impl Drop for ShortAnswer {
    fn drop(&mut self) {
        let mut answers = self.ends.answers.lock();
        if let Some(count) = answers.get_mut(&self.ino) {
            *count -= 1;
            if *count == 0 {
                answers.remove(&self.ino);
            }
        }
        self.ends.count.store(answers.len(), Ordering::Release);
        drop(answers);
        self.ends.fewer.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn only_attributes_of_the_same_inode_wait_and_for_all_its_answers() {
        let ends = Arc::new(Ends::default());
        let (a, b) = (InodeId(1), InodeId(2));
        let answers = [ends.short_answer(a), ends.short_answer(a)];
        assert!(ends.taken_in(b).now_or_never().is_some());
        let mut waiting = Box::pin(ends.taken_in(a));
        let [first, second] = answers;
        drop(first);
        assert!((&mut waiting).now_or_never().is_none());
        drop(second);
        assert!(waiting.now_or_never().is_some());
        assert_eq!(ends.count.load(Ordering::Acquire), 0);
    }
}
