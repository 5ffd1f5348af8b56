//! Deleting all shards of blocks. Answered when the deletion is power-safe.

use fjordfs_proto::{
    FsResult,
    pb::data::{DeleteShardsReply, DeleteShardsRequest},
};

use crate::node::Node;

pub(super) async fn run(node: &Node, request: &DeleteShardsRequest) -> FsResult<DeleteShardsReply> {
    let store = node.store(request.target)?;
    let deleted = store.delete(&super::block_ids(&request.blocks)).await?;
    store.sync().await?;
    Ok(DeleteShardsReply { deleted })
}
