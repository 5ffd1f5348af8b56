//! Verified block data in memory.
//!
//! Blocks are immutable, so nothing here is ever invalidated. The unit is a chunk of 1 MiB of a block: what a
//! sequential reader fetches at a time. One fetch serves all who ask for a chunk meanwhile.
//!
//! # Memory
//! Read data may take what written data does not: the cache's bound falls, in steps, while there is dirty data, and rises again.

use std::{
    num::NonZeroUsize,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use fjordfs_proto::{
    BLOCK_SIZE_MAX, BlockId, FsError, FsResult, Layout, PAGE_SIZE, error::Errno, extent::BlockPiece,
};
use lru::LruCache;
use parking_lot::Mutex;
use quick_cache::{Weighter, sync::Cache};
use tokio::sync::Semaphore;

use crate::{
    data::{BlockRange, DataClient},
    prefetch::window::Window,
};

/// Bytes of a chunk.
pub(crate) const CHUNK: u32 = 1 << 20;

/// Dirty data takes room from the cache in steps of this.
const STEP: u64 = 64 << 20;

/// So many reads that went on where another had ended are no coincidence.
const IN_ORDER: u32 = 2;

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
    /// Pages, as long as the reads of a chunk jump about in it: a read that is a good part of a chunk costs less by itself than
    /// memory for the whole one, which has to be fresh until the cache is full.
    InOrder,
}

/// The cache in front of the data servers.
pub(crate) struct BlockCache {
    chunks: Cache<Key, Bytes, ByLength>,
    data: Arc<DataClient>,
    prefetch: Semaphore,
    touched: Touched,
    window: Arc<Window>,
    bytes_max: u64,
    /// Steps that dirty data has taken of `bytes_max`.
    yielded: AtomicU64,
}

/// Chunks of which a part was read lately: as many as the cache holds, since a neighbour that comes later than that
/// would not find the chunk.
struct Touched(Mutex<LruCache<Key, Touch>>);

/// The last read of a chunk.
struct Touch {
    /// Block offset at which it ended.
    end: u32,
    /// Reads in a row, up to this one, that went on where the one before had ended.
    streak: u32,
}

impl Touched {
    fn new(chunks: usize) -> Touched {
        Touched(Mutex::new(LruCache::new(NonZeroUsize::new(chunks).unwrap_or(NonZeroUsize::MIN))))
    }

    /// Notes a read of these block offsets; if the chunk was read before, how many reads went on where another had ended.
    fn note(&self, key: Key, range: Range<u32>) -> Option<u32> {
        let mut touched = self.0.lock();
        let Some(touch) = touched.get_mut(&key) else {
            touched.put(key, Touch { end: range.end, streak: 0 });
            return None;
        };
        let streak = if touch.end == range.start { touch.streak.saturating_add(1) } else { 0 };
        *touch = Touch { end: range.end, streak };
        Some(streak)
    }
}

impl BlockCache {
    pub(crate) fn new(data: Arc<DataClient>, bytes_max: u64, prefetch_max: u64) -> BlockCache {
        let items = (bytes_max / u64::from(CHUNK)).max(16) as usize;
        BlockCache {
            chunks: Cache::with_weighter(items, bytes_max, ByLength),
            data,
            prefetch: Semaphore::new((prefetch_max / u64::from(CHUNK)).max(4) as usize),
            touched: Touched::new(items),
            window: Window::new(prefetch_max),
            bytes_max,
            yielded: AtomicU64::new(0),
        }
    }

    /// Whether files of so many bytes can stay in memory as a whole.
    pub(crate) fn can_hold(&self, size: u64) -> bool {
        // A part is lost to chunks that are not spread evenly over the cache's shards.
        size <= self.chunks.capacity() / 8 * 7
    }

    /// Leaves room for so many bytes of dirty data.
    pub(crate) fn yield_to(&self, dirty: u64) {
        let steps = dirty.div_ceil(STEP);
        if self.yielded.load(Ordering::Relaxed) != steps
            && self.yielded.swap(steps, Ordering::AcqRel) != steps
        {
            self.chunks.set_capacity(self.bytes_max.saturating_sub(steps * STEP).max(STEP));
        }
    }

    /// The bytes of a piece of an extent, in order. What has to wait is boxed, here and in [`BlockCache::read_into`]: else every
    /// request of a mount would be as large as a read that misses, also those that find all in memory.
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
                None if self.wants_chunk(fetch, key, at..stop) => {
                    let chunk = Box::pin(self.chunk(piece.block, piece.layout, index)).await?;
                    cut(&chunk, index * CHUNK, at..stop)?
                }
                None => {
                    let first = at - at % PAGE_SIZE as u32;
                    let range = BlockRange {
                        block: piece.block,
                        layout: piece.layout,
                        offset: first,
                        length: stop - first,
                    };
                    cut(&Box::pin(self.data.read(range)).await?, first, at..stop)?
                }
            };
            parts.push(part);
            at = stop;
        }
        Ok(parts)
    }

    /// As [`BlockCache::read`], into memory as long as the piece.
    pub(crate) async fn read_into(&self, piece: BlockPiece, fetch: Fetch, memory: &mut [u8]) -> FsResult<()> {
        let end = piece.offset + piece.length;
        let (mut at, mut rest) = (piece.offset, memory);
        while at < end {
            let index = at / CHUNK;
            let stop = end.min((index + 1) * CHUNK);
            let (part, after) = rest.split_at_mut((stop - at) as usize);
            let key = (piece.block, index);
            self.window.read(&key);
            match self.chunks.get(&key) {
                Some(chunk) => part.copy_from_slice(slice(&chunk, index * CHUNK, at..stop)?),
                None if self.wants_chunk(fetch, key, at..stop) => {
                    let chunk = Box::pin(self.chunk(piece.block, piece.layout, index)).await?;
                    part.copy_from_slice(slice(&chunk, index * CHUNK, at..stop)?);
                }
                None => Box::pin(self.pages_into(piece, at..stop, part)).await?,
            }
            (at, rest) = (stop, after);
        }
        Ok(())
    }

    fn wants_chunk(&self, fetch: Fetch, key: Key, range: Range<u32>) -> bool {
        match fetch {
            Fetch::Chunks => true,
            Fetch::Pages => false,
            Fetch::Neighbours => self.touched.note(key, range).is_some(),
            Fetch::InOrder => self.touched.note(key, range).is_some_and(|streak| streak >= IN_ORDER),
        }
    }

    /// Reads a range of a block that is not kept.
    async fn pages_into(&self, piece: BlockPiece, range: Range<u32>, memory: &mut [u8]) -> FsResult<()> {
        let first = range.start - range.start % PAGE_SIZE as u32;
        let pages =
            BlockRange { block: piece.block, layout: piece.layout, offset: first, length: range.end - first };
        if first < range.start {
            memory.copy_from_slice(slice(&self.data.read(pages).await?, first, range)?);
            return Ok(());
        }
        let filled = self.data.read_into(pages, memory).await?;
        if filled < memory.len() { Err(too_short(first as usize + filled, range.end)) } else { Ok(()) }
    }

    /// Fetches chunk `index` of a block if it is not there and memory for reading ahead is free.
    pub(crate) async fn prefetch(&self, block: BlockId, layout: Layout, index: u32) {
        if self.chunks.peek(&(block, index)).is_some() {
            return;
        }
        if let Ok(_permit) = self.prefetch.try_acquire() {
            // Whoever reads it will see the error.
            let _ = self.chunk(block, layout, index).await;
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
    pub(crate) async fn fetch(&self, block: BlockId, layout: Layout, index: u32) -> FsResult<()> {
        self.chunk(block, layout, index).await.map(drop)
    }

    /// Forgets a chunk: its reader will not come back to it.
    pub(crate) fn drop_chunk(&self, block: BlockId, index: u32) {
        self.chunks.remove(&(block, index));
    }

    async fn chunk(&self, block: BlockId, layout: Layout, index: u32) -> FsResult<Bytes> {
        let offset = index * CHUNK;
        let length = CHUNK.min(BLOCK_SIZE_MAX as u32 - offset);
        let range = BlockRange { block, layout, offset, length };
        self.chunks.get_or_insert_async(&(block, index), self.data.read(range)).await
    }
}

/// The part `range` (block offsets) of `bytes` that begin at block offset `start`.
///
/// # Errors
/// `EIO` when the block ends before the range does: an extent that points past its block.
fn slice(bytes: &[u8], start: u32, range: Range<u32>) -> FsResult<&[u8]> {
    let (from, to) = ((range.start - start) as usize, (range.end - start) as usize);
    bytes.get(from..to).ok_or_else(|| too_short(start as usize + bytes.len(), range.end))
}

/// As [`slice`], sharing the memory.
fn cut(bytes: &Bytes, start: u32, range: Range<u32>) -> FsResult<Bytes> {
    slice(bytes, start, range).map(|part| bytes.slice_ref(part))
}

fn too_short(block_end: usize, needed: u32) -> FsError {
    FsError::new(Errno::EIO, format!("block ends at {block_end}, the file needs {needed}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_chunk_are_where_the_block_has_them() {
        let bytes = Bytes::from_static(b"0123456789");
        assert_eq!(cut(&bytes, 100, 103..106).unwrap(), b"345"[..]);
        assert_eq!(cut(&bytes, 100, 110..110).unwrap(), b""[..]);
        let error = cut(&bytes, 100, 105..111).unwrap_err();
        assert_eq!(error.errno, Errno::EIO);
        assert!(error.message.contains("ends at 110") && error.message.contains("needs 111"), "{error}");
    }

    #[test]
    fn a_chunk_counts_as_touched_until_others_have_taken_its_place() {
        let touched = Touched::new(2);
        let again = |block| touched.note((BlockId(block), 0), 0..4096).is_some();
        assert!(!again(1) && !again(2));
        assert!(again(1));
        assert!(!again(3), "takes the place of 2");
        assert!(!again(2));
        assert!(again(3));
    }

    #[test]
    fn reads_of_a_chunk_in_order_are_told_from_others() {
        let touched = Touched::new(2);
        let note = |start, end| touched.note((BlockId(1), 0), start..end);
        assert_eq!(note(0, 100_000), None);
        assert_eq!((note(100_000, 200_000), note(200_000, 300_000)), (Some(1), Some(2)));
        assert_eq!((note(900_000, 1_000_000), note(300_000, 400_000)), (Some(0), Some(0)));
        assert_eq!(note(300_000, 400_000), Some(0), "the same once more");
    }
}
