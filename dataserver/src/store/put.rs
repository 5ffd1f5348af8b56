//! Storing a shard: space, one write, index.
//!
//! PERFORMANCE-CRITICAL. The data is written from the buffer it was received into; keep it that way.
//!
//! **Retries.** A put of what is already there, with the same bytes, succeeds: clients repeat puts after a lost
//! connection. With other bytes it is refused, for a block id is used once.
//!
//! **Cancellation.** A put that is dropped halfway (only when the server is going down) keeps its place reserved, so that
//! the next start scans it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use fjordfs_proto::{BlockId, PAGE_SIZE, ShardNo};

use super::{
    Store,
    device::Device,
    error::{StoreError, is_device_fault, is_no_space},
    index::{Entry, VOLUME_ID_MAX, VOLUME_PAGES_MAX},
    record::{RecordHeader, fill_header, fill_table, parse_table, record_bytes, table_at, table_pages},
    volume::{Volume, VolumeId, VolumeLabel},
};
use crate::{blocking, buffer::PageBuf};

const PAGE: u64 = PAGE_SIZE as u64;

/// A short volume is not made smaller than this while there is room for it, bytes.
const VOLUME_SIZE_MIN: u64 = 32 << 20;

/// What a put says about its shard.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewShard {
    pub(crate) block: BlockId,
    pub(crate) shard: ShardNo,
    pub(crate) policy: u16,
    /// Bytes, from 1 to `BLOCK_SIZE_MAX`.
    pub(crate) length: u32,
}

/// A reserved place for a record.
pub(super) struct Place<F> {
    pub(super) volume: Arc<Volume<F>>,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

impl<D: Device> Store<D> {
    /// Stores a shard whose data lies at byte 4096 of `record` and matches `page_crcs`. The buffer must hold
    /// `record_pages(length)` pages.
    ///
    /// # Errors
    /// `Full`: put elsewhere. `Exists`, `Deleted`: never the same id again. `Failed`, `Io`: put elsewhere.
    pub(crate) async fn put(
        &self,
        new: NewShard,
        record: PageBuf,
        page_crcs: &[u8],
    ) -> Result<(), StoreError> {
        self.check_alive()?;
        // Before anything is written: a crash would bring the shard back, and forget that it was deleted.
        self.check_not_deleted(new.block)?;
        if let Some(old) = self.index.get(new.block, new.shard) {
            return self.same_or_refused(&old, &new, record, page_crcs).await;
        }
        let place = self.reserve(record_bytes(new.length)).await?;
        let (entry, record) = self.write_record(&new, &place, record, page_crcs).await?;
        place.volume.add_record();
        if let Err(old) = self.index.insert(&entry) {
            // The same put came twice at the same moment, and the other one was quicker.
            place.volume.remove_record();
            self.give_up(&place).await;
            return self.same_or_refused(&old, &new, record, page_crcs).await;
        }
        place.volume.settle(place.offset);
        self.counters.shards.fetch_add(1, Ordering::Relaxed);
        self.counters.shard_bytes.fetch_add(u64::from(new.length), Ordering::Relaxed);
        self.counters.puts.fetch_add(1, Ordering::Relaxed);
        // A deletion that came meanwhile has not seen it.
        if let Err(e) = self.check_not_deleted(new.block) {
            self.delete_one(&entry).await?;
            return Err(e);
        }
        Ok(())
    }

    /// Writes a record to its place, which is given up when that fails. Returns its entry, not yet in the index.
    pub(super) async fn write_record(
        &self,
        new: &NewShard,
        place: &Place<D::File>,
        mut record: PageBuf,
        page_crcs: &[u8],
    ) -> Result<(Entry, PageBuf), StoreError> {
        let NewShard { block, shard, policy, length } = *new;
        fill_table(&mut record, length, page_crcs);
        let header = RecordHeader { block, shard, policy, length, birth_ms: now_ms() };
        fill_header(&mut record, &header, place.volume.salt, place.offset);
        let (result, record) =
            self.device.write(&place.volume.file, place.offset, record, 0..place.bytes as usize).await;
        self.wrote(&place.volume);
        if let Err(e) = result {
            self.give_up(place).await;
            return Err(self.write_failure(
                format!("writing {block} {shard} to {}", place.volume.id),
                e,
                place.bytes,
            ));
        }
        let page = (place.offset / PAGE) as u32;
        Ok((Entry { block, shard, policy, length, volume: place.volume.id, page }, record))
    }

    pub(super) fn check_not_deleted(&self, block: BlockId) -> Result<(), StoreError> {
        let deleted = || StoreError::Deleted { path: self.path().to_owned(), block };
        if self.deleted.contains(block) { Err(deleted()) } else { Ok(()) }
    }

    /// Compares a put with what is stored under its name.
    async fn same_or_refused(
        &self,
        old: &Entry,
        new: &NewShard,
        scratch: PageBuf,
        page_crcs: &[u8],
    ) -> Result<(), StoreError> {
        if (old.length, old.policy) == (new.length, new.policy) {
            let table_len = table_pages(old.length) * PAGE_SIZE;
            let table = self.read_record(old, table_at(old.length), scratch, 0..table_len).await?;
            if parse_table(&table[..table_len], old.length) == Some(page_crcs) {
                return Ok(());
            }
        }
        Err(StoreError::Exists { path: self.path().to_owned(), block: new.block, shard: new.shard })
    }

    /// Frees the place of a record that is not to be believed.
    pub(super) async fn give_up(&self, place: &Place<D::File>) {
        let span = place.offset..place.offset + place.bytes;
        match self.device.punch(&place.volume.file, span).await {
            Ok(()) => {
                self.wrote(&place.volume);
                place.volume.settle(place.offset);
                self.counters.used.fetch_sub(place.bytes, Ordering::SeqCst);
            }
            // The place stays reserved: the next start will look at it again.
            Err(e) => tracing::warn!("target {}: dropping an unfinished put: {e}", self.path().display()),
        }
    }

    async fn reserve(&self, bytes: u64) -> Result<Place<D::File>, StoreError> {
        let max = self.options.capacity_max.unwrap_or(u64::MAX);
        let within = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= max);
        if self.counters.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, within).is_err() {
            return Err(self.full(bytes));
        }
        self.reserve_counted(bytes).await
    }

    /// Reserves what `used` counts already.
    pub(super) async fn reserve_counted(&self, bytes: u64) -> Result<Place<D::File>, StoreError> {
        let result = self.reserve_in_volume(bytes).await;
        if result.is_err() {
            self.counters.used.fetch_sub(bytes, Ordering::SeqCst);
        }
        result
    }

    async fn reserve_in_volume(&self, bytes: u64) -> Result<Place<D::File>, StoreError> {
        let try_active = || {
            let volume = self.active.read().clone()?;
            let offset = volume.reserve(bytes)?;
            Some(Place { volume, offset, bytes })
        };
        loop {
            if let Some(place) = try_active() {
                return Ok(place);
            }
            let mut next_id = self.growing.lock().await;
            // Another put may have made a volume while this one waited.
            if let Some(place) = try_active() {
                return Ok(place);
            }
            self.grow(&mut next_id, bytes).await?;
        }
    }

    /// Begins a new volume with room for `bytes`. The old one stays active when there is no space for a new one:
    /// smaller records may still fit there.
    async fn grow(&self, next_id: &mut u32, bytes: u64) -> Result<(), StoreError> {
        let (id, salt) = (VolumeId(*next_id), uuid::Uuid::new_v4().as_u64_pair().0);
        if id.0 > VOLUME_ID_MAX {
            return Err(self.fail("all volume ids have been used".to_owned()));
        }
        let need = bytes + PAGE;
        let size = self.new_volume_size(need)?;
        let (device, uuid) = (self.device.clone(), self.uuid);
        let made = blocking::run(move || make_volume(&*device, uuid, id, salt, size, need)).await;
        // Also when it failed: whatever was left behind keeps its id.
        *next_id += 1;
        let made = made.map_err(|e| self.io(format!("making {id}"), e))?;
        let (file, size) = match made {
            Ok(made) => made,
            Err(e) => return Err(self.write_failure(format!("making {id}"), e, bytes)),
        };
        let volume = Arc::new(Volume::new(id, salt, Arc::new(file), size, PAGE));
        self.volumes.write().insert(id, volume.clone());
        let old = self.active.write().replace(volume);
        if let Some(old) = old {
            let tail = old.close();
            if !tail.is_empty() {
                match self.device.punch(&old.file, tail).await {
                    Ok(()) => self.wrote(&old),
                    Err(e) => {
                        let path = self.path().display();
                        tracing::warn!("target {path}: the unused end of {} stays allocated: {e}", old.id);
                    }
                }
            }
        }
        Ok(())
    }

    /// How large a new volume should be: the configured size where there is plenty of room, else a part of what is left,
    /// so that targets which share a filesystem share its end too.
    fn new_volume_size(&self, need: u64) -> Result<u64, StoreError> {
        let free = self.device.space().map_err(|e| self.io("asking for free space", e))?;
        let left = free.free.saturating_sub(reserve_bytes(free.total));
        let mut size = self.options.volume_size.min((left / 4).max(left.min(VOLUME_SIZE_MIN)));
        if let Some(max) = self.options.capacity_max {
            // `used` counts the record that is waiting already.
            let rest = max.saturating_sub(self.counters.used.load(Ordering::SeqCst));
            size = size.min(rest.saturating_add(need));
        }
        let size = size.max(need).min(VOLUME_PAGES_MAX * PAGE) / PAGE * PAGE;
        if size > left { Err(self.full(need)) } else { Ok(size) }
    }

    /// Capacity and free space, bytes.
    pub(super) fn space(&self) -> Result<(u64, u64), StoreError> {
        let device = self.device.space().map_err(|e| self.io("asking for free space", e))?;
        let room = self.active.read().as_ref().map_or(0, |v| v.room());
        let free = device.free.saturating_sub(reserve_bytes(device.total)) + room;
        Ok(match self.options.capacity_max {
            None => (device.total, free),
            Some(max) => {
                let rest = max.saturating_sub(self.counters.used.load(Ordering::SeqCst));
                (device.total.min(max), free.min(rest))
            }
        })
    }

    /// What a failed write means: no room, a shortage that passes, or a target that has failed.
    fn write_failure(&self, what: String, e: std::io::Error, need: u64) -> StoreError {
        if is_no_space(&e) {
            self.full(need)
        } else if is_device_fault(&e) {
            self.fail(format!("{what}: {e}"))
        } else {
            self.io(what, e)
        }
    }

    fn full(&self, need: u64) -> StoreError {
        let free = self.space().map_or(0, |(_, free)| free);
        StoreError::Full { path: self.path().to_owned(), free, need }
    }
}

/// What is left alone on the filesystem: checkpoints (two at a time, below one percent of the records) and labels.
fn reserve_bytes(total: u64) -> u64 {
    (total / 100).clamp(4 << 20, 4 << 30)
}

/// Makes and labels a volume file, as large as there is room for between `need` and `size`.
fn make_volume<D: Device>(
    device: &D,
    uuid: [u8; 16],
    id: VolumeId,
    salt: u64,
    mut size: u64,
    need: u64,
) -> std::io::Result<(D::File, u64)> {
    let file = loop {
        match device.create(id, size) {
            Err(e) if is_no_space(&e) && size > need => size = (size / 2 / PAGE * PAGE).max(need),
            result => break result?,
        }
    };
    let mut page = PageBuf::unpooled(1);
    VolumeLabel { id, uuid, salt, size, created_ms: now_ms() }.encode(&mut page);
    let labelled = device
        .write_now(&file, 0, &page)
        .and_then(|()| device.sync_now(&file))
        .and_then(|()| device.sync_folder());
    if let Err(e) = labelled {
        // The reason to report is the first one; a leftover without a label is removed at the next start.
        let _ = device.remove(id);
        return Err(e);
    }
    Ok((file, size))
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
