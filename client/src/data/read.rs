//! Verified reads of block ranges. Hot path.
//!
//! One copy is asked; when it fails, or does not answer within the hedge delay, the next one is asked as well and the
//! first verified answer wins.

use std::sync::Arc;

use bytes::Bytes;
use fjordfs_proto::{
    BlockId, FsError, FsResult, PAGE_SIZE, Policy, TargetId,
    block::first_bad_page,
    cluster::mix,
    error::Errno,
    frame::{self, Opcode},
    pb::data::{Range, ReadShardReply, ReadShardRequest},
};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tracing::warn;

use super::DataClient;

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
        let mut attempts = FuturesUnordered::new();
        let mut failures: Vec<FsError> = Vec::new();
        let mut rest = copies.iter();
        loop {
            if let Some(&target) = rest.next() {
                attempts.push(self.read_copy(target, range));
            } else if attempts.is_empty() {
                return Err(self.all_failed(range, &failures));
            }
            let more = rest.len() > 0;
            let outcome = tokio::select! {
                outcome = attempts.next() => outcome,
                // Everyone has been asked: wait as long as an operation may.
                () = tokio::time::sleep(if more { self.hedge_delay } else { self.timeout }) => {
                    if more {
                        continue;
                    }
                    let why = format!("no copy answered within {:?}", self.timeout);
                    return Err(FsError::new(Errno::EIO, format!("{}: {why}", range.block)));
                }
            };
            match outcome {
                Some(Ok(bytes)) => return Ok(bytes),
                Some(Err(e)) => failures.push(e),
                None => {}
            }
        }
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
        let map = self.map();
        let group = map.placement(range.block, range.policy).unwrap_or_default();
        let shard = group.iter().position(|t| *t == target).unwrap_or_default() as u32;
        let request = ReadShardRequest {
            target: target.0,
            block: range.block.0,
            shard,
            // Whole pages: only those can be verified.
            ranges: vec![Range {
                offset: range.offset,
                length: range.length.next_multiple_of(PAGE_SIZE as u32),
            }],
            integrity: true,
        };
        let connection = self.connection(target).await?;
        let reply = connection.request(Opcode::ReadShard, &request, Vec::new()).await?;
        let body: ReadShardReply = frame::decode_body(Opcode::ReadShard, &reply.body)?;
        if reply.payload.len() > (range.length as usize).next_multiple_of(PAGE_SIZE) {
            return Err(FsError::new(Errno::EPROTO, format!("target {target} sent more than asked for")));
        }
        if let Some(page) = first_bad_page(&reply.payload, &body.page_crcs) {
            let at = range.offset as usize + page * PAGE_SIZE;
            warn!(%target, block = %range.block, offset = at, "page does not match its checksum");
            return Err(FsError::new(
                Errno::EIO,
                format!("{} on target {target}: the page at {at} does not match its checksum", range.block),
            ));
        }
        Ok(reply.payload.slice(..reply.payload.len().min(range.length as usize)))
    }

    fn all_failed(&self, range: BlockRange, failures: &[FsError]) -> FsError {
        let told: Vec<&str> = failures.iter().map(|e| e.message.as_str()).collect();
        let gone = !failures.is_empty() && failures.iter().all(|e| e.errno == Errno::ENOENT);
        let errno = if gone { Errno::ENOENT } else { Errno::EIO };
        FsError::new(errno, format!("{}: no copy could be read: {}", range.block, told.join("; ")))
    }
}
