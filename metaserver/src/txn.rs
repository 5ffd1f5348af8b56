//! The view that operations work on: the store as it will be once the current burst is committed.
//!
//! Reads see the writes of earlier operations of the burst. An operation runs between [`Txn::begin`] and either
//! [`Txn::accept`] or [`Txn::reject`]; rejected, it leaves no trace. [`Txn::take_batch`] hands out all accepted
//! writes of a burst as one batch.
//!
//! Between `take_batch` and [`Txn::committed`] or [`Txn::abandon`] nothing may be read.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::{Bound, Range},
    sync::Arc,
};

use bytes::Bytes;
use fjordfs_proto::{BlockId, FsError, FsResult, InodeId, SessionId, error::Errno};
use prost::Message;

use crate::{
    hot_extents::HotExtents,
    keys::{self, Key},
    records::{self, Counters, Dirent, Inode},
    store::{Batch, MetaStore, Order, Pair, StoreError, successor},
};

/// Rows fetched beyond what was asked for, in case the overlay hides some.
const SCAN_SLACK: usize = 16;

/// Most dead runs remembered by name; beyond it they are found by a scan.
const DEAD_HINTS_MAX: usize = 1 << 16;

/// Background work that the store holds, so that an idle burst need not scan for it. Hints only: a rejected operation
/// leaves some that lead nowhere.
pub(crate) struct Pending {
    /// First blocks of dead runs.
    pub(crate) dead: BTreeSet<u64>,
    /// There may be dead runs that are not in `dead`.
    pub(crate) dead_unknown: bool,
    /// There may be 'destroy' records.
    pub(crate) destroyed: bool,
}

impl Pending {
    pub(crate) fn add_dead(&mut self, first: u64) {
        if self.dead.len() < DEAD_HINTS_MAX {
            self.dead.insert(first);
        } else {
            self.dead_unknown = true;
        }
    }
}

/// The store below an overlay of uncommitted writes.
pub(crate) struct Txn {
    store: Arc<dyn MetaStore>,
    overlay: BTreeMap<Key, Option<Bytes>>,
    /// What the overlay held before each write of the current operation, newest last.
    undo: Vec<(Key, Option<Option<Bytes>>)>,
    counters: Counters,
    counters_before: Counters,
    counters_stored: Counters,
    /// The first error of the engine; operations only see its `FsError`.
    broken: Option<StoreError>,
    pending: Pending,
    hot: HotExtents,
    /// First of the block ids that each session used last. Hints only, of sessions that are there.
    claims: HashMap<SessionId, BlockId>,
    /// Inodes of which the current operation has read or written something, with repetitions.
    seen: Vec<InodeId>,
    /// Those of which it has written something.
    changed: Vec<InodeId>,
}

impl Txn {
    /// A view of the store with an empty overlay.
    ///
    /// # Errors
    /// When the counters cannot be read.
    pub(crate) fn new(store: Arc<dyn MetaStore>) -> FsResult<Txn> {
        let stored = store.get(&[keys::COUNTERS]).map_err(|e| FsError::from(&e))?;
        let counters = match stored {
            Some(value) => records::decode(value, || "counters".into())?,
            None => Counters::default(),
        };
        Ok(Txn {
            store,
            overlay: BTreeMap::new(),
            undo: Vec::new(),
            counters,
            counters_before: counters,
            counters_stored: counters,
            broken: None,
            // After a start nobody knows.
            pending: Pending { dead: BTreeSet::new(), dead_unknown: true, destroyed: true },
            hot: HotExtents::default(),
            claims: HashMap::new(),
            seen: Vec::new(),
            changed: Vec::new(),
        })
    }

    // ---- operations and bursts ----

    pub(crate) fn begin(&mut self) {
        self.undo.clear();
        self.counters_before = self.counters;
        self.seen.clear();
        self.changed.clear();
    }

    pub(crate) fn accept(&mut self) {
        self.undo.clear();
    }

    pub(crate) fn reject(&mut self) {
        while let Some((key, before)) = self.undo.pop() {
            match before {
                Some(before) => self.overlay.insert(key, before),
                None => self.overlay.remove(&key),
            };
        }
        self.counters = self.counters_before;
        self.changed.clear();
    }

    /// Inodes of which the operation just accepted or rejected has looked at something, changed ones included.
    pub(crate) fn seen(&self) -> &[InodeId] {
        &self.seen
    }

    /// Inodes of which the operation just accepted has changed something, each once.
    pub(crate) fn changed(&mut self) -> &[InodeId] {
        self.changed.sort_unstable();
        self.changed.dedup();
        &self.changed
    }

    /// All accepted writes of the burst, or `None` when there are none.
    pub(crate) fn take_batch(&mut self) -> Option<Batch> {
        if self.counters != self.counters_stored {
            let value = Bytes::from(self.counters.encode_to_vec());
            self.overlay.insert(vec![keys::COUNTERS], Some(value));
        }
        if self.overlay.is_empty() {
            return None;
        }
        let writes: Vec<_> = std::mem::take(&mut self.overlay).into_iter().collect();
        self.hot.apply(&writes);
        Some(Batch { writes })
    }

    /// The batch is in the store.
    pub(crate) fn committed(&mut self) {
        self.counters_stored = self.counters;
    }

    /// The batch is not in the store: forget the burst.
    pub(crate) fn abandon(&mut self) {
        self.overlay.clear();
        self.undo.clear();
        self.hot = HotExtents::default();
        self.counters = self.counters_stored;
    }

    /// Number of keys the burst has written so far.
    pub(crate) fn writes(&self) -> usize {
        self.overlay.len()
    }

    /// The engine's error behind an `EIO` of an operation, once.
    pub(crate) fn take_error(&mut self) -> Option<StoreError> {
        self.broken.take()
    }

    fn engine<T>(&mut self, result: Result<T, StoreError>) -> FsResult<T> {
        result.map_err(|e| {
            let answer = FsError::from(&e);
            self.broken.get_or_insert(e);
            answer
        })
    }

    // ---- raw records ----

    pub(crate) fn pending(&mut self) -> &mut Pending {
        &mut self.pending
    }

    pub(crate) fn claims(&mut self) -> &mut HashMap<SessionId, BlockId> {
        &mut self.claims
    }

    pub(crate) fn counters(&mut self) -> &mut Counters {
        &mut self.counters
    }

    pub(crate) fn get(&mut self, key: &[u8]) -> FsResult<Option<Bytes>> {
        self.seen.extend(keys::leased_inode(key));
        if let Some(value) = self.overlay.get(key) {
            return Ok(value.clone());
        }
        let found = self.store.get(key);
        self.engine(found)
    }

    pub(crate) fn record<M: Message + Default>(&mut self, key: &[u8]) -> FsResult<Option<M>> {
        let value = self.get(key)?;
        value.map(|v| records::decode(v, || format!("record {}", key.escape_ascii()))).transpose()
    }

    pub(crate) fn put(&mut self, key: Key, value: Bytes) {
        self.write(key, Some(value));
    }

    pub(crate) fn put_record(&mut self, key: Key, record: &impl Message) {
        self.put(key, Bytes::from(record.encode_to_vec()));
    }

    pub(crate) fn remove(&mut self, key: Key) {
        self.write(key, None);
    }

    fn write(&mut self, key: Key, value: Option<Bytes>) {
        if let Some(ino) = keys::leased_inode(&key) {
            self.seen.push(ino);
            self.changed.push(ino);
        }
        self.write_untold(key, value);
    }

    fn write_untold(&mut self, key: Key, value: Option<Bytes>) {
        let before = self.overlay.insert(key.clone(), value);
        self.undo.push((key, before));
    }

    /// The first `limit` pairs of a range.
    pub(crate) fn scan(&mut self, range: &Range<Key>, order: Order, limit: usize) -> FsResult<Vec<Pair>> {
        if range.start >= range.end || limit == 0 {
            return Ok(Vec::new());
        }
        // A scan of such records is always of one inode.
        self.seen.extend(keys::leased_inode(&range.start));
        let touched = self.overlay.range::<[u8], _>(bounds(&range.start, &range.end)).next().is_some();
        if !touched {
            return self.stored(&range.start, &range.end, order, limit);
        }
        let Range { mut start, mut end } = self.narrowed(range, order, limit);
        let mut out = Vec::new();
        loop {
            let want = (limit - out.len()).saturating_add(SCAN_SLACK);
            let page = self.stored(&start, &end, order, want)?;
            // The part of the range that this page speaks for; the rest is the next turn's.
            let last = (page.len() == want).then(|| page.last().map(|(k, _)| k.clone())).flatten();
            let (from, to) = match (&last, order) {
                (None, _) => (start.clone(), end.clone()),
                (Some(last), Order::Ascending) => (start.clone(), successor(last)),
                (Some(last), Order::Descending) => (last.clone(), end.clone()),
            };
            let written = self.overlay.range::<[u8], _>(bounds(&from, &to));
            match order {
                Order::Ascending => merge(page, written, order, limit, &mut out),
                Order::Descending => merge(page, written.rev(), order, limit, &mut out),
            }
            match (last, order) {
                (Some(_), Order::Ascending) if out.len() < limit => start = to,
                (Some(_), Order::Descending) if out.len() < limit => end = from,
                _ => return Ok(out),
            }
        }
    }

    /// The part of a range that a scan need look at: what lies beyond the pairs of the overlay that would do alone has no say. There an
    /// engine may have to walk over a great deal that was removed.
    fn narrowed(&self, range: &Range<Key>, order: Order, limit: usize) -> Range<Key> {
        let written = self.overlay.range::<[u8], _>(bounds(&range.start, &range.end));
        let mut there = written.filter(|(_, value)| value.is_some()).map(|(key, _)| key);
        match order {
            Order::Ascending => {
                let end = there.nth(limit - 1).map_or_else(|| range.end.clone(), |last| successor(last));
                range.start.clone()..end
            }
            Order::Descending => {
                let start = there.nth_back(limit - 1).unwrap_or(&range.start).clone();
                start..range.end.clone()
            }
        }
    }

    /// As [`Txn::scan`], of what is in the store.
    fn stored(&mut self, start: &[u8], end: &[u8], order: Order, limit: usize) -> FsResult<Vec<Pair>> {
        if let Some(found) = self.hot.scan(start, end, order, limit) {
            return Ok(found);
        }
        let found = self.store.scan(start..end, order, limit);
        self.engine(found)
    }

    /// The extents of a file are about to be changed, perhaps not for the last time.
    pub(crate) fn changes_extents(&mut self, ino: InodeId) -> FsResult<()> {
        let warmed = self.hot.touch(&*self.store, ino);
        self.engine(warmed)
    }

    /// Whether a range holds nothing.
    pub(crate) fn is_empty(&mut self, range: &Range<Key>) -> FsResult<bool> {
        Ok(self.scan(range, Order::Ascending, 1)?.is_empty())
    }

    // ---- inodes and entries ----

    /// An inode that must be there; `ESTALE` when it is not.
    pub(crate) fn inode(&mut self, ino: InodeId) -> FsResult<Inode> {
        self.find_inode(ino)?.ok_or_else(|| {
            FsError::new(
                Errno::ESTALE,
                format!("inode {ino} does not exist: it was removed, look its name up again"),
            )
        })
    }

    pub(crate) fn find_inode(&mut self, ino: InodeId) -> FsResult<Option<Inode>> {
        let mut inode: Option<Inode> = self.record(&keys::inode(ino))?;
        if let Some(inode) = &mut inode
            && ino.0 < self.counters.aged_below
        {
            inode.data_version = inode.data_version.max(self.counters.version_floor);
        }
        Ok(inode)
    }

    /// A directory that must be there and not be removed.
    pub(crate) fn directory(&mut self, ino: InodeId) -> FsResult<Inode> {
        let inode = self.inode(ino)?;
        if !inode.is_dir() {
            return Err(FsError::new(Errno::ENOTDIR, format!("inode {ino} is not a directory")));
        }
        if inode.nlink == 0 {
            return Err(FsError::new(Errno::ENOENT, format!("directory {ino} was removed")));
        }
        Ok(inode)
    }

    pub(crate) fn put_inode(&mut self, ino: InodeId, inode: &Inode) {
        self.put_record(keys::inode(ino), inode);
    }

    /// A change of which those who cache the inode are not told.
    pub(crate) fn put_inode_untold(&mut self, ino: InodeId, inode: &Inode) {
        self.write_untold(keys::inode(ino), Some(Bytes::from(inode.encode_to_vec())));
    }

    pub(crate) fn dirent(&mut self, parent: InodeId, name: &[u8]) -> FsResult<Option<Dirent>> {
        self.record(&keys::dirent(parent, name))
    }

    pub(crate) fn put_dirent(&mut self, parent: InodeId, name: &[u8], ino: InodeId, kind: i32) {
        self.put_record(keys::dirent(parent, name), &Dirent { ino: ino.0, kind });
    }
}

/// Adds to `out`, until it has `limit` pairs, what is stored and not written, and what is written and not removed; both come in
/// the given order.
///
/// Takes no more from the overlay than it must: a commit of many extents asks for one neighbour of each, among all that it has
/// written before.
fn merge<'a>(
    stored: Vec<Pair>,
    written: impl Iterator<Item = (&'a Key, &'a Option<Bytes>)>,
    order: Order,
    limit: usize,
    out: &mut Vec<Pair>,
) {
    let (mut stored, mut written) = (stored.into_iter().peekable(), written.peekable());
    while out.len() < limit {
        let first = match (stored.peek(), written.peek()) {
            (Some((stored, _)), Some((written, _))) if order == Order::Ascending => stored.cmp(written),
            (Some((stored, _)), Some((written, _))) => stored.cmp(written).reverse(),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return,
        };
        if first == Ordering::Less {
            out.extend(stored.next());
            continue;
        }
        if first == Ordering::Equal {
            stored.next();
        }
        if let Some((key, Some(value))) = written.next() {
            out.push((key.clone(), value.clone()));
        }
    }
}

fn bounds<'a>(start: &'a [u8], end: &'a [u8]) -> (Bound<&'a [u8]>, Bound<&'a [u8]>) {
    (Bound::Included(start), Bound::Excluded(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;
    use proptest::prelude::*;

    fn key(n: u8) -> Key {
        keys::extent(InodeId(7), n.into())
    }

    /// With as much as lies in a range, a commit of 30,000 extents took minutes, for which every client waited.
    #[test]
    fn one_neighbour_costs_one_step_however_much_a_burst_has_written() {
        let written: BTreeMap<Key, Option<Bytes>> =
            (0..1000).map(|n| (keys::extent(InodeId(7), 2 * n), Some(Bytes::new()))).collect();
        for (order, nearest) in [(Order::Ascending, 0), (Order::Descending, 1999)] {
            let stored = vec![(keys::extent(InodeId(7), 1999), Bytes::new())];
            let (mut steps, mut out) = (0, Vec::new());
            let count = |_: &(&Key, &Option<Bytes>)| steps += 1;
            match order {
                Order::Ascending => merge(stored, written.iter().inspect(count), order, 1, &mut out),
                Order::Descending => merge(stored, written.iter().rev().inspect(count), order, 1, &mut out),
            }
            assert_eq!(out.len(), 1);
            assert_eq!(out[0].0, keys::extent(InodeId(7), nearest), "{order:?}");
            assert!(steps <= 2, "{order:?}: {steps} steps");
        }
    }

    #[test]
    fn the_store_is_not_asked_beyond_what_the_burst_has_written() {
        let mut txn = Txn::new(Arc::new(MemoryStore::default())).unwrap();
        [10, 20, 25].into_iter().for_each(|n| txn.put(key(n), Bytes::new()));
        txn.remove(key(25));
        let range = key(0)..key(30);
        let ask = |order, limit| txn.narrowed(&range, order, limit);
        assert_eq!(ask(Order::Descending, 1), key(20)..key(30));
        assert_eq!(ask(Order::Descending, 2), key(10)..key(30));
        assert_eq!(ask(Order::Descending, 3), range);
        assert_eq!(ask(Order::Ascending, 1), key(0)..successor(&key(10)));
        assert_eq!(ask(Order::Ascending, 2), key(0)..successor(&key(20)));
        assert_eq!(ask(Order::Ascending, usize::MAX), range);
    }

    proptest! {
        /// The oracle is one tree; the view is a store with an overlay, some of whose operations are rejected.
        #[test]
        fn the_overlay_is_as_if_it_were_stored(
            ops in proptest::collection::vec((any::<bool>(), any::<bool>(), proptest::collection::vec((0..60u8, any::<Option<u8>>()), 0..40)), 1..8),
            from in 0..60u8, to in 0..60u8, limit in 0..30usize, touches in 0..20usize,
        ) {
            let store = Arc::new(MemoryStore::default());
            let fence = store.take_over().unwrap();
            let mut txn = Txn::new(store.clone()).unwrap();
            let mut oracle: BTreeMap<Key, Bytes> = BTreeMap::new();
            for (keep, commit, writes) in ops {
                txn.begin();
                let before = oracle.clone();
                for (n, value) in writes {
                    match value {
                        Some(v) => { txn.put(key(n), Bytes::from(vec![v])); oracle.insert(key(n), Bytes::from(vec![v])); }
                        None => { txn.remove(key(n)); oracle.remove(&key(n)); }
                    }
                }
                (0..touches).for_each(|_| txn.changes_extents(InodeId(7)).unwrap());
                if keep { txn.accept() } else { txn.reject(); oracle = before; }
                if commit {
                    if let Some(batch) = txn.take_batch() { store.commit(batch, fence).unwrap(); }
                    txn.committed();
                }
                let range = key(from)..key(to);
                let all: Vec<Pair> = if from < to { oracle.range(range.clone()).map(|(k, v)| (k.clone(), v.clone())).collect() } else { vec![] };
                let forward: Vec<Pair> = all.iter().take(limit).cloned().collect();
                let backward: Vec<Pair> = all.iter().rev().take(limit).cloned().collect();
                prop_assert_eq!(txn.scan(&range, Order::Ascending, limit).unwrap(), forward);
                prop_assert_eq!(txn.scan(&range, Order::Descending, limit).unwrap(), backward);
                for n in 0..60 {
                    prop_assert_eq!(txn.get(&key(n)).unwrap(), oracle.get(&key(n)).cloned());
                }
            }
        }
    }
}
