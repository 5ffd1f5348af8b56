//! The admin calls to the metaserver.

use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use bytes::Bytes;
use fjordfs_client::{CallError, Metaservers};
use fjordfs_proto::pb::meta::{
    BackupRequest, ChangeTargetRequest, FsckReport, FsckRequest, HandOverRequest, MetaStatusReply,
    MetaStatusRequest, RebalanceRequest, ScrubRequest, StartGcRequest, StatusReply, StatusRequest,
    cluster_client::ClusterClient,
};
use tonic::{Code, Response, Status, Streaming, transport::Channel};

const ANSWER_PATIENCE: Duration = Duration::from_secs(15);
/// How long a store may be changing hands, and the wait between two looks.
const CHANGE_PATIENCE: Duration = Duration::from_secs(15);
const CHANGE_PAUSE: Duration = Duration::from_millis(300);

/// What the metaserver knows of the cluster.
///
/// # Errors
/// Names the address and what to try.
pub(crate) async fn status(meta: &str) -> anyhow::Result<StatusReply> {
    ask(meta, |mut owner| async move { owner.status(StatusRequest {}).await }).await
}

/// Takes a target out of service, or brings it back; what came of it, as a sentence.
///
/// # Errors
/// What the metaserver says against it.
pub(crate) async fn change_target(meta: &str, request: ChangeTargetRequest) -> anyhow::Result<String> {
    let changed = ask(meta, |mut owner| async move { owner.change_target(request).await });
    Ok(changed.await?.message)
}

/// Begins or ends moving blocks for balance; what came of it, as a sentence.
///
/// # Errors
/// When there is no metaserver.
pub(crate) async fn rebalance(meta: &str, stop: bool) -> anyhow::Result<String> {
    let asked = ask(meta, |mut owner| async move { owner.rebalance(RebalanceRequest { stop }).await });
    Ok(asked.await?.message)
}

/// Has everything scrubbed; what came of it, as a sentence.
///
/// # Errors
/// When there is no metaserver.
pub(crate) async fn scrub(meta: &str) -> anyhow::Result<String> {
    Ok(ask(meta, |mut owner| async move { owner.scrub(ScrubRequest {}).await }).await?.message)
}

/// Has garbage collected in the metaserver's process; what came of it, as a sentence.
///
/// # Errors
/// When there is no metaserver, or its program does not collect.
pub(crate) async fn start_gc(meta: &str) -> anyhow::Result<String> {
    Ok(ask(meta, |mut owner| async move { owner.start_gc(StartGcRequest {}).await }).await?.message)
}

/// Has the records of the metadata checked against each other, and mended if `repair`. `tell` hears how many have been looked at.
///
/// # Errors
/// When there is no metaserver, or its store cannot be read.
pub(crate) async fn fsck(meta: &str, repair: bool, tell: impl Fn(u64)) -> anyhow::Result<FsckReport> {
    let replies = ask(meta, |mut owner| async move { owner.fsck(FsckRequest { repair }).await });
    let mut replies = replies.await?;
    while let Some(reply) = next(&mut replies, "the check").await? {
        match reply.report {
            Some(report) => return Ok(report),
            None => tell(reply.records),
        }
    }
    bail!("the metaserver at {meta} ended before the check was over: try again")
}

/// All records of the metadata, as the bytes of a file, piece by piece.
///
/// # Errors
/// When there is no metaserver, its store cannot be read, or `each` refuses a piece.
pub(crate) async fn backup(
    meta: &str,
    mut each: impl AsyncFnMut(Bytes) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut replies = ask(meta, |mut owner| async move { owner.backup(BackupRequest {}).await }).await?;
    while let Some(reply) = next(&mut replies, "the backup").await? {
        each(reply.data).await?;
    }
    Ok(())
}

async fn next<T>(replies: &mut Streaming<T>, what: &str) -> anyhow::Result<Option<T>> {
    replies.message().await.map_err(|e| anyhow!("{what} was broken off: {}", e.message()))
}

/// Has the metaserver let go of its store. One that is losing it at this moment says that it is stopping; then the next one is asked.
///
/// # Errors
/// Names the address and what to try.
pub(crate) async fn hand_over(meta: &str) -> anyhow::Result<()> {
    check_address(meta)?;
    let metaservers = Metaservers::new(meta, ANSWER_PATIENCE);
    let begun = Instant::now();
    let mut was_stopping = false;
    loop {
        let call = metaservers.ask(|mut owner| async move { owner.hand_over(HandOverRequest {}).await });
        let why = match call.await {
            Ok(_) => return Ok(()),
            Err(why) => why,
        };
        was_stopping |= matches!(why, CallError::NotNow(_));
        let is_over = matches!(why, CallError::Refused(_)) || !was_stopping;
        if is_over || begun.elapsed() >= CHANGE_PATIENCE {
            return Err(explained(meta, why));
        }
        tokio::time::sleep(CHANGE_PAUSE).await;
    }
}

/// How the metaserver and its store are.
///
/// # Errors
/// Names the address and what to try.
pub(crate) async fn meta_status(meta: &str) -> anyhow::Result<MetaStatusReply> {
    ask(meta, |mut owner| async move { owner.meta_status(MetaStatusRequest {}).await }).await
}

async fn ask<T, F>(meta: &str, call: impl Fn(ClusterClient<Channel>) -> F) -> anyhow::Result<T>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    check_address(meta)?;
    Metaservers::new(meta, ANSWER_PATIENCE).ask(call).await.map_err(|e| explained(meta, e))
}

fn explained(meta: &str, e: CallError) -> anyhow::Error {
    match e {
        CallError::Unreachable(why) => anyhow!(
            "no metaserver answers at {meta} ({why}). Is `fjord meta` or `fjord up` running? Another address is given \
             with --meta HOST:PORT"
        ),
        CallError::NotNow(why) => anyhow!("the metaserver at {meta} cannot answer now: {why}"),
        CallError::Refused(status) => match status.code() {
            Code::FailedPrecondition | Code::InvalidArgument | Code::NotFound => {
                anyhow!("{}", status.message())
            }
            _ => anyhow!(
                "what listens at {meta} does not answer as a FjordFS metaserver does: {}",
                status.message()
            ),
        },
    }
}

/// `HOST:PORT`, or several with commas between, so that a typing error is not reported as a network failure.
pub(crate) fn check_address(meta: &str) -> anyhow::Result<()> {
    for address in meta.split(',') {
        let port = address
            .rsplit_once(':')
            .filter(|(host, _)| !host.is_empty())
            .and_then(|(_, port)| port.parse::<u16>().ok());
        if port.is_none_or(|port| port == 0) {
            bail!(
                "'{address}' is not the address of a metaserver: write HOST:PORT, for example 127.0.0.1:7440"
            )
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        for good in ["127.0.0.1:7440", "[::1]:7440", "meta.example:1", "a:1,b:2"] {
            assert!(check_address(good).is_ok(), "{good}");
        }
        for bad in ["", "7440", "host", "host:", ":7440", "host:0", "host:99999", "host:abc", "a:1,"] {
            assert!(check_address(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn nobody_there_is_explained() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = status(&free.to_string()).await.unwrap_err().to_string();
        assert!(error.contains(&free.to_string()) && error.contains("fjord up"), "{error}");
    }
}
