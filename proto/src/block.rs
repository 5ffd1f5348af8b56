//! Sizes of blocks and pages, and the integrity entries of a page.

use crate::crc32c::{crc32c, crc32c_append};

/// Most bytes in a block.
pub const BLOCK_SIZE_MAX: usize = 16 << 20;

/// Unit of integrity entries, of alignment on the device and of shard reads, bytes.
pub const PAGE_SIZE: usize = 4096;

/// Pages that `bytes` occupy.
pub const fn pages(bytes: usize) -> usize {
    bytes.div_ceil(PAGE_SIZE)
}

/// CRC32C of each page of `data`, little-endian; the last page counts its used bytes only.
pub fn page_crcs(data: &[u8]) -> Vec<u8> {
    let mut crcs = Vec::with_capacity(4 * pages(data.len()));
    crcs.extend(data.chunks(PAGE_SIZE).flat_map(|page| crc32c(page).to_le_bytes()));
    crcs
}

/// Like [`page_crcs`] for data that lies in several buffers, as if they were one.
pub fn page_crcs_of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut crcs = PageCrcs::with_capacity(0);
    parts.into_iter().for_each(|part| crcs.update(part));
    crcs.finish()
}

/// Like [`page_crcs`] for data that comes bit by bit.
#[derive(Clone, Debug)]
pub struct PageCrcs {
    entries: Vec<u8>,
    crc: u32,
    /// Bytes of the page begun.
    filled: usize,
}

impl PageCrcs {
    /// Of nothing yet, with room for the entries of so many bytes.
    pub fn with_capacity(bytes: usize) -> PageCrcs {
        PageCrcs { entries: Vec::with_capacity(4 * pages(bytes)), crc: 0, filled: 0 }
    }

    /// Goes on with these bytes.
    pub fn update(&mut self, mut part: &[u8]) {
        while !part.is_empty() {
            if self.filled == 0 {
                // The way of nearly all pages, and the faster one.
                let (whole, rest) = part.as_chunks::<PAGE_SIZE>();
                self.entries.extend(whole.iter().flat_map(|page| crc32c(page).to_le_bytes()));
                part = rest;
            }
            let take = part.len().min(PAGE_SIZE - self.filled);
            self.crc = crc32c_append(self.crc, &part[..take]);
            self.filled += take;
            part = &part[take..];
            if self.filled == PAGE_SIZE {
                self.entries.extend(self.crc.to_le_bytes());
                (self.crc, self.filled) = (0, 0);
            }
        }
    }

    /// The entries.
    pub fn finish(mut self) -> Vec<u8> {
        if self.filled > 0 {
            self.entries.extend(self.crc.to_le_bytes());
        }
        self.entries
    }
}

/// Index of the first page of `data` that does not match `crcs`, or `None` when all do.
///
/// A table of the wrong length is a mismatch at the first page it lacks or has too many.
pub fn first_bad_page(data: &[u8], crcs: &[u8]) -> Option<usize> {
    let (entries, rest) = crcs.as_chunks::<4>();
    let n = pages(data.len());
    let bad =
        data.chunks(PAGE_SIZE).zip(entries).position(|(page, crc)| crc32c(page) != u32::from_le_bytes(*crc));
    bad.or_else(|| (entries.len() != n || !rest.is_empty()).then_some(n.min(entries.len())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_flipped_bit_is_found(mut data in proptest::collection::vec(any::<u8>(), 1..20_000), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let crcs = page_crcs(&data);
            prop_assert_eq!(first_bad_page(&data, &crcs), None);
            let i = at.index(data.len());
            data[i] ^= 1 << bit;
            prop_assert_eq!(first_bad_page(&data, &crcs), Some(i / PAGE_SIZE));
        }

        #[test]
        fn parts_are_as_good_as_a_whole(data in proptest::collection::vec(any::<u8>(), 0..20_000), cut in 1..9000usize) {
            prop_assert_eq!(page_crcs_of(data.chunks(cut)), page_crcs(&data));
        }
    }

    #[test]
    fn a_table_of_the_wrong_length_is_bad() {
        let data = [7u8; 2 * PAGE_SIZE];
        let crcs = page_crcs(&data);
        assert_eq!(first_bad_page(&data, &crcs[..4]), Some(1));
        assert_eq!(first_bad_page(&data[..PAGE_SIZE], &crcs), Some(1));
        assert_eq!(first_bad_page(&data, &crcs[..7]), Some(1));
    }
}
