//! WRITEs that a READ may have overtaken in the kernel's page cache.
//!
//! write(2) copies into pages and lets go of those that are whole before it sends the WRITE (fs/fuse/file.c, `fuse_fill_write_pages`).
//! Pages that are dropped in between, because the file is opened without keeping them or is invalidated, are filled anew by a READ that is
//! served before the WRITE: with what was there before, and nothing drops that again.
//!
//! Therefore what READs fill is noted for a while after pages were dropped of a file that somebody has open for writing, and a
//! WRITE to such a place, through a handle from before, is followed by dropping the pages once more. Until then, a moment after write(2)
//! has returned, the old bytes can be seen.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fjordfs_proto::InodeId;
use parking_lot::Mutex;

use crate::numbers::NumberHasher;

/// Enough that workers rarely meet on one lock.
const SHARDS: usize = 32;
/// How long a WRITE may be on its way from its copy into the pages to here.
const ON_ITS_WAY: Duration = Duration::from_secs(5);
/// Ranges noted of one file; more count as all of it.
const RANGES_MAX: usize = 64;

type Shard = HashMap<InodeId, Written, BuildHasherDefault<NumberHasher>>;

/// Files that are open for writing, and what was read of them since pages were dropped.
#[derive(Debug)]
pub(crate) struct Overtaken {
    shards: [Mutex<Shard>; SHARDS],
    /// Files with [`Written::dropped`].
    watched: AtomicUsize,
}

/// A file that is open for writing.
#[derive(Debug, Default)]
struct Written {
    handles: usize,
    dropped: Option<Dropped>,
}

/// Pages were dropped.
#[derive(Debug)]
struct Dropped {
    until: Instant,
    /// Handles with lower numbers may have sent WRITEs before.
    before: u64,
    read: Vec<Range<u64>>,
}

impl Default for Overtaken {
    fn default() -> Overtaken {
        Overtaken { shards: std::array::from_fn(|_| Mutex::default()), watched: AtomicUsize::new(0) }
    }
}

impl Overtaken {
    fn shard(&self, ino: InodeId) -> &Mutex<Shard> {
        &self.shards[(ino.0 % SHARDS as u64) as usize]
    }

    /// A file is opened as `fh`, for writing or not, and the kernel drops what it has cached of it or keeps that.
    pub(crate) fn opened(&self, ino: InodeId, fh: u64, writes: bool, drops: bool) {
        if !writes && !drops {
            return;
        }
        let mut shard = self.shard(ino).lock();
        if drops && let Some(written) = shard.get_mut(&ino) {
            self.watch(written, fh);
        }
        if writes {
            shard.entry(ino).or_default().handles += 1;
        }
    }

    /// A handle that was opened for writing is gone.
    pub(crate) fn closed(&self, ino: InodeId) {
        let mut shard = self.shard(ino).lock();
        let Some(written) = shard.get_mut(&ino) else { return };
        written.handles = written.handles.saturating_sub(1);
        if written.handles == 0 {
            self.forget(written);
            shard.remove(&ino);
        }
    }

    /// Whether anybody has it open for writing.
    pub(crate) fn is_written(&self, ino: InodeId) -> bool {
        self.shard(ino).lock().contains_key(&ino)
    }

    /// The kernel is told to drop pages.
    pub(crate) fn dropped(&self, ino: InodeId) {
        if let Some(written) = self.shard(ino).lock().get_mut(&ino) {
            self.watch(written, u64::MAX);
        }
    }

    fn watch(&self, written: &mut Written, before: u64) {
        let until = Instant::now() + ON_ITS_WAY;
        match &mut written.dropped {
            Some(dropped) => (dropped.until, dropped.before) = (until, before.max(dropped.before)),
            none => {
                *none = Some(Dropped { until, before, read: Vec::new() });
                self.watched.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn forget(&self, written: &mut Written) {
        if written.dropped.take().is_some() {
            self.watched.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Pages are going to be filled with these bytes. To be told before it is decided what they are.
    pub(crate) fn filling(&self, ino: InodeId, bytes: Range<u64>) {
        if self.watched.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut shard = self.shard(ino).lock();
        let Some(written) = shard.get_mut(&ino) else { return };
        match &mut written.dropped {
            Some(dropped) if dropped.until <= Instant::now() => self.forget(written),
            Some(dropped) if dropped.read.len() >= RANGES_MAX => {
                dropped.read.clear();
                dropped.read.push(0..u64::MAX);
            }
            Some(dropped) => dropped.read.push(bytes),
            None => {}
        }
    }

    /// These bytes were written through the pages, as `fh`: whether pages may have been filled with others meanwhile. They are to be
    /// dropped then, once the kernel has the answer.
    pub(crate) fn is_overtaken(&self, ino: InodeId, fh: u64, bytes: &Range<u64>) -> bool {
        if self.watched.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let mut shard = self.shard(ino).lock();
        let Some(written) = shard.get_mut(&ino) else { return false };
        let Some(dropped) = &mut written.dropped else { return false };
        if dropped.until <= Instant::now() {
            self.forget(written);
            return false;
        }
        if fh >= dropped.before {
            return false;
        }
        let ranges = dropped.read.len();
        dropped.read.retain(|read| read.end <= bytes.start || bytes.end <= read.start);
        dropped.read.len() < ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INO: InodeId = InodeId(5);

    #[test]
    fn a_write_is_overtaken_by_what_was_read_since_pages_were_dropped() {
        let overtaken = Overtaken::default();
        overtaken.opened(INO, 1, true, true);
        overtaken.filling(INO, 0..4096);
        assert!(!overtaken.is_overtaken(INO, 1, &(0..4096)), "nothing was dropped beside it");
        overtaken.dropped(INO);
        assert!(!overtaken.is_overtaken(INO, 1, &(0..4096)), "nothing was read since");
        overtaken.filling(INO, 4096..8192);
        assert!(!overtaken.is_overtaken(INO, 1, &(0..4096)), "that was not read");
        assert!(overtaken.is_overtaken(INO, 1, &(0..4097)));
        assert!(!overtaken.is_overtaken(INO, 1, &(0..4097)), "the pages have been dropped again");
        (0..200).for_each(|page| overtaken.filling(INO, page * 4096..(page + 1) * 4096));
        assert!(overtaken.is_overtaken(INO, 1, &(4096..4097)), "many are all");
        overtaken.closed(INO);
        assert_eq!(overtaken.watched.load(Ordering::Relaxed), 0);
        assert!(overtaken.shards.iter().all(|shard| shard.lock().is_empty()));
    }

    #[test]
    fn an_open_that_drops_pages_concerns_who_wrote_before() {
        let overtaken = Overtaken::default();
        overtaken.opened(INO, 1, false, true);
        assert_eq!(overtaken.watched.load(Ordering::Relaxed), 0, "nobody writes");
        overtaken.opened(INO, 2, true, false);
        overtaken.opened(INO, 3, true, true);
        overtaken.filling(INO, 0..10);
        assert!(!overtaken.is_overtaken(INO, 3, &(0..10)), "what it writes it has copied afterwards");
        assert!(overtaken.is_overtaken(INO, 2, &(0..10)));
        overtaken.closed(INO);
        overtaken.filling(INO, 0..10);
        assert!(overtaken.is_overtaken(INO, 2, &(0..10)));
    }
}
