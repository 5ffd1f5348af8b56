//! A shard on the device.
//!
//! ```text
//!   one record, every part a multiple of 4 KiB:
//!   | header | data page 0 | data page 1 | ... | data page n-1 | integrity table          |
//!   0      4096                                 4096*(1+n)
//!
//!   header (rest of the page is zero)
//!    0        8      10      12     13     16     24      28     32     40       48     60
//!   | FJSHARD1 | vers | policy | shard | zero | block | length | pages | birth | position | zero | CRC32C |
//!
//!   integrity table (padded with zeros)
//!    0                4*n            4*n+4
//!   | CRC32C per page | CRC32C of what stands before it |
//! ```
//!
//! All integers are little-endian. The last data page is padded with zeros; its CRC counts the used bytes only.
//!
//! **Why in this order.** The header stands first because a scan must learn from one page how far to jump. The table
//! stands last so that a record goes out in one sequential write whose front is the payload as it came off the
//! socket, and so that a read near the end of a shard gets data and table in one piece.
//!
//! **What is assumed of the device.** Nothing about the order or atomicity of page writes within a record: a record
//! counts only when header, table and (for records younger than the checkpoint) every data page verify. What a
//! successful flush covers stays.
//!
//! **Why nobody can plant a header.** Data pages are bytes of users and may be a copy of a volume. The header's CRC is
//! therefore seeded with a random number of the volume that is never in a record, and the header names its own
//! position: a copy of any header, from this volume or another, does not verify where it was not written by the store.

use fjordfs_proto::crc32c::{crc32c, crc32c_append};
use fjordfs_proto::{BlockId, PAGE_SIZE, ShardNo, block::pages};

const MAGIC: &[u8; 8] = b"FJSHARD1";

/// Versions of the record. 1: first.
const VERSION: u16 = 1;

const CRC_AT: usize = 60;

/// What a header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RecordHeader {
    pub(crate) block: BlockId,
    pub(crate) shard: ShardNo,
    /// `fjordfs_proto::Policy` code.
    pub(crate) policy: u16,
    /// Bytes of data.
    pub(crate) length: u32,
    /// Milliseconds since 1970 when it was put.
    pub(crate) birth_ms: u64,
}

/// Pages of the integrity table of a shard of `length` bytes.
pub(crate) fn table_pages(length: u32) -> usize {
    (4 * pages(length as usize) + 4).div_ceil(PAGE_SIZE)
}

/// Pages of the whole record of a shard of `length` bytes.
pub(crate) fn record_pages(length: u32) -> usize {
    1 + pages(length as usize) + table_pages(length)
}

/// Bytes of the whole record of a shard of `length` bytes.
pub(crate) fn record_bytes(length: u32) -> u64 {
    (record_pages(length) * PAGE_SIZE) as u64
}

/// Where the table begins, bytes from the start of the record.
pub(crate) fn table_at(length: u32) -> usize {
    PAGE_SIZE * (1 + pages(length as usize))
}

/// Completes a record whose data lies at byte 4096 of `record`: padding, table, and a blank header page.
pub(crate) fn fill_table(record: &mut [u8], length: u32, page_crcs: &[u8]) {
    let (data_end, table) = (PAGE_SIZE + length as usize, table_at(length));
    record[data_end..table].fill(0);
    let end = table + page_crcs.len();
    record[table..end].copy_from_slice(page_crcs);
    record[end..end + 4].copy_from_slice(&crc32c(page_crcs).to_le_bytes());
    record[end + 4..record_bytes(length) as usize].fill(0);
}

/// Writes the header page. Its position is part of it, so this comes last.
pub(crate) fn fill_header(page: &mut [u8], header: &RecordHeader, salt: u64, position: u64) {
    page[..PAGE_SIZE].fill(0);
    page[0..8].copy_from_slice(MAGIC);
    page[8..10].copy_from_slice(&VERSION.to_le_bytes());
    page[10..12].copy_from_slice(&header.policy.to_le_bytes());
    page[12] = header.shard.0;
    page[16..24].copy_from_slice(&header.block.0.to_le_bytes());
    page[24..28].copy_from_slice(&header.length.to_le_bytes());
    page[28..32].copy_from_slice(&(pages(header.length as usize) as u32).to_le_bytes());
    page[32..40].copy_from_slice(&header.birth_ms.to_le_bytes());
    page[40..48].copy_from_slice(&position.to_le_bytes());
    let crc = header_crc(page, salt);
    page[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
}

fn header_crc(page: &[u8], salt: u64) -> u32 {
    crc32c_append(crc32c(&salt.to_le_bytes()), &page[..CRC_AT])
}

/// The header in `page`, if one was written there at `position` of the volume with `salt`.
pub(crate) fn parse_header(page: &[u8], salt: u64, position: u64) -> Option<RecordHeader> {
    let page = page.get(..PAGE_SIZE)?;
    let u32_at = |at: usize| u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    let genuine = page[0..8] == *MAGIC
        && u32_at(CRC_AT) == header_crc(page, salt)
        && page[8..10] == VERSION.to_le_bytes()
        && u64_at(40) == position;
    let length = u32_at(24);
    let sane = length > 0
        && length as usize <= fjordfs_proto::BLOCK_SIZE_MAX
        && u32_at(28) as usize == pages(length as usize);
    (genuine && sane).then(|| RecordHeader {
        block: BlockId(u64_at(16)),
        shard: ShardNo(page[12]),
        policy: u16::from_le_bytes([page[10], page[11]]),
        length,
        birth_ms: u64_at(32),
    })
}

/// The CRCs of all data pages from the table of a shard of `length` bytes, if the table verifies.
pub(crate) fn parse_table(table: &[u8], length: u32) -> Option<&[u8]> {
    let (crcs, rest) = table.split_at_checked(4 * pages(length as usize))?;
    (rest.get(..4)? == crc32c(crcs).to_le_bytes()).then_some(crcs)
}

/// Whether a whole record (its header already believed) verifies: table and every data page.
pub(crate) fn verify_body(record: &[u8], length: u32) -> bool {
    let data = record.get(PAGE_SIZE..PAGE_SIZE + length as usize);
    let crcs = record.get(table_at(length)..).and_then(|table| parse_table(table, length));
    match (data, crcs) {
        (Some(data), Some(crcs)) => fjordfs_proto::block::first_bad_page(data, crcs).is_none(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fjordfs_proto::block::page_crcs;
    use proptest::prelude::*;

    fn sample(data: &[u8], salt: u64, position: u64) -> (RecordHeader, Vec<u8>) {
        let length = data.len() as u32;
        let header = RecordHeader {
            block: BlockId(7),
            shard: ShardNo(1),
            policy: 2,
            length,
            birth_ms: 1_700_000_000_000,
        };
        let mut record = vec![0xee; record_bytes(length) as usize];
        record[PAGE_SIZE..PAGE_SIZE + data.len()].copy_from_slice(data);
        fill_table(&mut record, length, &page_crcs(data));
        fill_header(&mut record, &header, salt, position);
        (header, record)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(data in proptest::collection::vec(any::<u8>(), 1..20_000), salt: u64, page in 0..1000u64) {
            let (header, record) = sample(&data, salt, page * 4096);
            prop_assert_eq!(parse_header(&record, salt, page * 4096), Some(header));
            prop_assert!(verify_body(&record, header.length));
            prop_assert_eq!(parse_header(&record, salt, (page + 1) * 4096), None);
            prop_assert_eq!(parse_header(&record, salt ^ 1, page * 4096), None);
        }

        #[test]
        fn a_flipped_bit_that_matters_is_found(data in proptest::collection::vec(any::<u8>(), 1..20_000), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let (header, mut record) = sample(&data, 3, 0);
            let table_end = table_at(header.length) + 4 * pages(data.len()) + 4;
            let spots: Vec<usize> = (0..64).chain(PAGE_SIZE..PAGE_SIZE + data.len()).chain(table_at(header.length)..table_end).collect();
            record[spots[at.index(spots.len())]] ^= 1 << bit;
            prop_assert!(parse_header(&record, 3, 0).is_none() || !verify_body(&record, header.length));
        }

        #[test]
        fn noise_is_not_a_record(noise in proptest::collection::vec(any::<u8>(), 0..9000), length in 1..10_000u32) {
            prop_assert_eq!(parse_header(&noise, 0, 0), None);
            prop_assert!(!verify_body(&noise, length));
        }
    }

    #[test]
    fn a_whole_block_has_five_table_pages() {
        assert_eq!(record_pages(16 << 20), 1 + 4096 + 5);
        assert_eq!(record_pages(1), 3);
        assert_eq!(table_pages(1023 * 4096), 1);
        assert_eq!(table_pages(1024 * 4096), 2);
    }
}
