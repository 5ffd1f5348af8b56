//! The metaserver that owns the metadata: how it is connected to, and calls to it beside a session's stream.
//!
//! Of several metaservers only the owner listens. But one that was it may stand still, or be about to stop: whoever stays silent, or says
//! that it cannot answer now, is left for the next address. A call may so be made twice, without harm: a former owner has lost the
//! store, and nothing that it is asked takes effect.

use std::{
    fmt::Debug,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fjordfs_proto::{META_MESSAGE_MAX, pb::meta::cluster_client::ClusterClient};
use futures_util::TryFutureExt;
use hyper_util::rt::TokioIo;
use tonic::{
    Code, Response, Status,
    transport::{Channel, Endpoint},
};

use crate::Network;

/// How long an address may stay silent: to a connection, and to a ping. Shorter when there is another one to try: a standby may have
/// taken over from a server that stands still.
pub(super) struct Patience {
    pub(super) connect: Duration,
    pub(super) ping: Duration,
}

impl Patience {
    /// An answer that is broken off has to be asked for anew as a whole: what is only slow for a moment is to go on.
    fn of_calls(addresses: usize) -> Patience {
        let secs = Duration::from_secs;
        match addresses {
            1 => Patience { connect: secs(5), ping: secs(15) },
            _ => Patience { connect: secs(1), ping: secs(2) },
        }
    }
}

/// Why there is no connection.
pub(super) enum ConnectError {
    /// What was written is no address.
    NoAddress(String),
    /// Nobody listens there.
    Unreachable(String),
}

/// Connects to one of the metaservers.
pub(super) async fn connect(
    address: &str,
    network: Option<&Arc<dyn Network>>,
    patience: &Patience,
) -> Result<Channel, ConnectError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|e| ConnectError::NoAddress(format!("'{address}' is not an address: {e}; write HOST:PORT")))?
        .tcp_nodelay(true)
        .connect_timeout(patience.connect)
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20)
        .http2_keep_alive_interval(patience.ping)
        .keep_alive_timeout(patience.ping);
    let channel = match network {
        None => endpoint.connect().await,
        Some(network) => {
            let (network, address) = (network.clone(), address.to_owned());
            let connect = move |_| network.connect(&address).map_ok(TokioIo::new);
            endpoint.connect_with_connector(tower::service_fn(connect)).await
        }
    };
    channel.map_err(|e| ConnectError::Unreachable(root_cause(&e)))
}

/// Innermost error of a chain: the one that says "Connection refused".
fn root_cause(e: &dyn std::error::Error) -> String {
    let mut cause = e;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// Why a call to the owner came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody answers: to be tried again, or the address is wrong.
    #[error("{0}")]
    Unreachable(String),
    /// A metaserver says that it cannot answer now: to be tried again.
    #[error("{0}")]
    NotNow(String),
    /// It says no.
    #[error("{}", .0.message())]
    Refused(Status),
}

/// The metaservers of a cluster, one of which is the owner.
#[derive(Debug)]
pub struct Metaservers {
    /// As the user wrote them: one address, or several with commas between.
    addresses: String,
    network: Option<Arc<dyn Network>>,
    /// Longest time that an answer may take to begin.
    answer: Duration,
    /// Position of the address that answered last.
    at: AtomicUsize,
}

impl Metaservers {
    /// At `HOST:PORT`, or several of them with commas between; `answer` is the longest time that an answer may take to begin.
    pub fn new(addresses: &str, answer: Duration) -> Metaservers {
        Metaservers::over(None, addresses, answer)
    }

    pub(crate) fn over(network: Option<Arc<dyn Network>>, addresses: &str, answer: Duration) -> Metaservers {
        Metaservers { addresses: addresses.to_owned(), network, answer, at: AtomicUsize::new(0) }
    }

    /// Makes a call to the owner: to the address that answered last, then to the others, once each.
    ///
    /// # Errors
    /// Of all addresses, when nobody is the owner; what the owner says against it.
    pub async fn ask<T, F>(&self, call: impl Fn(ClusterClient<Channel>) -> F) -> Result<T, CallError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let addresses: Vec<&str> = self.addresses.split(',').collect();
        let patience = Patience::of_calls(addresses.len());
        let first = self.at.load(Ordering::Relaxed);
        let (mut unreachable, mut not_now) = (Vec::new(), None);
        for at in first..first + addresses.len() {
            let address = addresses[at % addresses.len()];
            match self.ask_at(address, &patience, &call).await {
                Err(CallError::Unreachable(why)) => unreachable.push(format!("{address}: {why}")),
                Err(CallError::NotNow(why)) => not_now = Some(CallError::NotNow(format!("{address}: {why}"))),
                answered => {
                    self.at.store(at % addresses.len(), Ordering::Relaxed);
                    return answered;
                }
            }
        }
        Err(not_now.unwrap_or_else(|| CallError::Unreachable(unreachable.join("; "))))
    }

    async fn ask_at<T, F>(
        &self,
        address: &str,
        patience: &Patience,
        call: &impl Fn(ClusterClient<Channel>) -> F,
    ) -> Result<T, CallError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let channel = connect(address, self.network.as_ref(), patience).await;
        let channel = channel.map_err(|e| match e {
            ConnectError::NoAddress(why) | ConnectError::Unreachable(why) => CallError::Unreachable(why),
        })?;
        let owner = ClusterClient::new(channel).max_decoding_message_size(META_MESSAGE_MAX);
        match tokio::time::timeout(self.answer, call(owner)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            // Not said by a metaserver: something on the way to it.
            Ok(Err(status)) if std::error::Error::source(&status).is_some() => {
                Err(CallError::Unreachable(root_cause(&status)))
            }
            Ok(Err(status)) if status.code() == Code::Unavailable => {
                Err(CallError::NotNow(status.message().to_owned()))
            }
            Ok(Err(status)) => Err(CallError::Refused(status)),
            Err(_) => Err(CallError::Unreachable(format!("no answer within {:?}", self.answer))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, net::SocketAddr, task};

    use fjordfs_proto::pb::meta::{ScrubReply, ScrubRequest, cluster_server::SERVICE_NAME};
    use tokio::net::TcpListener;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{
        body::Body,
        codegen::{Service, http},
        server::NamedService,
        transport::Server,
    };

    use super::*;

    /// A metaserver that says the same to everybody.
    #[derive(Clone)]
    struct Says(Status);

    impl NamedService for Says {
        const NAME: &'static str = SERVICE_NAME;
    }

    impl Service<http::Request<Body>> for Says {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = std::future::Ready<Result<http::Response<Body>, Infallible>>;

        fn poll_ready(&mut self, _: &mut task::Context<'_>) -> task::Poll<Result<(), Infallible>> {
            task::Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: http::Request<Body>) -> Self::Future {
            std::future::ready(Ok(self.0.clone().into_http()))
        }
    }

    async fn serve(says: Status) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = TcpListenerStream::new(listener);
        tokio::spawn(Server::builder().add_service(Says(says)).serve_with_incoming(incoming));
        address
    }

    async fn scrub(metaservers: &Metaservers) -> Result<ScrubReply, CallError> {
        metaservers.ask(|mut owner| async move { owner.scrub(ScrubRequest {}).await }).await
    }

    fn at(addresses: &[SocketAddr]) -> Metaservers {
        let addresses: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
        // Far longer than any of them is waited for.
        Metaservers::new(&addresses.join(","), Duration::from_secs(600))
    }

    #[tokio::test]
    async fn the_owner_is_found_behind_those_that_are_not() {
        // The kernel accepts connections for a process that stands still.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let still = listener.local_addr().unwrap();
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let stopping = serve(Status::unavailable("it is stopping")).await;
        let owner = serve(Status::failed_precondition("it is the owner")).await;

        let metaservers = at(&[still, nobody, stopping, owner]);
        for _ in 0..2 {
            let said = scrub(&metaservers).await.unwrap_err();
            assert!(matches!(&said, CallError::Refused(s) if s.message() == "it is the owner"), "{said:?}");
            assert_eq!(metaservers.at.load(Ordering::Relaxed), 3, "it is asked first the next time");
        }
        let said = scrub(&at(&[still, nobody, stopping])).await.unwrap_err();
        assert!(matches!(&said, CallError::NotNow(why) if why.contains("it is stopping")), "{said:?}");
        let said = scrub(&at(&[still, nobody])).await.unwrap_err();
        let names_both = |why: &str| [still, nobody].iter().all(|a| why.contains(&a.to_string()));
        assert!(matches!(&said, CallError::Unreachable(why) if names_both(why)), "{said:?}");
    }
}
