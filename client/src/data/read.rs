//! Verified reads of block ranges. Hot path.
//!
//! The shard that holds a range is asked for it: any copy, or the one data shard. When that fails, or is late, another
//! copy is asked as well, or the range is decoded from the same range of K other shards; the first verified answer
//! wins. What is late, and whom to ask first, says [`super::health`].

use std::{pin::pin, sync::Arc};

use bytes::{Bytes, BytesMut};
use fjordfs_proto::{
    BlockId, FsError, FsResult, Layout, PAGE_SIZE, TargetId, cluster::mix, coding::Code, error::Errno,
    layout::ShardPiece,
};
use futures_util::future::{Either, select, try_join_all};
use tracing::debug;

use super::{DataClient, gather::Want};

/// Bytes of one block. `offset` is a multiple of the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BlockRange {
    pub(crate) block: BlockId,
    pub(crate) layout: Layout,
    pub(crate) offset: u32,
    pub(crate) length: u32,
}

/// How a piece can be had.
struct Ways {
    /// Shards that have it as it is, the one to be asked first at the front. All copies, or one data shard.
    plain: Vec<Want>,
    /// K of these restore it; none under copies.
    others: Vec<Want>,
    /// Nobody of `plain` is likely to answer.
    decode_first: bool,
}

impl DataClient {
    /// Reads a range; shorter only at the end of the block, or of the zeros that its last shard is filled up with.
    ///
    /// # Errors
    /// `EHOSTUNREACH` when somebody who may have it cannot be reached now, `ENOENT` when a shard is not where it should be (the
    /// caller's extents may be stale), else `EIO`; naming what each of them said.
    pub(crate) async fn read(self: &Arc<Self>, range: BlockRange) -> FsResult<Bytes> {
        let mut pieces = range.pieces();
        match (pieces.next(), pieces.next()) {
            (None, _) => Ok(Bytes::new()),
            (Some(only), None) => self.read_piece(range, only).await,
            (Some(first), Some(second)) => {
                let pieces = [first, second].into_iter().chain(pieces);
                let parts = try_join_all(pieces.map(|piece| self.read_piece(range, piece))).await?;
                let mut whole = BytesMut::with_capacity(range.length as usize);
                parts.iter().for_each(|part| whole.extend_from_slice(part));
                Ok(whole.freeze())
            }
        }
    }

    /// Reads a range into `memory`, from its start on, and says how many bytes: at most `range.length`, and as many as
    /// [`DataClient::read`] would return. They come straight from the socket and are verified where they lie; room for whole
    /// pages is needed for that, else they are copied. More of `memory` than that may be overwritten.
    ///
    /// # Errors
    /// As [`DataClient::read`]. What is in `memory` then is not verified and must not be shown to anyone.
    pub(crate) async fn read_into(self: &Arc<Self>, range: BlockRange, memory: &mut [u8]) -> FsResult<usize> {
        let mut pieces = range.pieces();
        match (pieces.next(), pieces.next()) {
            (None, _) => Ok(0),
            (Some(only), None) => self.read_piece_into(range, only, memory).await,
            (Some(first), Some(second)) => {
                let mut rest = memory;
                let mut reads = Vec::new();
                for piece in [first, second].into_iter().chain(pieces) {
                    let (room, after) = rest.split_at_mut(rest.len().min(piece.length as usize));
                    rest = after;
                    reads.push(self.read_piece_into(range, piece, room));
                }
                Ok(try_join_all(reads).await?.iter().sum())
            }
        }
    }

    async fn read_piece(&self, range: BlockRange, piece: ShardPiece) -> FsResult<Bytes> {
        match self.read_whole(range, piece).await? {
            Ok(bytes) => Ok(bytes),
            Err(failures) => self.read_by_page(range, piece, failures).await,
        }
    }

    /// What is left when damage is scattered: each page may be well on another target than its neighbours.
    async fn read_by_page(
        &self,
        range: BlockRange,
        piece: ShardPiece,
        failures: Vec<FsError>,
    ) -> FsResult<Bytes> {
        let is_rotten = failures.iter().any(|e| e.errno == Errno::EBADMSG);
        if !is_rotten || piece.length as usize <= PAGE_SIZE {
            return Err(all_failed(range, &failures));
        }
        let end = piece.offset + piece.length;
        let mut whole = BytesMut::with_capacity(piece.length as usize);
        for offset in (piece.offset..end).step_by(PAGE_SIZE) {
            let page = ShardPiece { offset, length: (end - offset).min(PAGE_SIZE as u32), ..piece };
            match self.read_whole(range, page).await? {
                Ok(bytes) => whole.extend_from_slice(&bytes),
                Err(failures) => return Err(all_failed(range, &failures)),
            }
        }
        Ok(whole.freeze())
    }

    async fn read_whole(
        &self,
        range: BlockRange,
        piece: ShardPiece,
    ) -> FsResult<Result<Bytes, Vec<FsError>>> {
        let ways = self.ways(range, piece)?;
        if ways.others.is_empty() {
            return Ok(self.plain(&ways.plain).await);
        }
        let (plain, decoded) = (pin!(self.plain(&ways.plain)), pin!(self.decode(range, piece, &ways.others)));
        Ok(match ways.decode_first {
            true => self.race(decoded, ways.others.first(), plain).await,
            false => self.race(plain, ways.plain.first(), decoded).await,
        })
    }

    /// The first copy's answer goes into memory directly; the others' are copied there.
    async fn read_piece_into(
        &self,
        range: BlockRange,
        piece: ShardPiece,
        memory: &mut [u8],
    ) -> FsResult<usize> {
        let mut ways = self.ways(range, piece)?;
        // What is rarely needed has a place of its own, so that every read does not carry it.
        let bytes = if ways.decode_first || ways.plain.is_empty() {
            Box::pin(self.read_piece(range, piece)).await?
        } else {
            let first = ways.plain.remove(0);
            let mut direct = pin!(self.read_shard_into(&first, memory));
            let others = || {
                Box::pin(async {
                    match ways.others.is_empty() {
                        true => self.plain(&ways.plain).await,
                        false => self.decode(range, piece, &ways.others).await,
                    }
                })
            };
            let answer = tokio::select! {
                biased;
                answer = &mut direct => Some(answer),
                () = self.late(Some(&first), ways.plain.len() + ways.others.len() > 0) => None,
            };
            let bytes = match answer {
                Some(Ok(filled)) => return Ok(filled),
                Some(Err(e)) => others().await.map_err(|failures| (e, failures)),
                None => match select(direct, others()).await {
                    Either::Left((Ok(filled), _)) => return Ok(filled),
                    Either::Left((Err(e), others)) => others.await.map_err(|failures| (e, failures)),
                    Either::Right((Ok(bytes), _)) => Ok(bytes),
                    // Nobody else has it: as long as an operation may take.
                    Either::Right((Err(failures), direct)) => {
                        match tokio::time::timeout(self.timeout, direct).await {
                            Ok(Ok(filled)) => return Ok(filled),
                            Ok(Err(e)) => Err((e, failures)),
                            Err(_) => Err((self.silent(&first), failures)),
                        }
                    }
                },
            };
            match bytes {
                Ok(bytes) => bytes,
                Err((e, mut failures)) => {
                    failures.insert(0, e);
                    Box::pin(self.read_by_page(range, piece, failures)).await?
                }
            }
        };
        let filled = bytes.len().min(memory.len());
        memory[..filled].copy_from_slice(&bytes[..filled]);
        Ok(filled)
    }

    async fn plain(&self, wants: &[Want]) -> Result<Bytes, Vec<FsError>> {
        let mut answers = self.gather(wants, 1).await?;
        answers.pop().map(|(_, bytes)| bytes).ok_or_else(Vec::new)
    }

    /// Restores a piece from the same range of K others.
    async fn decode(
        &self,
        range: BlockRange,
        piece: ShardPiece,
        others: &[Want],
    ) -> Result<Bytes, Vec<FsError>> {
        debug!(block = %range.block, shard = piece.shard, "decoding");
        let mut others = others.to_vec();
        others.sort_by_cached_key(|want| self.health.is_avoided(want.target));
        let answers = self.gather(&others, range.layout.needed()).await?;
        let present: Vec<(u8, &[u8])> = answers.iter().map(|(shard, bytes)| (*shard, &bytes[..])).collect();
        let restored = match Code::of(range.layout) {
            Some(code) => code.restore(&present, piece.shard).map_err(|e| e.to_string()),
            None => Err("copies are not decoded".to_owned()),
        };
        restored
            .map(Bytes::from)
            .map_err(|e| vec![FsError::new(Errno::EIO, format!("{} #{}: {e}", range.block, piece.shard))])
    }

    /// Waits for `first`, and when it fails or is late for `second` as well. The first success wins.
    async fn race<T>(
        &self,
        mut first: impl Future<Output = Result<T, Vec<FsError>>> + Unpin,
        asked: Option<&Want>,
        second: impl Future<Output = Result<T, Vec<FsError>>> + Unpin,
    ) -> Result<T, Vec<FsError>> {
        let both = |mut a: Vec<FsError>, b: Vec<FsError>| {
            a.extend(b);
            a
        };
        let answer = tokio::select! {
            biased;
            answer = &mut first => Some(answer),
            () = self.late(asked, true) => None,
        };
        match answer {
            Some(Ok(value)) => Ok(value),
            Some(Err(e)) => second.await.map_err(|f| both(e, f)),
            None => match select(first, second).await {
                Either::Left((Ok(value), _)) | Either::Right((Ok(value), _)) => Ok(value),
                Either::Left((Err(e), second)) => second.await.map_err(|f| both(e, f)),
                Either::Right((Err(e), first)) => first.await.map_err(|f| both(f, e)),
            },
        }
    }

    /// Who can be asked, in the order in which it is done: those that are up and well first, copies spread by position
    /// so that they share the load.
    fn ways(&self, range: BlockRange, piece: ShardPiece) -> FsResult<Ways> {
        let map = self.map();
        let BlockRange { block, layout, .. } = range;
        let group = map.placement(block, layout).ok_or_else(|| {
            FsError::new(Errno::EIO, format!("{block}: no placement for {}", layout.policy()))
        })?;
        let readable = |t: &TargetId| map.targets.get(t).is_some_and(|target| target.readable());
        let shards = group.iter().zip(0..).map(|(&target, shard)| Want {
            block,
            layout,
            target,
            piece: ShardPiece { shard, ..piece },
        });
        let turn = (mix(block.0 ^ u64::from(range.offset) >> 20) % group.len() as u64) as usize;
        let (mut plain, mut others): (Vec<Want>, Vec<Want>) = match layout {
            Layout::Copies(_) => (shards.collect(), Vec::new()),
            Layout::Ec { .. } => shards.partition(|want| want.piece.shard == piece.shard),
        };
        for wants in [&mut plain, &mut others] {
            let turn = turn.min(wants.len().saturating_sub(1));
            wants.rotate_left(turn);
        }
        // Being asked whether it is in trouble may be a target's turn to be probed, so only whoever would be asked is.
        let well = |want: &Want| readable(&want.target) && !self.health.in_trouble(want.target);
        plain.sort_by_key(|want| !readable(&want.target));
        others.sort_by_key(|want| !readable(&want.target));
        if let Some(at) = plain.iter().position(well) {
            plain.swap(0, at);
            return Ok(Ways { plain, others, decode_first: false });
        }
        let decode_first = others.len() >= layout.needed();
        Ok(Ways { plain, others, decode_first })
    }
}

impl BlockRange {
    fn pieces(self) -> impl Iterator<Item = ShardPiece> {
        self.layout.pieces(self.offset..self.offset.saturating_add(self.length))
    }
}

fn all_failed(range: BlockRange, failures: &[FsError]) -> FsError {
    let told: Vec<&str> = failures.iter().map(|e| e.message.as_str()).collect();
    let any = |errno| failures.iter().any(|e| e.errno == errno);
    let errno =
        [Errno::EHOSTUNREACH, Errno::ENOENT].into_iter().find(|errno| any(*errno)).unwrap_or(Errno::EIO);
    let what = match range.layout {
        Layout::Copies(_) => "no copy could be read".to_owned(),
        Layout::Ec { .. } => format!("fewer than {} shards could be read", range.layout.needed()),
    };
    FsError::new(errno, format!("{}: {what}: {}", range.block, told.join("; ")))
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
