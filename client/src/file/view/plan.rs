//! How a range is read: what is here, what is a hole, and what is in blocks.

use std::ops::Range;

use bytes::Bytes;
use fjordfs_proto::{Extent, Source, extent::BlockPiece, interval::Run};

use super::{Body, View};

/// A part of a read, in file order.
#[derive(Clone, Debug)]
pub(crate) enum Part {
    /// Here.
    Memory(Bytes),
    /// A hole.
    Zeros(u64),
    /// In a block.
    Block(BlockPiece),
}

/// What a read needs.
#[derive(Debug)]
pub(crate) enum ReadPlan {
    /// These parts.
    Parts(Vec<Part>),
    /// The extents from this offset on, first.
    Extents(u64),
}

impl View {
    /// How to read `len` bytes at `offset`; the result ends at the end of the file.
    pub(crate) fn plan_read(&self, offset: u64, len: u64) -> ReadPlan {
        let end = offset.saturating_add(len).min(self.size());
        if offset >= end {
            return ReadPlan::Parts(Vec::new());
        }
        if let Some(piece) = self.only_piece(offset..end) {
            return ReadPlan::Parts(vec![Part::Block(piece)]);
        }
        let mut parts = Vec::new();
        for (range, segment) in self.local.cover(offset..end) {
            match segment.map(|s| s.body) {
                Some(Body::Memory(bytes)) => parts.push(Part::Memory(bytes)),
                Some(Body::Growing(bytes)) => parts.push(Part::Memory(bytes.freeze())),
                Some(Body::Stored(addr, layout)) => {
                    let run = Extent::blocks(addr, range.end - range.start, layout);
                    parts.extend(run.pieces().map(Part::Block));
                }
                None => {
                    if let Some(missing) = self.plan_committed(range, &mut parts) {
                        return ReadPlan::Extents(missing);
                    }
                }
            }
        }
        ReadPlan::Parts(parts)
    }

    /// The one piece of a block that a range is. Most reads are that: they need no list of what is known and of what lies where.
    fn only_piece(&self, range: Range<u64>) -> Option<BlockPiece> {
        let Range { start, end } = range;
        if !self.local.is_empty() {
            return None;
        }
        let (from, known) = self.known.overlapping(start..end).next()?;
        let (at, extent) = self.committed.overlapping(start..end).next()?;
        let is_inside = |from: u64, len: u64| from <= start && end - from <= len;
        if !is_inside(from, known.0) || !is_inside(at, extent.length) {
            return None;
        }
        let piece = extent.slice(start - at..end - at).pieces().next()?;
        (u64::from(piece.length) == end - start).then_some(piece)
    }

    /// Adds the committed parts of `range`; the first offset whose extents are not known, if any.
    fn plan_committed(&self, range: Range<u64>, parts: &mut Vec<Part>) -> Option<u64> {
        // Beyond the committed size there is nothing to know.
        let inside = range.start..range.end.min(self.attr.size).max(range.start);
        let unknown = self.known.cover(inside.clone()).into_iter().find(|(_, known)| known.is_none());
        if let Some((missing, _)) = unknown {
            return Some(missing.start);
        }
        for (hole, extent) in self.committed.cover(inside.clone()) {
            match extent {
                None => parts.push(Part::Zeros(hole.end - hole.start)),
                Some(Extent { source: Source::Inline(data), .. }) => parts.push(Part::Memory(data)),
                Some(extent) => parts.extend(extent.pieces().map(Part::Block)),
            }
        }
        if inside.end < range.end {
            parts.push(Part::Zeros(range.end - inside.end));
        }
        None
    }
}
