//! One pipelined connection to a data server. Hot path: no lock is held across a send or a receive, and payloads are
//! neither copied on the way out nor on the way in.
//!
//! Two tasks own the halves of the socket. A request registers itself under its id, hands its frame to the writer and
//! waits; the reader completes requests in whatever order answers come. When either half fails, every waiting
//! request fails with `EIO` and the connection is replaced by its next user.

use std::{
    collections::HashMap,
    io::IoSlice,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Buf, Bytes};
use fjordfs_proto::{
    FsError, FsResult, PROTOCOL_VERSION, ServerId,
    error::Errno,
    frame::{self, HEADER_LEN, Header, Opcode},
    pb::data::{HelloReply, HelloRequest},
};
use parking_lot::Mutex;
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot},
};
use tracing::debug;

use super::buffers::Buffers;
use crate::engine::Engine;

/// How long a server may take to accept and greet.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Slices of one vectored write.
const SLICES_MAX: usize = 64;

/// A frame on its way out: header and body, then the payload's parts.
struct Outgoing {
    head: Bytes,
    payload: Vec<Bytes>,
}

/// An answer: body and payload.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) body: Bytes,
    pub(super) payload: Bytes,
}

type Waiters = Mutex<HashMap<u64, oneshot::Sender<FsResult<Reply>>>>;

struct Shared {
    address: String,
    buffers: Arc<Buffers>,
    waiters: Waiters,
    broken: AtomicBool,
}

impl Shared {
    /// Fails everyone who waits, once.
    fn fail(&self, why: &str) {
        if !self.broken.swap(true, Ordering::AcqRel) {
            debug!(server = self.address, why, "data connection ended");
        }
        let waiters = std::mem::take(&mut *self.waiters.lock());
        for (_, waiter) in waiters {
            let _ =
                waiter.send(Err(FsError::new(Errno::EIO, format!("data server {}: {why}", self.address))));
        }
    }
}

/// An open connection.
pub(super) struct Connection {
    shared: Arc<Shared>,
    outgoing: mpsc::UnboundedSender<Outgoing>,
    request_next: AtomicU64,
}

impl Connection {
    /// Connects and greets; the tasks run on the calling thread's lane.
    pub(super) async fn open(
        engine: &Engine,
        address: &str,
        server: ServerId,
        cluster_id: &str,
        client: &str,
        buffers: Arc<Buffers>,
    ) -> FsResult<Arc<Connection>> {
        let failed =
            |why: String| FsError::new(Errno::EIO, format!("data server {server} at {address}: {why}"));
        let socket = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
            .await
            .map_err(|_| failed(format!("no connection within {CONNECT_TIMEOUT:?}")))?
            .map_err(|e| failed(e.to_string()))?;
        socket.set_nodelay(true).map_err(|e| failed(e.to_string()))?;
        let (reader, writer) = socket.into_split();
        let shared = Arc::new(Shared {
            address: address.to_owned(),
            buffers,
            waiters: Waiters::default(),
            broken: AtomicBool::new(false),
        });
        let (outgoing, queue) = mpsc::unbounded_channel();
        engine.spawn_here(write_all(writer, queue, shared.clone()));
        engine.spawn_here(read_all(reader, shared.clone()));
        let connection = Arc::new(Connection { shared, outgoing, request_next: AtomicU64::new(1) });
        let hello = HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            cluster_id: cluster_id.to_owned(),
            client: client.to_owned(),
        };
        let greeting = connection.request(Opcode::Hello, &hello, Vec::new());
        let reply = tokio::time::timeout(CONNECT_TIMEOUT, greeting)
            .await
            .map_err(|_| failed(format!("no greeting within {CONNECT_TIMEOUT:?}")))??;
        let hello: HelloReply = frame::decode_body(Opcode::Hello, &reply.body)?;
        if hello.server != server.0 {
            return Err(failed(format!("it is server s{}", hello.server)));
        }
        Ok(connection)
    }

    /// False once it has failed: get another one.
    pub(super) fn usable(&self) -> bool {
        !self.shared.broken.load(Ordering::Acquire) && !self.outgoing.is_closed()
    }

    /// Sends a request and waits for its answer. Dropping the future forgets the answer.
    ///
    /// # Errors
    /// What the server answered, or `EIO` when the connection fails.
    pub(super) async fn request(
        &self,
        opcode: Opcode,
        body: &impl Message,
        payload: Vec<Bytes>,
    ) -> FsResult<Reply> {
        let request = self.request_next.fetch_add(1, Ordering::Relaxed);
        let payload_len = payload.iter().map(Bytes::len).sum();
        let head = Bytes::from(frame::encode(opcode, false, request, body, payload_len));
        let (tx, rx) = oneshot::channel();
        self.shared.waiters.lock().insert(request, tx);
        let forget = Forget { shared: &self.shared, request };
        if self.outgoing.send(Outgoing { head, payload }).is_err() || !self.usable() {
            self.shared.fail("connection closed");
        }
        let result = rx.await;
        drop(forget);
        result.unwrap_or_else(|_| {
            Err(FsError::new(Errno::EIO, format!("data server {}: connection closed", self.shared.address)))
        })
    }
}

/// Removes a request that nobody waits for any more.
struct Forget<'a> {
    shared: &'a Shared,
    request: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.shared.waiters.lock().remove(&self.request);
    }
}

async fn write_all(
    mut socket: OwnedWriteHalf,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    shared: Arc<Shared>,
) {
    while let Some(frame) = queue.recv().await {
        if let Err(e) = write_frame(&mut socket, frame).await {
            shared.fail(&e.to_string());
            return;
        }
    }
}

/// Writes header, body and payload with as few calls as the kernel's socket buffer allows.
async fn write_frame(socket: &mut OwnedWriteHalf, frame: Outgoing) -> std::io::Result<()> {
    let mut parts: std::collections::VecDeque<Bytes> =
        std::iter::once(frame.head).chain(frame.payload).collect();
    while !parts.is_empty() {
        let slices: Vec<IoSlice<'_>> = parts.iter().take(SLICES_MAX).map(|p| IoSlice::new(p)).collect();
        let mut written = socket.write_vectored(&slices).await?;
        if written == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        while let Some(part) = parts.front_mut() {
            let step = written.min(part.len());
            part.advance(step);
            written -= step;
            if part.has_remaining() {
                break;
            }
            parts.pop_front();
        }
    }
    Ok(())
}

async fn read_all(mut socket: OwnedReadHalf, shared: Arc<Shared>) {
    let why = match read_frames(&mut socket, &shared).await {
        Ok(()) => "closed by the server".to_owned(),
        Err(e) => e,
    };
    shared.fail(&why);
}

async fn read_frames(socket: &mut OwnedReadHalf, shared: &Shared) -> Result<(), String> {
    let mut head = [0; HEADER_LEN];
    loop {
        match socket.read_exact(&mut head).await {
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e.to_string()),
        }
        let header = Header::decode(&head).map_err(|e| e.to_string())?;
        let body = read_bytes(socket, &shared.buffers, header.body_len as usize).await?;
        let payload = read_bytes(socket, &shared.buffers, header.payload_len as usize).await?;
        let waiter = shared.waiters.lock().remove(&header.request);
        if let Some(waiter) = waiter {
            let result = match header.status {
                0 => Ok(Reply { body, payload }),
                status => Err(frame::decode_error(status, &body)),
            };
            let _ = waiter.send(result);
        }
    }
}

/// Exactly `len` bytes, read straight into their own buffer.
async fn read_bytes(socket: &mut OwnedReadHalf, buffers: &Arc<Buffers>, len: usize) -> Result<Bytes, String> {
    let mut filling = buffers.take(len);
    while filling.bytes.len() < len {
        let missing = len - filling.bytes.len();
        let n = (&mut *socket)
            .take(missing as u64)
            .read_buf(&mut filling.bytes)
            .await
            .map_err(|e| e.to_string())?;
        if n == 0 {
            return Err("closed in the middle of a frame".into());
        }
    }
    Ok(filling.freeze())
}
