//! One unit on its way: store, wait for its turn, commit; and when the metaserver says that it replaces something, sync and
//! commit again.

use std::{collections::HashSet, sync::Arc, time::Duration};

use bytes::Bytes;
use fjordfs_proto::{
    BLOCK_SIZE_MAX, BlockId, FsError, FsResult, Layout, Policy, TargetId,
    error::Errno,
    pb::meta::{Commit, CommitReply, FileCommit, MissingShards, request::Op, response},
};
use tokio::{sync::watch, time::Instant};
use tracing::warn;

use super::UnitDone;
use crate::{
    client::Inner,
    data::{Placed, Unsynced},
    file::{FileInner, FileState, UnitId},
    meta::{Pending, unexpected},
};

/// Wait before groups with targets that failed are tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// A unit being filled.
pub(crate) struct Unit {
    id: UnitId,
    policy: Policy,
    files: Vec<Arc<FileState>>,
    parts: Vec<Bytes>,
    length: u64,
    /// The bytes travel inside the commit; there is no block.
    inline: bool,
    /// Units that have to be done before this one is committed, and appends that have to be answered. Only older ones, so no two units wait
    /// for each other.
    before: Vec<UnitDone>,
    done: watch::Sender<bool>,
}

/// A unit that has been started.
struct Running {
    unit: Unit,
    block: Option<BlockId>,
    abandoned: Vec<u64>,
    /// Members of its group that have no shard of the block.
    missing: Vec<TargetId>,
    /// Shards of the block, until they have been synced.
    unsynced: Vec<Unsynced>,
}

impl Unit {
    pub(crate) fn new(policy: Policy) -> Unit {
        Unit {
            id: UnitId::unused(),
            policy,
            files: Vec::new(),
            parts: Vec::new(),
            length: 0,
            inline: false,
            before: Vec::new(),
            done: watch::Sender::new(false),
        }
    }

    /// A unit whose bytes go into the metadata.
    pub(crate) fn inline(policy: Policy) -> Unit {
        Unit { inline: true, ..Unit::new(policy) }
    }

    pub(crate) fn policy(&self) -> Policy {
        self.policy
    }

    fn layout(&self) -> Layout {
        Layout::of(self.policy, self.length as usize)
    }

    /// Bytes that fit beside what is in it.
    pub(crate) fn room(&self) -> u64 {
        BLOCK_SIZE_MAX as u64 - self.length
    }

    pub(crate) fn file_count(&self) -> usize {
        self.files.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Whether it may take bytes of a file: not when a younger unit has taken earlier bytes. That one would have to be committed first,
    /// and a unit waits for older ones only.
    pub(crate) fn may_take(&self, inner: &FileInner) -> bool {
        inner.units.iter().all(|(id, _)| *id <= self.id)
    }

    /// Takes dirty bytes of a file, as many as there is room for; how many.
    pub(crate) fn take(&mut self, state: &Arc<FileState>, inner: &mut FileInner) -> u64 {
        let pieces = inner.view.take_dirty(self.id, self.length as u32, self.room());
        self.register(state, inner, pieces)
    }

    /// Takes a full block's worth of contiguous dirty bytes, if the file has that; whether it had.
    pub(crate) fn take_run(&mut self, state: &Arc<FileState>, inner: &mut FileInner) -> bool {
        let pieces = inner.view.take_run(self.id, BLOCK_SIZE_MAX as u64);
        self.register(state, inner, pieces.unwrap_or_default()) > 0
    }

    /// From the moment the bytes are taken, whoever flushes the file waits for this unit.
    fn register(&mut self, state: &Arc<FileState>, inner: &mut FileInner, pieces: Vec<Bytes>) -> u64 {
        let taken = pieces.iter().map(|p| p.len() as u64).sum();
        if taken == 0 {
            return 0;
        }
        debug_assert!(self.may_take(inner), "bytes would be committed before those written earlier");
        self.length += taken;
        self.parts.extend(pieces);
        self.before.extend(inner.units.iter().filter(|(id, _)| *id < self.id).map(|(_, done)| done.clone()));
        self.before.extend(inner.unanswered.iter().filter(|done| done.has_changed().is_ok()).cloned());
        if !inner.units.iter().any(|(id, _)| *id == self.id) {
            inner.units.push((self.id, self.done.subscribe()));
            self.files.push(state.clone());
        }
        inner.dirty_since = (inner.view.dirty_bytes() > 0).then(Instant::now);
        taken
    }

    /// Sends it on its way: a block on the engine, which computes its checksums; one that is but a message to the
    /// metaserver on the calling thread's lane, where its caller waits for it.
    pub(crate) fn start(mut self, client: &Arc<Inner>) {
        // Locks are taken in inode order wherever several files are locked.
        self.files.sort_by_key(|f| f.ino);
        // Taken here and not in the task, so that a file's full blocks get consecutive ids.
        let block = if self.inline { None } else { client.blocks.take_now(self.layout()) };
        let running =
            Running { unit: self, block, abandoned: Vec::new(), missing: Vec::new(), unsynced: Vec::new() };
        let task_client = client.clone();
        let inline = running.unit.inline;
        let task = async move { running.run(&task_client).await };
        if inline {
            client.engine.spawn_here(task);
        } else {
            client.engine.spawn(task);
        }
    }
}

/// Whether a block that can be read is kept although targets of its group have no shard of it: only when no group has
/// all its targets. What is full stays full, so for want of room nothing is left out.
fn good_enough(client: &Inner, layout: Layout, avoid: &mut HashSet<TargetId>, placed: &Placed) -> bool {
    let missing = &placed.missing;
    if missing.is_empty() {
        return true;
    }
    avoid.extend(missing.iter().map(|(target, _)| *target));
    if missing.iter().any(|(_, e)| e.errno == Errno::ENOSPC) || client.blocks.has_whole_group(layout, avoid) {
        return false;
    }
    for (target, e) in missing {
        warn!(block = %placed.block, %target, "stored without a shard on this target: {e}");
    }
    true
}

/// Adds a block to those that are to be abandoned.
fn abandon(abandoned: &mut Vec<u64>, block: Option<BlockId>) {
    let block = block.map(|block| block.0).filter(|block| !abandoned.contains(block));
    abandoned.extend(block);
}

impl Running {
    async fn run(mut self, client: &Arc<Inner>) {
        let outcome = self.store_and_commit(client).await;
        if let Err(e) = outcome {
            self.fail(client, &e);
            self.tell_abandoned(client);
        }
        for file in &self.unit.files {
            let mut inner = file.lock();
            inner.units.retain(|(id, _)| *id != self.unit.id);
            if !inner.view.has_local() {
                inner.dirty_since = None;
                // Under the file's lock, so that a write that comes now is not forgotten.
                client.is_clean(file.ino);
            }
        }
        self.unit.done.send_replace(true);
    }

    async fn store_and_commit(&mut self, client: &Arc<Inner>) -> FsResult<()> {
        if !self.unit.inline {
            self.store(client).await?;
        }
        for done in &mut self.unit.before {
            let _ = done.wait_for(|done| *done).await;
        }
        loop {
            let (sent, pending) = self.submit(client);
            let Some(pending) = pending else { return Ok(()) };
            let committed = match pending.wait().await {
                Ok(response::Result::Commit(reply)) if reply.sync_first && !self.unsynced.is_empty() => {
                    let files = self.unit.files.iter().map(|file| file.ino).collect();
                    client.sync_block(std::mem::take(&mut self.unsynced), files).await
                }
                Ok(response::Result::Commit(reply)) => {
                    self.abandoned.clear();
                    return self.committed(client, sent, reply);
                }
                Ok(_) => return Err(unexpected("a commit")),
                Err(e) => Err(e),
            };
            if let Err(e) = committed {
                // What the commit named is as it was before. If it takes effect after all, this is refused.
                abandon(&mut self.abandoned, self.block);
                return Err(e);
            }
        }
    }

    /// Stores the block, in another group whenever a target fails.
    async fn store(&mut self, client: &Arc<Inner>) -> FsResult<()> {
        let began = Instant::now();
        let parts = std::mem::take(&mut self.unit.parts);
        let layout = self.unit.layout();
        let shards = client.data.encode(layout, &parts).await?;
        let mut avoid = HashSet::new();
        let mut last: Option<FsError> = None;
        let placed = loop {
            let block = match self.block.take() {
                Some(block) => block,
                None => match (client.blocks.take(layout, &avoid).await, &last) {
                    (Ok(block), _) => block,
                    (Err(e), None) => return Err(e),
                    // Every group has a target that failed. A full cluster stays full; others may come back.
                    (Err(_), Some(last))
                        if last.errno == Errno::ENOSPC
                            || began.elapsed() >= client.options.operation_timeout =>
                    {
                        return Err(last.clone());
                    }
                    (Err(_), Some(_)) => {
                        avoid.clear();
                        tokio::time::sleep(RETRY_PAUSE).await;
                        continue;
                    }
                },
            };
            let (missing, error) = match client.data.put(block, layout, &shards, began.elapsed()).await {
                Ok(placed) if good_enough(client, layout, &mut avoid, &placed) => break placed,
                Ok(Placed { missing, .. }) => (missing, None),
                Err(failed) if failed.missing.is_empty() => return Err(failed.error),
                Err(failed) => (failed.missing, Some(failed.error)),
            };
            self.abandoned.push(block.0);
            for (target, e) in &missing {
                warn!(%block, %target, "block could not be stored, trying another group: {e}");
            }
            avoid.extend(missing.iter().map(|(target, _)| *target));
            last = error.or_else(|| missing.into_iter().next().map(|(_, e)| e));
        };
        self.block = Some(placed.block);
        self.missing = placed.missing.iter().map(|(target, _)| *target).collect();
        let mut freed = 0;
        {
            let mut unsynced = client.unsynced.lock();
            for file in &self.unit.files {
                unsynced.entry(file.ino).or_default().extend(placed.unsynced.iter().cloned());
            }
        }
        for file in &self.unit.files {
            freed += file.lock().view.unit_stored(self.unit.id, placed.block, layout);
        }
        self.unsynced = placed.unsynced;
        client.budget.release(freed);
        Ok(())
    }

    /// Builds and submits the commit while all files are locked; what it says of each file.
    fn submit(&mut self, client: &Inner) -> (Vec<Option<FileCommit>>, Option<Pending>) {
        let locked: Vec<_> = self.unit.files.iter().map(|f| f.lock()).collect();
        let sent: Vec<Option<FileCommit>> = locked.iter().map(|f| f.view.commit_of(self.unit.id)).collect();
        let files: Vec<FileCommit> = sent.iter().flatten().cloned().collect();
        if files.is_empty() {
            abandon(&mut self.abandoned, self.block);
        }
        let abandoned = self.abandoned.clone();
        if files.is_empty() && abandoned.is_empty() {
            return (sent, None);
        }
        let missing = self.block.filter(|_| !files.is_empty() && !self.missing.is_empty()).map(|block| {
            let targets = self.missing.iter().map(|target| target.0).collect();
            MissingShards { block: block.0, targets, ..MissingShards::default() }
        });
        let missing = missing.into_iter().collect();
        let unsynced = !self.unsynced.is_empty();
        let commit = Commit { files, abandoned, sync: false, missing, unsynced };
        (sent, Some(client.meta.submit(Op::Commit(commit))))
    }

    /// Blocks of a unit that has failed: on a full cluster, what was stored of them would be in the way until the session ends.
    fn tell_abandoned(&mut self, client: &Inner) {
        let abandoned = std::mem::take(&mut self.abandoned);
        if !abandoned.is_empty() {
            // Nobody waits: when it fails, they are swept with the session.
            drop(client.meta.submit(Op::Commit(Commit { abandoned, ..Commit::default() })));
        }
    }

    fn committed(&self, client: &Inner, sent: Vec<Option<FileCommit>>, reply: CommitReply) -> FsResult<()> {
        let named = sent.iter().flatten().count();
        if reply.files.len() != named {
            return Err(unexpected("a commit"));
        }
        let mut replies = reply.files.into_iter();
        let (mut freed, mut moved) = (0, Vec::new());
        for (file, sent) in self.unit.files.iter().zip(sent) {
            let mut inner = file.lock();
            let Some((sent, reply)) = sent.and_then(|sent| Some((sent, replies.next()?))) else {
                freed += inner.unit_failed(self.unit.id);
                continue;
            };
            match reply.errno {
                0 if !inner.view.can_shift(&sent, reply.appended_shift) => {
                    freed += inner.unit_failed(self.unit.id);
                    client.lost(file.ino, &mut inner, &unexpected("an append"));
                }
                0 => {
                    let (free, shifted) = inner.view.unit_committed(self.unit.id, &sent, reply);
                    freed += free;
                    moved.extend(shifted.then_some(file.ino));
                }
                // The file was removed by everyone: nobody will miss the bytes.
                errno if errno == Errno::ESTALE.code() => freed += inner.unit_failed(self.unit.id),
                errno => {
                    freed += inner.unit_failed(self.unit.id);
                    let error =
                        FsError::new(Errno::from_code(errno), format!("{}: commit refused", file.ino));
                    client.lost(file.ino, &mut inner, &error);
                }
            }
        }
        client.budget.release(freed);
        for ino in moved {
            client.tell_moved(ino);
        }
        Ok(())
    }

    fn fail(&self, client: &Inner, error: &FsError) {
        warn!(files = self.unit.files.len(), "written data is lost: {error}");
        let mut freed = 0;
        for file in &self.unit.files {
            let mut inner = file.lock();
            freed += inner.unit_failed(self.unit.id);
            client.lost(file.ino, &mut inner, error);
        }
        client.budget.release(freed);
    }
}
