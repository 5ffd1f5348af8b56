//! A volume file: a label page, then records, appended.
//!
//! ```text
//!   | label 4K | record | record | ... | preallocated, zero            |
//!              ^                 ^ next                                ^ size
//!
//!   label    0        8      12   14    16        32     40     48        56     60
//!           | FJVOLUME | id | vers | zero | target uuid | salt | size | created | zero | CRC32C |
//! ```
//!
//! **Invariants**
//! - Space of a volume is used once: a deleted or torn record leaves a hole, and nothing is written there again. The
//!   one exception is recovery, which may go on after the last record of the newest volume once it has made the rest
//!   of it zero and has synced that.
//! - `position` is where a scan must begin: every record before it is in the index or is gone for good. Puts run at
//!   the same time and finish in any order, so it is the start of the first one in flight.
//! - A put that was given up without a verdict (its task died) holds `position` back until the next start.
//! - The label is on stable storage before the first record is written, so `salt` is always known to recovery.

use fjordfs_proto::crc32c::crc32c;
use std::{
    collections::BTreeSet,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use fjordfs_proto::PAGE_SIZE;
use parking_lot::Mutex;

const MAGIC: &[u8; 8] = b"FJVOLUME";

/// Versions of the volume label. 1: first.
const VERSION: u16 = 1;

const PAGE: u64 = PAGE_SIZE as u64;

/// A volume of one target; ids are never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct VolumeId(pub(crate) u32);

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "volume {}", self.0)
    }
}

/// The first page of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct VolumeLabel {
    pub(crate) id: VolumeId,
    /// Of the target it was made for.
    pub(crate) uuid: [u8; 16],
    /// Seeds the CRC of record headers; see `record.rs`.
    pub(crate) salt: u64,
    /// Bytes of the file, the label included.
    pub(crate) size: u64,
    /// Milliseconds since 1970.
    pub(crate) created_ms: u64,
}

impl VolumeLabel {
    pub(crate) fn encode(&self, page: &mut [u8]) {
        page[..PAGE_SIZE].fill(0);
        page[0..8].copy_from_slice(MAGIC);
        page[8..12].copy_from_slice(&self.id.0.to_le_bytes());
        page[12..14].copy_from_slice(&VERSION.to_le_bytes());
        page[16..32].copy_from_slice(&self.uuid);
        page[32..40].copy_from_slice(&self.salt.to_le_bytes());
        page[40..48].copy_from_slice(&self.size.to_le_bytes());
        page[48..56].copy_from_slice(&self.created_ms.to_le_bytes());
        let crc = crc32c(&page[..60]);
        page[60..64].copy_from_slice(&crc.to_le_bytes());
    }

    /// `None` when the page is no label of this version.
    pub(crate) fn decode(page: &[u8]) -> Option<VolumeLabel> {
        let page = page.get(..PAGE_SIZE)?;
        let u32_at = |at: usize| u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let genuine = page[0..8] == *MAGIC
            && u32_at(60) == crc32c(&page[..60])
            && page[12..14] == VERSION.to_le_bytes();
        genuine.then(|| VolumeLabel {
            id: VolumeId(u32_at(8)),
            uuid: page[16..32].try_into().unwrap_or_default(),
            salt: u64_at(32),
            size: u64_at(40),
            created_ms: u64_at(48),
        })
    }
}

/// An open volume.
pub(crate) struct Volume<F> {
    pub(crate) id: VolumeId,
    pub(crate) salt: u64,
    pub(crate) file: Arc<F>,
    /// Bytes of the file.
    pub(crate) size: u64,
    append: Mutex<Append>,
    /// Completed writes and punches.
    writes: AtomicU64,
    /// Of those, how many are known to be on stable storage.
    synced: AtomicU64,
    /// Records in the index.
    records: AtomicU64,
}

struct Append {
    next: u64,
    in_flight: BTreeSet<u64>,
}

impl<F> Volume<F> {
    /// A volume in which the next record goes to byte `next`; `size` closes it.
    pub(crate) fn new(id: VolumeId, salt: u64, file: Arc<F>, size: u64, next: u64) -> Volume<F> {
        Volume {
            id,
            salt,
            file,
            size,
            append: Mutex::new(Append { next: next.clamp(PAGE.min(size), size), in_flight: BTreeSet::new() }),
            writes: AtomicU64::new(0),
            synced: AtomicU64::new(0),
            records: AtomicU64::new(0),
        }
    }

    /// Room for a record: its offset, or `None` when too little is left. Balanced by [`Volume::settle`].
    pub(crate) fn reserve(&self, bytes: u64) -> Option<u64> {
        let mut append = self.append.lock();
        let offset = append.next;
        (offset + bytes <= self.size).then(|| {
            append.next += bytes;
            append.in_flight.insert(offset);
            offset
        })
    }

    /// The record at `offset` is in the index, or has been punched: scans need not look at it again.
    pub(crate) fn settle(&self, offset: u64) {
        self.append.lock().in_flight.remove(&offset);
    }

    /// Nothing more is appended. Returns the unused end.
    pub(crate) fn close(&self) -> std::ops::Range<u64> {
        let mut append = self.append.lock();
        let tail = append.next..self.size;
        append.next = self.size;
        tail
    }

    /// Bytes that can still be appended.
    pub(crate) fn room(&self) -> u64 {
        self.size - self.append.lock().next
    }

    /// Where a scan must begin.
    pub(crate) fn position(&self) -> u64 {
        let append = self.append.lock();
        append.in_flight.first().copied().unwrap_or(append.next)
    }

    /// Closed, and nothing in it any more.
    pub(crate) fn removable(&self) -> bool {
        self.position() == self.size && self.records() == 0
    }

    pub(crate) fn records(&self) -> u64 {
        self.records.load(Ordering::SeqCst)
    }

    pub(crate) fn add_record(&self) {
        self.records.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn remove_record(&self) {
        self.records.fetch_sub(1, Ordering::SeqCst);
    }

    /// A write or a punch has completed, and is not on stable storage yet.
    pub(crate) fn wrote(&self) {
        self.writes.fetch_add(1, Ordering::SeqCst);
    }

    /// What a sync that begins now will cover, or `None` when there is nothing to sync.
    pub(crate) fn unsynced(&self) -> Option<u64> {
        let writes = self.writes.load(Ordering::SeqCst);
        (self.synced.load(Ordering::SeqCst) < writes).then_some(writes)
    }

    /// A sync has succeeded that began when [`Volume::unsynced`] returned `covered`.
    pub(crate) fn synced(&self, covered: u64) {
        self.synced.fetch_max(covered, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_survives_and_noise_does_not() {
        let label = VolumeLabel { id: VolumeId(3), uuid: [9; 16], salt: 77, size: 1 << 30, created_ms: 5 };
        let mut page = vec![1; PAGE_SIZE];
        label.encode(&mut page);
        assert_eq!(VolumeLabel::decode(&page), Some(label));
        page[33] ^= 1;
        assert_eq!(VolumeLabel::decode(&page), None);
        assert_eq!(VolumeLabel::decode(&[0; 100]), None);
    }

    #[test]
    fn the_scan_position_waits_for_the_first_put_in_flight() {
        let v = Volume::new(VolumeId(1), 0, Arc::new(()), 10 * PAGE, PAGE);
        let (a, b) = (v.reserve(3 * PAGE).unwrap(), v.reserve(3 * PAGE).unwrap());
        assert_eq!((a, b, v.position()), (PAGE, 4 * PAGE, PAGE));
        v.settle(b);
        assert_eq!(v.position(), PAGE);
        v.settle(a);
        assert_eq!(v.position(), 7 * PAGE);
        assert_eq!(v.reserve(4 * PAGE), None);
        assert_eq!(v.close(), 7 * PAGE..10 * PAGE);
        assert!(v.removable() && v.reserve(PAGE).is_none());
    }

    #[test]
    fn a_write_during_a_sync_stays_unsynced() {
        let v = Volume::new(VolumeId(1), 0, Arc::new(()), 10 * PAGE, PAGE);
        assert_eq!(v.unsynced(), None);
        v.wrote();
        let covered = v.unsynced().unwrap();
        v.wrote();
        v.synced(covered);
        assert_eq!(v.unsynced(), Some(2));
    }
}
