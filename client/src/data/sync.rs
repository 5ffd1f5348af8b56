//! Making stored blocks power-safe.
//!
//! A sync covers what its connection put before. When the connection was replaced meanwhile, the server may have
//! restarted and dropped a put that was not on stable storage yet; so the shard is asked for, and its absence is an
//! error of the fsync, never silence.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Weak},
    time::Duration,
};

use fjordfs_proto::{
    BlockId, FsError, FsResult, TargetId,
    error::Errno,
    frame::Opcode,
    pb::data::{Range, ReadShardRequest, SyncRequest},
};
use futures_util::future::join_all;

use super::{DataClient, connection::Connection};

/// Wait before a failed sync is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// A shard that was acknowledged and may not be power-safe yet.
#[derive(Clone, Debug)]
pub(crate) struct Unsynced {
    target: TargetId,
    block: BlockId,
    shard: u32,
    /// `None`: put by another client, which looks after it; a sync of the target is all there is to do here.
    connection: Option<Weak<Connection>>,
}

impl Unsynced {
    pub(super) fn new(
        target: TargetId,
        block: BlockId,
        shard: u32,
        connection: &Arc<Connection>,
    ) -> Unsynced {
        Unsynced { target, block, shard, connection: Some(Arc::downgrade(connection)) }
    }

    /// Whatever others have put on a target.
    fn of_others(target: TargetId) -> Unsynced {
        Unsynced { target, block: BlockId(0), shard: 0, connection: None }
    }

    /// Whether the server has been there without a break since the put.
    fn unbroken(&self) -> bool {
        self.connection.as_ref().is_none_or(|c| c.upgrade().is_some_and(|c| c.usable()))
    }
}

impl DataClient {
    /// What has to be synced when blocks came from anywhere.
    pub(crate) fn unsynced_of_others(&self) -> Vec<Unsynced> {
        self.map()
            .targets
            .iter()
            .filter(|(_, t)| t.readable())
            .map(|(id, _)| Unsynced::of_others(*id))
            .collect()
    }

    /// Returns when every block of `shards` survives a power failure. `shards` holds all copies of each block.
    ///
    /// A copy on a target that the metaserver has declared down counts as one of the losses that the policy survives;
    /// a block needs at least one synced copy.
    ///
    /// # Errors
    /// `EIO` when no copy of some block could be synced.
    pub(crate) async fn sync(self: &Arc<Self>, shards: &[Unsynced]) -> FsResult<()> {
        let mut by_target: BTreeMap<TargetId, Vec<&Unsynced>> = BTreeMap::new();
        for shard in shards {
            by_target.entry(shard.target).or_default().push(shard);
        }
        let outcomes = join_all(by_target.into_iter().map(|(target, shards)| async move {
            let outcome = self.sync_target(target, &shards).await;
            (shards, outcome)
        }))
        .await;
        let mut safe = HashSet::new();
        let mut lost: Vec<(BlockId, FsError)> = Vec::new();
        for (shards, outcome) in outcomes {
            match outcome {
                Ok(()) => safe.extend(shards.iter().map(|s| s.block)),
                Err(e) => lost.extend(shards.iter().map(|s| (s.block, e.clone()))),
            }
        }
        match lost.into_iter().find(|(block, _)| !safe.contains(block)) {
            Some((block, e)) => {
                Err(FsError::new(Errno::EIO, format!("{block}: no copy is on stable storage: {e}")))
            }
            None => Ok(()),
        }
    }

    /// Syncs one target, trying again while the metaserver takes it for up.
    async fn sync_target(&self, target: TargetId, shards: &[&Unsynced]) -> FsResult<()> {
        let sync = async {
            loop {
                match self.sync_once(target, shards).await {
                    Err(e) if e.errno != Errno::ENOENT => tokio::time::sleep(RETRY_PAUSE).await,
                    outcome => return outcome,
                }
            }
        };
        self.while_up(target, sync).await
    }

    async fn sync_once(&self, target: TargetId, shards: &[&Unsynced]) -> FsResult<()> {
        let connection = self.connection(target).await?;
        connection.request(Opcode::Sync, &SyncRequest { targets: vec![target.0] }, Vec::new()).await?;
        for shard in shards.iter().filter(|s| !s.unbroken()) {
            let probe = ReadShardRequest {
                target: target.0,
                block: shard.block.0,
                shard: shard.shard,
                ranges: vec![Range { offset: 0, length: 1 }],
                integrity: false,
            };
            connection.request(Opcode::ReadShard, &probe, Vec::new()).await?;
        }
        Ok(())
    }
}
