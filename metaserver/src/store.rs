//! What the metadata service asks of a storage engine.
//!
//! The contract is small enough for an embedded engine, a replicated key-value store and a relational database
//! alike: point reads, ordered scans, and atomic batches that apply only while the caller owns the store. There is no
//! concurrency control beyond that: one executor at a time owns the keys, proven by its [`Fence`].
//!
//! # Crash consistency
//! A batch is applied whole or not at all. Of an embedded engine: when [`MetaStore::commit`] returns, the batch survives `kill -9` of this
//! process; when a later [`MetaStore::sync`] returned a ticket not below the batch's, it survives power failure. Of an engine
//! across a network ([`Late`]) a batch survives both once it is acknowledged, and before nobody may be told of it.
//!
//! # Errors
//! After a failed `commit` or `sync` nobody can know what the device holds. An engine answers every later `commit`
//! with an error; reads go on and show what was committed before.

pub(crate) mod bulk;
mod fjall;
mod memory;
mod remote;
mod synced;
mod url;

#[cfg(test)]
pub(crate) mod conformance;

use std::{
    io,
    ops::Range,
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use bytes::Bytes;
use fjordfs_proto::{FsError, error::Errno, pb::meta::StoreReport};
use futures_util::future::BoxFuture;

pub use fjall::{FjallOptions, FjallStore};
pub use memory::MemoryStore;
pub use remote::RemoteStore;
pub use url::{PASSWORD_VARIABLE, Place};

/// The smallest key above `key`.
pub(crate) fn successor(key: &[u8]) -> Vec<u8> {
    let mut next = key.to_vec();
    next.push(0);
    next
}

/// Proof of ownership: a batch applies only while this is the newest one given out.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Fence(pub u64);

/// Position of a batch in the order of commits, to ask for its durability.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Ticket(pub u64);

/// Direction of a scan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// Smallest key first.
    Ascending,
    /// Largest key first.
    Descending,
}

/// A key with its value.
pub type Pair = (Vec<u8>, Bytes);

/// Writes that are applied together. A key occurs at most once.
#[derive(Clone, Default, Debug)]
pub struct Batch {
    /// Key, and its new value or `None` to remove it.
    pub writes: Vec<(Vec<u8>, Option<Bytes>)>,
}

/// Why the engine could not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The device is full.
    #[error("no space left for the metadata in {}: free some space there, then restart the metaserver", folder.display())]
    NoSpace {
        /// The engine's folder.
        folder: PathBuf,
    },
    /// The device failed, or failed before.
    #[error("metadata store in {}: {source}", folder.display())]
    Io {
        /// The engine's folder.
        folder: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Somebody else took the store over.
    #[error(
        "another metaserver took over the store (fence {current:?}, ours is {ours:?}): this one must stop"
    )]
    Fenced {
        /// The caller's fence.
        ours: Fence,
        /// The one in force.
        current: Fence,
    },
    /// The engine found damage.
    #[error("metadata store in {} is damaged: {what}", folder.display())]
    Damaged {
        /// The engine's folder.
        folder: PathBuf,
        /// What it said.
        what: String,
    },
    /// The store's address is wrong, or the store refuses this program.
    #[error("store {text}: {why}")]
    Place {
        /// As the user wrote it, without a password.
        text: String,
        /// What is wrong.
        why: String,
    },
    /// The engine in a folder does not do without.
    #[error(
        "the working directory of this process has been removed: cd to one that exists, and start it again"
    )]
    NoWorkingDirectory,
    /// Another process has it open.
    #[error("metadata store in {} is open in another process", folder.display())]
    Locked {
        /// The engine's folder.
        folder: PathBuf,
    },
}

/// Result of an engine call.
pub type StoreResult<T> = Result<T, StoreError>;

impl From<&StoreError> for FsError {
    fn from(e: &StoreError) -> FsError {
        let errno = match e {
            StoreError::NoSpace { .. } => Errno::ENOSPC,
            _ => Errno::EIO,
        };
        FsError::new(errno, e.to_string())
    }
}

/// What can be read: a store, or a store as it was.
pub trait Reading {
    /// The value of a key.
    ///
    /// # Errors
    /// When the engine fails.
    fn get(&self, key: &[u8]) -> StoreResult<Option<Bytes>>;

    /// The first `limit` pairs of a range, smallest key first.
    ///
    /// # Errors
    /// When the engine fails.
    fn scan(&self, range: Range<&[u8]>, limit: usize) -> StoreResult<Vec<Pair>>;
}

/// A store that nobody writes to meanwhile.
pub struct Idle<'a>(pub &'a dyn MetaStore);

impl Reading for Idle<'_> {
    fn get(&self, key: &[u8]) -> StoreResult<Option<Bytes>> {
        self.0.get(key)
    }

    fn scan(&self, range: Range<&[u8]>, limit: usize) -> StoreResult<Vec<Pair>> {
        self.0.scan(range, Order::Ascending, limit)
    }
}

/// A store as it was at one moment between two batches, whatever is committed since.
pub type Snapshot = Box<dyn Reading + Send>;

/// An ordered key-value engine. Keys that begin with a zero byte belong to the engine.
pub trait MetaStore: Send + Sync + 'static {
    /// The value of a key.
    fn get(&self, key: &[u8]) -> StoreResult<Option<Bytes>>;

    /// The first `limit` pairs of a range in the given order.
    fn scan(&self, range: Range<&[u8]>, order: Order, limit: usize) -> StoreResult<Vec<Pair>>;

    /// Applies a batch atomically, if `fence` is in force. Readers see it when this returns.
    fn commit(&self, batch: Batch, fence: Fence) -> StoreResult<Ticket>;

    /// Makes every batch committed so far survive power failure. The ticket says up to which. Does not hold up
    /// commits on other threads for longer than it must.
    fn sync(&self) -> StoreResult<Ticket>;

    /// Takes ownership: the fence returned is newer than all before, which are void from now on.
    fn take_over(&self) -> StoreResult<Fence>;

    /// For people: `fjord status`.
    fn name(&self) -> &'static str;

    /// Everything as it is now. `None`: the engine cannot keep that while commits go on.
    fn snapshot(&self) -> StoreResult<Option<Snapshot>> {
        Ok(None)
    }

    /// A sync that holds up no thread while it waits; then this is used instead of [`MetaStore::sync`] while the metaserver runs, and
    /// the whole store is read in its runtime, too: such an engine answers at once.
    fn sync_waiting(&self) -> Option<BoxFuture<'static, StoreResult<Ticket>>> {
        None
    }

    /// The run of the kernel that this store lives in, if what was committed and not synced ends with it.
    fn boot(&self) -> Option<u64> {
        None
    }

    /// An engine across a network says here how far it is.
    fn late(&self) -> Option<&dyn Late> {
        None
    }
}

/// Whether it has no records but the engine's own.
pub(crate) fn is_empty(store: &dyn MetaStore) -> StoreResult<bool> {
    let all = crate::keys::everything();
    Ok(store.scan(&all.start..&all.end, Order::Ascending, 1)?.is_empty())
}

/// Pairs of one page of [`each_page`].
const PAGE: usize = 1024;

/// Calls `f` with all pairs of a range, some at a time and in order; whatever is written meanwhile is seen or not.
///
/// # Errors
/// The engine's, and those of `f`, which end it.
pub fn each_page<E: From<StoreError>>(
    store: &dyn MetaStore,
    range: Range<Vec<u8>>,
    mut f: impl FnMut(Vec<Pair>) -> Result<(), E>,
) -> Result<(), E> {
    let Range { mut start, end } = range;
    loop {
        let page = store.scan(&start..&end, Order::Ascending, PAGE)?;
        let more = page.len() == PAGE;
        let Some((last, _)) = page.last() else { return Ok(()) };
        start = successor(last);
        f(page)?;
        if !more {
            return Ok(());
        }
    }
}

/// An engine whose `commit` returns before the batch is safe, and whose ownership others may want.
pub trait Late {
    /// Calls `notify` whenever the answers below may have changed; from a thread that must not be held up.
    fn watch(&self, notify: Box<dyn Fn() + Send + Sync>);

    /// Up to which commit batches survive the loss of this host.
    ///
    /// # Errors
    /// When this process does not own the store any more.
    fn acknowledged(&self) -> StoreResult<Ticket>;

    /// Whether nobody else can own the store at this moment. While it is false, nobody may be answered.
    fn is_owner(&self) -> bool;

    /// Like [`MetaStore::sync`], for so long at most.
    ///
    /// # Errors
    /// When it took longer: the store is of no use to this process any more.
    fn settle(&self, patience: Duration) -> StoreResult<Ticket>;

    /// Writes that a batch should have at most. One of more takes several times the work.
    fn batch_writes(&self) -> usize;

    /// Waits until the present owner has been silent for so long that it answers nobody, or has let go; false when
    /// `stop` was set before.
    /// Meanwhile this process is known to others as a standby called `name`.
    fn await_silence(&self, stop: Arc<AtomicBool>, name: Option<&str>) -> StoreResult<bool>;

    /// Calls `then` with how the store is, as far as that shows within some seconds; from a thread that must not be held up.
    fn report(&self, then: Box<dyn FnOnce(StoreReport) + Send>);

    /// Lets go of the store, after everything committed: the next owner need not wait.
    fn release(&self) -> StoreResult<()>;
}
