//! gRPC: the session stream and the unary calls. Nothing here decides anything; requests become jobs of the executor.

mod attach;
mod cluster;
pub(crate) mod outbox;
mod whole;

use std::{convert::Infallible, io, time::Duration};

use fjordfs_proto::{
    META_MESSAGE_MAX,
    pb::meta::{cluster_server::ClusterServer, meta_server},
};
use futures_util::{Stream, stream};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};
use tonic::{
    Status,
    transport::{Server, server::Connected},
};

use crate::{executor::Jobs, refusal::Refusal};

/// Windows large enough for a burst of 1 MiB pages in flight per stream.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// A peer that does not answer a ping for this long is gone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Pause after an accept that failed, e.g. for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Status {
        match refusal {
            Refusal::Invalid(m) => Status::invalid_argument(m),
            Refusal::Precondition(m) => Status::failed_precondition(m),
            Refusal::NotFound(m) => Status::not_found(m),
            Refusal::Aborted(m) => Status::aborted(m),
            Refusal::Unavailable(m) => Status::unavailable(m),
            Refusal::Exhausted(m) => Status::resource_exhausted(m),
        }
    }
}

fn stopped() -> Status {
    Status::unavailable("the metaserver is stopping; it can be tried again")
}

/// Serves until `stop` is resolved.
pub(crate) async fn serve<I, IO>(
    connections: I,
    jobs: Jobs,
    stop: oneshot::Receiver<()>,
) -> Result<(), tonic::transport::Error>
where
    I: Stream<Item = Result<IO, Infallible>>,
    IO: Connection,
{
    let meta = meta_server::MetaServer::new(attach::MetaService::new(jobs.clone()))
        .max_decoding_message_size(META_MESSAGE_MAX)
        .max_encoding_message_size(META_MESSAGE_MAX);
    let cluster = ClusterServer::new(cluster::ClusterService::new(jobs))
        .max_decoding_message_size(META_MESSAGE_MAX)
        .max_encoding_message_size(META_MESSAGE_MAX);
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(meta)
        .add_service(cluster)
        .serve_with_incoming_shutdown(connections, async {
            // A dropped sender means the same as a message.
            let _ = stop.await;
        })
        .await
}

/// What requests come in through.
pub trait Connection: AsyncRead + AsyncWrite + Connected + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Connected + Send + Unpin + 'static> Connection for T {}

/// Accepted connections with TCP_NODELAY, which tonic leaves off here: without it a small answer waits 40 ms for
/// the peer's delayed acknowledgement.
pub(crate) fn connections(listener: TcpListener) -> impl Stream<Item = Result<TcpStream, Infallible>> {
    stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((socket, peer)) => {
                    if let Err(e) = socket.set_nodelay(true) {
                        tracing::debug!(%peer, error = %e, "TCP_NODELAY");
                        continue;
                    }
                    return Some((Ok(socket), listener));
                }
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    tracing::warn!(error = %e, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}
