//! What a target that lacks blocks of its group must not copy.

use fjordfs_proto::{
    BlockId, PgId, TargetId,
    pb::meta::{WantedReply, WantedRequest},
};

use super::Membership;
use crate::{block_ids, keys, refusal::Refusal, store::Order, txn::Txn};

/// Blocks of one question.
const BLOCKS_MAX: usize = 4096;

impl Membership {
    /// Sorts the blocks of a question. Changes nothing.
    ///
    /// A deletion is queued for all holders of a block and all untidy targets at once, and stays queued until each has confirmed
    /// it. So a block is dead as long as one of those that were listed may still list it, and whoever copies it nevertheless, because it asked before, finds
    /// the deletion in its own queue.
    pub(crate) fn wanted(&self, txn: &mut Txn, request: &WantedRequest) -> Result<WantedReply, Refusal> {
        self.check_cluster(&request.cluster_id, "asking for blocks")?;
        if request.blocks.len() > BLOCKS_MAX {
            return Err(Refusal::Invalid(format!(
                "a question is about {BLOCKS_MAX} blocks at most: split it"
            )));
        }
        let (era, width, pg) = (BlockId(request.first_block), request.width as usize, PgId(request.pg));
        let Some((table, _)) = self.map.group(era, width, pg) else {
            return Err(Refusal::NotFound(format!(
                "there is no group {pg} of width {width} in the era of {era}"
            )));
        };
        let mut holders = table.holders(pg);
        holders.extend(request.strays.iter().copied().map(TargetId));
        let leased = block_ids::unused(txn)?;
        let mut reply = WantedReply::default();
        for block in request.blocks.iter().copied() {
            let mut dead = in_a_dead_run(txn, block)?;
            for holder in &holders {
                dead = dead || txn.get(&keys::delete(*holder, BlockId(block)))?.is_some();
            }
            if dead {
                reply.dead.push(block);
            } else if block_ids::contains(&leased, block) {
                reply.unsettled.push(block);
            }
        }
        Ok(reply)
    }
}

fn in_a_dead_run(txn: &mut Txn, block: u64) -> Result<bool, Refusal> {
    let to_here = keys::all(keys::DEAD).start..keys::dead(BlockId(block.saturating_add(1)));
    let Some((key, value)) = txn.scan(&to_here, Order::Descending, 1)?.pop() else { return Ok(false) };
    let run: crate::records::DeadRun = crate::records::decode(value, || "a run of dead blocks".into())?;
    Ok(keys::first_id(&key).is_some_and(|first| block - first < run.count))
}
