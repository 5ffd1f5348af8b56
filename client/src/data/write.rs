//! Writing whole blocks. Hot path.
//!
//! All shards are sent at once. A block with enough of them to be read is stored; whether one that lacks some is good
//! enough is the caller's decision. An id that is given up is swept by the metaserver.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use fjordfs_proto::{
    BlockId, Epoch, FsError, FsResult, Layout, ShardNo, TargetId,
    coding::{self, Shards},
    error::Errno,
    frame::Opcode,
    pb::data::{MemoryPiece, PutShardRequest},
};
use tracing::debug;

use super::{DataClient, Unsynced, connection::address_of};

/// A server on this host reads shards of at least so many bytes from memory. It starts a thread for each, in which time smaller ones are sent.
const LENT_MIN: usize = 512 << 10;

/// Bytes of a piece of them on average, at least. So a shard has no more of them than a server takes.
const PIECE_MIN: usize = 16 << 10;

fn piece(of: &Bytes) -> MemoryPiece {
    MemoryPiece { address: address_of(of), length: of.len() as u32 }
}

/// While others have not done enough either, a target is given so many times as long.
const FOR_ENOUGH: u32 = 4;

/// A block that can be read.
#[derive(Debug)]
pub(crate) struct Placed {
    pub(crate) block: BlockId,
    /// What has to be synced before the block is power-safe.
    pub(crate) unsynced: Vec<Unsynced>,
    /// Members of its group that have no shard of it, and why.
    pub(crate) missing: Vec<(TargetId, FsError)>,
}

/// A block of which too few shards could be stored.
#[derive(Debug)]
pub(crate) struct PutFailed {
    /// Who has none; nobody when there is no group at all.
    pub(crate) missing: Vec<(TargetId, FsError)>,
    pub(crate) error: FsError,
}

impl DataClient {
    /// The shards of a block about to be put, whose bytes are `parts`. Waits while much parity of others is under way.
    ///
    /// # Errors
    /// `EIO` when the client is being shut down.
    pub(crate) async fn encode(&self, layout: Layout, parts: &[Bytes]) -> FsResult<Shards> {
        let mut room = self.parity.room(layout).await?;
        Ok(coding::encode(layout, parts, |size| room.buffer(size)))
    }

    /// Stores a block under `block`, on those of its targets that are up. The longer earlier attempts have taken, the longer this
    /// one may, so that a cluster that is slow altogether is not asked for the same again and again.
    pub(crate) async fn put(
        self: &Arc<Self>,
        block: BlockId,
        layout: Layout,
        shards: &Shards,
        earlier: Duration,
    ) -> Result<Placed, PutFailed> {
        let map = self.map();
        let (table, pg) = map.group_of(block, layout.width()).ok_or_else(|| PutFailed {
            missing: Vec::new(),
            error: FsError::new(
                Errno::EIO,
                format!(
                    "{} needs {} targets; `fjord status` shows what is there",
                    layout.policy(),
                    layout.width()
                ),
            ),
        })?;
        let (group, epoch, targets) = (table.group(pg), map.epoch, &map.targets);
        let puts = group.iter().zip(0u8..).map(|(&target, shard)| async move {
            let outcome = if table.is_moving(pg, ShardNo(shard)) {
                let what = format!("target {target} is being replaced in the group of {block}");
                Err(FsError::new(Errno::ESTALE, what))
            } else if !targets.get(&target).is_some_and(|target| target.readable()) {
                Err(FsError::new(Errno::EIO, format!("target {target}: it is down")))
            } else if self.health.is_silent(target) {
                let what = format!("target {target} said nothing to who has put before");
                Err(FsError::new(Errno::ETIMEDOUT, what))
            } else {
                self.put_shard(target, block, shard, layout, (shards, epoch)).await
            };
            (shard, outcome)
        });
        let mut outcomes: Vec<Option<Result<Unsynced, FsError>>> = group.iter().map(|_| None).collect();
        let patience = self.patience().max(earlier);
        let mut stored = 0;
        let all = self.until_enough(puts, false, patience, |(shard, outcome)| {
            stored += usize::from(outcome.is_ok());
            outcomes[usize::from(shard)] = Some(outcome);
            stored >= layout.needed()
        });
        // Late, or without end for all that is known here.
        let _ = tokio::time::timeout(patience.saturating_mul(FOR_ENOUGH), all).await;
        let (mut unsynced, mut missing) = (Vec::with_capacity(group.len()), Vec::new());
        for (&target, outcome) in group.iter().zip(outcomes) {
            match outcome {
                Some(Ok(stored)) => {
                    self.health.heard(target);
                    unsynced.push(stored);
                }
                Some(Err(e)) => missing.push((target, e)),
                None => {
                    self.health.said_nothing(target);
                    let what = format!("target {target} has not answered in time");
                    missing.push((target, FsError::new(Errno::ETIMEDOUT, what)));
                }
            }
        }
        match missing.first() {
            Some((_, error)) if unsynced.len() < layout.needed() => {
                Err(PutFailed { error: error.clone().to_users(), missing })
            }
            _ => Ok(Placed { block, unsynced, missing }),
        }
    }

    async fn put_shard(
        &self,
        target: TargetId,
        block: BlockId,
        shard: u8,
        layout: Layout,
        (shards, epoch): (&Shards, Epoch),
    ) -> Result<Unsynced, FsError> {
        let (at, shard) = (usize::from(shard), u32::from(shard));
        let (parts, crcs) = (shards.parts.get(at), shards.page_crcs.get(at));
        let parts = parts.cloned().unwrap_or_default();
        let length = parts.iter().map(Bytes::len).sum::<usize>();
        let mut request = PutShardRequest {
            target: target.0,
            block: block.0,
            shard,
            policy: layout.policy().code().into(),
            length: length as u32,
            page_crcs: crcs.cloned().unwrap_or_default(),
            epoch: epoch.0,
            memory: Vec::new(),
        };
        let stored = async {
            let connection = self.connection(target).await?;
            if connection.reads_memory() && length >= LENT_MIN && length / parts.len() >= PIECE_MIN {
                request.memory = parts.iter().map(piece).collect();
                // The shards stay where they are for as long as this is waited for. Who stops waiting lets the server read what it likes: it
                // stores nothing that does not match the checksums.
                match connection.request(Opcode::PutShard, &request, Vec::new()).await {
                    Err(e) if e.errno == Errno::EFAULT => {
                        debug!(%target, "it does not take what is put from memory any more: {e}");
                        connection.cannot_read_memory();
                        request.memory.clear();
                    }
                    Err(e) => return Err(e),
                    Ok(_) => return Ok(Unsynced::new(target, block, shard, layout, &connection)),
                }
            }
            connection.request(Opcode::PutShard, &request, parts).await?;
            Ok(Unsynced::new(target, block, shard, layout, &connection))
        };
        self.while_up(target, stored).await
    }
}
