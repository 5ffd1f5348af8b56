//! One client's connection: frames in, operations run side by side, answers out in any order.
//!
//! PERFORMANCE-CRITICAL. No payload is copied: a put is received, or read from the memory of a client on this host, into the buffer it is
//! written from, a read is sent from the buffer it was read into. Nothing here may block the core.
//!
//! **Backpressure.** At most [`IN_FLIGHT_MAX`] requests of a connection are being worked on, counted until their answer
//! has been sent; then no more is read from the socket, and TCP holds the client back. Buffers come from the bounded
//! pool; a put waits for one before its payload is read.
//!
//! **Cancellation.** A request, once read, runs to its end also when the connection is lost: a half-done put would tie up
//! its place. The answer is dropped then.
//!
//! **Stalls.** A client that stops in the middle of a frame, or does not take its answers, holds buffers that others wait
//! for: after [`STALL_MAX`] the connection is closed. Between frames it may be silent for as long as it likes.

mod reader;
mod writer;

pub(crate) use writer::Answer;

use fjordfs_proto::crc32c::crc32c;
use std::{net::Shutdown, sync::Arc, time::Duration};

use fjordfs_proto::{
    FsError, PAGE_SIZE,
    error::Errno,
    frame::{self, FrameError, Header, Opcode},
    pb::data::{HelloReply, HelloRequest, PutShardRequest},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use self::reader::{Broken, FrameReader};
use crate::{lent::Lender, listen::Socket, node::Node, ops, runtime, store::record::record_pages};

/// Requests of one connection that are worked on at the same time.
const IN_FLIGHT_MAX: usize = 128;

/// How long a peer may take for the rest of a frame, or to accept an answer.
const STALL_MAX: Duration = Duration::from_secs(60);

/// How long a refused peer may go on sending before the connection is cut.
const LINGER: Duration = Duration::from_secs(1);

/// Serves a connection until its end, or until `stopping` turns true; then what is in flight is finished.
///
/// `_alive` is dropped at the very end: who holds the other side knows when all connections are done.
pub(crate) async fn serve(
    node: Arc<Node>,
    socket: Socket,
    peer: String,
    mut stopping: watch::Receiver<bool>,
    _alive: mpsc::Sender<()>,
) {
    let socket = Arc::new(socket);
    let (answers, inbox) = mpsc::unbounded_channel();
    let (written, writing) = oneshot::channel();
    let writer = writer::run(socket.clone(), inbox, STALL_MAX);
    runtime::spawn(async move {
        writer.await;
        // Whoever waits for it is below.
        let _ = written.send(());
    });
    let mut connection = Connection {
        node,
        peer: peer.into(),
        reader: FrameReader::new(socket.clone(), STALL_MAX),
        answers,
        in_flight: Arc::new(Semaphore::new(IN_FLIGHT_MAX)),
        upkeep: false,
        lender: None,
    };
    let refused = tokio::select! {
        refused = connection.run() => refused,
        _ = stopping.wait_for(|stop| *stop) => false,
    };
    // Every operation in flight holds a clone of the sender, so the writer ends when the last answer is out.
    let Connection { mut reader, answers, peer, .. } = connection;
    drop(answers);
    if writing.await.is_err() {
        tracing::error!("connection of {peer}: the writer has panicked");
    }
    if refused {
        reader.linger(LINGER).await;
    }
    // Ends a receive that the ring may still have in flight. The peer may be gone already.
    let _ = socket.shutdown(Shutdown::Both);
}

struct Connection {
    node: Arc<Node>,
    peer: Arc<str>,
    reader: FrameReader,
    answers: mpsc::UnboundedSender<Answer>,
    in_flight: Arc<Semaphore>,
    /// No user waits for its requests.
    upkeep: bool,
    /// The peer, if its memory can be read.
    lender: Option<Arc<Lender>>,
}

impl Connection {
    /// Whether the connection ends because the peer was refused.
    async fn run(&mut self) -> bool {
        match self.serve_frames().await {
            Ok(()) => return false,
            Err(Broken::Socket(e)) => {
                tracing::debug!("connection of {}: {e}", self.peer);
                return false;
            }
            Err(Broken::Stalled) => {
                tracing::warn!("connection of {} closed: it stopped in the middle of a request", self.peer);
                return false;
            }
            Err(Broken::Frame(raw, e)) => {
                tracing::warn!("connection of {} closed: {e}", self.peer);
                if !matches!(e, FrameError::Magic(_)) {
                    let (opcode, request) = salvage(&raw);
                    self.refuse(opcode, request, &e.into());
                }
            }
            Err(Broken::Protocol(header, e)) => {
                tracing::warn!("connection of {} closed: {e}", self.peer);
                self.refuse(header.opcode, header.request, &e);
            }
        }
        true
    }

    /// Until the peer closes, or something is wrong.
    async fn serve_frames(&mut self) -> Result<(), Broken> {
        let Some(header) = self.reader.header().await? else { return Ok(()) };
        self.hello(&header).await?;
        loop {
            // Taken before reading, so that an overloaded connection is not read from.
            let Ok(permit) = self.in_flight.clone().acquire_owned().await else { return Ok(()) };
            let Some(header) = self.reader.header().await? else { return Ok(()) };
            if header.reply {
                return Err(protocol(&header, "an answer came where requests are expected"));
            }
            let body = self.reader.bytes(header.body_len as usize).await?;
            if !self.upkeep
                && matches!(header.opcode, Opcode::PutShard | Opcode::ReadShard | Opcode::LocateShard)
            {
                self.node.rebuild_rate.user_seen();
            }
            match header.opcode {
                Opcode::PutShard => self.put(&header, &body, permit).await?,
                Opcode::Hello => return Err(protocol(&header, "a second Hello")),
                _ if header.payload_len > 0 => {
                    return Err(protocol(&header, "a payload where none belongs"));
                }
                _ => self.start(&header, body, permit),
            }
        }
    }

    async fn hello(&mut self, header: &Header) -> Result<(), Broken> {
        if header.opcode != Opcode::Hello || header.reply || header.payload_len > 0 {
            return Err(protocol(header, "a connection must begin with Hello"));
        }
        let body = self.reader.bytes(header.body_len as usize).await?;
        let hello: HelloRequest = decode(header, &body)?;
        let ours = fjordfs_proto::PROTOCOL_VERSION;
        if hello.protocol_version != ours {
            let theirs = hello.protocol_version;
            return Err(protocol(
                header,
                format!(
                    "client speaks protocol version {theirs}, data server {ours}: install the same release on both"
                ),
            ));
        }
        if hello.cluster_id != self.node.cluster_id {
            let (ours, theirs) = (&self.node.cluster_id, &hello.cluster_id);
            let what = format!(
                "this data server belongs to cluster {ours}, the client to '{theirs}': check the address"
            );
            return Err(Broken::Protocol(*header, FsError::new(Errno::EINVAL, what)));
        }
        self.upkeep = hello.upkeep;
        self.lender = hello.probe.and_then(|probe| Lender::find(self.reader.socket(), &probe)).map(Arc::new);
        tracing::debug!("connection of {} from {}", self.peer, hello.client);
        let reply = HelloReply {
            server: self.node.server.0,
            cluster_id: self.node.cluster_id.clone(),
            targets: self.node.targets.keys().map(|t| t.0).collect(),
            incarnation: self.node.incarnation,
            reads_memory: self.lender.is_some(),
        };
        self.answer(Answer::new(frame::encode(Opcode::Hello, true, header.request, &reply, 0), None));
        Ok(())
    }

    /// Receives a put's payload where it will be written from, then lets the operation run.
    async fn put(
        &mut self,
        header: &Header,
        body: &[u8],
        permit: OwnedSemaphorePermit,
    ) -> Result<(), Broken> {
        let request: PutShardRequest = decode(header, body)?;
        let new = match ops::put_shard::check(&request, header.payload_len) {
            Ok(new) => new,
            Err(e) => {
                self.reader.skip(header.payload_len as usize).await?;
                self.answer(Answer::new(
                    frame::encode_error(header.opcode, header.request, &e),
                    Some(permit),
                ));
                return Ok(());
            }
        };
        let Some(mut record) =
            self.node.pool.take(&[record_pages(new.length)]).await.and_then(|mut b| b.pop())
        else {
            return Err(protocol(header, "a shard larger than the buffers"));
        };
        record = self.reader.read_into(record, PAGE_SIZE, header.payload_len as usize).await?;
        let (node, answers, header) = (self.node.clone(), self.answers.clone(), *header);
        let lender = self.lender.clone();
        runtime::spawn(async move {
            let filled = match request.memory.is_empty() {
                true => Ok(record),
                false => ops::put_shard::fill(lender, &request, record).await,
            };
            let result = match filled {
                Ok(record) => ops::put_shard::run(&node, &request, new, record).await,
                Err(e) => Err(e),
            };
            send(&answers, ops::answer(&header, result.map(ops::Output::from), permit));
        });
        Ok(())
    }

    fn start(&self, header: &Header, body: Box<[u8]>, permit: OwnedSemaphorePermit) {
        let (node, answers, header) = (self.node.clone(), self.answers.clone(), *header);
        let peer = self.peer.clone();
        runtime::spawn(async move {
            let result = ops::run(&node, &header, &body).await;
            if let Err(e) = &result {
                tracing::debug!("{:?} of {peer}: {e}", header.opcode);
            }
            send(&answers, ops::answer(&header, result, permit));
        });
    }

    fn refuse(&self, opcode: Opcode, request: u64, error: &FsError) {
        self.answer(Answer::new(frame::encode_error(opcode, request, error), None));
    }

    fn answer(&self, answer: Answer) {
        send(&self.answers, answer);
    }
}

/// The writer is gone when the peer is, and then nobody wants the answer.
fn send(answers: &mpsc::UnboundedSender<Answer>, answer: Answer) {
    drop(answers.send(answer));
}

fn decode<B: prost::Message + Default>(header: &Header, body: &[u8]) -> Result<B, Broken> {
    frame::decode_body(header.opcode, body).map_err(|e| Broken::Protocol(*header, e.into()))
}

fn protocol(header: &Header, what: impl Into<String>) -> Broken {
    Broken::Protocol(*header, FsError::new(Errno::EPROTO, what))
}

/// Opcode and request id of a header that was refused, as far as they can be believed.
fn salvage(raw: &[u8; frame::HEADER_LEN]) -> (Opcode, u64) {
    let crc = u32::from_le_bytes([raw[28], raw[29], raw[30], raw[31]]);
    if crc != crc32c(&raw[..28]) {
        return (Opcode::Hello, 0);
    }
    let request = u64::from_le_bytes([raw[8], raw[9], raw[10], raw[11], raw[12], raw[13], raw[14], raw[15]]);
    (Opcode::from_code(raw[5] & !frame::REPLY).unwrap_or(Opcode::Hello), request)
}
