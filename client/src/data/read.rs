//! Verified reads of block ranges. Hot path.
//!
//! One copy is asked; when it fails, or does not answer within the hedge delay, the next one is asked as well and the
//! first verified answer wins.

use std::{pin::pin, sync::Arc};

use bytes::Bytes;
use fjordfs_proto::{
    BlockId, FsError, FsResult, PAGE_SIZE, Policy, TargetId,
    block::first_bad_page,
    cluster::mix,
    error::Errno,
    frame::{self, Opcode},
    pb::data::{LocateShardRequest, Range, ReadShardReply, ReadShardRequest},
};
use futures_util::{
    future::{Either, select},
    stream::{FuturesUnordered, StreamExt},
};
use tracing::warn;

use super::{DataClient, local::Shard};

/// Bytes of one block. `offset` is a multiple of the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BlockRange {
    pub(crate) block: BlockId,
    pub(crate) policy: Policy,
    pub(crate) offset: u32,
    pub(crate) length: u32,
}

impl DataClient {
    /// Reads a range; shorter only at the end of the block.
    ///
    /// # Errors
    /// `ENOENT` when every copy says that there is no such block (the caller's extents are stale), else `EIO` naming
    /// what each copy said.
    pub(crate) async fn read(self: &Arc<Self>, range: BlockRange) -> FsResult<Bytes> {
        let copies = self.copies(range)?;
        self.read_any(range, &copies).await.map_err(|failures| all_failed(range, &failures))
    }

    /// Reads a range into `memory`, from its start on, and says how many bytes: at most `range.length`, and as many as
    /// [`DataClient::read`] would return. They come straight from the socket and are verified where they lie; room for whole
    /// pages is needed for that, else they are copied. More of `memory` than that may be overwritten.
    ///
    /// # Errors
    /// As [`DataClient::read`]. What is in `memory` then is not verified and must not be shown to anyone.
    pub(crate) async fn read_into(self: &Arc<Self>, range: BlockRange, memory: &mut [u8]) -> FsResult<usize> {
        let copies = self.copies(range)?;
        let Some((&first, others)) = copies.split_first() else { return Err(all_failed(range, &[])) };
        let bytes = {
            let mut first = pin!(self.read_copy_into(first, range, memory));
            let wait = if others.is_empty() { self.timeout } else { self.hedge_delay };
            let answer = tokio::select! {
                biased;
                answer = &mut first => Some(answer),
                () = tokio::time::sleep(wait) => None,
            };
            let (bytes, failure) = match answer {
                Some(Ok(filled)) => return Ok(filled),
                Some(Err(e)) => (self.read_any(range, others).await, e),
                None if others.is_empty() => return Err(self.silent(range)),
                None => match select(first, pin!(self.read_any(range, others))).await {
                    Either::Left((Ok(filled), _)) => return Ok(filled),
                    Either::Left((Err(e), others)) => (others.await, e),
                    Either::Right((Ok(bytes), _)) => (Ok(bytes), self.silent(range)),
                    Either::Right((Err(failures), first)) => match first.await {
                        Ok(filled) => return Ok(filled),
                        Err(e) => (Err(failures), e),
                    },
                },
            };
            bytes.map_err(|mut failures| {
                failures.insert(0, failure);
                all_failed(range, &failures)
            })?
        };
        let filled = bytes.len().min(memory.len());
        memory[..filled].copy_from_slice(&bytes[..filled]);
        Ok(filled)
    }

    /// The first verified answer of `copies`, each asked when the one before it has failed or is silent for too long.
    async fn read_any(&self, range: BlockRange, copies: &[TargetId]) -> Result<Bytes, Vec<FsError>> {
        let mut attempts = FuturesUnordered::new();
        let mut failures: Vec<FsError> = Vec::new();
        let mut rest = copies.iter();
        loop {
            if let Some(&target) = rest.next() {
                attempts.push(self.read_copy(target, range));
            } else if attempts.is_empty() {
                return Err(failures);
            }
            let more = rest.len() > 0;
            let outcome = tokio::select! {
                outcome = attempts.next() => outcome,
                // Everyone has been asked: wait as long as an operation may.
                () = tokio::time::sleep(if more { self.hedge_delay } else { self.timeout }) => {
                    if more {
                        continue;
                    }
                    failures.push(self.silent(range));
                    return Err(failures);
                }
            };
            match outcome {
                Some(Ok(bytes)) => return Ok(bytes),
                Some(Err(e)) => failures.push(e),
                None => {}
            }
        }
    }

    fn silent(&self, range: BlockRange) -> FsError {
        FsError::new(Errno::EIO, format!("{}: no copy answered within {:?}", range.block, self.timeout))
    }

    /// Targets with a copy, in the order in which they are asked: readable ones first, spread by position so that
    /// the copies share the load.
    fn copies(&self, range: BlockRange) -> FsResult<Vec<TargetId>> {
        let map = self.map();
        let group = map.placement(range.block, range.policy).ok_or_else(|| {
            FsError::new(Errno::EIO, format!("{}: no placement for policy {}", range.block, range.policy))
        })?;
        let mut copies = group.to_vec();
        let turn = (mix(range.block.0 ^ u64::from(range.offset) >> 20) % copies.len() as u64) as usize;
        copies.rotate_left(turn);
        copies.sort_by_key(|t| !map.targets.get(t).is_some_and(|t| t.readable()));
        Ok(copies)
    }

    async fn read_copy(&self, target: TargetId, range: BlockRange) -> FsResult<Bytes> {
        let request = self.request(target, range);
        if let Some(bytes) = self.read_here(&request).await? {
            return Ok(bytes.slice(..bytes.len().min(range.length as usize)));
        }
        let connection = self.connection(target).await?;
        let answer = connection.request(Opcode::ReadShard, &request, Vec::new()).await?;
        verify(target, range, &answer.payload, &answer.body)?;
        Ok(answer.payload.slice(..answer.payload.len().min(range.length as usize)))
    }

    async fn read_copy_into(
        &self,
        target: TargetId,
        range: BlockRange,
        memory: &mut [u8],
    ) -> FsResult<usize> {
        let request = self.request(target, range);
        if let Some(bytes) = self.read_here(&request).await? {
            let filled = bytes.len().min(memory.len()).min(range.length as usize);
            memory[..filled].copy_from_slice(&bytes[..filled]);
            return Ok(filled);
        }
        let connection = self.connection(target).await?;
        let room = memory.len().min(whole_pages(range.length));
        let answer = connection.request_into(Opcode::ReadShard, &request, &mut memory[..room]).await?;
        let filled = answer.direct + answer.payload.len();
        if filled > memory.len() {
            verify(target, range, &answer.payload, &answer.body)?;
            memory.copy_from_slice(&answer.payload[..memory.len()]);
        } else {
            memory[answer.direct..filled].copy_from_slice(&answer.payload);
            verify(target, range, &memory[..filled], &answer.body)?;
        }
        Ok(filled.min(memory.len()).min(range.length as usize))
    }

    /// Reads the one range of a request from the shard's file, if that is on this host; `None` when the server has to be asked.
    ///
    /// # Errors
    /// The server's, which knows of no such shard.
    async fn read_here(&self, request: &ReadShardRequest) -> FsResult<Option<Bytes>> {
        let &[Range { offset, length }] = &request.ranges[..] else { return Ok(None) };
        let shard =
            Shard { target: TargetId(request.target), block: BlockId(request.block), no: request.shard };
        if !self.local.may_read(shard.target) {
            return Ok(None);
        }
        let locate = async || {
            let connection = self.connection(shard.target).await?;
            if !connection.is_local() {
                return Ok(None);
            }
            let request =
                LocateShardRequest { target: shard.target.0, block: shard.block.0, shard: shard.no };
            let answer = connection.request(Opcode::LocateShard, &request, Vec::new()).await?;
            frame::decode_body(Opcode::LocateShard, &answer.body).map(Some).map_err(FsError::from)
        };
        self.local.read(shard, offset, length, locate).await
    }

    fn request(&self, target: TargetId, range: BlockRange) -> ReadShardRequest {
        let map = self.map();
        let group = map.placement(range.block, range.policy).unwrap_or_default();
        let shard = group.iter().position(|t| *t == target).unwrap_or_default() as u32;
        ReadShardRequest {
            target: target.0,
            block: range.block.0,
            shard,
            ranges: vec![Range { offset: range.offset, length: whole_pages(range.length) as u32 }],
            integrity: true,
        }
    }
}

/// Only whole pages can be verified.
fn whole_pages(length: u32) -> usize {
    (length as usize).next_multiple_of(PAGE_SIZE)
}

fn verify(target: TargetId, range: BlockRange, data: &[u8], body: &[u8]) -> FsResult<()> {
    let body: ReadShardReply = frame::decode_body(Opcode::ReadShard, body)?;
    if data.len() > whole_pages(range.length) {
        return Err(FsError::new(Errno::EPROTO, format!("target {target} sent more than asked for")));
    }
    let Some(page) = first_bad_page(data, &body.page_crcs) else { return Ok(()) };
    let at = range.offset as usize + page * PAGE_SIZE;
    warn!(%target, block = %range.block, offset = at, "page does not match its checksum");
    Err(FsError::new(
        Errno::EIO,
        format!("{} on target {target}: the page at {at} does not match its checksum", range.block),
    ))
}

fn all_failed(range: BlockRange, failures: &[FsError]) -> FsError {
    let told: Vec<&str> = failures.iter().map(|e| e.message.as_str()).collect();
    let gone = !failures.is_empty() && failures.iter().all(|e| e.errno == Errno::ENOENT);
    let errno = if gone { Errno::ENOENT } else { Errno::EIO };
    FsError::new(errno, format!("{}: no copy could be read: {}", range.block, told.join("; ")))
}
