//! Verified block data in memory.
//!
//! Blocks are immutable, so nothing here is ever invalidated. The unit is a chunk of 1 MiB of a block: what a
//! sequential reader fetches at a time. One fetch serves all who ask for a chunk meanwhile.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use fjordfs_proto::{BLOCK_SIZE_MAX, BlockId, FsResult, PAGE_SIZE, Policy, extent::BlockPiece};
use parking_lot::Mutex;
use quick_cache::{Weighter, sync::Cache};
use tokio::sync::Semaphore;

use crate::{
    data::{BlockRange, DataClient},
    prefetch::window::Window,
};

/// Bytes of a chunk.
pub(crate) const CHUNK: u32 = 1 << 20;

type Key = (BlockId, u32);

#[derive(Clone)]
struct ByLength;

impl Weighter<Key, Bytes> for ByLength {
    fn weight(&self, _: &Key, chunk: &Bytes) -> u64 {
        chunk.len() as u64 + 64
    }
}

/// How a reader wants what is not in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fetch {
    /// Whole chunks, kept for the neighbours: sequential reads, packed small files.
    Chunks,
    /// These pages only, not kept: random reads.
    Pages,
    /// Pages at first; the whole chunk once a neighbour was read lately. Small files share blocks with the files that
    /// were written beside them: a reader that comes back for a neighbour will want the others too.
    Neighbours,
}

/// The cache in front of the data servers.
pub(crate) struct BlockCache {
    chunks: Cache<Key, Bytes, ByLength>,
    data: Arc<DataClient>,
    prefetch: Semaphore,
    touched: Touched,
    window: Arc<Window>,
}

/// Chunks of which a part was read lately.
#[derive(Default)]
struct Touched(Mutex<VecDeque<Key>>);

impl Touched {
    /// How many chunks are remembered: readers of more packed chunks than this at a time are random.
    const MAX: usize = 64;

    /// Notes a read; true when the chunk was read before.
    fn again(&self, key: Key) -> bool {
        let mut recent = self.0.lock();
        if recent.contains(&key) {
            return true;
        }
        if recent.len() == Touched::MAX {
            recent.pop_front();
        }
        recent.push_back(key);
        false
    }
}

impl BlockCache {
    pub(crate) fn new(data: Arc<DataClient>, bytes_max: u64, prefetch_max: u64) -> BlockCache {
        let items = (bytes_max / u64::from(CHUNK)).max(16) as usize;
        BlockCache {
            chunks: Cache::with_weighter(items, bytes_max, ByLength),
            data,
            prefetch: Semaphore::new((prefetch_max / u64::from(CHUNK)).max(4) as usize),
            touched: Touched::default(),
            window: Window::new(prefetch_max),
        }
    }

    /// The bytes of a piece of an extent, in order.
    pub(crate) async fn read(&self, piece: BlockPiece, fetch: Fetch) -> FsResult<Vec<Bytes>> {
        let mut parts = Vec::with_capacity(2);
        let (mut at, end) = (piece.offset, piece.offset + piece.length);
        while at < end {
            let index = at / CHUNK;
            let stop = end.min((index + 1) * CHUNK);
            let key = (piece.block, index);
            self.window.read(&key);
            let part = match self.chunks.get(&key) {
                Some(chunk) => cut(&chunk, index * CHUNK, at..stop)?,
                None if fetch == Fetch::Chunks || (fetch == Fetch::Neighbours && self.touched.again(key)) => {
                    let chunk = self.chunk(piece.block, piece.policy, index).await?;
                    cut(&chunk, index * CHUNK, at..stop)?
                }
                None => {
                    let first = at - at % PAGE_SIZE as u32;
                    let range = BlockRange {
                        block: piece.block,
                        policy: piece.policy,
                        offset: first,
                        length: stop - first,
                    };
                    cut(&self.data.read(range).await?, first, at..stop)?
                }
            };
            parts.push(part);
            at = stop;
        }
        Ok(parts)
    }

    /// Fetches chunk `index` of a block if it is not there and memory for reading ahead is free.
    pub(crate) async fn prefetch(&self, block: BlockId, policy: Policy, index: u32) {
        if self.chunks.peek(&(block, index)).is_some() {
            return;
        }
        if let Ok(_permit) = self.prefetch.try_acquire() {
            // Whoever reads it will see the error.
            let _ = self.chunk(block, policy, index).await;
        }
    }

    /// What plans have fetched ahead of their readers.
    pub(crate) fn window(&self) -> &Arc<Window> {
        &self.window
    }

    /// Whether a chunk is in memory.
    pub(crate) fn has(&self, block: BlockId, index: u32) -> bool {
        self.chunks.peek(&(block, index)).is_some()
    }

    /// Fetches a chunk for later.
    pub(crate) async fn fetch(&self, block: BlockId, policy: Policy, index: u32) -> FsResult<()> {
        self.chunk(block, policy, index).await.map(drop)
    }

    /// Forgets a chunk: its reader will not come back to it.
    pub(crate) fn drop_chunk(&self, block: BlockId, index: u32) {
        self.chunks.remove(&(block, index));
    }

    async fn chunk(&self, block: BlockId, policy: Policy, index: u32) -> FsResult<Bytes> {
        let offset = index * CHUNK;
        let length = CHUNK.min(BLOCK_SIZE_MAX as u32 - offset);
        let range = BlockRange { block, policy, offset, length };
        self.chunks.get_or_insert_async(&(block, index), self.data.read(range)).await
    }
}

/// The part `range` (block offsets) of `bytes` that begin at block offset `start`.
///
/// # Errors
/// `EIO` when the block ends before the range does: an extent that points past its block.
fn cut(bytes: &Bytes, start: u32, range: std::ops::Range<u32>) -> FsResult<Bytes> {
    let (from, to) = ((range.start - start) as usize, (range.end - start) as usize);
    if to > bytes.len() {
        let why = format!("block ends at {}, the file needs {}", start as usize + bytes.len(), range.end);
        return Err(fjordfs_proto::FsError::new(fjordfs_proto::error::Errno::EIO, why));
    }
    Ok(bytes.slice(from..to))
}
