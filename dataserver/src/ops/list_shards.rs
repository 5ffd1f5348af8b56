//! Listing shards in block order, page by page.

use fjordfs_proto::{
    BlockId, FsResult,
    pb::data::{ListShardsReply, ListShardsRequest, ShardInfo},
};

use crate::node::Node;

/// Shards in a page, if the asker leaves it open, and at most: about 300 KiB of body.
const PAGE_MAX: usize = 16_384;

pub(super) fn run(node: &Node, request: &ListShardsRequest) -> FsResult<ListShardsReply> {
    let store = node.store(request.target)?;
    let limit = match request.limit as usize {
        0 => PAGE_MAX,
        n => n.min(PAGE_MAX),
    };
    let (entries, end) = store.list(BlockId(request.after_block), limit);
    let info = |e: &crate::store::index::Entry| ShardInfo {
        block: e.block.0,
        shard: e.shard.0.into(),
        policy: e.policy.into(),
        length: e.length,
    };
    Ok(ListShardsReply { shards: entries.iter().map(info).collect(), end })
}
