//! Deleting shards: out of the index, then a hole.
//!
//! The hole is the record of the deletion: recovery believes neither an entry nor a header where there is one. So a
//! deletion is power-safe when the volume has been synced, and the caller syncs before it tells anyone.

use std::sync::atomic::Ordering;

use fjordfs_proto::BlockId;

use futures_util::{StreamExt, stream};

use super::{Store, device::Device, error::StoreError, index::Entry};

/// Holes punched at the same time by one call.
const AT_ONCE: usize = 16;

impl<D: Device> Store<D> {
    /// Deletes every shard of these blocks; unknown blocks are no error. Returns how many shards there were.
    /// Power-safe after [`Store::sync`].
    ///
    /// # Errors
    /// When a hole cannot be punched: that shard is unchanged, the others are deleted.
    pub(crate) async fn delete(&self, blocks: &[BlockId]) -> Result<u32, StoreError> {
        self.check_alive()?;
        // First: a put that is under way finds it, or is found here.
        self.deleted.add(blocks);
        let mut deleted = 0;
        loop {
            let entries: Vec<Entry> = blocks.iter().flat_map(|block| self.index.of_block(*block)).collect();
            deleted += self.delete_all(&entries).await?;
            // What others had taken out before has its hole now, or is back.
            drop(self.deleting.write().await);
            if blocks.iter().all(|block| self.index.of_block(*block).is_empty()) {
                return Ok(deleted);
            }
        }
    }

    async fn delete_all(&self, entries: &[Entry]) -> Result<u32, StoreError> {
        let mut deletions =
            stream::iter(entries).map(|entry| self.delete_one(entry)).buffer_unordered(AT_ONCE);
        let (mut deleted, mut failure) = (0, Ok(()));
        while let Some(result) = deletions.next().await {
            match result {
                Ok(was_there) => deleted += u32::from(was_there),
                Err(e) => failure = Err(e),
            }
        }
        failure.map(|()| deleted)
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
