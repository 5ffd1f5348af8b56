//! Putting a good record of a shard in the place of a damaged one, most pages of which are good.
//!
//! **In this order:** the good record is written and synced, then the index points to it, then the damaged one becomes a
//! hole. Without room for both nothing changes: what the damaged one has left can still be read.
//!
//! **Crash consistency.** One of the two is there at any moment. Where both are, recovery drops the one that was written
//! first, which is the damaged one: space is used once and in ascending order. A checkpoint that is written meanwhile and
//! names neither, or only the good one, does no harm: the place of the good one is held open until the damaged one is a
//! hole, so a scan finds it, and a checkpoint waits for that hole as for those of deletions.

use std::sync::atomic::Ordering;

use super::{NewShard, Store, device::Device, error::StoreError, index::Entry, record::record_bytes};
use crate::buffer::PageBuf;

impl<D: Device> Store<D> {
    /// Stores a shard instead of `old`, which has the same name. `record` and `page_crcs` are as those of [`Store::put`]. The
    /// new record is power-safe then; that the old one is gone, after [`Store::sync`].
    ///
    /// # Errors
    /// `Missing`, `Deleted`: the old record is not there any more. With all others it is as it was.
    pub(crate) async fn replace(
        &self,
        old: &Entry,
        new: NewShard,
        record: PageBuf,
        page_crcs: &[u8],
    ) -> Result<(), StoreError> {
        debug_assert!((old.block, old.shard) == (new.block, new.shard));
        self.check_alive()?;
        self.check_not_deleted(old.block)?;
        if self.index.get(old.block, old.shard) != Some(*old) {
            return Err(self.missing(old.block, old.shard));
        }
        // Beyond the configured capacity, if need be: for a moment, and a full target must not stay damaged.
        let bytes = record_bytes(new.length);
        self.counters.used.fetch_add(bytes, Ordering::SeqCst);
        let place = self.reserve_counted(bytes).await?;
        let (entry, _) = self.write_record(&new, &place, record, page_crcs).await?;
        self.sync().await?;
        let deleting = self.deleting.read().await;
        place.volume.add_record();
        if !self.index.replace(old, &entry) {
            place.volume.remove_record();
            self.give_up(&place).await;
            return Err(self.missing(old.block, old.shard));
        }
        let volume = self.volumes.read().get(&old.volume).cloned();
        if let Some(volume) = volume {
            if let Err(e) = self.device.punch(&volume.file, old.span()).await {
                // Two records would be back after the next start, and after a deletion one of them.
                if self.index.replace(&entry, old) {
                    place.volume.remove_record();
                    self.give_up(&place).await;
                } else {
                    place.volume.settle(place.offset);
                }
                let what = format!("punching damaged {} {} out of {}", old.block, old.shard, volume.id);
                return Err(self.io(what, e));
            }
            self.wrote(&volume);
            volume.remove_record();
            self.counters.used.fetch_sub(record_bytes(old.length), Ordering::SeqCst);
        }
        place.volume.settle(place.offset);
        self.counters.shard_bytes.fetch_add(new.length.into(), Ordering::Relaxed);
        self.counters.shard_bytes.fetch_sub(old.length.into(), Ordering::Relaxed);
        drop(deleting);
        // A deletion that came meanwhile has looked for the old one.
        if let Err(e) = self.check_not_deleted(entry.block) {
            self.delete_one(&entry).await?;
            return Err(e);
        }
        Ok(())
    }
}
