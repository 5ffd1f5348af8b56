//! Calls to the metaserver beside the session's stream.

use fjordfs_proto::{
    FsError, FsResult,
    error::Errno,
    pb::meta::{BlocksReply, BlocksRequest, MendRequest, UsesReply, UsesRequest},
};
use tonic::Status;

use crate::{CallError, Client};

fn failed(e: &CallError) -> FsError {
    match e {
        CallError::Unreachable(why) => {
            FsError::new(Errno::ETIMEDOUT, format!("no metaserver can be reached: {why}"))
        }
        CallError::NotNow(why) => {
            FsError::new(Errno::EIO, format!("the metaserver cannot answer now: {why}"))
        }
        CallError::Refused(status) => {
            FsError::new(Errno::EIO, format!("the metaserver refuses: {}", status.message()))
        }
    }
}

fn broken_off(e: &Status) -> FsError {
    FsError::new(Errno::EIO, format!("the metaserver has broken off: {}", e.message()))
}

/// All blocks of the filesystem, in pieces; the last one has a cluster map.
pub(super) async fn blocks(client: &Client, mut each: impl FnMut(BlocksReply)) -> FsResult<()> {
    let asked = client.inner.metaservers.ask(|mut owner| async move { owner.blocks(BlocksRequest {}).await });
    let mut replies = asked.await.map_err(|e| failed(&e))?;
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
    let asked = client.inner.metaservers.ask(|mut owner| {
        let asked = asked.clone();
        async move { owner.uses(asked).await }
    });
    let mut replies = asked.await.map_err(|e| failed(&e))?;
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
    let mended = client.inner.metaservers.ask(|mut owner| {
        let request = request.clone();
        async move { owner.mend(request).await }
    });
    Ok(mended.await.map_err(|e| failed(&e))?.deletions)
}
