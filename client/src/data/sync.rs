//! Making stored blocks power-safe.
//!
//! A sync covers what the server's process has acknowledged before. When another process answers than took the put, the one
//! before may have dropped it with the power of its host, before it was on stable storage; so the shard is asked for, and its
//! absence is an error of the fsync, never silence. Connections do not tell: one to a host that has lost its power breaks
//! when something is sent through it, and others may lead to the new process before that.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, atomic::Ordering},
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

/// Which shard of which block is where, or how much others had put there when.
pub(crate) type Place = (TargetId, BlockId, u32);

/// A shard that was acknowledged and may not be power-safe yet.
#[derive(Clone, Debug)]
pub(crate) struct Unsynced {
    target: TargetId,
    block: BlockId,
    shard: u32,
    /// Shards that the block needs; none when it is safe without this one.
    needed: usize,
    /// Of the server that took it. `None`: put by other clients, which look after it; a sync of the target is all there is to
    /// do here.
    incarnation: Option<u64>,
}

/// What a sync has come to.
#[derive(Default)]
pub(crate) struct Synced {
    /// Of blocks that are not safe, and why.
    pub(crate) lost: HashMap<Place, FsError>,
    /// Their blocks are safe without them. They may be synced yet.
    pub(crate) spare: HashSet<Place>,
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
        connection: &Connection,
    ) -> Unsynced {
        let incarnation = Some(connection.incarnation());
        Unsynced { target, block, shard, needed: layout.needed(), incarnation }
    }

    /// Where it is.
    pub(crate) fn place(&self) -> Place {
        (self.target, self.block, self.shard)
    }

    /// The block that it is of; `None` for whatever others have put.
    pub(crate) fn block(&self) -> Option<BlockId> {
        self.incarnation.is_some().then_some(self.block)
    }

    /// Its block is safe without it.
    pub(crate) fn becomes_spare(&mut self) {
        self.needed = 0;
    }

    pub(crate) fn is_spare(&self) -> bool {
        self.needed == 0
    }

    /// What becomes safe with it: its block, or what others have put on this target.
    fn whole(&self) -> Whole {
        (self.block, self.incarnation.is_none().then_some(self.target))
    }

    /// Whether the server's process that took it is the one that answers here.
    fn is_of(&self, connection: &Connection) -> bool {
        self.incarnation.is_none_or(|incarnation| incarnation == connection.incarnation())
    }
}

impl Synced {
    /// All of it, or why not.
    pub(crate) fn all(self) -> FsResult<()> {
        self.lost.into_values().next().map_or(Ok(()), Err)
    }
}

impl DataClient {
    /// What has to be synced when blocks came from anywhere.
    pub(crate) fn unsynced_of_others(&self) -> Vec<Unsynced> {
        // Not the same as what was there at another time.
        let shard = self.looks.fetch_add(1, Ordering::Relaxed);
        let map = self.map();
        let up = map.targets.iter().filter(|(_, t)| t.readable());
        up.map(|(&target, _)| Unsynced { target, block: BlockId(0), shard, needed: 1, incarnation: None })
            .collect()
    }

    /// Returns when every block of `shards` survives a power failure. `shards` holds all shards of each block that were stored.
    ///
    /// A shard on a target that the metaserver has declared down counts as one of the losses that the policy survives, and so does
    /// one on a target that has not synced long after others have;
    /// a block needs as many synced shards as restore it: one copy, or K. While it has fewer, targets that are down are waited
    /// for, as long as an operation may take.
    pub(crate) async fn sync(self: &Arc<Self>, shards: &[Unsynced]) -> Synced {
        let deadline = Instant::now() + self.timeout;
        let (mut safe, mut synced) = (Safe::default(), Synced::default());
        let mut rest: Vec<&Unsynced> = shards.iter().collect();
        while !rest.is_empty() {
            let failed = self.sync_targets(&rest, &mut safe).await;
            let mut hopes: HashMap<Whole, usize> = HashMap::new();
            for (shard, _) in failed.iter().filter(|(shard, e)| self.may_be_synced_yet(shard, e)) {
                *hopes.entry(shard.whole()).or_default() += 1;
            }
            let late = Instant::now() >= deadline;
            rest.clear();
            for (shard, e) in failed.into_iter().filter(|(shard, _)| !self.is_loss_of_others(shard)) {
                let wanting = safe.wanting(shard);
                if wanting == 0 {
                    synced.spare.extend(self.may_be_synced_yet(shard, &e).then(|| shard.place()));
                } else if late || hopes.get(&shard.whole()).copied().unwrap_or(0) < wanting {
                    let (block, needed) = (shard.block, shard.needed);
                    let what = format!("{block}: fewer than {needed} shards are on stable storage: {e}");
                    synced.lost.insert(shard.place(), FsError::new(Errno::EIO, what));
                } else {
                    rest.push(shard);
                }
            }
            if !rest.is_empty() {
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
        synced
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
        let mut known = HashSet::new();
        // Many files may have bytes in a block.
        for shard in shards.iter().filter(|shard| known.insert(shard.place())) {
            by_target.entry(shard.target).or_default().push(shard);
        }
        let mut silent = by_target.clone();
        let syncs = by_target.into_iter().map(|(target, shards)| async move {
            let outcome = self.sync_target(target, &shards).await;
            (target, shards, outcome)
        });
        let all_safe = |safe: &Safe| shards.iter().all(|shard| safe.wanting(shard) == 0);
        let enough = all_safe(safe);
        let mut failed = Vec::new();
        self.until_enough(syncs, enough, self.patience(), |(target, synced, outcome)| {
            silent.remove(&target);
            match outcome {
                Ok(mut absent) => {
                    for shard in synced {
                        match absent.remove(&shard.place()) {
                            Some(e) => failed.push((shard, e)),
                            None => safe.add(shard),
                        }
                    }
                }
                Err(e) => failed.extend(synced.into_iter().map(|s| (s, e.clone()))),
            }
            all_safe(safe)
        })
        .await;
        for (target, shards) in silent {
            let what = format!("target {target} has not synced long after others had");
            failed.extend(shards.into_iter().map(|s| (s, FsError::new(Errno::ETIMEDOUT, what.clone()))));
        }
        failed
    }

    /// Syncs one target, trying again while the metaserver takes it for up. What it has not, and why.
    async fn sync_target(&self, target: TargetId, shards: &[&Unsynced]) -> FsResult<HashMap<Place, FsError>> {
        let sync = async {
            let mut complained = Instant::now();
            loop {
                match self.sync_once(target, shards).await {
                    Err(e) => {
                        if complained.elapsed() >= COMPLAIN {
                            complained = Instant::now();
                            warn!(%target, "cannot sync, trying again: {e}");
                        }
                        tokio::time::sleep(RETRY_PAUSE).await;
                    }
                    absent => return absent,
                }
            }
        };
        self.while_up(target, sync).await
    }

    async fn sync_once(&self, target: TargetId, shards: &[&Unsynced]) -> FsResult<HashMap<Place, FsError>> {
        let connection = self.connection(target).await?;
        connection.request(Opcode::Sync, &SyncRequest { targets: vec![target.0] }, Vec::new()).await?;
        let mut absent = HashMap::new();
        for shard in shards.iter().filter(|s| !s.is_of(&connection)) {
            let probe = ReadShardRequest {
                target: target.0,
                block: shard.block.0,
                shard: shard.shard,
                ranges: vec![Range { offset: 0, length: 1 }],
                integrity: false,
            };
            match connection.request(Opcode::ReadShard, &probe, Vec::new()).await {
                Err(e) if e.errno == Errno::ENOENT => drop(absent.insert(shard.place(), e)),
                answer => drop(answer?),
            }
        }
        Ok(absent)
    }
}
