//! The shard store of one target: immutable shards in append-only volume files.
//!
//! | file | what is there |
//! |---|---|
//! | `record.rs` | a shard on the device: header, data pages, integrity table |
//! | `volume.rs` | a volume file: label, then records; where to append, what is synced |
//! | `tables.rs` | integrity tables that were read lately, in memory |
//! | `index.rs` | (block, shard) → place, in memory |
//! | `put.rs` | reserving space, growing, writing a record |
//! | `delete.rs` | deleting by punching holes |
//! | `replace.rs` | a good record in the place of a damaged one |
//! | `deleted.rs` | which blocks were deleted, against puts that come late |
//! | `sync.rs` | group sync |
//! | `checkpoint.rs`, `snapshot.rs` | the index on disk: its format, and when it is written |
//! | `recovery.rs` | from files to an index |
//! | `label.rs` | whose folder it is |
//! | `device.rs`, `files.rs`, `sim.rs` | the device below: trait, io_uring, and a crashing one for tests |
//!
//! **Life of a shard.** `put`: space is reserved in the active volume, one write carries header, data and table, then the
//! index knows it. It survives kill -9 from then on, and power failure after a `sync`. It is never changed. `delete`: it
//! leaves the index, and its record becomes a hole; that is power-safe after a `sync`.
//!
//! **Concurrency.** The store is shared by all cores. Reading takes two reader locks for a moment; writing also the
//! volume's short append lock. No lock is held across I/O, except for the queues of those who wait for the same thing
//! (sync, a new volume).
//!
//! **Reads against deletions.** A deletion leaves the index first and punches then, so a reader that still finds its
//! entry after reading ([`Store::still_there`]) has read the shard and not the hole.

pub(crate) mod checkpoint;
mod delete;
mod deleted;
pub(crate) mod device;
pub(crate) mod error;
pub(crate) mod files;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub(crate) mod index;
pub(crate) mod label;
mod put;
pub(crate) mod record;
mod recovery;
mod replace;
#[cfg(any(test, fuzzing))]
#[allow(clippy::unwrap_used, reason = "for tests only: there a panic is the report")]
#[cfg_attr(fuzzing, allow(dead_code, reason = "tests also let it crash and rot"))]
mod sim;
mod snapshot;
mod sync;
pub(crate) mod tables;
#[cfg(test)]
mod tests;
pub(crate) mod volume;

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use fjordfs_proto::{BlockId, PAGE_SIZE, ShardNo};
use parking_lot::{Mutex, RwLock};

use self::{
    deleted::Deleted,
    device::Device,
    error::StoreError,
    index::{Entry, Index},
    sync::SyncState,
    volume::{Volume, VolumeId},
};
use crate::buffer::PageBuf;

pub(crate) use delete::Deletion;
pub(crate) use put::NewShard;

/// How a store uses its device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoreOptions {
    /// Of the volume files, where there is room for that.
    pub(crate) volume_size: u64,
    /// Most bytes of records, if less than the filesystem has.
    pub(crate) capacity_max: Option<u64>,
}

/// What a store has done and holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct StoreStats {
    /// Bytes that all shards together could have.
    pub(crate) capacity: u64,
    pub(crate) free: u64,
    pub(crate) shards: u64,
    pub(crate) shard_bytes: u64,
    pub(crate) volumes: u32,
    pub(crate) reads: u64,
    pub(crate) puts: u64,
    /// Pages that arrived damaged, and reads that the device refused.
    pub(crate) bad_pages: u64,
}

#[derive(Default)]
struct Counters {
    shards: AtomicU64,
    shard_bytes: AtomicU64,
    /// Bytes of records, in the index or being written.
    used: AtomicU64,
    reads: AtomicU64,
    puts: AtomicU64,
    bad_pages: AtomicU64,
}

/// The shard store of one target.
pub(crate) struct Store<D: Device> {
    device: Arc<D>,
    uuid: [u8; 16],
    options: StoreOptions,
    index: Index,
    deleted: Deleted,
    volumes: RwLock<BTreeMap<VolumeId, Arc<Volume<D::File>>>>,
    /// Where records are appended.
    active: RwLock<Option<Arc<Volume<D::File>>>>,
    /// Held while a volume is made; the next volume's id.
    growing: tokio::sync::Mutex<u32>,
    counters: Counters,
    sync_state: SyncState,
    /// Held (shared) from leaving the index until the hole is punched; a checkpoint takes it once exclusively.
    deleting: tokio::sync::RwLock<()>,
    /// Held while a checkpoint is written; `writes` of the last one.
    checkpointing: tokio::sync::Mutex<Option<u64>>,
    /// Why no more writes are taken.
    failure: Mutex<Option<String>>,
}

impl<D: Device> Store<D> {
    /// Recovers the store from its device. Blocks; at start only.
    pub(crate) fn open(
        device: Arc<D>,
        uuid: [u8; 16],
        options: StoreOptions,
    ) -> Result<Store<D>, StoreError> {
        let found = recovery::recover(&*device, uuid)?;
        tracing::info!(
            "target {}: {} shards, {} bytes, {} volumes",
            device.path().display(),
            found.shards,
            found.shard_bytes,
            found.volumes.len()
        );
        let store = Store {
            device,
            uuid,
            options,
            index: found.index,
            deleted: Deleted::default(),
            volumes: RwLock::new(found.volumes),
            active: RwLock::new(found.active),
            growing: tokio::sync::Mutex::new(found.next_volume),
            counters: Counters {
                shards: found.shards.into(),
                shard_bytes: found.shard_bytes.into(),
                used: found.used.into(),
                ..Counters::default()
            },
            sync_state: SyncState::new(),
            deleting: tokio::sync::RwLock::new(()),
            checkpointing: tokio::sync::Mutex::new(None),
            failure: Mutex::new(None),
        };
        // What the process before has punched counts as deleted here, and it may have been killed before its sync.
        for volume in store.volumes.read().values() {
            store.wrote(volume);
        }
        Ok(store)
    }

    pub(crate) fn path(&self) -> &Path {
        self.device.path()
    }

    /// Where a shard is.
    pub(crate) fn find(&self, block: BlockId, shard: ShardNo) -> Result<Entry, StoreError> {
        self.index.get(block, shard).ok_or_else(|| self.missing(block, shard))
    }

    /// Whether a shard has not been deleted since [`Store::find`] returned it.
    pub(crate) fn still_there(&self, entry: &Entry) -> Result<(), StoreError> {
        if self.index.get(entry.block, entry.shard).as_ref() == Some(entry) {
            self.counters.reads.fetch_add(1, Ordering::Relaxed);
            Ok(())
        } else {
            Err(self.missing(entry.block, entry.shard))
        }
    }

    fn missing(&self, block: BlockId, shard: ShardNo) -> StoreError {
        StoreError::Missing { path: self.path().to_owned(), block, shard }
    }

    /// Reads part of a record, from byte `at` of it into `range` of the buffer; both are page aligned. Nothing is
    /// verified: that is for who uses the bytes.
    pub(crate) async fn read_record(
        &self,
        entry: &Entry,
        at: usize,
        buf: PageBuf,
        range: Range<usize>,
    ) -> Result<PageBuf, StoreError> {
        debug_assert!(at.is_multiple_of(PAGE_SIZE) && range.start.is_multiple_of(PAGE_SIZE));
        let volume = self.volumes.read().get(&entry.volume).cloned();
        // Gone with its last shard.
        let volume = volume.ok_or_else(|| self.missing(entry.block, entry.shard))?;
        let (result, buf) = self.device.read(&volume.file, entry.span().start + at as u64, buf, range).await;
        result.map(|()| buf).map_err(|e| {
            self.bad_page();
            let what = format!("reading {} {} in {}", entry.block, entry.shard, entry.volume);
            tracing::error!("target {}: {what}: {e}", self.path().display());
            self.io(what, e)
        })
    }

    /// Shards of blocks above `after` that fit; see [`Index::after`].
    pub(crate) fn list(
        &self,
        after: BlockId,
        limit: usize,
        fits: impl Fn(&Entry) -> bool,
    ) -> (Vec<Entry>, bool) {
        self.index.after(after, limit, fits)
    }

    /// Whether a whole record that was read is what was put: its header, its table and every page.
    pub(crate) fn is_sound(&self, entry: &Entry, record: &[u8]) -> bool {
        let Some(volume) = self.volumes.read().get(&entry.volume).cloned() else { return false };
        let header = record::parse_header(record, volume.salt, entry.span().start);
        let same = header.is_some_and(|h| {
            (h.block, h.shard, h.policy, h.length) == (entry.block, entry.shard, entry.policy, entry.length)
        });
        same && record::verify_body(record, entry.length)
    }

    /// A page has turned out to be damaged.
    pub(crate) fn bad_page(&self) {
        self.counters.bad_pages.fetch_add(1, Ordering::Relaxed);
    }

    /// Figures for people and for the metaserver.
    pub(crate) fn stats(&self) -> Result<StoreStats, StoreError> {
        let (capacity, free) = self.space()?;
        let c = &self.counters;
        Ok(StoreStats {
            capacity,
            free,
            shards: c.shards.load(Ordering::Relaxed),
            shard_bytes: c.shard_bytes.load(Ordering::Relaxed),
            volumes: self.volumes.read().len() as u32,
            reads: c.reads.load(Ordering::Relaxed),
            puts: c.puts.load(Ordering::Relaxed),
            bad_pages: c.bad_pages.load(Ordering::Relaxed),
        })
    }

    /// Why the target takes no writes, if so.
    pub(crate) fn failure(&self) -> Option<String> {
        self.failure.lock().clone()
    }

    /// Stops taking writes. The first reason is the one that is kept.
    fn fail(&self, why: String) -> StoreError {
        let mut failure = self.failure.lock();
        if failure.is_none() {
            tracing::error!("target {} has failed: {why}", self.path().display());
        }
        StoreError::Failed { path: self.path().to_owned(), why: failure.get_or_insert(why).clone() }
    }

    fn check_alive(&self) -> Result<(), StoreError> {
        match &*self.failure.lock() {
            None => Ok(()),
            Some(why) => Err(StoreError::Failed { path: self.path().to_owned(), why: why.clone() }),
        }
    }

    fn io(&self, what: impl Into<String>, source: io::Error) -> StoreError {
        StoreError::Io { path: self.path().to_owned(), what: what.into(), source }
    }

    /// Notes a completed write or punch.
    fn wrote(&self, volume: &Volume<D::File>) {
        volume.wrote();
        self.sync_state.wrote();
    }
}
