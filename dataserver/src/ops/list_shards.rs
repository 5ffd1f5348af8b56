//! Listing shards in block order, page by page.

use fjordfs_proto::{
    BlockId, FsError, FsResult,
    error::Errno,
    pb::data::{ListShardsReply, ListShardsRequest, ShardInfo},
};

use crate::{blocking, node::Node};

/// Shards in a page, if the asker leaves it open, and at most: about 300 KiB of body.
const PAGE_MAX: usize = 16_384;

pub(super) async fn run(node: &Node, request: &ListShardsRequest) -> FsResult<ListShardsReply> {
    let (store, after) = (node.store(request.target)?.clone(), BlockId(request.after_block));
    let limit = match request.limit as usize {
        0 => PAGE_MAX,
        n => n.min(PAGE_MAX),
    };
    // It goes through the whole index: not on the core.
    let listed = blocking::run(move || store.list(after, limit)).await;
    let (entries, end) = listed.map_err(|e| FsError::new(Errno::EIO, format!("listing shards: {e}")))?;
    let info = |e: &crate::store::index::Entry| ShardInfo {
        block: e.block.0,
        shard: e.shard.0.into(),
        policy: e.policy.into(),
        length: e.length,
    };
    Ok(ListShardsReply { shards: entries.iter().map(info).collect(), end })
}
