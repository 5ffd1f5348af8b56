//! A reader has found a shard damaged.

use fjordfs_proto::{
    BlockId, FsResult, TargetId,
    pb::data::{ReportShardReply, ReportShardRequest},
};

use crate::node::Node;

/// Has the shard looked at, soon. What the reader says is only a reason to look.
pub(super) fn run(node: &Node, request: &ReportShardRequest) -> FsResult<ReportShardReply> {
    node.store(request.target)?;
    let shard = super::shard_no(request.shard)?;
    node.scrubs.suspect(TargetId(request.target), BlockId(request.block), shard);
    Ok(ReportShardReply {})
}
