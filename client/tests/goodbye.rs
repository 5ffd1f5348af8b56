//! The end of a session whose metaserver does not hear of it, or does not say so. Over connections in memory.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fjordfs_client::{Client, Network, Options, Wire};
use fjordfs_proto::{
    PROTOCOL_VERSION, Policy,
    pb::{
        common::ClusterMap,
        meta::{
            ClientMessage, Empty, Response, ServerMessage, Welcome,
            meta_server::{Meta, MetaServer},
            response::Result as Reply,
        },
    },
};
use futures_util::{FutureExt, Stream, future::BoxFuture};
use tokio::{io::DuplexStream, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tonic::{Request, Status, Streaming};

/// What a metaserver does when it is told that a session is over.
#[derive(Clone, Copy)]
enum AtGoodbye {
    /// It says nothing, and its connection lives on.
    Silent,
    /// The first stream breaks, as when somebody else has taken over.
    BreaksOnce,
    /// It closes the session, and the connection breaks before it can say so.
    ForgetsAndBreaks,
}

/// A metaserver that answers every request with nothing.
#[derive(Clone)]
struct Fake {
    at_goodbye: AtGoodbye,
    goodbyes: Arc<AtomicUsize>,
}

type Out = mpsc::Sender<Result<ServerMessage, Status>>;

impl Fake {
    async fn serve(self, mut inbound: Streaming<ClientMessage>, out: Out) {
        while let Ok(Some(message)) = inbound.message().await {
            let ClientMessage { requests, goodbye, beat, .. } = message;
            let answer = |id| Response { id, result: Some(Reply::Empty(Empty {})), ..Response::default() };
            let responses = requests.iter().map(|request| answer(request.id)).collect();
            let answers = ServerMessage { responses, beat, ..ServerMessage::default() };
            if answers != ServerMessage::default() && out.send(Ok(answers)).await.is_err() {
                return;
            }
            if !goodbye {
                continue;
            }
            let before = self.goodbyes.fetch_add(1, Ordering::SeqCst);
            match self.at_goodbye {
                AtGoodbye::Silent => {}
                AtGoodbye::BreaksOnce if before > 0 => return,
                AtGoodbye::BreaksOnce | AtGoodbye::ForgetsAndBreaks => {
                    let _ = out.send(Err(Status::unavailable("the connection is gone"))).await;
                    return;
                }
            }
        }
    }
}

#[tonic::async_trait]
impl Meta for Fake {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<ServerMessage, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<ClientMessage>>,
    ) -> Result<tonic::Response<Self::AttachStream>, Status> {
        let mut inbound = request.into_inner();
        let hello = inbound.message().await?.unwrap().hello.unwrap();
        assert_eq!(hello.protocol_version, PROTOCOL_VERSION);
        let is_over = matches!(self.at_goodbye, AtGoodbye::ForgetsAndBreaks)
            && self.goodbyes.load(Ordering::SeqCst) > 0;
        if is_over {
            assert_eq!(hello.session, 7, "a session that is over is not replaced by another");
            return Err(Status::not_found("it is over"));
        }
        let (out, answers) = mpsc::channel(16);
        let policy: Policy = "replica:1".parse().unwrap();
        let map = ClusterMap {
            cluster_id: "fake".into(),
            epoch: 1,
            default_policy: policy.code().into(),
            ..ClusterMap::default()
        };
        let welcome = Welcome {
            session: 7,
            cluster_id: "fake".into(),
            map: Some(map),
            root: 1,
            session_timeout_ms: 10_000,
            slots: 8,
            lease_ms: 3_000,
            ..Welcome::default()
        };
        let first = ServerMessage { welcome: Some(welcome), ..ServerMessage::default() };
        out.send(Ok(first)).await.unwrap();
        tokio::spawn(self.clone().serve(inbound, out));
        Ok(tonic::Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

/// Connections in memory to one listener.
#[derive(Debug)]
struct InMemory(mpsc::UnboundedSender<Result<DuplexStream, Infallible>>);

impl Network for InMemory {
    fn connect(&self, _: &str) -> BoxFuture<'static, io::Result<Box<dyn Wire>>> {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let sent = self.0.send(Ok(theirs)).map_err(io::Error::other);
        async move { sent.map(|()| Box::new(ours) as Box<dyn Wire>) }.boxed()
    }
}

/// A client comes and goes; how often the metaserver was told that it goes.
async fn goodbyes(at_goodbye: AtGoodbye) -> usize {
    let fake = Fake { at_goodbye, goodbyes: Arc::default() };
    let (connect, listener) = mpsc::unbounded_channel();
    let server = tonic::transport::Server::builder()
        .add_service(MetaServer::new(fake.clone()))
        .serve_with_incoming(UnboundedReceiverStream::new(listener));
    tokio::spawn(server);
    let options = Options { defer: false, network: Some(Arc::new(InMemory(connect))), ..Options::default() };
    // Longer than a user waits for an unmount.
    assert!(options.operation_timeout > Duration::from_secs(100));
    let client = Client::connect("fake:1", options).await.unwrap();
    client.shutdown().await.unwrap();
    fake.goodbyes.load(Ordering::SeqCst)
}

#[tokio::test]
async fn a_goodbye_that_is_not_acknowledged_is_no_failure() {
    assert_eq!(goodbyes(AtGoodbye::Silent).await, 1);
}

#[tokio::test]
async fn a_goodbye_that_may_not_have_been_heard_is_said_again() {
    assert_eq!(goodbyes(AtGoodbye::BreaksOnce).await, 2);
}

#[tokio::test]
async fn a_session_that_is_over_is_not_begun_anew() {
    assert_eq!(goodbyes(AtGoodbye::ForgetsAndBreaks).await, 1);
}
