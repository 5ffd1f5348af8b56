//! Reads that end where the file ends, and the sizes that must not overtake them.
//!
//! The kernel fills the rest of a page that a READ leaves short with zeros, and shows as much of its pages as the file has bytes, so
//! zeros past an old end are read as bytes of the file once it has heard of a new one. It drops pages when it hears of another
//! size, but only afterwards, and waits there for every READ of an earlier page: all the while another reader finds the new
//! size beside the old last page. (fs/fuse/inode.c, `fuse_change_attributes`: `i_size_write` comes before
//! `invalidate_inode_pages2`.) An append goes past the pages, which are dropped *before* the WRITE is sent; what a reader caches
//! until it is answered stays (fs/fuse/file.c, `fuse_direct_write_iter`; 6.18.44 drops once more.)
//!
//! Therefore an answer that tells of a size waits
//! 1. until the kernel has taken in every short answer that was given before. A short answer is only given if the file still ends
//!    there when it is noted here, and the size to be told was known before that look;
//! 2. until the kernel has dropped the pages with zeros after an earlier end. What is read from then on ends where the file ends now.
//!
//! # What is left
//! A thread that has got hold of the old page and looks at the size next, some instructions later, may be stopped between the two for as
//! long as a notification, an answer and another thread's taking it in take. SETATTR of a size does not wait: until it is answered
//! the kernel sends no dirty page of a mapping, and the notification would wait for those.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::BuildHasherDefault;
use std::ops::Range;
use std::sync::Arc;

use fjordfs_proto::InodeId;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::numbers::NumberHasher;

/// Enough that workers rarely meet on one lock.
const SHARDS: usize = 64;

type Shard = HashMap<InodeId, End, BuildHasherDefault<NumberHasher>>;

/// Where READs of files ended. Bounded by the kernel, as [`crate::held`] is: an entry goes with the inode.
#[derive(Debug)]
pub(crate) struct Ends {
    shards: [Mutex<Shard>; SHARDS],
    fewer: Notify,
}

/// Of one inode.
#[derive(Debug, Default)]
struct End {
    /// Short answers that the kernel may not have taken in.
    on_their_way: usize,
    /// First and last byte that the kernel may have cached zeros from.
    cached: Option<(u64, u64)>,
}

/// The size that an answer tells of an inode.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told {
    pub(crate) ino: InodeId,
    pub(crate) size: u64,
}

/// A short answer on its way; to be dropped when the kernel has taken it in.
#[derive(Debug)]
pub(crate) struct ShortAnswer {
    ends: Arc<Ends>,
    ino: InodeId,
}

impl Default for Ends {
    fn default() -> Ends {
        Ends { shards: std::array::from_fn(|_| Mutex::default()), fewer: Notify::new() }
    }
}

impl Ends {
    fn shard(&self, ino: InodeId) -> &Mutex<Shard> {
        &self.shards[(ino.0 % SHARDS as u64) as usize]
    }

    /// A short answer, of a file that ends at `end`, is going to be given. Look at the file's size after this, not before.
    pub(crate) fn short_answer(self: &Arc<Ends>, ino: InodeId, end: u64) -> ShortAnswer {
        let mut shard = self.shard(ino).lock();
        let of = shard.entry(ino).or_default();
        of.on_their_way += 1;
        let (first, last) = of.cached.unwrap_or((end, end));
        of.cached = Some((first.min(end), last.max(end)));
        drop(shard);
        ShortAnswer { ends: Arc::clone(self), ino }
    }

    fn is_awaited(&self, ino: InodeId) -> bool {
        self.shard(ino).lock().get(&ino).is_some_and(|of| of.on_their_way > 0)
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

    /// Where zeros begin that the kernel would show once it has been told this.
    pub(crate) fn zeros_before(&self, Told { ino, size }: Told) -> Option<u64> {
        let (first, _) = self.shard(ino).lock().get(&ino)?.cached?;
        (first < size).then_some(first)
    }

    /// The kernel has put a program's bytes into its pages, and sent them.
    pub(crate) fn overwritten(&self, ino: InodeId, bytes: Range<u64>) {
        if let Some(End { cached: Some((first, last)), .. }) = self.shard(ino).lock().get_mut(&ino)
            && bytes.contains(first)
        {
            *first = bytes.end;
            *last = bytes.end.max(*last);
        }
    }

    /// The kernel has dropped what it had cached from an end before this size on.
    pub(crate) fn dropped(&self, Told { ino, size }: Told) {
        let mut shard = self.shard(ino).lock();
        let Entry::Occupied(mut of) = shard.entry(ino) else { return };
        // Ends that were noted meanwhile are this one or later ones.
        of.get_mut().cached = of.get().cached.filter(|(_, last)| *last >= size).map(|(_, last)| (size, last));
        if of.get().cached.is_none() && of.get().on_their_way == 0 {
            of.remove();
        }
    }

    /// The kernel has forgotten the inode, and its pages with it.
    pub(crate) fn forget(&self, ino: InodeId) {
        let mut shard = self.shard(ino).lock();
        let Entry::Occupied(mut of) = shard.entry(ino) else { return };
        of.get_mut().cached = None;
        if of.get().on_their_way == 0 {
            of.remove();
        }
        if shard.len() < shard.capacity() / 8 {
            let half = shard.capacity() / 2;
            shard.shrink_to(half);
        }
    }
}

impl Drop for ShortAnswer {
    fn drop(&mut self) {
        if let Some(of) = self.ends.shard(self.ino).lock().get_mut(&self.ino) {
            of.on_their_way = of.on_their_way.saturating_sub(1);
        }
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
        let answers = [ends.short_answer(a, 5), ends.short_answer(a, 5)];
        assert!(ends.taken_in(b).now_or_never().is_some());
        let mut waiting = Box::pin(ends.taken_in(a));
        let [first, second] = answers;
        drop(first);
        assert!((&mut waiting).now_or_never().is_none());
        drop(second);
        assert!(waiting.now_or_never().is_some());
    }

    #[test]
    fn zeros_after_an_old_end_are_known_until_they_are_dropped() {
        let ends = Arc::new(Ends::default());
        let ino = InodeId(1);
        let told = |size| Told { ino, size };
        assert_eq!(ends.zeros_before(told(u64::MAX)), None);
        drop(ends.short_answer(ino, 5));
        assert_eq!((ends.zeros_before(told(5)), ends.zeros_before(told(6))), (None, Some(5)));
        // While the pages are being dropped, a read ends at the new end: that page stays.
        drop(ends.short_answer(ino, 9));
        assert_eq!(ends.zeros_before(told(8)), Some(5));
        ends.dropped(told(8));
        assert_eq!((ends.zeros_before(told(8)), ends.zeros_before(told(10))), (None, Some(8)));
        ends.dropped(told(10));
        assert_eq!(ends.zeros_before(told(u64::MAX)), None);
        assert!(ends.shards.iter().all(|shard| shard.lock().is_empty()));
    }

    #[test]
    fn what_is_written_here_stays_in_the_kernels_pages() {
        let ends = Arc::new(Ends::default());
        let ino = InodeId(1);
        let told = |size| Told { ino, size };
        ends.overwritten(ino, 0..9);
        assert_eq!(ends.zeros_before(told(u64::MAX)), None);
        drop(ends.short_answer(ino, 5));
        ends.overwritten(ino, 6..9);
        assert_eq!(ends.zeros_before(told(9)), Some(5), "a gap stays");
        ends.overwritten(ino, 5..9);
        assert_eq!((ends.zeros_before(told(9)), ends.zeros_before(told(10))), (None, Some(9)));
    }

    #[test]
    fn nothing_is_kept_of_what_the_kernel_forgot() {
        let ends = Arc::new(Ends::default());
        let ino = InodeId(7);
        let answer = ends.short_answer(ino, 5);
        ends.forget(ino);
        assert!(ends.is_awaited(ino), "it is on its way all the same");
        drop(answer);
        ends.forget(ino);
        assert_eq!(ends.zeros_before(Told { ino, size: 9 }), None);
        assert!(ends.shards.iter().all(|shard| shard.lock().is_empty()));
    }
}
