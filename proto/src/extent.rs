//! Extents: which block bytes, or which inline bytes, a run of file bytes is.

use std::ops::Range;

use bytes::Bytes;

use crate::{
    BLOCK_SIZE_MAX, FILE_SIZE_MAX, FsError, FsResult, Layout,
    error::Errno,
    ids::{BlockAddr, BlockId},
    interval::{IntervalMap, Run},
    pb,
};

/// Where the bytes of an extent are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// In blocks, from this address on. All blocks of a run have one layout; all but the last are read to their
    /// full 16 MiB.
    Blocks {
        /// Address of the first byte.
        addr: BlockAddr,
        /// How each of the blocks lies on its targets.
        layout: Layout,
    },
    /// Here: small files keep their bytes in the metadata.
    Inline(Bytes),
}

/// A run of file bytes with its source. Its file offset is the key in its map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Bytes; equals the data's length when inline.
    pub length: u64,
    /// Where they are.
    pub source: Source,
}

/// Extents of a file by offset.
pub type ExtentMap = IntervalMap<Extent>;

/// A piece of an extent that lies in one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockPiece {
    /// The block.
    pub block: BlockId,
    /// First byte in the block.
    pub offset: u32,
    /// Bytes.
    pub length: u32,
    /// Distance of the first byte from the extent's start.
    pub from: u64,
    /// How the block lies on its targets.
    pub layout: Layout,
}

impl Extent {
    /// An extent of inline bytes.
    pub fn inline(data: Bytes) -> Extent {
        Extent { length: data.len() as u64, source: Source::Inline(data) }
    }

    /// An extent of block bytes.
    pub fn blocks(addr: BlockAddr, length: u64, layout: Layout) -> Extent {
        Extent { length, source: Source::Blocks { addr, layout } }
    }

    /// The extent block by block; nothing for inline bytes.
    pub fn pieces(&self) -> impl Iterator<Item = BlockPiece> {
        let (start, length) = match &self.source {
            Source::Blocks { addr, layout } => (Some((*addr, *layout)), self.length),
            Source::Inline(_) => (None, 0),
        };
        let mut from = 0;
        std::iter::from_fn(move || {
            let (addr, layout) = start.filter(|_| from < length)?;
            let at = addr.advance(from);
            let piece = (BLOCK_SIZE_MAX as u64 - u64::from(at.offset)).min(length - from);
            let out = BlockPiece { block: at.block, offset: at.offset, length: piece as u32, from, layout };
            from += piece;
            Some(out)
        })
    }

    /// As it travels.
    pub fn to_pb(&self, offset: u64) -> pb::meta::Extent {
        match &self.source {
            Source::Blocks { addr, layout } => pb::meta::Extent {
                offset,
                length: self.length,
                block: addr.block.0,
                block_offset: addr.offset,
                layout: layout.code(),
                data: Bytes::new(),
            },
            Source::Inline(data) => {
                pb::meta::Extent { offset, length: self.length, data: data.clone(), ..Default::default() }
            }
        }
    }

    /// From the wire or the disk: its file offset and the extent.
    ///
    /// # Errors
    /// `EINVAL` when it is empty, ends beyond the largest file, has an unknown layout, or its parts disagree.
    pub fn from_pb(e: pb::meta::Extent) -> FsResult<(u64, Extent)> {
        let bad = |what: &str| FsError::new(Errno::EINVAL, format!("extent at {}: {what}", e.offset));
        if e.length == 0 {
            return Err(bad("it is empty"));
        }
        if e.offset.checked_add(e.length).is_none_or(|end| end > FILE_SIZE_MAX) {
            return Err(bad("it ends beyond the largest file"));
        }
        let extent = if e.data.is_empty() {
            let layout = Layout::from_code(e.layout).ok_or_else(|| bad("unknown layout"))?;
            if e.block_offset as usize >= BLOCK_SIZE_MAX || e.block == 0 {
                return Err(bad("bad block address"));
            }
            let addr = BlockAddr { block: BlockId(e.block), offset: e.block_offset };
            Extent::blocks(addr, e.length, layout)
        } else {
            if e.data.len() as u64 != e.length {
                return Err(bad("inline bytes and length differ"));
            }
            Extent::inline(e.data)
        };
        Ok((e.offset, extent))
    }
}

impl Run for Extent {
    fn len(&self) -> u64 {
        self.length
    }

    fn slice(&self, range: Range<u64>) -> Extent {
        let source = match &self.source {
            Source::Blocks { addr, layout } => {
                Source::Blocks { addr: addr.advance(range.start), layout: *layout }
            }
            Source::Inline(data) => Source::Inline(data.slice(range.start as usize..range.end as usize)),
        };
        Extent { length: range.end - range.start, source }
    }

    /// Block runs join when their addresses go on. Inline bytes are never joined: that would copy.
    fn join(&mut self, next: Extent) -> Result<(), Extent> {
        match (&self.source, &next.source) {
            (Source::Blocks { addr, layout }, Source::Blocks { addr: next_addr, layout: next_layout })
                if layout == next_layout && addr.advance(self.length) == *next_addr =>
            {
                self.length += next.length;
                Ok(())
            }
            _ => Err(next),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Policy;

    fn blocks(block: u64, offset: u32, length: u64) -> Extent {
        let layout = Layout::of(Policy::replica(2).unwrap(), BLOCK_SIZE_MAX);
        Extent::blocks(BlockAddr { block: BlockId(block), offset }, length, layout)
    }

    const FULL: u64 = BLOCK_SIZE_MAX as u64;

    #[test]
    fn full_consecutive_blocks_become_one_run() {
        let mut map = ExtentMap::default();
        map.insert(0, blocks(7, 0, FULL));
        map.insert(2 * FULL, blocks(9, 0, 100));
        map.insert(FULL, blocks(8, 0, FULL));
        assert_eq!(map.len(), 1);
        let (_, run) = map.iter().next().unwrap();
        let pieces: Vec<_> = run.pieces().map(|p| (p.block.0, p.offset, p.length, p.from)).collect();
        assert_eq!(pieces, [(7, 0, 1 << 24, 0), (8, 0, 1 << 24, FULL), (9, 0, 100, 2 * FULL)]);
    }

    #[test]
    fn a_block_that_is_not_full_ends_its_run() {
        let mut map = ExtentMap::default();
        map.insert(0, blocks(7, 0, 100));
        map.insert(100, blocks(8, 0, 100));
        assert_eq!(map.len(), 2);
    }

    #[test]
    fn a_cut_run_points_at_the_right_bytes() {
        let run = blocks(7, 0, 3 * FULL).slice(FULL + 5..2 * FULL + 1);
        let pieces: Vec<_> = run.pieces().map(|p| (p.block.0, p.offset, p.length)).collect();
        assert_eq!(pieces, [(8, 5, (1 << 24) - 5), (9, 0, 1)]);
    }

    #[test]
    fn the_wire_form_round_trips_and_bad_ones_are_refused() {
        for e in [blocks(3, 17, 5 * FULL), Extent::inline(Bytes::from_static(b"hello"))] {
            assert_eq!(Extent::from_pb(e.to_pb(11)).unwrap(), (11, e));
        }
        let good = blocks(3, 17, 5).to_pb(11);
        for bad in [
            pb::meta::Extent { length: 0, ..good.clone() },
            pb::meta::Extent { offset: u64::MAX, ..good.clone() },
            pb::meta::Extent { layout: 0, ..good.clone() },
            pb::meta::Extent { block_offset: 1 << 24, ..good.clone() },
            pb::meta::Extent { data: Bytes::from_static(b"four"), ..good },
        ] {
            assert_eq!(Extent::from_pb(bad).unwrap_err().errno, Errno::EINVAL);
        }
    }
}
