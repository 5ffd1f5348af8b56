//! The admin calls to the metaserver.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use fjordfs_proto::pb::meta::{
    BackupRequest, ChangeTargetRequest, FsckReport, FsckRequest, HandOverRequest, MetaStatusReply,
    MetaStatusRequest, RebalanceRequest, ScrubRequest, StartGcRequest, StatusReply, StatusRequest,
    cluster_client::ClusterClient,
};
use tonic::{
    Code, Response, Status, Streaming,
    transport::{Channel, Endpoint},
};

const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
const ANSWER_PATIENCE: Duration = Duration::from_secs(15);
/// How long a store may be changing hands, and the wait between two looks.
const CHANGE_PATIENCE: Duration = Duration::from_secs(15);
const CHANGE_PAUSE: Duration = Duration::from_millis(300);

/// A map of thousands of targets with tables of thousands of groups is some MiB.
const STATUS_SIZE_MAX: usize = 256 << 20;

/// What the metaserver knows of the cluster.
///
/// # Errors
/// Names the address and what to try.
pub(crate) async fn status(meta: &str) -> anyhow::Result<StatusReply> {
    let mut client = connect(meta).await?;
    client.status(StatusRequest {}).await.map(Response::into_inner).map_err(|e| unlike(meta, &e))
}

/// Takes a target out of service, or brings it back; what came of it, as a sentence.
///
/// # Errors
/// What the metaserver says against it.
pub(crate) async fn change_target(meta: &str, request: ChangeTargetRequest) -> anyhow::Result<String> {
    match connect(meta).await?.change_target(request).await {
        Ok(reply) => Ok(reply.into_inner().message),
        Err(e) => match e.code() {
            Code::FailedPrecondition | Code::InvalidArgument | Code::NotFound => bail!("{}", e.message()),
            _ => Err(unlike(meta, &e)),
        },
    }
}

/// Begins or ends moving blocks for balance; what came of it, as a sentence.
///
/// # Errors
/// When there is no metaserver.
pub(crate) async fn rebalance(meta: &str, stop: bool) -> anyhow::Result<String> {
    match connect(meta).await?.rebalance(RebalanceRequest { stop }).await {
        Ok(reply) => Ok(reply.into_inner().message),
        Err(e) => Err(unlike(meta, &e)),
    }
}

/// Has everything scrubbed; what came of it, as a sentence.
///
/// # Errors
/// When there is no metaserver.
pub(crate) async fn scrub(meta: &str) -> anyhow::Result<String> {
    match connect(meta).await?.scrub(ScrubRequest {}).await {
        Ok(reply) => Ok(reply.into_inner().message),
        Err(e) => Err(unlike(meta, &e)),
    }
}

/// Has garbage collected in the metaserver's process; what came of it, as a sentence.
///
/// # Errors
/// When there is no metaserver, or its program does not collect.
pub(crate) async fn start_gc(meta: &str) -> anyhow::Result<String> {
    match connect(meta).await?.start_gc(StartGcRequest {}).await {
        Ok(reply) => Ok(reply.into_inner().message),
        Err(e) if e.code() == Code::FailedPrecondition => bail!("{}", e.message()),
        Err(e) => Err(unlike(meta, &e)),
    }
}

/// Has the records of the metadata checked against each other, and mended if `repair`. `tell` hears how many have been looked at.
///
/// # Errors
/// When there is no metaserver, or its store cannot be read.
pub(crate) async fn fsck(meta: &str, repair: bool, tell: impl Fn(u64)) -> anyhow::Result<FsckReport> {
    let mut client = connect(meta).await?;
    let replies = client.fsck(FsckRequest { repair }).await.map_err(|e| unlike(meta, &e))?;
    let mut replies = replies.into_inner();
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
    mut each: impl FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut client = connect(meta).await?;
    let replies = client.backup(BackupRequest {}).await.map_err(|e| unlike(meta, &e))?;
    let mut replies = replies.into_inner();
    while let Some(reply) = next(&mut replies, "the backup").await? {
        each(&reply.data)?;
    }
    Ok(())
}

async fn next<T>(replies: &mut Streaming<T>, what: &str) -> anyhow::Result<Option<T>> {
    replies.message().await.map_err(|e| anyhow::anyhow!("{what} was broken off: {}", e.message()))
}

/// Has the metaserver let go of its store. One that is losing it at this moment says that it is stopping; then the next one is asked.
///
/// # Errors
/// Names the address and what to try.
pub(crate) async fn hand_over(meta: &str) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut was_stopping = false;
    loop {
        let why = match connect(meta).await {
            Ok(mut client) => match client.hand_over(HandOverRequest {}).await {
                Ok(_) => return Ok(()),
                Err(e) if e.code() == Code::FailedPrecondition => bail!("{}", e.message()),
                Err(e) if is_refusal_for_now(&e) => {
                    was_stopping = true;
                    unlike(meta, &e)
                }
                Err(e) => return Err(unlike(meta, &e)),
            },
            Err(e) if was_stopping => e,
            Err(e) => return Err(e),
        };
        if begun.elapsed() >= CHANGE_PATIENCE {
            return Err(why);
        }
        tokio::time::sleep(CHANGE_PAUSE).await;
    }
}

/// How the metaserver and its store are.
///
/// # Errors
/// Names the address and what to try.
pub(crate) async fn meta_status(meta: &str) -> anyhow::Result<MetaStatusReply> {
    let mut client = connect(meta).await?;
    client.meta_status(MetaStatusRequest {}).await.map(Response::into_inner).map_err(|e| unlike(meta, &e))
}

/// The metaserver itself said so, and not the way to it.
fn is_refusal_for_now(e: &Status) -> bool {
    e.code() == Code::Unavailable && std::error::Error::source(e).is_none()
}

fn unlike(meta: &str, e: &Status) -> anyhow::Error {
    if is_refusal_for_now(e) {
        return anyhow::anyhow!("the metaserver at {meta} cannot answer now: {}", e.message());
    }
    anyhow::anyhow!("what listens at {meta} does not answer as a FjordFS metaserver does: {}", e.message())
}

/// The first of the addresses at which somebody listens: standbys do not.
async fn connect(meta: &str) -> anyhow::Result<ClusterClient<Channel>> {
    check_address(meta)?;
    let mut why = String::new();
    for address in meta.split(',') {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .with_context(|| format!("'{address}' is not an address: write HOST:PORT"))?
            .connect_timeout(CONNECT_PATIENCE)
            .timeout(ANSWER_PATIENCE)
            .tcp_nodelay(true);
        match endpoint.connect().await {
            Ok(channel) => return Ok(ClusterClient::new(channel).max_decoding_message_size(STATUS_SIZE_MAX)),
            Err(e) => why = innermost(&e),
        }
    }
    bail!(
        "no metaserver answers at {meta} ({why}). Is `fjord meta` or `fjord up` running? Another address is given \
         with --meta HOST:PORT"
    )
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

fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
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
