//! A metaserver that only knows membership, and a client that speaks frames over a plain socket.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(unreachable_pub, reason = "shared by several test programs")]
#![allow(clippy::unwrap_used, reason = "a panic is the report of a test")]

pub mod peer;

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use fjordfs_dataserver::{Config, DataServer};
use fjordfs_proto::{
    FsError, PROTOCOL_VERSION,
    block::page_crcs,
    frame::{self, HEADER_LEN, Header, Opcode},
    pb::{
        data::*,
        meta::{
            self, HeartbeatReply, HeartbeatRequest, RegisterReply, RegisterRequest,
            cluster_server::{Cluster, ClusterServer},
        },
    },
};
use prost::Message;
use tonic::{Request, Response, Status};

/// What the fake metaserver has seen, and what it will say.
#[derive(Default)]
pub struct State {
    pub cluster_id: String,
    pub target_ids: BTreeMap<String, u64>,
    pub registrations: Vec<RegisterRequest>,
    pub heartbeats: Vec<HeartbeatRequest>,
    pub deletes: Vec<meta::DeletedBlocks>,
    pub deleted: Vec<meta::DeletedBlocks>,
    pub map: Option<fjordfs_proto::pb::common::ClusterMap>,
    pub checks: Vec<meta::Check>,
    pub check_reports: Vec<meta::CheckReport>,
    /// What is answered to every question for wanted blocks.
    pub wanted: meta::WantedReply,
    pub asked: Vec<u64>,
    pub scrubs: u64,
    /// The next heartbeats are answered with `unknown`.
    pub forget: bool,
}

#[derive(Clone)]
struct Fake(Arc<Mutex<State>>);

#[tonic::async_trait]
impl Cluster for Fake {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<RegisterReply>, Status> {
        let (request, mut state) = (request.into_inner(), self.0.lock().unwrap());
        if !request.cluster_id.is_empty() && request.cluster_id != state.cluster_id {
            let what = format!("this is cluster {}, not {}", state.cluster_id, request.cluster_id);
            return Err(Status::failed_precondition(what));
        }
        state.forget = false;
        let mut targets = Vec::new();
        for t in &request.targets {
            let next = state.target_ids.len() as u64 + 1;
            targets.push(*state.target_ids.entry(t.uuid.clone()).or_insert(next));
        }
        state.registrations.push(request);
        let cluster_id = state.cluster_id.clone();
        Ok(Response::new(RegisterReply {
            cluster_id,
            server: 1,
            targets,
            heartbeat_ms: 20,
            map: None,
            scrubs: state.scrubs,
        }))
    }

    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatReply>, Status> {
        let (request, mut state) = (request.into_inner(), self.0.lock().unwrap());
        let unknown = state.forget;
        if !unknown {
            state.deleted.extend(request.deleted.clone());
            state.check_reports.extend(request.checks.clone());
        }
        let request_targets: Vec<u64> = request.targets.iter().map(|t| t.target).collect();
        let mine = |check: &meta::Check| request_targets.contains(&check.target);
        let checks =
            if unknown { vec![] } else { state.checks.iter().filter(|c| mine(c)).cloned().collect() };
        let map = state.map.clone().filter(|map| map.epoch > request.epoch);
        state.heartbeats.push(request);
        // One that nobody has goes to anybody.
        let known: Vec<u64> = state.target_ids.values().copied().collect();
        let has = |target: u64| request_targets.contains(&target) || !known.contains(&target);
        let (deletes, others) =
            std::mem::take(&mut state.deletes).into_iter().partition(|d| has(d.target) && !unknown);
        state.deletes = others;
        Ok(Response::new(HeartbeatReply { map, deletes, more: false, unknown, checks, scrubs: state.scrubs }))
    }

    async fn wanted(
        &self,
        request: Request<meta::WantedRequest>,
    ) -> Result<Response<meta::WantedReply>, Status> {
        let mut state = self.0.lock().unwrap();
        state.asked.extend(request.into_inner().blocks);
        Ok(Response::new(state.wanted.clone()))
    }

    async fn rebalance(
        &self,
        _: Request<meta::RebalanceRequest>,
    ) -> Result<Response<meta::RebalanceReply>, Status> {
        Err(Status::unimplemented("not in this fake"))
    }

    async fn scrub(&self, _: Request<meta::ScrubRequest>) -> Result<Response<meta::ScrubReply>, Status> {
        Err(Status::unimplemented("not in this fake"))
    }

    async fn start_gc(
        &self,
        _: Request<meta::StartGcRequest>,
    ) -> Result<Response<meta::StartGcReply>, Status> {
        Err(Status::unimplemented("not in this fake"))
    }

    async fn change_target(
        &self,
        _: Request<meta::ChangeTargetRequest>,
    ) -> Result<Response<meta::ChangeTargetReply>, Status> {
        Err(Status::unimplemented("not in this fake"))
    }

    async fn status(&self, _: Request<meta::StatusRequest>) -> Result<Response<meta::StatusReply>, Status> {
        Err(Status::unimplemented("not in this fake"))
    }

    type FsckStream = futures_util::stream::Empty<Result<meta::FsckReply, Status>>;

    async fn fsck(&self, _: Request<meta::FsckRequest>) -> Result<Response<Self::FsckStream>, Status> {
        Err(Status::unimplemented("not in this fake"))
    }

    type BlocksStream = futures_util::stream::Empty<Result<meta::BlocksReply, Status>>;

    async fn blocks(&self, _: Request<meta::BlocksRequest>) -> Result<Response<Self::BlocksStream>, Status> {
        Err(Status::unimplemented("not in this fake"))
    }

    type UsesStream = futures_util::stream::Empty<Result<meta::UsesReply, Status>>;

    async fn uses(&self, _: Request<meta::UsesRequest>) -> Result<Response<Self::UsesStream>, Status> {
        Err(Status::unimplemented("not in this fake"))
    }

    type BackupStream = futures_util::stream::Empty<Result<meta::BackupReply, Status>>;

    async fn backup(&self, _: Request<meta::BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        Err(Status::unimplemented("not in this fake"))
    }

    async fn mend(&self, _: Request<meta::MendRequest>) -> Result<Response<meta::MendReply>, Status> {
        Err(Status::unimplemented("not in this fake"))
    }

    async fn meta_status(
        &self,
        _: Request<meta::MetaStatusRequest>,
    ) -> Result<Response<meta::MetaStatusReply>, Status> {
        Err(Status::unimplemented("not in this fake"))
    }

    async fn hand_over(
        &self,
        _: Request<meta::HandOverRequest>,
    ) -> Result<Response<meta::HandOverReply>, Status> {
        Err(Status::unimplemented("not in this fake"))
    }
}

/// A running fake metaserver.
pub struct FakeMeta {
    pub address: SocketAddr,
    pub state: Arc<Mutex<State>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl FakeMeta {
    pub fn start(cluster_id: &str) -> FakeMeta {
        FakeMeta::start_at(cluster_id, SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    pub fn start_at(cluster_id: &str, address: SocketAddr) -> FakeMeta {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let state = Arc::new(Mutex::new(State { cluster_id: cluster_id.to_owned(), ..State::default() }));
        let listener = runtime.block_on(tokio::net::TcpListener::bind(address)).unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let service = ClusterServer::new(Fake(state.clone()));
        runtime.spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        FakeMeta { address, state, runtime: Some(runtime) }
    }

    pub fn stop(mut self) -> BTreeMap<String, u64> {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
        self.state.lock().unwrap().target_ids.clone()
    }

    /// Waits until the state is as wanted.
    pub fn wait(&self, what: &str, wanted: impl Fn(&State) -> bool) {
        let begun = Instant::now();
        while !wanted(&self.state.lock().unwrap()) {
            assert!(begun.elapsed() < Duration::from_secs(20), "still waiting for: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Dropped with a runtime inside an async context this would panic; tests are plain threads, so it may block.
impl Drop for FakeMeta {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub fn config(meta: &FakeMeta, folder: &Path) -> Config {
    Config { cores: 2, volume_size: 64 << 20, ..Config::new(meta.address.to_string(), [folder.to_owned()]) }
}

pub fn start(meta: &FakeMeta, folder: &Path) -> DataServer {
    DataServer::start(config(meta, folder)).unwrap()
}

/// A connection of a client.
pub struct Client {
    pub socket: TcpStream,
    next: u64,
}

/// An answer as it came.
pub struct Reply {
    pub header: Header,
    pub body: Vec<u8>,
    pub payload: Vec<u8>,
}

impl Reply {
    pub fn result<B: Message + Default>(&self) -> Result<B, FsError> {
        match self.header.status {
            0 => Ok(B::decode(&*self.body).unwrap()),
            status => Err(frame::decode_error(status, &self.body)),
        }
    }
}

impl Client {
    pub fn raw(address: SocketAddr) -> Client {
        let socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Client { socket, next: 1 }
    }

    pub fn connect(server: &DataServer, cluster_id: &str) -> Client {
        let mut client = Client::raw(server.address());
        client.hello(PROTOCOL_VERSION, cluster_id).unwrap();
        client
    }

    pub fn hello(&mut self, protocol_version: u32, cluster_id: &str) -> Result<HelloReply, FsError> {
        let (cluster_id, client) = (cluster_id.to_owned(), "test".to_owned());
        let body = HelloRequest { protocol_version, cluster_id, client, upkeep: false };
        self.call(Opcode::Hello, &body, &[]).0
    }

    pub fn send(&mut self, opcode: Opcode, body: &impl Message, payload: &[u8]) -> u64 {
        let request = self.next;
        self.next += 1;
        let mut bytes = frame::encode(opcode, false, request, body, payload.len());
        bytes.extend(payload);
        self.socket.write_all(&bytes).unwrap();
        request
    }

    /// The next answer, or `None` when the server has closed the connection.
    pub fn receive(&mut self) -> Option<Reply> {
        let mut raw = [0; HEADER_LEN];
        if let Err(e) = self.socket.read_exact(&mut raw) {
            let closed = [std::io::ErrorKind::UnexpectedEof, std::io::ErrorKind::ConnectionReset];
            assert!(closed.contains(&e.kind()), "{e}");
            return None;
        }
        let header = Header::decode(&raw).unwrap();
        let mut body = vec![0; header.body_len as usize];
        self.socket.read_exact(&mut body).unwrap();
        let mut payload = vec![0; header.payload_len as usize];
        self.socket.read_exact(&mut payload).unwrap();
        Some(Reply { header, body, payload })
    }

    pub fn call<B: Message + Default>(
        &mut self,
        opcode: Opcode,
        body: &impl Message,
        payload: &[u8],
    ) -> (Result<B, FsError>, Vec<u8>) {
        let request = self.send(opcode, body, payload);
        let reply = self.receive().expect("an answer");
        assert_eq!((reply.header.request, reply.header.opcode, reply.header.reply), (request, opcode, true));
        (reply.result(), reply.payload)
    }

    pub fn put(&mut self, block: u64, data: &[u8]) -> Result<(), FsError> {
        self.call::<PutShardReply>(Opcode::PutShard, &put_request(block, data), data).0.map(|_| ())
    }

    pub fn read(&mut self, block: u64, ranges: &[(u32, u32)]) -> Result<(ReadShardReply, Vec<u8>), FsError> {
        let ranges =
            ranges.iter().map(|(offset, length)| Range { offset: *offset, length: *length }).collect();
        let body = ReadShardRequest { target: 1, block, shard: 0, ranges, integrity: true };
        let (reply, payload) = self.call(Opcode::ReadShard, &body, &[]);
        reply.map(|reply| (reply, payload))
    }

    pub fn delete(&mut self, blocks: &[u64]) -> u32 {
        let body = DeleteShardsRequest { target: 1, blocks: blocks.to_vec() };
        self.call::<DeleteShardsReply>(Opcode::DeleteShards, &body, &[]).0.unwrap().deleted
    }

    pub fn sync(&mut self) {
        self.call::<SyncReply>(Opcode::Sync, &SyncRequest { targets: vec![1] }, &[]).0.unwrap();
    }

    pub fn list(&mut self) -> Vec<u64> {
        let (mut blocks, mut after_block) = (Vec::new(), 0);
        loop {
            let body = ListShardsRequest { target: 1, after_block, limit: 7, group: None };
            let page: ListShardsReply = self.call(Opcode::ListShards, &body, &[]).0.unwrap();
            blocks.extend(page.shards.iter().map(|s| s.block));
            after_block = blocks.last().copied().unwrap_or(0);
            if page.end {
                return blocks;
            }
        }
    }

    pub fn stat(&mut self) -> TargetStat {
        self.call::<StatReply>(Opcode::Stat, &StatRequest {}, &[]).0.unwrap().targets.remove(0)
    }
}

pub fn put_request(block: u64, data: &[u8]) -> PutShardRequest {
    PutShardRequest {
        target: 1,
        block,
        shard: 0,
        policy: 2,
        length: data.len() as u32,
        page_crcs: page_crcs(data).into(),
        epoch: 0,
    }
}

/// Bytes that differ from block to block and from page to page.
pub fn bytes_of(block: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    for (i, chunk) in bytes.chunks_mut(8).enumerate() {
        chunk.copy_from_slice(
            &fjordfs_proto::cluster::mix(block << 32 ^ i as u64).to_le_bytes()[..chunk.len()],
        );
    }
    bytes
}
