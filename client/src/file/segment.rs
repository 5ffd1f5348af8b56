//! Runs of a file's bytes that this client has written and not committed yet.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::{Bytes, BytesMut};
use fjordfs_proto::{BlockId, Layout, ids::BlockAddr, interval::Run};

/// Writes below this are gathered into one buffer with their neighbour.
const GATHER_BELOW: usize = 64 << 10;

/// Largest gathered buffer.
const GATHER_MAX: usize = 1 << 20;

/// A unit of upload; see [`crate::write`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct UnitId(pub(crate) u64);

impl UnitId {
    /// The next number of this process: older units have smaller ones.
    pub(crate) fn unused() -> UnitId {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        UnitId(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Which unit took a segment, and where in the unit's block its first byte is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Taken {
    pub(crate) unit: UnitId,
    pub(crate) at: u32,
}

/// Where the bytes are now.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    /// In memory.
    Memory(Bytes),
    /// In memory, still growing by small sequential writes.
    Growing(BytesMut),
    /// In a block that is stored but not committed.
    Stored(BlockAddr, Layout),
}

/// A run of uncommitted bytes.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) length: u64,
    pub(crate) body: Body,
    /// `None` while dirty: no unit has it.
    pub(crate) taken: Option<Taken>,
}

impl Segment {
    pub(crate) fn dirty(data: Bytes) -> Segment {
        Segment { length: data.len() as u64, body: Body::Memory(data), taken: None }
    }

    pub(crate) fn is_dirty(&self) -> bool {
        self.taken.is_none()
    }

    /// Bytes it holds in memory.
    pub(crate) fn memory(&self) -> u64 {
        match self.body {
            Body::Memory(_) | Body::Growing(_) => self.length,
            Body::Stored(..) => 0,
        }
    }

    /// Gives the segment to a unit and returns its bytes; nothing when it has none to give.
    pub(crate) fn take(&mut self, taken: Taken) -> Option<Bytes> {
        let bytes = match std::mem::replace(&mut self.body, Body::Memory(Bytes::new())) {
            Body::Memory(bytes) => bytes,
            Body::Growing(bytes) => bytes.freeze(),
            stored @ Body::Stored(..) => {
                self.body = stored;
                return None;
            }
        };
        self.body = Body::Memory(bytes.clone());
        self.taken = Some(taken);
        Some(bytes)
    }

    /// The unit's block is stored under this id: memory is no longer needed.
    pub(crate) fn stored(&mut self, block: BlockId, layout: Layout) {
        if let Some(taken) = self.taken {
            self.body = Body::Stored(BlockAddr { block, offset: taken.at }, layout);
        }
    }
}

impl Run for Segment {
    fn len(&self) -> u64 {
        self.length
    }

    fn slice(&self, range: Range<u64>) -> Segment {
        let cut = range.start as usize..range.end as usize;
        let body = match &self.body {
            Body::Memory(bytes) => Body::Memory(bytes.slice(cut)),
            Body::Growing(bytes) => Body::Memory(Bytes::copy_from_slice(&bytes[cut])),
            Body::Stored(addr, layout) => Body::Stored(addr.advance(range.start), *layout),
        };
        let taken = self.taken.map(|t| Taken { at: t.at + range.start as u32, ..t });
        Segment { length: range.end - range.start, body, taken }
    }

    /// Small dirty writes are gathered, so that a log written line by line is not a run per line.
    fn join(&mut self, next: Segment) -> Result<(), Segment> {
        let room =
            (self.length + next.length) as usize <= GATHER_MAX && (next.length as usize) < GATHER_BELOW;
        if !self.is_dirty() || !next.is_dirty() || !room {
            return Err(next);
        }
        let more: &[u8] = match &next.body {
            Body::Memory(bytes) => bytes,
            Body::Growing(bytes) => bytes,
            Body::Stored(..) => return Err(next),
        };
        match &mut self.body {
            Body::Growing(bytes) => bytes.extend_from_slice(more),
            Body::Memory(bytes) => {
                let mut grown = BytesMut::with_capacity(2 * (bytes.len() + more.len()));
                grown.extend_from_slice(bytes);
                grown.extend_from_slice(more);
                self.body = Body::Growing(grown);
            }
            Body::Stored(..) => return Err(next),
        }
        self.length += next.length;
        Ok(())
    }
}
