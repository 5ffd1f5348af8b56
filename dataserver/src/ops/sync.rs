//! Making acknowledged puts power-safe.

use fjordfs_proto::{
    FsResult,
    pb::data::{SyncReply, SyncRequest},
};
use futures_util::future::try_join_all;

use crate::node::Node;

pub(super) async fn run(node: &Node, request: &SyncRequest) -> FsResult<SyncReply> {
    let stores = request.targets.iter().map(|t| node.store(*t)).collect::<FsResult<Vec<_>>>()?;
    try_join_all(stores.into_iter().map(|store| store.sync())).await?;
    Ok(SyncReply {})
}
