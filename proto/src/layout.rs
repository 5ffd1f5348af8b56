//! Where the bytes of a block are among its shards.
//!
//! ```text
//!   ec:K+M, shard size S:   | 0 .. S | S .. 2S | ...  | (K-1)S .. end, zeros | parity 0 | ... | parity M-1 |
//!            shard               0        1                  K-1                  K           K+M-1
//! ```
//!
//! A block is cut into K runs of equal length, not striped in cells: a read then concerns one shard, or two at a seam,
//! whatever its length up to S, and a degraded one fetches its own range of K others and nothing else. Readers of
//! whole blocks have several requests under way anyway, which are spread over the shards by their offsets.
//!
//! S is the K-th part rounded up to whole pages, so that every shard offset is page aligned where the block offset is.
//! Every shard is stored with S bytes, the last ones filled up with zeros: any of them can be restored exactly from
//! any K others. S cannot be told from a range of the block, so the layout carries it.
//!
//! Blocks too small to split well are whole copies, which is a layout of its own: [`Layout::of`].

use std::{
    num::{NonZeroU8, NonZeroU16},
    ops::Range,
};

use bytes::Bytes;

use crate::{PAGE_SIZE, Policy, block::pages};

/// Blocks are split when each of the K data shards gets at least so many bytes. Below that a request costs as much as
/// what it moves, and padding would be more than a sixteenth.
pub const SPLIT_MIN: usize = 64 << 10;

/// How one block lies on the targets of its placement group.
///
/// The 32-bit code is what extents store: `S / 4096 << 16 | K << 8 | M`, and the number of copies alone for copies.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Layout {
    /// This many whole copies: each shard is the block.
    Copies(NonZeroU8),
    /// K data shards and M parity shards of equal size: any K of them restore the block.
    Ec {
        /// Data shards, 2 or more.
        k: NonZeroU8,
        /// Parity shards.
        m: NonZeroU8,
        /// Pages of each shard.
        shard_pages: NonZeroU16,
    },
}

/// Bytes of one shard.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ShardPiece {
    /// Which shard; under copies the first, and any other would do.
    pub shard: u8,
    /// First byte in the shard.
    pub offset: u32,
    /// Bytes.
    pub length: u32,
}

impl Layout {
    /// The layout of a block of `length` bytes that is written under `policy`.
    ///
    /// Pure, but readers do not derive it: they know ranges of blocks, not their lengths.
    pub fn of(policy: Policy, length: usize) -> Layout {
        match policy {
            Policy::Replica(n) => Layout::Copies(n),
            Policy::Ec { k, m } => {
                let copies = Layout::Copies(m.saturating_add(1));
                let parts = usize::from(k.get());
                if parts == 1 || length < parts * SPLIT_MIN {
                    return copies;
                }
                let shard_pages = u16::try_from(pages(length).div_ceil(parts)).ok().and_then(NonZeroU16::new);
                // A block is at most 4,096 pages.
                shard_pages.map_or(copies, |shard_pages| Layout::Ec { k, m, shard_pages })
            }
        }
    }

    /// The stored form.
    pub fn code(self) -> u32 {
        match self {
            Layout::Copies(n) => n.get().into(),
            Layout::Ec { shard_pages, .. } => {
                u32::from(shard_pages.get()) << 16 | u32::from(self.policy().code())
            }
        }
    }

    /// From the stored form; `None` for a code no version has written.
    pub fn from_code(code: u32) -> Option<Layout> {
        match (Policy::from_code(code & 0xffff)?, NonZeroU16::new((code >> 16) as u16)) {
            (Policy::Replica(n), None) => Some(Layout::Copies(n)),
            (Policy::Ec { k, m }, Some(shard_pages)) if k.get() > 1 => Some(Layout::Ec { k, m, shard_pages }),
            _ => None,
        }
    }

    /// The redundancy, as shard headers and people have it.
    pub fn policy(self) -> Policy {
        match self {
            Layout::Copies(n) => Policy::Replica(n),
            Layout::Ec { k, m, .. } => Policy::Ec { k, m },
        }
    }

    /// Whether blocks of this layout may be in files of this policy: those it makes of small and of large blocks.
    pub fn serves(self, policy: Policy) -> bool {
        self.policy() == policy || Layout::of(policy, 1) == self
    }

    /// Number of shards.
    pub fn width(self) -> usize {
        self.policy().width()
    }

    /// Shards without which the block is lost.
    pub fn needed(self) -> usize {
        match self {
            Layout::Copies(_) => 1,
            Layout::Ec { k, .. } => k.get().into(),
        }
    }

    /// Bytes of every shard; `None` under copies, which are as long as their block.
    pub fn shard_size(self) -> Option<u32> {
        match self {
            Layout::Copies(_) => None,
            Layout::Ec { shard_pages, .. } => Some(u32::from(shard_pages.get()) * PAGE_SIZE as u32),
        }
    }

    /// Where a range of the block is: data shards in order, up to where they end.
    pub fn pieces(self, range: Range<u32>) -> impl Iterator<Item = ShardPiece> {
        let size = self.shard_size();
        let end = match size {
            Some(size) => range.end.min(size.saturating_mul(self.needed() as u32)),
            None => range.end,
        };
        let mut at = range.start;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let (shard, offset) = size.map_or((0, at), |size| (at / size, at % size));
            let length = (end - at).min(size.map_or(u32::MAX, |size| size - offset));
            at += length;
            Some(ShardPiece { shard: shard as u8, offset, length })
        })
    }
}

/// Cuts a block, given in parts, into its data shards of `size` bytes; what is missing at the end is zeros. Shares
/// the parts' memory.
pub fn split(parts: &[Bytes], k: usize, size: usize) -> Vec<Vec<Bytes>> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut shards = Vec::with_capacity(k);
    let (mut shard, mut filled) = (Vec::new(), 0);
    let mut parts = parts.iter().cloned();
    let mut rest = Bytes::new();
    while shards.len() < k {
        if rest.is_empty() {
            rest = parts.next().unwrap_or(Bytes::from_static(&ZEROS));
        }
        let piece = rest.split_to(rest.len().min(size - filled));
        filled += piece.len();
        if !piece.is_empty() {
            shard.push(piece);
        }
        if filled == size {
            shards.push(std::mem::take(&mut shard));
            filled = 0;
        }
    }
    shards
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BLOCK_SIZE_MAX;
    use proptest::prelude::*;

    #[test]
    fn small_blocks_are_copies() {
        let policy = Policy::ec(8, 2).unwrap();
        let copies = Layout::Copies(NonZeroU8::new(3).unwrap());
        assert_eq!(Layout::of(policy, 1), copies);
        assert_eq!(Layout::of(policy, 8 * SPLIT_MIN - 1), copies);
        assert_eq!(Layout::of(policy, 8 * SPLIT_MIN).shard_size(), Some(SPLIT_MIN as u32));
        assert_eq!(Layout::of(policy, BLOCK_SIZE_MAX).shard_size(), Some(2 << 20));
        assert_eq!(
            Layout::of(Policy::ec(1, 3).unwrap(), BLOCK_SIZE_MAX).policy(),
            Policy::replica(4).unwrap()
        );
        assert_eq!(Layout::of(Policy::replica(2).unwrap(), BLOCK_SIZE_MAX).width(), 2);
    }

    #[test]
    fn unknown_codes_are_refused() {
        for code in [0, 33, 1 << 16 | 2, 8 << 8 | 2, 1 << 16 | 1 << 8 | 1, 1 << 16 | 30 << 8 | 3, u32::MAX] {
            assert_eq!(Layout::from_code(code), None, "{code:#x}");
        }
    }

    fn policies() -> impl Strategy<Value = Policy> {
        prop_oneof![
            (1..33u8).prop_map(|n| Policy::replica(n).unwrap()),
            (1..17u8, 1..16u8).prop_map(|(k, m)| Policy::ec(k, m).unwrap()),
        ]
    }

    proptest! {
        #[test]
        fn codes_round_trip(policy in policies(), length in 1..BLOCK_SIZE_MAX) {
            let layout = Layout::of(policy, length);
            prop_assert_eq!(Layout::from_code(layout.code()), Some(layout));
            prop_assert!(layout.width() <= policy.width());
            prop_assert!(policy.widths().any(|width| width == layout.width()));
            prop_assert_eq!(layout.width() - layout.needed(), policy.losses_survived());
        }

        /// The oracle looks for each byte in what [`split`] has made of the block.
        #[test]
        fn pieces_find_every_byte(
            k in 2..9u8,
            length in 2 * SPLIT_MIN..12 * SPLIT_MIN,
            cut in 1..200_000usize,
            from in any::<prop::sample::Index>(),
            count in 0..400_000u32,
        ) {
            let block: Vec<u8> = (0..length).map(|i| (i % 251) as u8 ^ (i >> 12) as u8).collect();
            let Layout::Ec { k, shard_pages, .. } = Layout::of(Policy::ec(k, 2).unwrap(), length) else {
                return Ok(());
            };
            let layout = Layout::Ec { k, m: k, shard_pages };
            let size = layout.shard_size().unwrap() as usize;
            prop_assert!(size.is_multiple_of(PAGE_SIZE) && size * usize::from(k.get()) >= length);
            prop_assert!((size - PAGE_SIZE) * usize::from(k.get()) < length, "rounded up by less than a page");
            let parts: Vec<Bytes> = block.chunks(cut).map(Bytes::copy_from_slice).collect();
            let shards = split(&parts, k.get().into(), size);
            let shards: Vec<Vec<u8>> = shards.iter().map(|s| s.concat()).collect();
            prop_assert!(shards.iter().all(|s| s.len() == size));

            let from = from.index(length) as u32;
            let mut found: Vec<u8> = Vec::new();
            for piece in layout.pieces(from..from.saturating_add(count)) {
                prop_assert!(piece.length > 0);
                found.extend(&shards[usize::from(piece.shard)][piece.offset as usize..][..piece.length as usize]);
            }
            let mut padded = block.clone();
            padded.resize(size * usize::from(k.get()), 0);
            let end = (from as usize + count as usize).min(padded.len());
            prop_assert_eq!(&found, &padded[from as usize..end]);
        }
    }
}
