//! Calls to the metaserver beside the session's stream.

use std::time::Duration;

use fjordfs_proto::{
    FsError, FsResult, META_MESSAGE_MAX,
    error::Errno,
    pb::meta::{
        BlocksReply, BlocksRequest, MendRequest, UsesReply, UsesRequest, cluster_client::ClusterClient,
    },
};
use futures_util::TryFutureExt;
use hyper_util::rt::TokioIo;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use crate::Client;

const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// A metaserver that says nothing for so long is gone.
const PING: Duration = Duration::from_secs(15);

/// The first of the metaservers' addresses at which somebody listens: standbys do not.
async fn connect(client: &Client) -> FsResult<ClusterClient<Channel>> {
    let mut why = String::new();
    for address in client.inner.address.split(',') {
        let endpoint =
            Endpoint::from_shared(format!("http://{address}")).map_err(|e| failed("reached", &e))?;
        let endpoint = endpoint
            .tcp_nodelay(true)
            .connect_timeout(CONNECT_PATIENCE)
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PING);
        let channel = match &client.inner.options.network {
            None => endpoint.connect().await,
            Some(network) => {
                let (network, address) = (network.clone(), address.to_owned());
                let connect = move |_| network.connect(&address).map_ok(TokioIo::new);
                endpoint.connect_with_connector(tower::service_fn(connect)).await
            }
        };
        match channel {
            Ok(channel) => return Ok(ClusterClient::new(channel).max_decoding_message_size(META_MESSAGE_MAX)),
            Err(e) => why = format!("{address}: {e}"),
        }
    }
    Err(FsError::new(Errno::ETIMEDOUT, format!("no metaserver can be reached: {why}")))
}

fn failed(what: &str, e: &dyn std::fmt::Display) -> FsError {
    FsError::new(Errno::EIO, format!("the metaserver cannot be {what}: {e}"))
}

fn broken_off(e: &Status) -> FsError {
    FsError::new(Errno::EIO, format!("the metaserver has broken off: {}", e.message()))
}

/// All blocks of the filesystem, in pieces; the last one has a cluster map.
pub(super) async fn blocks(client: &Client, mut each: impl FnMut(BlocksReply)) -> FsResult<()> {
    let mut meta = connect(client).await?;
    let mut replies = meta.blocks(BlocksRequest {}).await.map_err(|e| broken_off(&e))?.into_inner();
    while let Some(reply) = replies.message().await.map_err(|e| broken_off(&e))? {
        let last = reply.map.is_some();
        each(reply);
        if last {
            return Ok(());
        }
    }
    Err(FsError::new(Errno::EIO, "the metaserver ended before it had listed all blocks: try again"))
}

/// Where blocks are used, and files of many small extents.
pub(super) async fn uses(client: &Client, asked: UsesRequest) -> FsResult<UsesReply> {
    let mut meta = connect(client).await?;
    let mut replies = meta.uses(asked).await.map_err(|e| broken_off(&e))?.into_inner();
    let mut all = UsesReply::default();
    while let Some(reply) = replies.message().await.map_err(|e| broken_off(&e))? {
        all.uses.extend(reply.uses);
        all.scattered.extend(reply.scattered);
        if reply.end {
            return Ok(all);
        }
    }
    Err(FsError::new(Errno::EIO, "the metaserver ended before it had said where blocks are used: try again"))
}

pub(super) async fn mend(client: &Client, request: MendRequest) -> FsResult<u64> {
    match connect(client).await?.mend(request).await {
        Ok(reply) => Ok(reply.into_inner().deletions),
        Err(e) => Err(FsError::new(Errno::EIO, format!("the metaserver refuses: {}", e.message()))),
    }
}
