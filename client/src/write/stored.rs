//! Making what was stored power-safe: which shards that takes, and which of them it does not take any more.
//!
//! A shard stays on the list until a sync of it has ended: whoever syncs meanwhile must wait for it, too. One that is not found
//! may belong to a block that was overwritten since and collected; the file's extents tell that from a loss.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use fjordfs_proto::{BlockId, FsError, FsResult, InodeId, error::Errno};

use crate::{
    client::Inner,
    data::{Place, Synced, Unsynced},
};

type Stored = HashMap<InodeId, Vec<Unsynced>>;

impl Inner {
    /// Makes everything that this client has stored power-safe.
    pub(crate) async fn sync_stored(self: &Arc<Self>) -> FsResult<()> {
        self.sync_what_was_left().await?;
        let stored = self.unsynced.lock().clone();
        self.sync_shards(stored).await
    }

    /// Makes what this client has stored of one inode power-safe.
    pub(crate) async fn sync_stored_of(self: &Arc<Self>, ino: InodeId) -> FsResult<()> {
        self.sync_what_was_left().await?;
        // Spare ones are synced in the background: their targets did not answer the last time.
        let wanted = |shards: &Vec<Unsynced>| shards.iter().filter(|s| !s.is_spare()).cloned().collect();
        let stored = self.unsynced.lock().get(&ino).map(|shards| Stored::from([(ino, wanted(shards))]));
        self.sync_shards(stored.unwrap_or_default()).await
    }

    /// Makes all that a file reaches power-safe, whoever has stored it.
    pub(crate) async fn sync_shared(self: &Arc<Self>, ino: InodeId) -> FsResult<()> {
        let mut shards = self.unsynced.lock().get(&ino).cloned().unwrap_or_default();
        shards.retain(|shard| !shard.is_spare());
        shards.extend(self.data.unsynced_of_others());
        self.data.sync(&shards).await.all()
    }

    /// What was stored of `source` now counts for `target`, too, with whatever other clients have put. Once: files are copied to
    /// and fro, and within themselves.
    pub(crate) fn is_stored_of_too(&self, source: InodeId, target: InodeId) {
        let mut unsynced = self.unsynced.lock();
        let shards = unsynced.get(&source).cloned().unwrap_or_default();
        let there = unsynced.entry(target).or_default();
        let mut known: HashSet<_> = there.iter().map(Unsynced::place).collect();
        there.extend(shards.into_iter().filter(|shard| known.insert(shard.place())));
        // What others have put by now covers what they had put before.
        there.retain(|shard| shard.block().is_some());
        there.extend(self.data.unsynced_of_others());
    }

    /// Makes a block power-safe that takes the place of something in these files.
    pub(crate) async fn sync_block(
        self: &Arc<Self>,
        shards: Vec<Unsynced>,
        files: Vec<InodeId>,
    ) -> FsResult<()> {
        let Synced { lost, spare } = self.data.sync(&shards).await;
        if let Some(e) = lost.into_values().next() {
            return Err(e);
        }
        files.into_iter().for_each(|ino| self.are_synced(ino, &shards, &spare));
        Ok(())
    }

    /// One file that cannot be made safe keeps none of the others on the list.
    async fn sync_shards(self: &Arc<Self>, stored: Stored) -> FsResult<()> {
        let shards: Vec<_> = stored.values().flatten().cloned().collect();
        let Synced { lost, spare } = self.data.sync(&shards).await;
        let mut outcome = Ok(());
        for (ino, shards) in stored {
            if let Err(e) = self.check_lost(ino, &shards, &lost).await {
                outcome = Err(e);
                continue;
            }
            self.are_synced(ino, &shards, &spare);
        }
        outcome
    }

    /// Takes shards of a file off the list; those that are `spare` are still to be synced in the background.
    fn are_synced(&self, ino: InodeId, shards: &[Unsynced], spare: &HashSet<Place>) {
        let done: HashSet<Place> = shards.iter().map(Unsynced::place).collect();
        let mut unsynced = self.unsynced.lock();
        if let Some(left) = unsynced.get_mut(&ino) {
            left.retain(|shard| !done.contains(&shard.place()) || spare.contains(&shard.place()));
            left.iter_mut().filter(|shard| done.contains(&shard.place())).for_each(Unsynced::becomes_spare);
            if left.is_empty() {
                unsynced.remove(&ino);
            }
        }
    }

    /// Whether a file has lost none of its shards.
    ///
    /// # Errors
    /// `EIO` when it reaches a block that is not safe.
    async fn check_lost(
        self: &Arc<Self>,
        ino: InodeId,
        shards: &[Unsynced],
        lost: &HashMap<Place, FsError>,
    ) -> FsResult<()> {
        if shards.iter().all(|shard| !lost.contains_key(&shard.place())) {
            return Ok(());
        }
        let reached = self.still_reached(ino, shards).await?;
        reached.iter().find_map(|shard| lost.get(&shard.place())).map_or(Ok(()), |e| Err(e.clone()))
    }

    /// Of these shards, those of blocks that the file reaches. What has been stored of it is committed first, so that a block
    /// that it does not reach is dead.
    async fn still_reached(self: &Arc<Self>, ino: InodeId, shards: &[Unsynced]) -> FsResult<Vec<Unsynced>> {
        if let Some(state) = self.known_file(ino) {
            self.flush(&state).await?;
        }
        let reached: HashSet<BlockId> = match self.all_extents(ino).await {
            Ok(extents) => extents.iter().flat_map(|(_, e)| e.pieces().map(|p| p.block)).collect(),
            Err(e) if matches!(e.errno, Errno::ESTALE | Errno::ENOENT) => HashSet::new(),
            Err(e) => return Err(e),
        };
        let needed = |shard: &&Unsynced| shard.block().is_none_or(|block| reached.contains(&block));
        Ok(shards.iter().filter(needed).cloned().collect())
    }
}
