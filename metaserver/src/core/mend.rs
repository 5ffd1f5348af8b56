//! What checkers of a live system need: snapshots, repairs, and garbage to be deleted.

use fjordfs_proto::{BlockId, FsResult, Layout, TargetId, pb::meta::MendRequest};

use super::{Core, FsError, Moment, Snapshot, snapshot};
use crate::{
    block_ids,
    fsck::repair::{self, Fix},
    keys,
    ops::Missed,
    refusal::Refusal,
};

impl Core {
    /// Everything as it was before the burst under way, readable while others write.
    pub(crate) fn snapshot(&mut self) -> FsResult<Snapshot> {
        if let Some(snapshot) = self.store.snapshot().map_err(|e| FsError::from(&e))? {
            return Ok(snapshot);
        }
        let (snapshot, keeper) = snapshot::freeze(self.store.clone());
        self.keepers.push(keeper);
        Ok(snapshot)
    }

    /// Carries repairs out, each by itself; how many were still to be made.
    pub(crate) fn repair(&mut self, fixes: &[Fix], now: Moment) -> Result<u64, Refusal> {
        let mut made = 0;
        for fix in fixes {
            let done: Result<bool, FsError> =
                self.operation(|core| repair::apply(&mut core.txn, fix, now.wall));
            made += u64::from(done?);
            self.leases.changed(None, self.txn.changed(), now.mono);
        }
        Ok(made)
    }

    /// Looks at groups that lack shards, and has garbage deleted; how many deletions that makes.
    ///
    /// Whoever asks has seen in a snapshot that nothing reaches a block and that no lease covers it. Ids are used once, so that
    /// stays true, whatever has happened since.
    pub(crate) fn mend(&mut self, request: &MendRequest, now: Moment) -> Result<u64, Refusal> {
        let map = self.members.map().clone();
        if request.cluster_id != map.cluster_id {
            let (asked, ours) = (&request.cluster_id, &map.cluster_id);
            return Err(Refusal::Precondition(format!(
                "that is about cluster {asked}, this is cluster {ours}"
            )));
        }
        let queued = self.operation(|core| {
            let leased = block_ids::unused(&mut core.txn)?;
            let next = core.txn.counters().next_block;
            let mut queued = 0;
            for garbage in &request.garbage {
                let target = TargetId(garbage.target);
                if !map.targets.contains_key(&target) {
                    return Err(Refusal::NotFound(format!("there is no target {target}")));
                }
                for block in garbage.blocks.iter().copied() {
                    if block >= next || block_ids::contains(&leased, block) {
                        return Err(Refusal::Invalid(format!("b{block} may be in use: it is no garbage")));
                    }
                    let key = keys::delete(target, BlockId(block));
                    if core.txn.get(&key)?.is_none() {
                        core.txn.put(key, Default::default());
                        queued += 1;
                    }
                }
            }
            core.txn.counters().queued += queued;
            Ok(queued)
        })?;
        let missed: Vec<Missed> = (request.missing.iter())
            .filter_map(|missing| {
                Some(Missed {
                    block: BlockId(missing.block),
                    width: Layout::from_code(missing.layout)?.width(),
                    targets: missing.targets.iter().copied().map(TargetId).collect(),
                })
            })
            .collect();
        self.healing.missed(&map, &missed, now.mono);
        Ok(queued)
    }
}
