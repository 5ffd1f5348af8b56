//! A data server: the real protocols at both of its sides, and a store that is a map.
//!
//! A put is answered when the device has the shard; a kill leaves it, a power failure leaves what was synced and any part of the
//! rest. Pages of what is read are not verified here: that is the client's.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use fjordfs_metaserver::{fsck, store::Idle};
use fjordfs_proto::{
    FsError, FsResult, META_MESSAGE_MAX, PAGE_SIZE, PROTOCOL_VERSION,
    block::first_bad_page,
    error::Errno,
    frame::{self, HEADER_LEN, Header, Opcode},
    pb::{
        data::{
            HelloReply, ListShardsReply, ListShardsRequest, PutShardReply, PutShardRequest, ReadShardReply,
            ReadShardRequest, ReportShardReply, ShardInfo, SyncReply,
        },
        meta::{
            DeletedBlocks, HeartbeatReply, HeartbeatRequest, RegisterRequest, TargetReport,
            cluster_client::ClusterClient,
        },
    },
};
use fjordfs_tests::rng::TestRng;
use prost::Message;
use rand::Rng;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, WriteHalf},
    sync::mpsc,
    task::JoinSet,
};
use tonic::transport::{Channel, Endpoint};

use crate::{
    disk::Drive,
    network::{Host, Nic, SimWire, address},
    run::{trace, violation},
};

/// (block, shard).
type Key = (u64, u32);

#[derive(Clone)]
struct Shard {
    bytes: Bytes,
    page_crcs: Bytes,
    synced: bool,
}

/// What is on flash, and who the server is.
pub(crate) struct Flash {
    name: Host,
    server: u64,
    target: u64,
    cluster_id: String,
    /// Of the process.
    incarnation: u64,
    shards: BTreeMap<Key, Shard>,
    /// Every block that was ordered to be deleted.
    deleted: BTreeSet<u64>,
    /// What the metaserver's host may lose.
    drive: Drive,
    random: TestRng,
}

/// See the module.
pub(crate) type Server = Arc<Mutex<Flash>>;

pub(crate) fn new(name: Host, random: TestRng, drive: Drive) -> Server {
    Arc::new(Mutex::new(Flash {
        name,
        server: 0,
        target: 0,
        cluster_id: String::new(),
        incarnation: 0,
        shards: BTreeMap::new(),
        deleted: BTreeSet::new(),
        drive,
        random,
    }))
}

impl Flash {
    /// The power is gone.
    pub(crate) fn lose_unsynced(&mut self) {
        let random = &mut self.random;
        let before = self.shards.len();
        self.shards.retain(|_, shard| shard.synced || random.random());
        self.shards.values_mut().for_each(|shard| shard.synced = true);
        trace(format_args!("h{}: {} shards lost", self.name, before - self.shards.len()));
    }

    pub(crate) fn holds(&self, key: Key) -> bool {
        self.shards.contains_key(&key)
    }

    pub(crate) fn was_told_to_delete(&self, block: u64) -> bool {
        self.deleted.contains(&block)
    }

    /// What is to be deleted must be dead whatever the metaserver's host loses: nothing brings a shard back.
    fn check_dead(&self, blocks: &[u64]) {
        let synced = self.drive.lock().unwrap().synced();
        for block in fsck::reached(&Idle(&synced), blocks.to_vec()).unwrap() {
            violation(format!(
                "h{} shall delete {block}, and a power failure would bring back a file that reaches it",
                self.name
            ));
        }
    }

    fn report(&self) -> TargetReport {
        TargetReport {
            target: self.target,
            uuid: format!("flash {}", self.name),
            path: format!("/flash{}", self.name),
            domain: self.name.to_string(),
            capacity: 1 << 40,
            free: 1 << 39,
            shards: self.shards.len() as u64,
            ..TargetReport::default()
        }
    }

    /// A moment that the device takes.
    fn pause(&mut self) -> Duration {
        let slow = if self.random.random_ratio(1, 50) { 300 } else { 3 };
        Duration::from_millis(self.random.random_range(0..slow))
    }
}

/// Runs until it is dropped.
pub(crate) fn start(
    server: &Server,
    nic: Nic,
    meta: Host,
    mut connections: mpsc::UnboundedReceiver<SimWire>,
) -> JoinSet<()> {
    server.lock().unwrap().incarnation += 1;
    let mut tasks = JoinSet::new();
    tasks.spawn(membership(server.clone(), nic, meta));
    let server = server.clone();
    tasks.spawn(async move {
        let mut clients = JoinSet::new();
        while let Some(wire) = connections.recv().await {
            let server = server.clone();
            clients.spawn(async move {
                if let Err(e) = serve(server.clone(), wire).await {
                    trace(format_args!("a connection of h{} ended: {e}", server.lock().unwrap().name));
                }
            });
        }
    });
    tasks
}

async fn membership(server: Server, nic: Nic, meta: Host) {
    loop {
        let ended = beat(&server, nic.clone(), meta).await;
        trace(format_args!("membership of h{}: {}", server.lock().unwrap().name, ended.unwrap_err()));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn beat(server: &Server, nic: Nic, meta: Host) -> Result<std::convert::Infallible, tonic::Status> {
    let mut client = connect(nic, meta).await?;
    let request = {
        let flash = server.lock().unwrap();
        RegisterRequest {
            protocol_version: PROTOCOL_VERSION,
            cluster_id: flash.cluster_id.clone(),
            server: flash.server,
            address: address(flash.name),
            name: flash.name.to_string(),
            targets: vec![flash.report()],
        }
    };
    let reply = client.register(request).await?.into_inner();
    {
        let mut flash = server.lock().unwrap();
        (flash.server, flash.target, flash.cluster_id) =
            (reply.server, reply.targets[0], reply.cluster_id.clone());
    }
    let (mut deleted, mut epoch) = (Vec::new(), 0);
    let interval = Duration::from_millis(reply.heartbeat_ms);
    loop {
        tokio::time::sleep(interval).await;
        let request = {
            let flash = server.lock().unwrap();
            HeartbeatRequest {
                cluster_id: flash.cluster_id.clone(),
                server: flash.server,
                targets: vec![flash.report()],
                epoch,
                deleted: std::mem::take(&mut deleted),
                checks: Vec::new(),
                // A put is over when it has begun here.
                placed_epoch: epoch,
                rebuild: None,
                strays: vec![],
            }
        };
        let HeartbeatReply { map, deletes, unknown, .. } = client.heartbeat(request).await?.into_inner();
        if unknown {
            return Err(tonic::Status::aborted("to be registered again"));
        }
        epoch = map.map_or(epoch, |map| map.epoch);
        deleted = delete(server, deletes).await;
    }
}

async fn connect(nic: Nic, meta: Host) -> Result<ClusterClient<Channel>, tonic::Status> {
    let at = address(meta);
    let endpoint =
        Endpoint::from_shared(format!("http://{at}")).map_err(|e| tonic::Status::internal(e.to_string()))?;
    let endpoint = endpoint.connect_timeout(Duration::from_secs(10)).timeout(Duration::from_secs(10));
    let connect = move |_| {
        let (nic, at) = (nic.clone(), at.clone());
        async move { nic.connect_to(at).await.map(hyper_util::rt::TokioIo::new) }
    };
    let channel = endpoint.connect_with_connector(tower::service_fn(connect)).await;
    let channel = channel.map_err(|e| tonic::Status::unavailable(e.to_string()))?;
    Ok(ClusterClient::new(channel).max_decoding_message_size(META_MESSAGE_MAX))
}

/// Deletes, and makes that power-safe.
async fn delete(server: &Server, deletes: Vec<DeletedBlocks>) -> Vec<DeletedBlocks> {
    if deletes.is_empty() {
        return deletes;
    }
    let pause = {
        let mut flash = server.lock().unwrap();
        for order in &deletes {
            if order.target != flash.target {
                violation(format!("h{} shall delete from target {}", flash.name, order.target));
            }
            trace(format_args!("h{} deletes {} blocks", flash.name, order.blocks.len()));
            flash.check_dead(&order.blocks);
            flash.deleted.extend(&order.blocks);
        }
        let Flash { shards, deleted, .. } = &mut *flash;
        shards.retain(|(block, _), _| !deleted.contains(block));
        flash.pause()
    };
    tokio::time::sleep(pause).await;
    deletes
}

async fn serve(server: Server, wire: SimWire) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(wire);
    let (answers, mut queue) = mpsc::unbounded_channel::<Vec<u8>>();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Some(answer) = queue.recv().await {
            if write(&mut writer, &answer).await.is_err() {
                return;
            }
        }
    });
    loop {
        let mut raw = [0; HEADER_LEN];
        reader.read_exact(&mut raw).await?;
        let header = Header::decode(&raw).map_err(|e| io::Error::other(e.to_string()))?;
        let mut body = vec![0; header.body_len as usize];
        reader.read_exact(&mut body).await?;
        let mut payload = vec![0; header.payload_len as usize];
        reader.read_exact(&mut payload).await?;
        let (server, answers) = (server.clone(), answers.clone());
        tasks.spawn(async move {
            let answer = answer(&server, header, &body, payload.into()).await;
            let answer = answer.unwrap_or_else(|e| frame::encode_error(header.opcode, header.request, &e));
            // The client may have gone.
            let _ = answers.send(answer);
        });
    }
}

async fn write(writer: &mut WriteHalf<SimWire>, bytes: &[u8]) -> io::Result<()> {
    writer.write_all(bytes).await?;
    writer.flush().await
}

async fn answer(server: &Server, header: Header, body: &[u8], payload: Bytes) -> FsResult<Vec<u8>> {
    let opcode = header.opcode;
    match opcode {
        Opcode::Hello => {
            let flash = server.lock().unwrap();
            let cluster_id = flash.cluster_id.clone();
            let (server, targets) = (flash.server, vec![flash.target]);
            let hello = HelloReply {
                server,
                cluster_id,
                targets,
                incarnation: flash.incarnation,
                reads_memory: false,
            };
            Ok(reply(header, &hello, &[]))
        }
        Opcode::PutShard => {
            put(server, frame::decode_body(opcode, body)?, payload).await?;
            Ok(reply(header, &PutShardReply {}, &[]))
        }
        Opcode::ReadShard => {
            let (message, payload) = read(server, &frame::decode_body(opcode, body)?).await?;
            Ok(reply(header, &message, &payload))
        }
        Opcode::ListShards => {
            let listed = list(server, &frame::decode_body(opcode, body)?).await?;
            Ok(reply(header, &listed, &[]))
        }
        Opcode::Sync => {
            sync(server).await;
            Ok(reply(header, &SyncReply {}, &[]))
        }
        Opcode::ReportShard => {
            violation(format!("a shard was reported as damaged: {body:?}"));
            Ok(reply(header, &ReportShardReply {}, &[]))
        }
        other => Err(FsError::new(Errno::EPROTO, format!("{other:?} is not expected of a client"))),
    }
}

fn reply(header: Header, body: &impl Message, payload: &[u8]) -> Vec<u8> {
    let mut out = frame::encode(header.opcode, true, header.request, body, payload.len());
    out.extend_from_slice(payload);
    out
}

fn wrong_target(flash: &Flash, target: u64) -> FsResult<()> {
    match target == flash.target {
        true => Ok(()),
        false => Err(FsError::new(Errno::ENODEV, format!("target {target} is not here"))),
    }
}

async fn put(server: &Server, request: PutShardRequest, payload: Bytes) -> FsResult<()> {
    let pause = {
        let mut flash = server.lock().unwrap();
        wrong_target(&flash, request.target)?;
        flash.pause()
    };
    if first_bad_page(&payload, &request.page_crcs).is_some() {
        return Err(FsError::new(Errno::EBADMSG, "a page does not match its checksum"));
    }
    let key = (request.block, request.shard);
    // The device has it at some moment before it says so, or has it and never says so.
    tokio::time::sleep(pause / 2).await;
    {
        let mut flash = server.lock().unwrap();
        let shard = Shard { bytes: payload, page_crcs: request.page_crcs, synced: false };
        match flash.shards.get(&key) {
            Some(there) if there.bytes != shard.bytes => {
                violation(format!("block {} shard {} is put twice, with other bytes", key.0, key.1));
            }
            Some(_) => {}
            None => drop(flash.shards.insert(key, shard)),
        }
    }
    tokio::time::sleep(pause / 2).await;
    Ok(())
}

async fn read(server: &Server, request: &ReadShardRequest) -> FsResult<(ReadShardReply, Vec<u8>)> {
    let pause = server.lock().unwrap().pause();
    tokio::time::sleep(pause).await;
    let flash = server.lock().unwrap();
    wrong_target(&flash, request.target)?;
    let (block, shard) = (request.block, request.shard);
    let shard = flash.shards.get(&(block, shard)).ok_or_else(|| {
        FsError::new(Errno::ENOENT, format!("h{} has no shard {shard} of block {block}", flash.name))
    })?;
    let length = shard.bytes.len();
    let (mut lengths, mut page_crcs, mut payload) = (Vec::new(), Vec::new(), Vec::new());
    for range in &request.ranges {
        let start = (range.offset as usize).min(length);
        let end = (start + range.length as usize).min(length);
        // Whole pages, or up to the end.
        let end = if end == length { end } else { end / PAGE_SIZE * PAGE_SIZE };
        lengths.push((end - start) as u32);
        payload.extend_from_slice(&shard.bytes[start..end]);
        if start < end {
            page_crcs.extend_from_slice(&shard.page_crcs[start / PAGE_SIZE * 4..end.div_ceil(PAGE_SIZE) * 4]);
        }
    }
    if !request.integrity {
        page_crcs.clear();
    }
    Ok((ReadShardReply { lengths, page_crcs: page_crcs.into(), shard_length: length as u32 }, payload))
}

/// A few at a time, so that much happens in between.
async fn list(server: &Server, request: &ListShardsRequest) -> FsResult<ListShardsReply> {
    const PAGE: usize = 20;
    let pause = server.lock().unwrap().pause();
    tokio::time::sleep(pause).await;
    let flash = server.lock().unwrap();
    wrong_target(&flash, request.target)?;
    let limit = if request.limit == 0 { PAGE } else { PAGE.min(request.limit as usize) };
    let mut shards: Vec<ShardInfo> = Vec::new();
    for ((block, no), shard) in flash.shards.range((request.after_block + 1, 0)..) {
        // All shards of a block are in one page.
        if shards.len() >= limit && shards.last().is_some_and(|last| last.block != *block) {
            return Ok(ListShardsReply { shards, end: false });
        }
        shards.push(ShardInfo { block: *block, shard: *no, policy: 0, length: shard.bytes.len() as u32 });
    }
    Ok(ListShardsReply { shards, end: true })
}

async fn sync(server: &Server) {
    let (before, pause) = {
        let mut flash = server.lock().unwrap();
        (flash.shards.keys().copied().collect::<Vec<_>>(), flash.pause())
    };
    tokio::time::sleep(pause).await;
    let mut flash = server.lock().unwrap();
    for key in before {
        if let Some(shard) = flash.shards.get_mut(&key) {
            shard.synced = true;
        }
    }
}
