//! Deleting shards: out of the index, then a hole.
//!
//! The hole is the record of the deletion: recovery believes neither an entry nor a header where there is one. So a
//! deletion is power-safe when the volume has been synced, and the caller syncs before it tells anyone.

use std::{collections::BTreeMap, sync::atomic::Ordering};

use fjordfs_proto::BlockId;

use futures_util::{StreamExt, stream};

use super::{Store, device::Device, error::StoreError, index::Entry};

/// Holes punched at the same time by one call.
const AT_ONCE: usize = 16;

/// What has become of blocks that were to be deleted.
#[derive(Default)]
pub(crate) struct Deletion {
    /// Shards that are gone.
    pub(crate) shards: u32,
    /// Blocks with a shard whose hole could not be punched: it is unchanged.
    pub(crate) kept: BTreeMap<BlockId, StoreError>,
}

impl<D: Device> Store<D> {
    /// Deletes every shard of these blocks; unknown blocks are no error. Returns how many shards there were.
    /// Power-safe after [`Store::sync`].
    ///
    /// # Errors
    /// When a hole cannot be punched: that shard is unchanged, the others are deleted.
    pub(crate) async fn delete(&self, blocks: &[BlockId]) -> Result<u32, StoreError> {
        let Deletion { shards, kept } = self.delete_each(blocks).await?;
        kept.into_values().next().map_or(Ok(shards), Err)
    }

    /// As [`Store::delete`], for who wants to know which of the blocks are gone although others are not.
    ///
    /// # Errors
    /// When the target has failed: nothing is deleted.
    pub(crate) async fn delete_each(&self, blocks: &[BlockId]) -> Result<Deletion, StoreError> {
        self.check_alive()?;
        // First: a put that is under way finds it, or is found here.
        self.deleted.add(blocks);
        let mut deletion = Deletion::default();
        loop {
            self.delete_all(&self.left(blocks, &deletion), &mut deletion).await;
            // What others had taken out before has its hole now, or is back.
            drop(self.deleting.write().await);
            if self.left(blocks, &deletion).is_empty() {
                return Ok(deletion);
            }
        }
    }

    /// No deletion ends before this is dropped.
    #[cfg(test)]
    pub(crate) fn hold_deletions(&self) -> tokio::sync::RwLockReadGuard<'_, ()> {
        self.deleting.try_read().unwrap()
    }

    fn left(&self, blocks: &[BlockId], deletion: &Deletion) -> Vec<Entry> {
        let left = blocks.iter().filter(|block| !deletion.kept.contains_key(block));
        left.flat_map(|block| self.index.of_block(*block)).collect()
    }

    async fn delete_all(&self, entries: &[Entry], deletion: &mut Deletion) {
        let delete = async |entry: &Entry| (entry.block, self.delete_one(entry).await);
        let mut deletions = stream::iter(entries).map(delete).buffer_unordered(AT_ONCE);
        while let Some((block, result)) = deletions.next().await {
            match result {
                Ok(was_there) => deletion.shards += u32::from(was_there),
                Err(e) => drop(deletion.kept.insert(block, e)),
            }
        }
    }

    /// Deletes one shard and leaves the others of its block alone.
    ///
    /// # Errors
    /// When the hole cannot be punched: the shard is unchanged.
    pub(crate) async fn drop_shard(&self, entry: &Entry) -> Result<(), StoreError> {
        self.check_alive()?;
        self.delete_one(entry).await.map(|_| ())
    }

    pub(super) async fn delete_one(&self, entry: &Entry) -> Result<bool, StoreError> {
        let volume = self.volumes.read().get(&entry.volume).cloned();
        let _deleting = self.deleting.read().await;
        if !self.index.remove(entry) {
            return Ok(false);
        }
        if let Some(volume) = volume {
            let span = entry.span();
            let bytes = span.end - span.start;
            if let Err(e) = self.device.punch(&volume.file, span).await {
                // Half deleted must not be: the record would be back after the next start. Unless it has been put
                // again meanwhile, and then there is a whole record anyway.
                if self.index.insert(entry).is_err() {
                    tracing::warn!(
                        "target {}: {} was put again while its deletion failed",
                        self.path().display(),
                        entry.block
                    );
                }
                return Err(
                    self.io(format!("punching {} {} out of {}", entry.block, entry.shard, volume.id), e)
                );
            }
            self.wrote(&volume);
            volume.remove_record();
            self.counters.used.fetch_sub(bytes, Ordering::SeqCst);
        }
        self.counters.shards.fetch_sub(1, Ordering::Relaxed);
        self.counters.shard_bytes.fetch_sub(u64::from(entry.length), Ordering::Relaxed);
        Ok(true)
    }
}
