//! Listing shards in block order, page by page.

use fjordfs_proto::{
    BlockId, FsError, FsResult, Policy,
    cluster::GroupSpan,
    error::Errno,
    pb::data::{ListShardsReply, ListShardsRequest, ShardInfo},
};

use crate::{blocking, node::Node, store::index::Entry};

/// Shards in a page, if the asker leaves it open, and at most: about 300 KiB of body.
const PAGE_MAX: usize = 16_384;

pub(super) async fn run(node: &Node, request: &ListShardsRequest) -> FsResult<ListShardsReply> {
    let (store, after) = (node.store(request.target)?.clone(), BlockId(request.after_block));
    let limit = match request.limit as usize {
        0 => PAGE_MAX,
        n => n.min(PAGE_MAX),
    };
    let group = match &request.group {
        None => None,
        Some(group) => Some(GroupSpan::from_pb(group).ok_or_else(|| {
            FsError::new(
                Errno::EINVAL,
                format!("listing shards: there is no group {} of {}", group.pg, group.pg_count),
            )
        })?),
    };
    let fits = move |entry: &Entry| {
        group.is_none_or(|group| {
            Policy::from_code(entry.policy.into()).is_some_and(|policy| group.contains(entry.block, policy))
        })
    };
    // It goes through the whole index: not on the core.
    let listed = blocking::run(move || store.list(after, limit, fits)).await;
    let (entries, end) = listed.map_err(|e| FsError::new(Errno::EIO, format!("listing shards: {e}")))?;
    let info = |e: &Entry| ShardInfo {
        block: e.block.0,
        shard: e.shard.0.into(),
        policy: e.policy.into(),
        length: e.length,
    };
    Ok(ListShardsReply { shards: entries.iter().map(info).collect(), end })
}
