//! The embedded engine: a log-structured merge tree with a journal (fjall).
//!
//! One keyspace holds all records; the prefix byte of the key keeps kinds apart.
//!
//! # Crash consistency
//! A commit is one batch in the journal, handed to the kernel before it returns: it survives `kill -9`. A journal that
//! ends in half a batch is cut there at the next start.
//!
//! A sync goes past the engine: `Database::persist` holds the journal's lock during the fsync, and every commit would
//! wait for the device. The bytes are in the kernel already, so an `fdatasync` through a descriptor of our own does the
//! same without the lock. The engine syncs a journal itself before it begins the next one, so the newest file is
//! the only one that can hold unsynced batches; and a journal that vanished under us was flushed to synced tables. What becomes of
//! syncs that fail, the engine's own among them, is in `fjall/journal.rs`.
//!
//! # Damage
//! What the engine takes for the end of a journal may be a flipped bit in the middle of it, and then all that follows would be gone
//! without a word; a folder that has vanished it would make anew. So every batch counts itself in the store, and after
//! each sync the count that is safe is written beside the folder (`store.synced`). A store that has counted less than that has
//! lost something, and is not opened. And the journals are looked through before the engine is opened (`fjall/journal.rs`).

mod journal;
mod watchdog;

use std::{
    io,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use bytes::Bytes;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode, Readable};
use parking_lot::Mutex;

use self::{journal::Newest, watchdog::Watchdog};
use super::{
    Batch, Fence, MetaStore, Order, Pair, Reading, Snapshot, StoreError, StoreResult, Ticket, synced::Synced,
};
use crate::keys;

const KEYSPACE: &str = "meta";
/// The engine refuses a smaller limit.
const JOURNAL_BYTES_MIN: u64 = 64 << 20;

/// Memory and disk the engine may use.
#[derive(Clone, Copy, Debug)]
pub struct FjallOptions {
    /// Cached table blocks, bytes.
    pub cache_bytes: u64,
    /// Memory table before it is written out, bytes.
    pub memtable_bytes: u64,
    /// Journals on disk before tables are forced out, bytes; at least 64 MiB.
    pub journal_bytes: u64,
    /// Threads that write and merge tables.
    pub workers: usize,
}

impl Default for FjallOptions {
    fn default() -> Self {
        FjallOptions {
            cache_bytes: 256 << 20,
            memtable_bytes: 32 << 20,
            journal_bytes: 256 << 20,
            workers: 2,
        }
    }
}

/// fjall in a folder.
pub struct FjallStore {
    watchdog: Watchdog,
    db: Database,
    records: Keyspace,
    folder: PathBuf,
    fence: Mutex<Fence>,
    /// Batches handed to the engine.
    commits: AtomicU64,
    /// Batches that the store held when it was opened.
    commits_before: u64,
    /// How many are safe.
    synced: Synced,
    newest: Mutex<Newest>,
    failed: AtomicBool,
}

impl FjallStore {
    /// Opens the engine in `folder`, or makes it.
    ///
    /// # Errors
    /// When another process has it open, it is damaged, or the folder cannot be used.
    pub fn open(folder: &Path, options: FjallOptions) -> StoreResult<FjallStore> {
        let wrap = |e| wrap(folder, e);
        // The engine asks for it even when the folder is absolute, and panics without it.
        std::env::current_dir().map_err(|_| StoreError::NoWorkingDirectory)?;
        let synced = Synced::open(folder)?;
        journal::prepare(folder, &synced)?;
        // What a damaged journal decodes to, the engine asserts here and there; nothing of it is left when it does.
        let db = catch_unwind(AssertUnwindSafe(|| {
            Database::builder(folder)
                .cache_size(options.cache_bytes)
                .max_journaling_size(options.journal_bytes.max(JOURNAL_BYTES_MIN))
                .worker_threads(options.workers.max(1))
                .open()
        }));
        let db = db.map_err(|_| StoreError::Damaged {
            folder: folder.to_owned(),
            what: "the engine cannot read it; restore it from a backup (`fjord meta restore`)".to_owned(),
        })?;
        let db = db.map_err(wrap)?;
        let records = db
            .keyspace(KEYSPACE, || {
                KeyspaceCreateOptions::default().max_memtable_size(options.memtable_bytes.max(1 << 20))
            })
            .map_err(wrap)?;
        let fence = records.get(keys::FENCE).map_err(wrap)?;
        let fence = fence.map_or(Ok(0), |v| u64_value(folder, "fence", &v))?;
        let counted = records.get(keys::COMMITS).map_err(wrap)?;
        let commits_before = counted.map_or(Ok(0), |v| u64_value(folder, "count of batches", &v))?;
        synced.check(commits_before)?;
        let mut newest = Newest::default();
        newest.sync(folder).map_err(|e| io_error(folder, e))?;
        let (asked, named) = (db.clone(), folder.display().to_string());
        let is_dead = move || matches!(asked.persist(PersistMode::Buffer), Err(fjall::Error::Poisoned));
        let end = move || {
            tracing::error!(
                "the engine in {named} has failed while a batch waits for it: this process ends, to be started again"
            );
            std::process::abort();
        };
        let watchdog = Watchdog::start(is_dead, end).map_err(|e| io_error(folder, e))?;
        Ok(FjallStore {
            watchdog,
            db,
            records,
            folder: folder.to_owned(),
            fence: Mutex::new(Fence(fence)),
            commits: AtomicU64::new(0),
            commits_before,
            synced,
            newest: Mutex::new(newest),
            failed: AtomicBool::new(false),
        })
    }

    fn wrap(&self, e: fjall::Error) -> StoreError {
        wrap(&self.folder, e)
    }

    fn io(&self, source: io::Error) -> StoreError {
        io_error(&self.folder, source)
    }

    fn refuse_after_failure(&self) -> StoreResult<()> {
        if self.failed.load(Ordering::Acquire) {
            return Err(self.io(io::Error::other("it failed before; restart the metaserver")));
        }
        Ok(())
    }

    fn sync_journal(&self) -> StoreResult<()> {
        let synced = self.newest.lock().sync(&self.folder).map_err(|e| self.io(e))?;
        // It says so when it has failed meanwhile.
        let mode = if synced { PersistMode::Buffer } else { PersistMode::SyncAll };
        self.db.persist(mode).map_err(|e| self.wrap(e))
    }
}

impl MetaStore for FjallStore {
    fn get(&self, key: &[u8]) -> StoreResult<Option<Bytes>> {
        let value = self.records.get(key).map_err(|e| self.wrap(e))?;
        Ok(value.map(|v| Bytes::copy_from_slice(&v)))
    }

    fn scan(&self, range: Range<&[u8]>, order: Order, limit: usize) -> StoreResult<Vec<Pair>> {
        if range.start >= range.end || limit == 0 {
            return Ok(Vec::new());
        }
        let mut found = self.records.range(range);
        let mut pairs = Vec::new();
        while pairs.len() < limit {
            let next = match order {
                Order::Ascending => found.next(),
                Order::Descending => found.next_back(),
            };
            let Some(guard) = next else { break };
            let (key, value) = guard.into_inner().map_err(|e| self.wrap(e))?;
            pairs.push((key.to_vec(), Bytes::copy_from_slice(&value)));
        }
        Ok(pairs)
    }

    fn commit(&self, batch: Batch, fence: Fence) -> StoreResult<Ticket> {
        self.refuse_after_failure()?;
        // Held over the commit: a take-over waits for a batch under the old fence, and refuses the next.
        let current = self.fence.lock();
        if *current != fence {
            return Err(StoreError::Fenced { ours: fence, current: *current });
        }
        let mut out = self.db.batch();
        for (key, value) in &batch.writes {
            match value {
                Some(value) => out.insert(&self.records, key.as_slice(), value.as_ref()),
                None => out.remove(&self.records, key.as_slice()),
            }
        }
        let count = self.commits_before + self.commits.load(Ordering::Acquire) + 1;
        out.insert(&self.records, keys::COMMITS, count.to_be_bytes());
        let _watched = self.watchdog.watch();
        out.commit().map_err(|e| {
            self.failed.store(true, Ordering::Release);
            self.wrap(e)
        })?;
        Ok(Ticket(self.commits.fetch_add(1, Ordering::AcqRel) + 1))
    }

    fn sync(&self) -> StoreResult<Ticket> {
        self.refuse_after_failure()?;
        let upto = Ticket(self.commits.load(Ordering::Acquire));
        // After a failed fsync the kernel may have dropped the pages: asking again would prove nothing.
        self.sync_journal().inspect_err(|_| self.failed.store(true, Ordering::Release))?;
        self.synced.note(self.commits_before + upto.0)?;
        Ok(upto)
    }

    fn take_over(&self) -> StoreResult<Fence> {
        self.refuse_after_failure()?;
        let mut current = self.fence.lock();
        let next = Fence(current.0 + 1);
        self.records.insert(keys::FENCE, next.0.to_be_bytes()).map_err(|e| self.wrap(e))?;
        self.db.persist(PersistMode::SyncAll).map_err(|e| self.wrap(e))?;
        *current = next;
        Ok(next)
    }

    fn snapshot(&self) -> StoreResult<Option<Snapshot>> {
        let (snapshot, records) = (self.db.snapshot(), self.records.clone());
        Ok(Some(Box::new(FjallSnapshot { snapshot, records, folder: self.folder.clone() })))
    }

    fn name(&self) -> &'static str {
        "fjall"
    }

    fn boot(&self) -> Option<u64> {
        // Without an answer every start counts as one after a power failure.
        let known = std::fs::read("/proc/sys/kernel/random/boot_id").ok();
        Some(known.map_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0, |id| xxhash_rust::xxh3::xxh3_64(&id)))
    }
}

/// The engine keeps what a snapshot can see.
struct FjallSnapshot {
    snapshot: fjall::Snapshot,
    records: Keyspace,
    folder: PathBuf,
}

impl Reading for FjallSnapshot {
    fn get(&self, key: &[u8]) -> StoreResult<Option<Bytes>> {
        let value = self.snapshot.get(&self.records, key).map_err(|e| wrap(&self.folder, e))?;
        Ok(value.map(|v| Bytes::copy_from_slice(&v)))
    }

    fn scan(&self, range: Range<&[u8]>, limit: usize) -> StoreResult<Vec<Pair>> {
        if range.start >= range.end {
            return Ok(Vec::new());
        }
        let pairs = self.snapshot.range(&self.records, range).take(limit);
        pairs
            .map(|guard| {
                let (key, value) = guard.into_inner().map_err(|e| wrap(&self.folder, e))?;
                Ok((key.to_vec(), Bytes::copy_from_slice(&value)))
            })
            .collect()
    }
}

fn u64_value(folder: &Path, what: &str, value: &[u8]) -> StoreResult<u64> {
    value.try_into().map(u64::from_be_bytes).map_err(|_| StoreError::Damaged {
        folder: folder.to_owned(),
        what: format!("its {what} has {} bytes", value.len()),
    })
}

fn io_error(folder: &Path, source: io::Error) -> StoreError {
    let folder = folder.to_owned();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::NoSpace { folder },
        _ => StoreError::Io { folder, source },
    }
}

fn wrap(folder: &Path, e: fjall::Error) -> StoreError {
    match e {
        fjall::Error::Io(e) | fjall::Error::Storage(fjall::LsmError::Io(e)) => io_error(folder, e),
        fjall::Error::Poisoned => io_error(
            folder,
            io::Error::other("an earlier write failed; see the log, then restart the metaserver"),
        ),
        fjall::Error::Locked => StoreError::Locked { folder: folder.to_owned() },
        other => StoreError::Damaged {
            folder: folder.to_owned(),
            what: format!("{other}: restore it from a backup (`fjord meta restore`)"),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::store::conformance;

    fn open(folder: &Path) -> FjallStore {
        let small = FjallOptions { cache_bytes: 1 << 20, ..FjallOptions::default() };
        FjallStore::open(folder, small).unwrap()
    }

    #[test]
    fn meets_the_contract() {
        let folder = tempfile::tempdir().unwrap();
        let mut n = 0;
        conformance::check(|| {
            n += 1;
            open(&folder.path().join(n.to_string()))
        });
    }

    #[test]
    fn what_was_committed_is_there_after_reopening_and_old_fences_stay_void() {
        let folder = tempfile::tempdir().unwrap();
        let old = {
            let store = open(&folder.path().join("store"));
            let fence = store.take_over().unwrap();
            store.commit(conformance::put(&[("k", "v")]), fence).unwrap();
            assert_eq!(store.sync().unwrap(), Ticket(1));
            fence
        };
        let store = open(&folder.path().join("store"));
        assert_eq!(store.get(b"k").unwrap().unwrap(), "v");
        assert!(store.take_over().unwrap() > old);
        assert!(matches!(store.commit(conformance::put(&[("k", "w")]), old), Err(StoreError::Fenced { .. })));
    }

    /// What `kill -9` leaves is what the files hold while the engine runs.
    #[test]
    fn what_was_committed_survives_the_end_of_the_process() {
        let (running, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = open(&running.path().join("store"));
        let fence = store.take_over().unwrap();
        for i in 0..500 {
            store
                .commit(conformance::put(&[(&format!("k{i}"), "v"), ("last", &i.to_string())]), fence)
                .unwrap();
        }
        copy(running.path(), killed.path());
        let found = open(&killed.path().join("store"));
        assert_eq!(found.get(b"last").unwrap().unwrap(), "499");
        assert_eq!(found.scan(b"k".as_slice()..b"l", Order::Ascending, usize::MAX).unwrap().len(), 500);
    }

    fn copy(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let to = to.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                fs::create_dir_all(&to).unwrap();
                copy(&entry.path(), &to);
            } else {
                fs::copy(entry.path(), to).unwrap();
            }
        }
    }

    #[test]
    fn a_snapshot_stays_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(&folder.path().join("store"));
        let fence = store.take_over().unwrap();
        store.commit(conformance::put(&[("a", "1"), ("b", "1")]), fence).unwrap();
        let then = store.snapshot().unwrap().unwrap();
        store.commit(conformance::put(&[("a", "2"), ("c", "2")]), fence).unwrap();
        let pairs = then.scan(b"a".as_slice()..b"z", 10).unwrap();
        assert_eq!(pairs, [(b"a".to_vec(), "1".into()), (b"b".to_vec(), "1".into())]);
        assert_eq!((then.get(b"a").unwrap().unwrap(), then.get(b"c").unwrap()), ("1".into(), None));
    }

    /// A bit flips in the middle of the journal, the journal is cut, or everything is gone: never less than what was synced.
    #[test]
    fn lost_batches_are_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let good = folder.path().join("good").join("store");
        fs::create_dir_all(good.parent().unwrap()).unwrap();
        {
            let store = open(&good);
            let fence = store.take_over().unwrap();
            for i in 0..200 {
                store.commit(conformance::put(&[(&format!("k{i}"), "v")]), fence).unwrap();
            }
            store.sync().unwrap();
            // After the sync: what a power failure may take.
            store.commit(conformance::put(&[("late", "v")]), fence).unwrap();
            let (_, journal) = journal::list(&good).unwrap().pop().unwrap();
            let name = journal.file_name().unwrap().to_owned();
            let bytes = fs::read(&journal).unwrap();
            let used = bytes.iter().rposition(|b| *b != 0).unwrap() + 1;
            let mut refused = 0;
            let tries = 24;
            for n in 0..=tries {
                let at = folder.path().join(format!("bad{n}"));
                copy(good.parent().unwrap(), &at);
                let journal = at.join("store").join(&name);
                let place = used * n / (tries + 1);
                let mut bad = bytes.clone();
                if n % 2 == 0 {
                    bad[place] ^= 0x10
                } else {
                    bad.truncate(place)
                }
                fs::write(&journal, bad).unwrap();
                match FjallStore::open(&at.join("store"), FjallOptions::default()) {
                    Err(StoreError::Damaged { what, .. }) => {
                        assert!(what.contains("fjord meta restore"), "{what}");
                        refused += 1;
                    }
                    Err(StoreError::Io { .. }) => refused += 1,
                    Err(e) => panic!("{e}"),
                    // Only a byte that nothing is read from may be damaged unnoticed.
                    Ok(store) => {
                        for i in 0..200 {
                            assert_eq!(
                                store.get(format!("k{i}").as_bytes()).unwrap().unwrap(),
                                "v",
                                "byte {place}"
                            );
                        }
                    }
                }
            }
            assert!(refused >= tries - 1, "{refused} of {tries}");
        }
        fs::remove_dir_all(&good).unwrap();
        let gone = FjallStore::open(&good, FjallOptions::default());
        let Err(StoreError::Damaged { what, .. }) = gone else { panic!("it was opened as empty") };
        assert!(what.contains("200"), "{what}");
    }

    /// A power failure in the middle of writing a large value: pages of the batch are there, and others before them are not.
    #[test]
    fn half_a_batch_that_nobody_was_promised_keeps_nobody_from_starting() {
        let folder = tempfile::tempdir().unwrap();
        let good = folder.path().join("good");
        let (journal, before, after) = {
            let store = open(&good.join("store"));
            let fence = store.take_over().unwrap();
            store.commit(conformance::put(&[("k", "v")]), fence).unwrap();
            store.sync().unwrap();
            let (_, journal) = journal::list(&good.join("store")).unwrap().pop().unwrap();
            let end = || fs::read(&journal).unwrap().iter().rposition(|byte| *byte != 0).unwrap() + 1;
            let before = end();
            // The engine compresses what it can.
            let value: Vec<u8> = (0..100_000u64).map(|n| fjordfs_proto::cluster::mix(n) as u8).collect();
            let large = Batch { writes: vec![(b"large".to_vec(), Some(value.into()))] };
            store.commit(large, fence).unwrap();
            let after = end();
            (journal, before, after)
        };
        let name = journal.file_name().unwrap();
        let bytes = fs::read(&journal).unwrap();
        for hole in (before.next_multiple_of(4096)..after - 4096).step_by(8192) {
            let at = folder.path().join(format!("hole{hole}"));
            copy(&good, &at);
            let mut torn = bytes.clone();
            torn[hole..hole + 4096].fill(0);
            fs::write(at.join("store").join(name), &torn).unwrap();
            let store = open(&at.join("store"));
            assert_eq!(store.get(b"k").unwrap().unwrap(), "v");
            assert_eq!(store.get(b"large").unwrap(), None, "all of it or nothing");
            assert_eq!(
                fs::read(at.join("store").join(name).with_extension("torn")).unwrap().len(),
                after - before
            );
            let fence = store.take_over().unwrap();
            store.commit(conformance::put(&[("k", "w")]), fence).unwrap();
            store.sync().unwrap();
            drop(store);
            assert_eq!(open(&at.join("store")).get(b"k").unwrap().unwrap(), "w");
        }
    }

    /// Pages that a failed sync has left behind in memory only, and that count as written, reach the disk after all.
    #[test]
    fn what_the_newest_journal_holds_is_written_once_more() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("store");
        {
            let store = open(&at);
            let fence = store.take_over().unwrap();
            store.commit(conformance::put(&[("k", "v")]), fence).unwrap();
        }
        let (_, journal) = journal::list(&at).unwrap().pop().unwrap();
        let before = fs::read(&journal).unwrap();
        let long_ago = std::time::SystemTime::UNIX_EPOCH;
        fs::File::options().write(true).open(&journal).unwrap().set_modified(long_ago).unwrap();
        // The engine cuts what it does not need, which would show as well.
        journal::prepare(&at, &Synced::open(&at).unwrap()).unwrap();
        assert!(fs::metadata(&journal).unwrap().modified().unwrap() > long_ago, "nothing was written");
        assert!(fs::read(&journal).unwrap() == before);
        let store = open(&at);
        assert_eq!(store.get(b"k").unwrap().unwrap(), "v");
    }

    /// The newest record is there, and the count that it holds; what lies before it is not all there.
    #[test]
    fn damage_in_an_older_journal_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let good = folder.path().join("good");
        {
            let options = FjallOptions { memtable_bytes: 512 << 20, ..FjallOptions::default() };
            let store = FjallStore::open(&good.join("store"), options).unwrap();
            let fence = store.take_over().unwrap();
            let value: Vec<u8> = (0..4_000_000u64).map(|n| fjordfs_proto::cluster::mix(n) as u8).collect();
            let value = Bytes::from(value);
            let put = |n: u32| Batch { writes: vec![(format!("k{n:02}").into_bytes(), Some(value.clone()))] };
            // Behind so many bytes the engine begins another journal, when a table is written.
            for n in 0..20 {
                store.commit(put(n), fence).unwrap();
            }
            // A small table of another keyspace, so that what was written first is in no table yet.
            let other = store.db.keyspace("other", KeyspaceCreateOptions::default).unwrap();
            other.insert("a", "b").unwrap();
            other.rotate_memtable_and_wait().unwrap();
            store.commit(put(20), fence).unwrap();
            store.sync().unwrap();
        }
        let journals = journal::list(&good.join("store")).unwrap();
        assert!(journals.len() > 1, "{journals:?}");
        let (_, oldest) = &journals[0];
        let bytes = fs::read(oldest).unwrap();
        let used = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
        let opened = |change: &dyn Fn(&Path)| {
            let at = folder.path().join("bad");
            copy(&good, &at);
            change(&at.join("store").join(oldest.file_name().unwrap()));
            let opened = FjallStore::open(&at.join("store"), FjallOptions::default());
            let said = opened.map(|store| store.get(b"k00").unwrap()).map_err(|e| e.to_string());
            fs::remove_dir_all(&at).unwrap();
            said
        };
        assert!(opened(&|_| {}).unwrap().is_some());
        for cut in [used / 2, 0] {
            let said = opened(&|path| {
                let mut bad = bytes.clone();
                bad[cut..].fill(0);
                fs::write(path, bad).unwrap();
            });
            assert!(said.clone().is_err_and(|e| e.contains("fjord meta restore")), "cut at {cut}: {said:?}");
        }
        let (_, newest) = journals.last().unwrap();
        let said = opened(&|path| {
            let newest = path.with_file_name(newest.file_name().unwrap());
            fs::rename(newest, path.with_file_name("9.jnl")).unwrap();
        });
        assert!(said.clone().is_err_and(|e| e.contains("missing")), "{said:?}");
    }

    #[test]
    fn a_second_opener_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let _first = open(&folder.path().join("store"));
        let second = FjallStore::open(&folder.path().join("store"), FjallOptions::default());
        assert!(matches!(second, Err(StoreError::Locked { .. })));
    }
}
