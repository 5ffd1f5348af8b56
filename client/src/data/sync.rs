//! Making stored blocks power-safe.
//!
//! A sync covers what its connection put before. When the connection was replaced meanwhile, the server may have
//! restarted and dropped a put that was not on stable storage yet; so the shard is asked for, and its absence is an
//! error of the fsync, never silence.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Weak},
    time::Duration,
};

use fjordfs_proto::{
    BlockId, FsError, FsResult, Layout, TargetId,
    error::Errno,
    frame::Opcode,
    pb::data::{Range, ReadShardRequest, SyncRequest},
};
use tokio::time::Instant;
use tracing::warn;

use super::{DataClient, connection::Connection};

/// Wait before a failed sync is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// A sync that fails for so long is mentioned in the log, and again each time as much later.
const COMPLAIN: Duration = Duration::from_secs(10);

/// A shard that was acknowledged and may not be power-safe yet.
#[derive(Clone, Debug)]
pub(crate) struct Unsynced {
    target: TargetId,
    block: BlockId,
    shard: u32,
    /// Shards that the block needs.
    needed: usize,
    /// `None`: put by another client, which looks after it; a sync of the target is all there is to do here.
    connection: Option<Weak<Connection>>,
}

/// See [`Unsynced::whole`].
type Whole = (BlockId, Option<TargetId>);

/// Shards that are on stable storage.
#[derive(Default)]
struct Safe(HashMap<Whole, HashSet<u32>>);

impl Safe {
    fn add(&mut self, shard: &Unsynced) {
        self.0.entry(shard.whole()).or_default().insert(shard.shard);
    }

    /// Shards that are wanting before the whole of `shard` is safe.
    fn wanting(&self, shard: &Unsynced) -> usize {
        shard.needed.saturating_sub(self.0.get(&shard.whole()).map_or(0, HashSet::len))
    }
}

impl Unsynced {
    pub(super) fn new(
        target: TargetId,
        block: BlockId,
        shard: u32,
        layout: Layout,
        connection: &Arc<Connection>,
    ) -> Unsynced {
        let needed = layout.needed();
        Unsynced { target, block, shard, needed, connection: Some(Arc::downgrade(connection)) }
    }

    /// Whatever others have put on a target.
    fn of_others(target: TargetId) -> Unsynced {
        Unsynced { target, block: BlockId(0), shard: 0, needed: 1, connection: None }
    }

    /// What becomes safe with it: its block, or what others have put on this target.
    fn whole(&self) -> Whole {
        (self.block, self.connection.is_none().then_some(self.target))
    }

    /// Where it is.
    pub(crate) fn place(&self) -> (TargetId, BlockId, u32) {
        (self.target, self.block, self.shard)
    }

    /// The block that it is of; `None` for whatever others have put.
    pub(crate) fn block(&self) -> Option<BlockId> {
        self.connection.is_some().then_some(self.block)
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

    /// Returns when every block of `shards` survives a power failure. `shards` holds all shards of each block that were stored.
    ///
    /// A shard on a target that the metaserver has declared down counts as one of the losses that the policy survives;
    /// a block needs as many synced shards as restore it: one copy, or K. While it has fewer, targets that are down are waited
    /// for, as long as an operation may take.
    ///
    /// # Errors
    /// `EIO` when too few shards of some block could be synced.
    pub(crate) async fn sync(self: &Arc<Self>, shards: &[Unsynced]) -> FsResult<()> {
        let deadline = Instant::now() + self.timeout;
        let mut safe = Safe::default();
        let mut rest: Vec<&Unsynced> = shards.iter().collect();
        loop {
            let mut failed = self.sync_targets(&rest, &mut safe).await;
            failed.retain(|(shard, _)| safe.wanting(shard) > 0 && !self.is_loss_of_others(shard));
            let mut hopes: HashMap<Whole, usize> = HashMap::new();
            for (shard, _) in failed.iter().filter(|(shard, e)| self.may_be_synced_yet(shard, e)) {
                *hopes.entry(shard.whole()).or_default() += 1;
            }
            let hopeless = |s: &Unsynced| hopes.get(&s.whole()).copied().unwrap_or(0) < safe.wanting(s);
            let late = Instant::now() >= deadline;
            if let Some((shard, e)) = failed.iter().find(|(shard, _)| late || hopeless(shard)) {
                let what =
                    format!("{}: fewer than {} shards are on stable storage: {e}", shard.block, shard.needed);
                return Err(FsError::new(Errno::EIO, what));
            }
            if failed.is_empty() {
                return Ok(());
            }
            rest = failed.into_iter().map(|(shard, _)| shard).collect();
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    /// Whether a shard that could not be synced may be there all the same, when its target is reached again.
    fn may_be_synced_yet(&self, shard: &Unsynced, e: &FsError) -> bool {
        let map = self.map();
        e.errno != Errno::ENOENT && map.targets.get(&shard.target).is_some_and(|target| target.may_return())
    }

    /// Whether it is what others had put on a target that was declared down since: a loss that their policies survive.
    fn is_loss_of_others(&self, shard: &Unsynced) -> bool {
        shard.block().is_none() && !self.map().targets.get(&shard.target).is_some_and(|t| t.readable())
    }

    /// Syncs every target once, adds to `safe` what is power-safe then, and returns what is not. Who says nothing when
    /// everything is safe without it is not waited for.
    async fn sync_targets<'a>(
        &self,
        shards: &[&'a Unsynced],
        safe: &mut Safe,
    ) -> Vec<(&'a Unsynced, FsError)> {
        let mut by_target: BTreeMap<TargetId, Vec<&Unsynced>> = BTreeMap::new();
        for shard in shards {
            by_target.entry(shard.target).or_default().push(shard);
        }
        let mut silent = by_target.clone();
        let syncs = by_target.into_iter().map(|(target, shards)| async move {
            let outcome = self.sync_target(target, &shards).await;
            (target, shards, outcome)
        });
        let mut failed = Vec::new();
        self.until_enough(syncs, self.patience(), |(target, synced, outcome)| {
            silent.remove(&target);
            match outcome {
                Ok(()) => synced.into_iter().for_each(|shard| safe.add(shard)),
                Err(e) => failed.extend(synced.into_iter().map(|s| (s, e.clone()))),
            }
            shards.iter().all(|shard| safe.wanting(shard) == 0)
        })
        .await;
        for (target, shards) in silent {
            let what = format!("target {target} has not synced long after others had");
            failed.extend(shards.into_iter().map(|s| (s, FsError::new(Errno::ETIMEDOUT, what.clone()))));
        }
        failed
    }

    /// Syncs one target, trying again while the metaserver takes it for up.
    async fn sync_target(&self, target: TargetId, shards: &[&Unsynced]) -> FsResult<()> {
        let sync = async {
            let mut complained = Instant::now();
            loop {
                match self.sync_once(target, shards).await {
                    Err(e) if e.errno != Errno::ENOENT => {
                        if complained.elapsed() >= COMPLAIN {
                            complained = Instant::now();
                            warn!(%target, "cannot sync, trying again: {e}");
                        }
                        tokio::time::sleep(RETRY_PAUSE).await;
                    }
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
