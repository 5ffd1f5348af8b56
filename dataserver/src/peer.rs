//! A connection to another data server, for copying shards: one request after the other.
//!
//! **Cancellation.** A request that is dropped before its answer is complete leaves the connection in the middle of a frame; so
//! it counts as broken from the moment a request begins until its answer has been read.

use std::time::Duration;

use fjordfs_proto::{
    FsError, FsResult, PROTOCOL_VERSION,
    error::Errno,
    frame::{self, HEADER_LEN, Header, Opcode},
    pb::data::{HelloReply, HelloRequest},
};
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// How long a server may take to accept and greet.
const CONNECT_MAX: Duration = Duration::from_secs(3);

/// How long an answer may take, and a payload.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// A data server that shards are copied from.
pub(crate) struct Peer {
    address: String,
    stream: TcpStream,
    next: u64,
    broken: bool,
}

impl Peer {
    /// Connects and greets. `who` is shown in the other server's log.
    ///
    /// # Errors
    /// `EIO` when it cannot be reached or is of another cluster or release.
    pub(crate) async fn connect(address: &str, cluster_id: &str, who: &str) -> FsResult<Peer> {
        let connecting = timeout(CONNECT_MAX, TcpStream::connect(address)).await;
        let stream = connecting.map_err(|_| lost(address, "it does not accept connections"))?;
        let stream = stream.map_err(|e| lost(address, e))?;
        stream.set_nodelay(true).map_err(|e| lost(address, e))?;
        let mut peer = Peer { address: address.to_owned(), stream, next: 0, broken: false };
        let hello = HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            cluster_id: cluster_id.to_owned(),
            client: who.to_owned(),
            upkeep: true,
            probe: None,
        };
        let _: HelloReply = peer.request(Opcode::Hello, &hello, &mut []).await?.0;
        Ok(peer)
    }

    /// Whether it can be used again.
    pub(crate) fn is_usable(&self) -> bool {
        !self.broken
    }

    /// Sends a request; its answer and the length of the payload, which is in `memory` from its start on.
    ///
    /// # Errors
    /// What the server says. `EIO` when the connection fails, `EPROTO` when the payload is larger than `memory` or the answer makes
    /// no sense; then the connection is of no more use.
    pub(crate) async fn request<R: Message + Default>(
        &mut self,
        opcode: Opcode,
        request: &impl Message,
        memory: &mut [u8],
    ) -> FsResult<(R, usize)> {
        if self.broken {
            return Err(lost(&self.address, "the connection is broken"));
        }
        self.broken = true;
        self.next += 1;
        let frame = frame::encode(opcode, false, self.next, request, 0);
        let answer = timeout(ANSWER_MAX, self.exchange(opcode, &frame, memory)).await;
        let (header, body) = answer.map_err(|_| lost(&self.address, "no answer"))??;
        self.broken = false;
        if header.status != 0 {
            return Err(frame::decode_error(header.status, &body));
        }
        Ok((frame::decode_body(opcode, &body)?, header.payload_len as usize))
    }

    async fn exchange(
        &mut self,
        opcode: Opcode,
        frame: &[u8],
        memory: &mut [u8],
    ) -> FsResult<(Header, Vec<u8>)> {
        let failed = |e: std::io::Error| lost(&self.address, e);
        self.stream.write_all(frame).await.map_err(failed)?;
        let mut raw = [0; HEADER_LEN];
        self.stream.read_exact(&mut raw).await.map_err(failed)?;
        let header = Header::decode(&raw)?;
        let mut body = vec![0; header.body_len as usize];
        self.stream.read_exact(&mut body).await.map_err(failed)?;
        let payload = memory.get_mut(..header.payload_len as usize);
        let (true, Some(payload)) =
            (header.reply && header.opcode == opcode && header.request == self.next, payload)
        else {
            let what = format!("data server at {} sent what was not asked for", self.address);
            return Err(FsError::new(Errno::EPROTO, what));
        };
        self.stream.read_exact(payload).await.map_err(failed)?;
        Ok((header, body))
    }
}

fn lost(address: &str, why: impl std::fmt::Display) -> FsError {
    FsError::new(Errno::EIO, format!("data server at {address}: {why}"))
}
