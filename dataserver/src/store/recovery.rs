//! From files to an index: load the checkpoint, then scan what is younger.
//!
//! **Crash consistency.** What must hold afterwards, whatever was lost of the writes that were never synced:
//! - every shard whose put was covered by a sync is there;
//! - no shard whose deletion was covered by a sync is there: its record is a hole, and a hole is no header;
//! - nothing is believed that does not verify. A checkpoint's entry is believed where its header is not a hole (the
//!   volumes were synced before the checkpoint became current). A younger record may be torn, so its header, its table
//!   and every data page are checked.
//!
//! **Why the scan goes page by page.** Several puts are in flight at once, and any subset of their pages can be missing.
//! A torn record must not hide the ones after it, and its length may be unknown, so after anything that does not verify
//! the scan goes on at the next page, up to the end of the file. It cannot mistake a data page for a header (see
//! `record.rs`). Preallocated space is skipped by asking the filesystem for holes, or else is read as zeros.
//!
//! What the scan found and did not believe becomes a hole, and every scanned volume is synced, before anything is
//! written behind it: so a later crash cannot bring an old header back to light.
//!
//! **After a kill** the holes and records of the process before are all seen, though the device may not have them yet.
//! Records are power-safe once they are believed: those of a checkpoint were synced before it, the others by the scan.
//! Holes are by the first sync, for which every volume counts as written to ([`super::Store::open`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
    sync::Arc,
};

use fjordfs_proto::PAGE_SIZE;

use super::{
    checkpoint::{Checkpoint, CheckpointVolume},
    device::Device,
    error::StoreError,
    index::{Entry, Index, VOLUME_PAGES_MAX},
    record::{RecordHeader, parse_header, record_bytes, record_pages, verify_body},
    volume::{Volume, VolumeId, VolumeLabel},
};
use crate::buffer::PageBuf;

const PAGE: u64 = PAGE_SIZE as u64;

/// Most pages read at a time while scanning: the record of a whole block fits.
const WINDOW_PAGES_MAX: usize = 4112;

/// What recovery found.
pub(super) struct Recovered<F> {
    pub(super) index: Index,
    pub(super) volumes: BTreeMap<VolumeId, Arc<Volume<F>>>,
    /// Where appending goes on, if anywhere.
    pub(super) active: Option<Arc<Volume<F>>>,
    /// Lowest volume id that was never used.
    pub(super) next_volume: u32,
    pub(super) shards: u64,
    /// Of data.
    pub(super) shard_bytes: u64,
    /// Of whole records.
    pub(super) used: u64,
}

/// An opened volume on its way.
struct Opened<F> {
    file: Arc<F>,
    salt: u64,
    size: u64,
    /// Where the scan begins.
    position: u64,
    /// Where it is no hole; `None` when the filesystem does not say.
    data: Option<Vec<Range<u64>>>,
    /// Label and size are as they should be.
    sound: bool,
}

impl<F> Opened<F> {
    /// Whether `offset` is no hole; `None` when the filesystem does not say.
    fn has_data_at(&self, offset: u64) -> Option<bool> {
        let data = self.data.as_ref()?;
        let after = data.partition_point(|r| r.start <= offset);
        Some(after > 0 && data[after - 1].end > offset)
    }

    /// Whether some part of `span` is no hole, as far as the filesystem says.
    fn has_data_in(&self, span: &Range<u64>) -> bool {
        let Some(data) = &self.data else { return true };
        data.get(data.partition_point(|r| r.end <= span.start)).is_some_and(|r| r.start < span.end)
    }
}

pub(super) fn recover<D: Device>(device: &D, uuid: [u8; 16]) -> Result<Recovered<D::File>, StoreError> {
    Recovery { device, uuid, opened: BTreeMap::new(), index: Index::new(), next_volume: 1 }.run()
}

struct Recovery<'a, D: Device> {
    device: &'a D,
    uuid: [u8; 16],
    opened: BTreeMap<VolumeId, Opened<D::File>>,
    index: Index,
    next_volume: u32,
}

impl<D: Device> Recovery<'_, D> {
    fn run(mut self) -> Result<Recovered<D::File>, StoreError> {
        let raw = self.device.load_checkpoint().map_err(|e| self.io("reading the index checkpoint", e))?;
        let checkpoint = raw.as_ref().and_then(|raw| Checkpoint::parse(raw, &self.uuid));
        if raw.is_some() && checkpoint.is_none() {
            tracing::warn!(
                "target {}: the index checkpoint does not verify; scanning every volume instead",
                self.device.path().display()
            );
            // It may read well next time, and what it says will not be true any more then.
            self.device
                .discard_checkpoint()
                .map_err(|e| self.io("removing the damaged index checkpoint", e))?;
        }
        let known: BTreeMap<VolumeId, CheckpointVolume> =
            checkpoint.iter().flat_map(|c| &c.head.volumes).map(|v| (v.id, *v)).collect();
        self.next_volume = checkpoint.as_ref().map_or(1, |c| c.head.next_volume);
        self.open_volumes(&known)?;
        if let Some(checkpoint) = &checkpoint {
            self.take_checkpoint(checkpoint)?;
        }
        let newest = self.opened.keys().next_back().copied();
        let ids: Vec<VolumeId> = self.opened.keys().copied().collect();
        let mut next = BTreeMap::new();
        for id in ids {
            next.insert(id, self.scan_volume(id, newest == Some(id))?);
        }
        self.finish(next)
    }

    fn io(&self, what: impl Into<String>, source: io::Error) -> StoreError {
        StoreError::Io { path: self.device.path().to_owned(), what: what.into(), source }
    }

    fn open_volumes(&mut self, known: &BTreeMap<VolumeId, CheckpointVolume>) -> Result<(), StoreError> {
        let path = self.device.path().display();
        let ids = self.device.volumes().map_err(|e| self.io("listing volumes", e))?;
        let mut page = PageBuf::unpooled(1);
        for id in ids {
            self.next_volume = self.next_volume.max(id.0.saturating_add(1));
            let (file, size) = self.device.open(id).map_err(|e| self.io(format!("opening {id}"), e))?;
            page.fill(0);
            self.device
                .read_now(&file, 0, &mut page)
                .map_err(|e| self.io(format!("reading the label of {id}"), e))?;
            let label = VolumeLabel::decode(&page);
            let noted = known.get(&id);
            let (salt, full_size) = match (label, noted) {
                (Some(label), _) if label.uuid != self.uuid || label.id != id => {
                    tracing::error!(
                        "target {path}: {id} belongs to another target or place; it is left alone"
                    );
                    continue;
                }
                (Some(label), _) => (label.salt, label.size),
                (None, Some(noted)) => {
                    tracing::error!(
                        "target {path}: the label of {id} is damaged; only shards of the index are served"
                    );
                    (noted.salt, noted.size)
                }
                (None, None) if page.iter().all(|b| *b == 0) => {
                    // Made, but not yet used when the server died: the label is synced before the first record.
                    self.device.remove(id).map_err(|e| self.io(format!("removing unfinished {id}"), e))?;
                    continue;
                }
                (None, None) => {
                    tracing::error!(
                        "target {path}: {id} has no readable label; it is left alone, its shards are lost here"
                    );
                    continue;
                }
            };
            let size = size.min(full_size).min(VOLUME_PAGES_MAX * PAGE) / PAGE * PAGE;
            if size < full_size {
                tracing::error!("target {path}: {id} has been truncated to {size} of {full_size} bytes");
            }
            let data = self.device.data_ranges(&file).map_err(|e| self.io(format!("mapping {id}"), e))?;
            // The label is no record, or it would be dropped as a torn one.
            let noted = noted.map_or(PAGE, |n| n.position.max(PAGE) / PAGE * PAGE);
            let position = if label.is_some() { noted } else { size }.min(size);
            let sound = label.is_some() && size == full_size;
            self.opened.insert(id, Opened { file: Arc::new(file), salt, size, position, data, sound });
        }
        for lost in known.keys().filter(|id| !self.opened.contains_key(id)) {
            tracing::error!("target {path}: {lost} is missing; its shards are lost here");
        }
        Ok(())
    }

    /// Believes the checkpoint's entries, except where the header is a hole now: that shard has been deleted. A
    /// deletion that was cut short is completed. Nothing else is dropped here: a page that has rotted must not cost the
    /// rest of its shard.
    fn take_checkpoint(&mut self, checkpoint: &Checkpoint<'_>) -> Result<(), StoreError> {
        let (mut lost, mut changed, mut page) = (0u64, BTreeSet::new(), PageBuf::unpooled(1));
        for entry in checkpoint.entries() {
            let span = entry.span();
            let Some(volume) = self.opened.get(&entry.volume) else {
                lost += 1;
                continue;
            };
            // The first page is the label's: a shard that claims it must not be dropped together with it.
            if span.start < PAGE || span.end > volume.size {
                lost += 1;
                continue;
            }
            if span.end > volume.position {
                // For the scan to find: were it known twice, one of the two would be dropped, and they are the same bytes.
                continue;
            }
            let present = match volume.has_data_at(span.start) {
                Some(present) => present,
                None => {
                    let read = self.device.read_now(&volume.file, span.start, &mut page);
                    read.map_err(|e| self.io(format!("reading a header of {}", entry.volume), e))?;
                    page.iter().any(|b| *b != 0)
                }
            };
            if !present && volume.has_data_in(&span) {
                let punched = self.device.punch_now(&volume.file, span);
                punched.map_err(|e| self.io(format!("completing a deletion in {}", entry.volume), e))?;
                changed.insert(entry.volume);
            }
            if present && self.index.insert(&entry).is_err() {
                tracing::error!("the index checkpoint names {} {} twice", entry.block, entry.shard);
            }
        }
        for id in changed {
            let file = &self.opened[&id].file;
            self.device.sync_now(file).map_err(|e| self.io(format!("syncing {id}"), e))?;
        }
        if lost > 0 {
            let path = self.device.path().display();
            tracing::error!(
                "target {path}: {lost} shards lie in missing or truncated volumes; they are read from other copies"
            );
        }
        Ok(())
    }

    /// Finds the records after the checkpoint. Returns where appending may go on; the volume's size when nowhere.
    fn scan_volume(&self, id: VolumeId, newest: bool) -> Result<u64, StoreError> {
        let Some(v) = self.opened.get(&id) else { return Ok(0) };
        if v.position >= v.size {
            return Ok(v.size);
        }
        let mut scan = Scan {
            device: self.device,
            volume: v,
            window: PageBuf::unpooled(WINDOW_PAGES_MAX.min(((v.size - v.position) / PAGE) as usize)),
            window_at: 0,
            window_len: 0,
            records: Vec::new(),
            garbage: Vec::new(),
        };
        scan.run();
        let (records, mut garbage) = (scan.records, scan.garbage);
        let mut end = v.position;
        for (offset, header) in records {
            let entry = Entry {
                block: header.block,
                shard: header.shard,
                policy: header.policy,
                length: header.length,
                volume: id,
                page: (offset / PAGE) as u32,
            };
            end = end.max(entry.span().end);
            // The same shard twice: an unsynced deletion and a new put, a put repeated at the same moment, or a damaged
            // record and the one that replaces it. The bytes are the same but for damage, since a block id is used once; the
            // later record is the undamaged one, and may be the one that a sync has covered.
            if let Err(old) = self.index.insert(&entry) {
                self.index.remove(&old);
                if self.index.insert(&entry).is_ok()
                    && let Some(other) = self.opened.get(&old.volume)
                {
                    let punched = self.device.punch_now(&other.file, old.span());
                    punched
                        .and_then(|()| self.device.sync_now(&other.file))
                        .map_err(|e| self.io("dropping a repeated shard", e))?;
                }
            }
        }
        let v = &self.opened[&id];
        let torn: u64 = garbage.iter().map(|g| g.end - g.start).sum();
        if torn > 0 {
            let path = self.device.path().display();
            tracing::info!(
                "target {path}: {id} holds {torn} bytes of puts that were never completed; they are dropped"
            );
        }
        let virgin = garbage.iter().all(|g| g.end <= end);
        let goes_on = newest && v.sound && v.size - end > PAGE;
        if !goes_on {
            garbage.push(end..v.size);
        }
        for range in garbage {
            self.device
                .punch_now(&v.file, range)
                .map_err(|e| self.io(format!("dropping torn records of {id}"), e))?;
        }
        // Without its preallocation the volume is no place to append to.
        let allocated = goes_on && (virgin || self.device.allocate_now(&v.file, end..v.size).is_ok());
        self.device.sync_now(&v.file).map_err(|e| self.io(format!("syncing {id}"), e))?;
        Ok(if allocated { end } else { v.size })
    }

    fn finish(self, next: BTreeMap<VolumeId, u64>) -> Result<Recovered<D::File>, StoreError> {
        let volumes: BTreeMap<VolumeId, Arc<Volume<D::File>>> = (self.opened.into_iter())
            .map(|(id, v)| {
                let next = next.get(&id).copied().unwrap_or(v.size);
                (id, Arc::new(Volume::new(id, v.salt, v.file, v.size, next)))
            })
            .collect();
        let (mut shards, mut shard_bytes, mut used) = (0, 0, 0);
        let visited: Result<(), StoreError> = self.index.visit_parts(|entries| {
            for entry in entries {
                shards += 1;
                shard_bytes += u64::from(entry.length);
                used += record_bytes(entry.length);
                if let Some(volume) = volumes.get(&entry.volume) {
                    volume.add_record();
                }
            }
            Ok(())
        });
        visited?;
        let active = volumes.values().next_back().filter(|v| v.room() > 0).cloned();
        Ok(Recovered {
            index: self.index,
            volumes,
            active,
            next_volume: self.next_volume,
            shards,
            shard_bytes,
            used,
        })
    }
}

/// One pass over the young part of a volume.
struct Scan<'a, D: Device> {
    device: &'a D,
    volume: &'a Opened<D::File>,
    window: PageBuf,
    window_at: u64,
    window_len: usize,
    records: Vec<(u64, RecordHeader)>,
    garbage: Vec<Range<u64>>,
}

impl<D: Device> Scan<'_, D> {
    fn run(&mut self) {
        // Every record that begins in the young part ends in it, so the window holds any of them.
        let young = self.volume.position..self.volume.size;
        let ranges = match &self.volume.data {
            None => vec![young.clone()],
            Some(data) => data.clone(),
        };
        let mut at = young.start;
        for range in ranges {
            at = at.max(range.start / PAGE * PAGE);
            while at < range.end.min(young.end) {
                at = self.step(at);
            }
        }
    }

    /// Looks at one page; returns where to look next.
    fn step(&mut self, at: u64) -> u64 {
        let salt = self.volume.salt;
        match self.page(at) {
            // A page that cannot be read is no record; the next one may be.
            None => at + PAGE,
            Some(page) if page.iter().all(|b| *b == 0) => at + PAGE,
            Some(page) => {
                if let Some(header) = parse_header(page, salt, at)
                    && at + record_bytes(header.length) <= self.volume.size
                    && self.body_verifies(at, header.length)
                {
                    self.records.push((at, header));
                    return at + record_bytes(header.length);
                }
                match self.garbage.last_mut() {
                    Some(last) if last.end == at => last.end += PAGE,
                    _ => self.garbage.push(at..at + PAGE),
                }
                at + PAGE
            }
        }
    }

    /// Whether the rest of the record at `at` verifies. One that cannot be read whole is kept: it is not torn but ill,
    /// and its readable pages may be somebody's only copy.
    fn body_verifies(&mut self, at: u64, length: u32) -> bool {
        let bytes = record_bytes(length) as usize;
        if at + bytes as u64 > self.window_at + self.window_len as u64 {
            self.fill(at, self.window.len() / PAGE_SIZE);
            if self.window_len < bytes {
                self.fill(at, record_pages(length));
            }
            if self.window_len < bytes {
                let path = self.device.path().display();
                tracing::error!(
                    "target {path}: the record at byte {at} cannot be read whole; kept for what can"
                );
                return true;
            }
        }
        let from = (at - self.window_at) as usize;
        self.window.get(from..from + bytes).is_some_and(|record| verify_body(record, length))
    }

    fn page(&mut self, at: u64) -> Option<&[u8]> {
        if at < self.window_at || at + PAGE > self.window_at + self.window_len as u64 {
            self.fill(at, self.window.len() / PAGE_SIZE);
            if self.window_len < PAGE_SIZE {
                // Some page of the window is unreadable: is it this one?
                self.fill(at, 1);
            }
        }
        let from = (at - self.window_at) as usize;
        self.window.get(from..from + PAGE_SIZE).filter(|_| from + PAGE_SIZE <= self.window_len)
    }

    fn fill(&mut self, at: u64, pages: usize) {
        self.window_at = at;
        let wanted = (self.volume.size - at).min((pages * PAGE_SIZE) as u64) as usize;
        self.window_len = match self.device.read_now(&self.volume.file, at, &mut self.window[..wanted]) {
            Ok(n) => n / PAGE_SIZE * PAGE_SIZE,
            Err(e) => {
                tracing::warn!("target {}: scanning at byte {at}: {e}", self.device.path().display());
                0
            }
        };
    }
}
