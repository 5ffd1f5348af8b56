//! Reading: plan under the lock, fetch what is not in memory, read ahead of sequential readers. Hot path: the lock is
//! never held while waiting, and bytes are handed on, not copied.

use std::{ops::Range, time::Duration};

use bytes::Bytes;
use fjordfs_proto::{
    Extent, FsError, FsResult, InodeId,
    error::Errno,
    extent::BlockPiece,
    interval::Run,
    pb::meta::{ExtentsReply, GetExtents, request::Op, response},
};
use futures_util::future::try_join_all;
use tokio::time::Instant;
use tracing::warn;

use super::{
    FileState, Handle,
    view::{Part, ReadPlan},
};
use crate::{
    cache::{CHUNK, Fetch},
    client::Inner,
    meta::unexpected,
};

/// Extents asked for at a time.
const EXTENTS_PAGE: u32 = 4096;

/// A file up to this size shares its block with others, so it is read with regard to its neighbours.
const SMALL_FILE: u64 = CHUNK as u64;

/// Whoever reads such a file at once, and so many bytes, fares well without its neighbours: by way of chunks, half of the client's CPU time of
/// cold files of 100 KiB went into zeroing fresh memory.
const ALONE_MIN: u64 = 64 << 10;

/// A sequential reader's requests may overtake each other by this much.
const REORDERED_MAX: u64 = 4 * CHUNK as u64;

/// How often a read starts over because the file changed under it.
const ATTEMPTS: usize = 16;

/// Pause before servers that could not be reached are asked again.
const UNREACHED_PAUSE: Duration = Duration::from_millis(100);

/// A read that fails for so long is mentioned in the log.
const COMPLAIN: Duration = Duration::from_secs(10);

/// Holes are handed out as slices of this.
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// What a handle remembers of its reader.
#[derive(Default)]
pub(super) struct Cursor {
    /// End of the last read.
    next: u64,
    /// Reads in a row that went on where the last ended.
    streak: u32,
    /// File offset up to which chunks were asked for ahead.
    ahead: u64,
    /// File offset up to which chunks were dropped behind.
    behind: u64,
    /// It counts among the client's streams.
    pub(super) is_stream: bool,
}

impl Cursor {
    /// Notes a read; true when the reader is sequential. The kernel's readahead issues requests side by side, so a
    /// read that begins a little off still counts.
    fn note(&mut self, range: &Range<u64>) -> bool {
        let slack = 4 * u64::from(CHUNK);
        let near = range.start.abs_diff(self.next) <= slack && range.end > self.next.saturating_sub(slack);
        let large = range.end - range.start >= 64 << 10;
        if near && (large || range.start == self.next) {
            self.streak = self.streak.saturating_add(1);
        } else {
            self.streak = 0;
            self.ahead = 0;
            self.behind = range.start;
        }
        self.next = if near { self.next.max(range.end) } else { range.end };
        self.streak >= 2 || (range.start == 0 && large)
    }
}

/// Attempts at a read that have not succeeded.
#[derive(Default)]
pub(super) struct Attempts {
    /// Those that went by extents that were not there, or told of blocks that were not.
    stale: usize,
    /// Where the last page of extents was looked up.
    at: u64,
    /// Since when it fails, and what was said last.
    failure: Option<(Instant, FsError)>,
    complained: bool,
}

impl Attempts {
    /// Notes that extents have to be looked up from an offset on. A page behind the last one is none that was there before.
    pub(super) fn look_up(&mut self, ino: InodeId, from: u64) -> FsResult<()> {
        self.stale += usize::from(from <= self.at);
        self.at = from;
        if self.stale > ATTEMPTS { Err(self.give_up(ino)) } else { Ok(()) }
    }

    fn give_up(&mut self, ino: InodeId) -> FsError {
        let why =
            self.failure.take().map_or_else(|| "it changed all the while".to_owned(), |(_, e)| e.message);
        FsError::new(Errno::EIO, format!("{ino} was looked up again and again and not read: {why}"))
    }
}

impl Handle {
    pub(super) async fn read_at(&self, offset: u64, len: usize) -> FsResult<Vec<Bytes>> {
        let mut attempts = Attempts::default();
        loop {
            let (plan, size) = self.plan(offset, len)?;
            let missing = match plan {
                ReadPlan::Extents(from) => {
                    attempts.look_up(self.state.ino, from)?;
                    from
                }
                ReadPlan::Parts(parts) if parts.is_empty() => return Ok(Vec::new()),
                ReadPlan::Parts(parts) => match self.fetch(offset, parts, size).await {
                    Ok(bytes) => return Ok(bytes),
                    Err(e) => {
                        Box::pin(self.failed(&mut attempts, e)).await?;
                        0
                    }
                },
            };
            self.client.fetch_extents(&self.state, missing).await?;
        }
    }

    /// What a read needs, and how large the file is.
    fn plan(&self, offset: u64, len: usize) -> FsResult<(ReadPlan, u64)> {
        let range = offset..offset.saturating_add(len as u64);
        let (plan, size, lost_end) =
            self.look(|view| (view.plan_read(offset, len as u64), view.size(), view.lost_end()));
        if lost_end > size && range.end > size {
            self.state.lock().check_lost(range)?;
        }
        Ok((plan, size))
    }

    async fn fetch(&self, offset: u64, parts: Vec<Part>, size: u64) -> FsResult<Vec<Bytes>> {
        if let [Part::Memory(bytes)] = &parts[..] {
            return Ok(vec![bytes.clone()]);
        }
        let end = offset + parts.iter().map(Part::len).sum::<u64>();
        let fetch = self.reading(offset..end, size);
        if let [Part::Block(piece)] = parts[..] {
            return self.client.cache.read(piece, fetch).await;
        }
        let fetched = try_join_all(parts.into_iter().map(|part| async move {
            match part {
                Part::Memory(bytes) => Ok(vec![bytes]),
                Part::Zeros(len) => Ok(zeros(len)),
                Part::Block(piece) => self.client.cache.read(piece, fetch).await,
            }
        }))
        .await?;
        Ok(fetched.into_iter().flatten().collect())
    }

    pub(super) async fn read_into(&self, offset: u64, memory: &mut [u8]) -> FsResult<usize> {
        let mut attempts = Attempts::default();
        loop {
            let (plan, size) = self.plan(offset, memory.len())?;
            let missing = match plan {
                ReadPlan::Extents(from) => {
                    attempts.look_up(self.state.ino, from)?;
                    from
                }
                ReadPlan::Parts(parts) => match self.fill(offset, &parts, size, memory).await {
                    Ok(filled) => return Ok(filled),
                    Err(e) => {
                        Box::pin(self.failed(&mut attempts, e)).await?;
                        0
                    }
                },
            };
            self.client.fetch_extents(&self.state, missing).await?;
        }
    }

    /// Returns when a read that has failed may do better, with extents of now: when its blocks were not found, since its extents may
    /// have been stale, and when servers could not be reached, a moment later. For as long as an operation may take.
    async fn failed(&self, attempts: &mut Attempts, e: FsError) -> FsResult<()> {
        let unreached = match e.errno {
            Errno::ENOENT => false,
            Errno::EHOSTUNREACH => true,
            _ => return Err(e),
        };
        let ino = self.state.ino;
        let since = attempts.failure.take().map_or_else(Instant::now, |(since, _)| since);
        if since.elapsed() >= COMPLAIN && !std::mem::replace(&mut attempts.complained, true) {
            warn!(%ino, "cannot be read, trying again: {e}");
        }
        attempts.failure = Some((since, e));
        if since.elapsed() >= self.client.options.operation_timeout {
            return Err(attempts.give_up(ino));
        }
        if unreached {
            tokio::time::sleep(UNREACHED_PAUSE).await;
            return Ok(());
        }
        attempts.look_up(ino, 0)
    }

    /// Puts parts into memory, one after the other, and says how many bytes they are.
    async fn fill(&self, offset: u64, parts: &[Part], size: u64, memory: &mut [u8]) -> FsResult<usize> {
        let total = parts.iter().map(Part::len).sum::<u64>() as usize;
        let fetch = match parts.iter().any(|part| matches!(part, Part::Block(_))) {
            true => self.reading(offset..offset + total as u64, size),
            false => Fetch::Pages,
        };
        if let [Part::Block(piece)] = parts {
            self.client.cache.read_into(*piece, fetch, &mut memory[..total]).await?;
            return Ok(total);
        }
        let mut rest = memory;
        let mut blocks = Vec::new();
        for part in parts {
            let (room, after) = rest.split_at_mut(part.len() as usize);
            rest = after;
            match part {
                Part::Memory(bytes) => room.copy_from_slice(bytes),
                Part::Zeros(_) => room.fill(0),
                Part::Block(piece) => blocks.push(self.client.cache.read_into(*piece, fetch, room)),
            }
        }
        try_join_all(blocks).await?;
        Ok(total)
    }

    /// Decides how this read of a file of `size` bytes fetches, and reads ahead of a sequential reader.
    fn reading(&self, range: Range<u64>, size: u64) -> Fetch {
        // What writers have given back is the cache's again.
        self.client.cache.yield_to(self.client.budget.used());
        if size <= SMALL_FILE {
            let alone = range.end >= size && range.end - range.start >= ALONE_MIN;
            return if alone { Fetch::InOrder } else { Fetch::Neighbours };
        }
        let window = self.client.options.readahead;
        let (ahead, passed) = {
            let mut cursor = self.cursor.lock();
            let is_sequential = cursor.note(&range);
            if is_sequential != std::mem::replace(&mut cursor.is_stream, is_sequential) {
                match is_sequential {
                    true => self.client.streams.begin(self.state.ino, size),
                    false => self.client.streams.end(self.state.ino),
                }
            }
            if !is_sequential {
                return Fetch::Pages;
            }
            // The window opens with the streak: a short run costs little.
            let window = window.min(u64::from(CHUNK) << cursor.streak.min(8));
            let target = (range.end + window).min(size);
            let from = cursor.ahead.max(range.end);
            if target < from + u64::from(CHUNK) && target < size {
                return Fetch::Chunks;
            }
            cursor.ahead = cursor.ahead.max(target);
            let passed = cursor.behind..range.start.saturating_sub(REORDERED_MAX).max(cursor.behind);
            cursor.behind = passed.end;
            (from..target, passed)
        };
        self.prefetch(ahead);
        if self.client.options.drop_behind && !self.client.cache.can_hold(self.client.streams.bytes()) {
            self.chunks_of(passed, |piece, index| self.client.cache.drop_chunk(piece.block, index));
        }
        Fetch::Chunks
    }

    /// Asks for the chunks of a file range that are in blocks.
    fn prefetch(&self, range: Range<u64>) {
        self.chunks_of(range, |piece, index| {
            let client = self.client.clone();
            self.client.engine.spawn_here(async move {
                client.cache.prefetch(piece.block, piece.layout, index).await;
            });
        });
    }

    /// Calls `each` with every chunk that a file range has bytes in, as far as its extents are known.
    fn chunks_of(&self, range: Range<u64>, each: impl Fn(BlockPiece, u32)) {
        if range.is_empty() {
            return;
        }
        let ReadPlan::Parts(parts) = self.state.lock().view.plan_read(range.start, range.end - range.start)
        else {
            return;
        };
        for part in parts {
            let Part::Block(piece) = part else { continue };
            for index in piece.offset / CHUNK..=(piece.offset + piece.length - 1) / CHUNK {
                each(piece, index);
            }
        }
    }
}

impl Part {
    fn len(&self) -> u64 {
        match self {
            Part::Memory(bytes) => bytes.len() as u64,
            Part::Zeros(len) => *len,
            Part::Block(piece) => piece.length.into(),
        }
    }
}

/// A hole's bytes.
fn zeros(len: u64) -> Vec<Bytes> {
    let max = ZEROS.len() as u64;
    (0..len.div_ceil(max)).map(|i| Bytes::from_static(&ZEROS[..max.min(len - i * max) as usize])).collect()
}

impl Inner {
    async fn extents_page(&self, ino: InodeId, offset: u64) -> FsResult<ExtentsReply> {
        let request = GetExtents { ino: ino.0, offset, limit: EXTENTS_PAGE };
        match self.meta.call(Op::GetExtents(request)).await? {
            response::Result::Extents(reply) => Ok(reply),
            _ => Err(unexpected("a request for extents")),
        }
    }

    /// Fetches one page of extents into the view.
    pub(super) async fn fetch_extents(&self, state: &FileState, from: u64) -> FsResult<()> {
        let reply = self.extents_page(state.ino, from).await?;
        let mut inner = state.lock();
        if from == 0 && reply.data_version == inner.view.extents_version() {
            inner.view.forget_extents(reply.data_version);
        }
        inner.view.learn_extents(from, reply)
    }

    /// All committed extents of a file, from the server.
    pub(crate) async fn all_extents(&self, ino: InodeId) -> FsResult<Vec<(u64, Extent)>> {
        let mut extents = Vec::new();
        let mut from = 0;
        loop {
            let page = self.extents_page(ino, from).await?;
            for extent in page.extents {
                let (offset, extent) = Extent::from_pb(extent)?;
                if offset + extent.len() > from {
                    extents.push((offset, extent));
                }
            }
            if page.next_offset == u64::MAX || page.next_offset <= from {
                return Ok(extents);
            }
            from = page.next_offset;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequential_readers_are_told_from_random_ones() {
        let mut sequential = Cursor::default();
        let step = 128 << 10;
        assert!((1..20u64).map(|i| sequential.note(&(i * step..(i + 1) * step))).skip(3).all(|s| s));
        let mut random = Cursor::default();
        let spots = [7u64, 900, 23, 450, 777, 12, 333];
        assert!(!spots.iter().any(|i| random.note(&(i << 24..(i << 24) + 4096))));
    }

    #[test]
    fn a_hole_has_its_length() {
        for len in [1, 4096, 1 << 20, (3 << 20) + 5] {
            assert_eq!(zeros(len).iter().map(Bytes::len).sum::<usize>() as u64, len);
        }
    }
}
