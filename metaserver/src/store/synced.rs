//! How many batches of an engine in a folder are safe, kept beside the folder: see the heading "Damage" of `fjall.rs`.
//!
//! ```text
//! STORE.synced:  | count u64 | CRC-32C of it u32 |   little-endian
//! ```
//!
//! It is written after each sync of the engine's log and not synced itself, so what a power failure leaves of it is never more than
//! what is safe.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use fjordfs_proto::crc32c::crc32c;

use super::{StoreError, StoreResult};

const LEN: usize = 12;

pub(super) struct Synced {
    folder: PathBuf,
    path: PathBuf,
    file: File,
}

impl Synced {
    pub(super) fn open(folder: &Path) -> StoreResult<Synced> {
        let mut name = folder.file_name().unwrap_or_default().to_owned();
        name.push(".synced");
        let path = folder.with_file_name(name);
        let open = || {
            std::fs::create_dir_all(folder)?;
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path)
        };
        let file = open().map_err(|source| StoreError::Io { folder: folder.to_owned(), source })?;
        Ok(Synced { folder: folder.to_owned(), path, file })
    }

    /// How many batches were safe once, if that is known.
    pub(super) fn count(&self) -> StoreResult<Option<u64>> {
        let mut bytes = [0; LEN + 1];
        let read = self.file.read_at(&mut bytes, 0).map_err(|e| self.io(e))?;
        if read == 0 {
            return Ok(None);
        }
        let (count, crc) = (u64_of(&bytes[..8]), u32::try_from(u64_of(&bytes[8..LEN])).unwrap_or_default());
        if read != LEN || crc != crc32c(&bytes[..8]) {
            // A torn write of it says nothing; the engine has its own checksums.
            tracing::warn!("{} makes no sense and is written anew", self.path.display());
            return Ok(None);
        }
        Ok(Some(count))
    }

    /// Refuses a store that has counted fewer batches than were safe once.
    pub(super) fn check(&self, counted: u64) -> StoreResult<()> {
        match self.count()? {
            Some(count) if counted < count => {
                Err(self.lacks(&format!("it holds {counted} batches, and {count} were safe")))
            }
            _ => Ok(()),
        }
    }

    /// Something that was safe is not there.
    pub(super) fn lacks(&self, what: &str) -> StoreError {
        let what = format!(
            "{what}: restore it from a backup (`fjord meta restore`), or remove {} to go on with what is left, which LOSES what was done \
             last",
            self.path.display()
        );
        StoreError::Damaged { folder: self.folder.clone(), what }
    }

    /// So many batches are safe.
    pub(super) fn note(&self, count: u64) -> StoreResult<()> {
        let mut bytes = [0; LEN];
        bytes[..8].copy_from_slice(&count.to_le_bytes());
        let crc = crc32c(&bytes[..8]);
        bytes[8..].copy_from_slice(&crc.to_le_bytes());
        self.file.write_all_at(&bytes, 0).map_err(|e| self.io(e))
    }

    fn io(&self, source: io::Error) -> StoreError {
        StoreError::Io { folder: self.folder.clone(), source }
    }
}

fn u64_of(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
}
