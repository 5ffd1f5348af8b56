//! Which chunks of which blocks a range of a file is made of.

use std::ops::Range;

use fjordfs_proto::{BlockId, FsResult, Layout};

use super::{
    File,
    read::Attempts,
    view::{Part, ReadPlan},
};
use crate::cache::CHUNK;

/// A chunk of a block that is read as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct BlockChunk {
    pub(crate) block: BlockId,
    pub(crate) layout: Layout,
    pub(crate) index: u32,
}

impl File {
    /// The chunks of stored bytes in a range, in file order. What is in holes, in the metadata or not yet stored has none.
    pub(crate) async fn chunks(&self, range: Range<u64>) -> FsResult<Vec<BlockChunk>> {
        let mut attempts = Attempts::default();
        loop {
            let plan = self.handle.state.lock().view.plan_read(range.start, range.end - range.start);
            let missing = match plan {
                ReadPlan::Extents(from) => from,
                ReadPlan::Parts(parts) => return Ok(parts.iter().flat_map(chunks_of).collect()),
            };
            attempts.look_up(self.ino(), missing)?;
            self.handle.client.fetch_extents(&self.handle.state, missing).await?;
        }
    }
}

fn chunks_of(part: &Part) -> impl Iterator<Item = BlockChunk> + use<> {
    let piece = match part {
        Part::Block(piece) if piece.length > 0 => Some(*piece),
        _ => None,
    };
    piece.into_iter().flat_map(|p| {
        let indexes = p.offset / CHUNK..=(p.offset + p.length - 1) / CHUNK;
        indexes.map(move |index| BlockChunk { block: p.block, layout: p.layout, index })
    })
}
