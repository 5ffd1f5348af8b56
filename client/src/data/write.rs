//! Writing whole blocks. Hot path.
//!
//! A block is stored completely or not at all: when one copy fails, the id is given up and the block goes to another
//! placement group at once, under a new id. Copies of the abandoned id are swept by the metaserver.

use std::sync::Arc;

use bytes::Bytes;
use fjordfs_proto::{
    BlockId, FsError, Policy, TargetId, block::page_crcs_of, error::Errno, frame::Opcode,
    pb::data::PutShardRequest,
};
use futures_util::future::try_join_all;

use super::{DataClient, Unsynced};

/// A stored block.
#[derive(Debug)]
pub(crate) struct Placed {
    pub(crate) block: BlockId,
    /// What has to be synced before the block is power-safe.
    pub(crate) unsynced: Vec<Unsynced>,
}

/// A copy that could not be stored.
#[derive(Debug)]
pub(crate) struct PutFailed {
    pub(crate) target: Option<TargetId>,
    pub(crate) error: FsError,
}

impl DataClient {
    /// Stores the block whose bytes are `parts` under `block`.
    pub(crate) async fn put(
        self: &Arc<Self>,
        block: BlockId,
        policy: Policy,
        parts: &[Bytes],
        page_crcs: &Bytes,
    ) -> Result<Placed, PutFailed> {
        let map = self.map();
        let group = map.placement(block, policy).ok_or_else(|| PutFailed {
            target: None,
            error: FsError::new(
                Errno::EIO,
                format!(
                    "policy {policy} needs {} targets; `fjord status` shows what is there",
                    policy.width()
                ),
            ),
        })?;
        let length = parts.iter().map(Bytes::len).sum::<usize>() as u32;
        let copies = group.iter().enumerate().map(|(shard, &target)| async move {
            let request = PutShardRequest {
                target: target.0,
                block: block.0,
                shard: shard as u32,
                policy: policy.code().into(),
                length,
                page_crcs: page_crcs.clone(),
            };
            let stored = async {
                let connection = self.connection(target).await?;
                connection.request(Opcode::PutShard, &request, parts.to_vec()).await?;
                Ok(Unsynced::new(target, block, shard as u32, &connection))
            };
            self.while_up(target, stored).await.map_err(|error| PutFailed { target: Some(target), error })
        });
        let unsynced = try_join_all(copies).await?;
        Ok(Placed { block, unsynced })
    }

    /// Integrity entries of a block about to be put.
    pub(crate) fn seal(parts: &[Bytes]) -> Bytes {
        page_crcs_of(parts.iter().map(|p| &p[..])).into()
    }
}
