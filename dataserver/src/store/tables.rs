//! Integrity tables that were read lately, in memory, under a hard cap.
//!
//! PERFORMANCE-CRITICAL. A read with checksums needs a page of data and a page of the table: two requests to the device,
//! where the second costs as much as the first. A table is a thousandth of its data, so those of everything that is
//! read again and again fit into memory, and then a read is one request.
//!
//! Only tables whose own checksum is right are kept. What a client is told is checked by it against the data in any case.

use std::sync::Arc;

use fjordfs_proto::TargetId;
use quick_cache::{Weighter, sync::Cache};

use super::{index::Entry, volume::VolumeId};

/// A place of a record: nothing else is ever written there while this process runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Place {
    target: TargetId,
    volume: VolumeId,
    page: u32,
}

#[derive(Clone)]
struct ByLength;

/// What an entry costs beside its checksums, bytes.
const OVERHEAD: u64 = 96;

impl Weighter<Place, Arc<[u8]>> for ByLength {
    fn weight(&self, _: &Place, table: &Arc<[u8]>) -> u64 {
        table.len() as u64 + OVERHEAD
    }
}

/// Tables of all targets of a server.
pub(crate) struct Tables {
    cache: Cache<Place, Arc<[u8]>, ByLength>,
}

impl Tables {
    /// At most `bytes_max` of them.
    pub(crate) fn new(bytes_max: u64) -> Tables {
        // Of whole blocks; the estimate only sizes the first allocation.
        Tables { cache: Cache::with_weighter((bytes_max >> 14).max(16) as usize, bytes_max, ByLength) }
    }

    /// The checksums of all pages of a shard.
    pub(crate) fn get(&self, target: TargetId, entry: &Entry) -> Option<Arc<[u8]>> {
        self.cache.get(&place(target, entry))
    }

    /// Keeps the checksums of a shard, which have been verified.
    pub(crate) fn keep(&self, target: TargetId, entry: &Entry, page_crcs: &[u8]) {
        self.cache.insert(place(target, entry), page_crcs.into());
    }
}

fn place(target: TargetId, entry: &Entry) -> Place {
    Place { target, volume: entry.volume, page: entry.page }
}

#[cfg(test)]
mod tests {
    use fjordfs_proto::{BlockId, ShardNo};

    use super::*;

    fn entry(page: u32) -> Entry {
        Entry { block: BlockId(1), shard: ShardNo(0), policy: 1, length: 1, volume: VolumeId(1), page }
    }

    #[test]
    fn tables_of_other_places_are_other_tables_and_the_cap_holds() {
        let tables = Tables::new(1 << 20);
        tables.keep(TargetId(1), &entry(1), &[1; 4]);
        assert_eq!(tables.get(TargetId(1), &entry(1)).as_deref(), Some(&[1; 4][..]));
        assert!(tables.get(TargetId(2), &entry(1)).is_none() && tables.get(TargetId(1), &entry(2)).is_none());
        for page in 0..1000 {
            tables.keep(TargetId(1), &entry(page), &[2; 16 << 10]);
        }
        assert!(tables.cache.weight() <= 1 << 20, "{}", tables.cache.weight());
    }
}
