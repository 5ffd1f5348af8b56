//! What can go wrong in a shard store, and the errno that a client sees for it.

use std::{io, path::PathBuf};

use fjordfs_proto::{BlockId, FsError, ShardNo, error::Errno};

/// A failed operation of the store. Each message names the target's folder.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// No room. Other targets may have some.
    #[error(
        "target {path} is full: {free} bytes are free and this shard needs {need} (delete files or add targets)"
    )]
    Full { path: PathBuf, free: u64, need: u64 },
    /// The store takes no more writes; reads go on.
    #[error("target {path} has failed and takes no writes: {why}")]
    Failed { path: PathBuf, why: String },
    /// Blocks are immutable and their ids are never used twice.
    #[error("target {path} already holds other bytes as {block} {shard}: block ids must not be reused")]
    Exists { path: PathBuf, block: BlockId, shard: ShardNo },
    /// It was deleted before it came.
    #[error(
        "{block} was deleted from target {path}: a block is not written again, its bytes go into a new one"
    )]
    Deleted { path: PathBuf, block: BlockId },
    /// Not stored here, or deleted meanwhile.
    #[error("target {path} has no shard {shard} of block {block}")]
    Missing { path: PathBuf, block: BlockId, shard: ShardNo },
    /// The device or its filesystem refused.
    #[error("target {path}: {what}: {source}")]
    Io { path: PathBuf, what: String, source: io::Error },
}

impl StoreError {
    fn errno(&self) -> Errno {
        match self {
            StoreError::Full { .. } => Errno::ENOSPC,
            StoreError::Exists { .. } => Errno::EEXIST,
            StoreError::Deleted { .. } => Errno::ESTALE,
            StoreError::Missing { .. } => Errno::ENOENT,
            StoreError::Failed { .. } | StoreError::Io { .. } => Errno::EIO,
        }
    }
}

impl From<StoreError> for FsError {
    fn from(e: StoreError) -> FsError {
        FsError::new(e.errno(), e.to_string())
    }
}

/// Whether an I/O error only says that there is no room.
pub(crate) fn is_no_space(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG))
}

/// Whether an I/O error tells of the device or its filesystem, rather than of a shortage in this process.
pub(crate) fn is_device_fault(e: &io::Error) -> bool {
    !matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN | libc::EINTR))
}
