//! The metaserver over real gRPC: attach, reconnect, resend, a data server, and starting it wrongly.

#![allow(clippy::unwrap_used, reason = "a panic in a test is the report")]

use std::{path::Path, time::Duration};

use fjordfs_metaserver::{Config, FolderError, MetaServer, StartError, fsck};
use fjordfs_proto::{
    BlockAddr, BlockId, Extent, Layout, PROTOCOL_VERSION, Policy,
    pb::meta::{
        cluster_client::ClusterClient, meta_client::MetaClient, request::Op, response::Result as Reply, *,
    },
};
use tokio::sync::mpsc;
use tonic::{Code, Streaming, transport::Channel};

fn start(folder: &Path) -> MetaServer {
    let mut config = Config::new(folder);
    config.listen.set_port(0);
    config.heartbeat = Duration::from_millis(50);
    config.engine.cache_bytes = 1 << 20;
    MetaServer::start(config).unwrap()
}

async fn connect(server: &MetaServer) -> Channel {
    Channel::from_shared(format!("http://{}", server.address())).unwrap().connect().await.unwrap()
}

struct Session {
    sender: mpsc::Sender<ClientMessage>,
    inbound: Streaming<ServerMessage>,
    welcome: Welcome,
    sequence: u64,
}

impl Session {
    async fn attach(server: &MetaServer, hello: Hello) -> Result<Session, tonic::Status> {
        let (sender, receiver) = mpsc::channel(16);
        sender.send(ClientMessage { hello: Some(hello), ..ClientMessage::default() }).await.unwrap();
        let outbound = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut inbound = MetaClient::new(connect(server).await).attach(outbound).await?.into_inner();
        let welcome = inbound.message().await?.unwrap().welcome.unwrap();
        Ok(Session { sender, inbound, welcome, sequence: 0 })
    }

    async fn new(server: &MetaServer) -> Session {
        Session::attach(server, hello(0)).await.unwrap()
    }

    async fn send(&self, requests: Vec<Request>) {
        self.sender.send(ClientMessage { requests, ..ClientMessage::default() }).await.unwrap();
    }

    async fn answers(&mut self, count: usize) -> Vec<Response> {
        let mut found = Vec::new();
        while found.len() < count {
            found.extend(self.inbound.message().await.unwrap().unwrap().responses);
        }
        found
    }

    fn request(&mut self, op: Op) -> Request {
        self.sequence += 1;
        Request {
            id: 1000 + self.sequence,
            slot: 0,
            sequence: self.sequence,
            op: Some(op),
            ..Request::default()
        }
    }

    async fn call(&mut self, op: Op) -> Reply {
        let request = self.request(op);
        self.send(vec![request]).await;
        self.answers(1).await.remove(0).result.unwrap()
    }
}

fn hello(session: u64) -> Hello {
    Hello { protocol_version: PROTOCOL_VERSION, session, client: "test".into(), ..Hello::default() }
}

fn make(name: &str) -> Op {
    Op::Make(Make {
        parent: 1,
        name: name.to_owned().into(),
        kind: FileKind::Regular.into(),
        exclusive: true,
        ..Make::default()
    })
}

fn report(uuid: &str, target: u64) -> TargetReport {
    TargetReport {
        target,
        uuid: uuid.into(),
        path: format!("/{uuid}"),
        capacity: 1 << 40,
        free: 1 << 39,
        ..TargetReport::default()
    }
}

fn registration(cluster_id: &str) -> RegisterRequest {
    RegisterRequest {
        protocol_version: PROTOCOL_VERSION,
        cluster_id: cluster_id.into(),
        address: "127.0.0.1:1".into(),
        name: "data".into(),
        targets: vec![report("u1", 0), report("u2", 0)],
        ..RegisterRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_works_reconnects_and_is_never_served_twice() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path());
    let mut session = Session::new(&server).await;
    assert_eq!((session.welcome.root, session.welcome.cluster_id.as_str()), (1, server.cluster_id()));

    // A burst on many slots, in one message.
    let burst: Vec<Request> = (0..200)
        .map(|i| Request {
            id: i,
            slot: i as u32 + 1,
            sequence: 1,
            op: Some(make(&format!("f{i}"))),
            ..Request::default()
        })
        .collect();
    session.send(burst.clone()).await;
    let mut first = session.answers(200).await;
    first.sort_by_key(|r| r.id);
    assert!(first.iter().all(|r| matches!(r.result, Some(Reply::Entry(_)))));

    // The stream breaks; everything is sent again on a new one, also after a restart.
    let id = session.welcome.session;
    drop(session);
    server.stop().unwrap();
    let server = start(folder.path());
    let mut session = Session::attach(&server, hello(id)).await.unwrap();
    session.send(burst).await;
    let mut second = session.answers(200).await;
    second.sort_by_key(|r| r.id);
    let results = |answers: &[Response]| answers.iter().map(|r| (r.id, r.result.clone())).collect::<Vec<_>>();
    assert_eq!(results(&first), results(&second));
    assert!(second.iter().all(|r| r.serial == 0), "an answer that is repeated may be old");

    // A second stream takes the session over.
    let mut newer = Session::attach(&server, hello(id)).await.unwrap();
    let ended = loop {
        match session.inbound.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the old stream ended without a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!(ended.code(), Code::Aborted);
    assert!(matches!(
        newer.call(Op::Lookup(Lookup { parent: 1, name: "f7".into(), ..Default::default() })).await,
        Reply::Entry(_)
    ));

    newer.sender.send(ClientMessage { goodbye: true, ..ClientMessage::default() }).await.unwrap();
    assert!(newer.inbound.message().await.unwrap().is_none(), "a goodbye ends the stream in peace");
    let refused = Session::attach(&server, hello(id)).await.err().unwrap();
    assert_eq!(refused.code(), Code::NotFound);
    server.stop().unwrap();
    let report = fsck::check_folder(folder.path()).unwrap();
    assert!(report.is_clean() && report.inodes == 201, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_say_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path());
    let refused = |hello| async { Session::attach(&server, hello).await.err().unwrap() };
    let status = refused(Hello { protocol_version: 7, ..hello(0) }).await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("same release"), "{status}");
    let status = refused(Hello { cluster_id: "x".into(), ..hello(0) }).await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(refused(hello(4711)).await.code(), Code::NotFound);

    let (sender, receiver) = mpsc::channel(1);
    sender.send(ClientMessage::default()).await.unwrap();
    let outbound = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let status = MetaClient::new(connect(&server).await).attach(outbound).await.err().unwrap();
    assert_eq!(status.code(), Code::InvalidArgument);

    let mut cluster = ClusterClient::new(connect(&server).await);
    let status = cluster.register(registration("another")).await.err().unwrap();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("another"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_server_registers_and_deletes_what_nobody_reaches() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path());
    let mut session = Session::new(&server).await;
    let mut cluster = ClusterClient::new(connect(&server).await);
    let reply = cluster.register(registration("")).await.unwrap().into_inner();
    assert_eq!((reply.targets, reply.heartbeat_ms), (vec![1, 2], 50));

    // The client hears of it by itself.
    let map = loop {
        if let Some(map) = session.inbound.message().await.unwrap().unwrap().map {
            break map;
        }
    };
    assert_eq!(map.epoch, reply.map.unwrap().epoch);

    let Reply::Entry(made) = session.call(make("f")).await else { panic!() };
    let Reply::LeaseBlocks(lease) = session.call(Op::LeaseBlocks(LeaseBlocks { count: 8 })).await else {
        panic!()
    };
    let addr = BlockAddr { block: BlockId(lease.first), offset: 0 };
    let extent = Extent::blocks(addr, 100_000, Layout::of(Policy::replica(2).unwrap(), 100_000)).to_pb(0);
    let file = FileCommit { ino: made.attr.unwrap().ino, extents: vec![extent], ..FileCommit::default() };
    let commit = Commit { files: vec![file], sync: true, ..Commit::default() };
    assert!(matches!(session.call(Op::Commit(commit)).await, Reply::Commit(_)));
    let remove = Remove { parent: 1, name: "f".into(), directory: false, time: None };
    assert!(matches!(session.call(Op::Remove(remove)).await, Reply::Empty(_)));
    assert!(matches!(session.call(Op::Sync(Sync {})).await, Reply::Empty(_)));

    let mut deleted: Vec<DeletedBlocks> = Vec::new();
    let mut seen = Vec::new();
    for _ in 0..50 {
        let beat = HeartbeatRequest {
            placed_epoch: 0,
            checks: vec![],
            cluster_id: server.cluster_id().into(),
            server: reply.server,
            targets: vec![report("u1", 1), report("u2", 2)],
            epoch: map.epoch,
            deleted: std::mem::take(&mut deleted),
            rebuild: None,
            strays: vec![],
        };
        let reply = cluster.heartbeat(beat).await.unwrap().into_inner();
        assert!(reply.map.is_none() && !reply.unknown);
        seen.extend(reply.deletes.iter().map(|d| (d.target, d.blocks.clone())));
        deleted = reply.deletes;
        if seen.len() >= 2 && deleted.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(seen, [(1, vec![lease.first]), (2, vec![lease.first])]);
    let status = cluster.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.blocks_to_delete, status.inodes, status.engine.as_str()), (0, 1, "fjall"));
    assert!(status.sessions[0].attached);
    assert_eq!(status.targets[1].capacity, 1 << 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_late_gets_every_answer() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path());
    let mut session = Session::new(&server).await;
    for chunk in 0..4 {
        let name = |i| format!("{}{chunk}-{i}", "n".repeat(200));
        let burst = (0..250).map(|i| Request {
            id: i,
            slot: i as u32,
            sequence: chunk + 1,
            op: Some(make(&name(i))),
            ..Request::default()
        });
        session.send(burst.collect()).await;
        session.answers(250).await;
    }
    // Each answer is a page of 256 KiB: more of them than the client's share of memory holds.
    let list = ReadDir { ino: 1, limit: 4096, attributes: true, ..ReadDir::default() };
    let list = Request { id: 1, op: Some(Op::ReadDir(list)), ..Request::default() };
    session.send(vec![list; 150]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(session.answers(150).await.len(), 150);
}

#[test]
fn starting_wrongly_is_explained() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(&folder.path().join("a"));
    let mut config = Config::new(folder.path().join("b"));
    config.listen = server.address();
    assert!(matches!(MetaServer::start(config), Err(StartError::AddressInUse(_))));
    let again = MetaServer::start(Config::new(folder.path().join("a")));
    assert!(matches!(again, Err(StartError::Folder(FolderError::Locked(_)))));
    assert!(matches!(fsck::check_folder(&folder.path().join("a")), Err(fsck::FsckError::Folder(_))));
    server.stop().unwrap();
    start(&folder.path().join("a")).stop().unwrap();
}
