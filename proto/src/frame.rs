//! The framed data protocol between clients and data servers, over TCP, or a Unix socket on the same host.
//!
//! ```text
//!  0        4   5   6      8            16           20             24     28        32
//!  | magic  | v | op| stat | request id | body bytes | payload bytes| zero | CRC32C | body | payload |
//! ```
//!
//! All little-endian. The CRC covers bytes 0..28, so a corrupt length is never believed. The body is a message of
//! [`crate::pb::data`], the payload is raw shard bytes, which carry CRCs of their own. Requests on one connection are
//! pipelined; answers repeat the request's id and opcode with [`REPLY`] set and come in any order. `stat` is 0 or an
//! errno, in which case the body is a [`crate::pb::data::ErrorBody`].
//!
//! After a frame that does not decode, the byte stream has no meaning any more: the connection is closed.

use crate::crc32c::crc32c;
use prost::Message;

use crate::{BLOCK_SIZE_MAX, FsError, ServerId, error::Errno, pb};

/// Bytes of a header.
pub const HEADER_LEN: usize = 32;

/// "FJRD" on the wire.
pub const MAGIC: u32 = u32::from_le_bytes(*b"FJRD");

/// Bit of the opcode byte that marks an answer.
pub const REPLY: u8 = 0x80;

/// Most bytes of a body: page CRCs of a whole block are 16 KiB, lists are cut to fit.
pub const BODY_MAX: u32 = 1 << 20;

/// Most bytes of a payload: one whole block.
pub const PAYLOAD_MAX: u32 = BLOCK_SIZE_MAX as u32;

/// Versions of the frame. 1: first.
pub const FRAME_VERSION: u8 = 1;

/// The name in the abstract namespace of Unix sockets under which a data server also listens, for clients on its host.
///
/// Such a name is seen in one network namespace only and belongs to no folder: a client in another container finds nobody
/// there and connects to the server's address. A name can be taken by anyone, as a port can; who connects checks whose
/// process listens, and, as over TCP, what the Hello says.
pub fn local_name(cluster_id: &str, server: ServerId) -> String {
    format!("fjordfs/{cluster_id}/{server}")
}

/// What a request asks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Opcode {
    /// First frame of a connection.
    Hello = 1,
    /// Store a shard.
    PutShard = 2,
    /// Read ranges of a shard.
    ReadShard = 3,
    /// Delete all shards of blocks.
    DeleteShards = 4,
    /// List shards in block order.
    ListShards = 5,
    /// Make acknowledged puts power-safe.
    Sync = 6,
    /// Capacity and counters.
    Stat = 7,
    /// Where a shard is in which file.
    LocateShard = 8,
    /// A reader found a shard damaged.
    ReportShard = 9,
}

impl Opcode {
    /// From the opcode byte with [`REPLY`] cleared.
    pub fn from_code(code: u8) -> Option<Opcode> {
        use Opcode::*;
        [Hello, PutShard, ReadShard, DeleteShards, ListShards, Sync, Stat, LocateShard, ReportShard]
            .into_iter()
            .find(|op| *op as u8 == code)
    }
}

/// A decoded header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What is asked or answered.
    pub opcode: Opcode,
    /// True for an answer.
    pub reply: bool,
    /// 0, or an errno in an answer.
    pub status: u16,
    /// Chosen by the requester, repeated in the answer.
    pub request: u64,
    /// Bytes of the body.
    pub body_len: u32,
    /// Bytes of the payload.
    pub payload_len: u32,
}

/// A header that cannot be believed. The connection must be closed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum FrameError {
    #[error("not a FjordFS data connection (magic {0:#010x}): is this the address of a data server?")]
    Magic(u32),
    #[error("frame version {0}, this build speaks {FRAME_VERSION}: install the same release on both ends")]
    Version(u8),
    #[error("corrupt frame header (checksum mismatch)")]
    Checksum,
    #[error("unknown opcode {0}")]
    Opcode(u8),
    #[error("frame with a body of {0} bytes, at most {BODY_MAX} are allowed")]
    BodyTooLong(u32),
    #[error("frame with a payload of {0} bytes, at most {PAYLOAD_MAX} are allowed")]
    PayloadTooLong(u32),
    #[error("body of a {0:?} frame does not decode: {1}")]
    Body(Opcode, String),
}

impl From<FrameError> for FsError {
    fn from(e: FrameError) -> Self {
        FsError::new(Errno::EPROTO, e.to_string())
    }
}

impl Header {
    /// Onto the wire.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4] = FRAME_VERSION;
        out[5] = self.opcode as u8 | if self.reply { REPLY } else { 0 };
        out[6..8].copy_from_slice(&self.status.to_le_bytes());
        out[8..16].copy_from_slice(&self.request.to_le_bytes());
        out[16..20].copy_from_slice(&self.body_len.to_le_bytes());
        out[20..24].copy_from_slice(&self.payload_len.to_le_bytes());
        let crc = crc32c(&out[..28]);
        out[28..32].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// From the wire.
    ///
    /// # Errors
    /// A [`FrameError`]: close the connection.
    pub fn decode(raw: &[u8; HEADER_LEN]) -> Result<Header, FrameError> {
        let u32_at = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        if u32_at(0) != MAGIC {
            return Err(FrameError::Magic(u32_at(0)));
        }
        if u32_at(28) != crc32c(&raw[..28]) {
            return Err(FrameError::Checksum);
        }
        if raw[4] != FRAME_VERSION {
            return Err(FrameError::Version(raw[4]));
        }
        let opcode = Opcode::from_code(raw[5] & !REPLY).ok_or(FrameError::Opcode(raw[5]))?;
        let (body_len, payload_len) = (u32_at(16), u32_at(20));
        if body_len > BODY_MAX {
            return Err(FrameError::BodyTooLong(body_len));
        }
        if payload_len > PAYLOAD_MAX {
            return Err(FrameError::PayloadTooLong(payload_len));
        }
        Ok(Header {
            opcode,
            reply: raw[5] & REPLY != 0,
            status: u16::from_le_bytes([raw[6], raw[7]]),
            request: u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32,
            body_len,
            payload_len,
        })
    }
}

/// Header and body in one buffer, ready to be followed by `payload_len` bytes.
pub fn encode(opcode: Opcode, reply: bool, request: u64, body: &impl Message, payload_len: usize) -> Vec<u8> {
    frame(opcode, reply, 0, request, body, payload_len)
}

/// An answer that tells of a failure.
pub fn encode_error(opcode: Opcode, request: u64, error: &FsError) -> Vec<u8> {
    let body = pb::data::ErrorBody { message: error.message.clone() };
    frame(opcode, true, error.errno.code() as u16, request, &body, 0)
}

fn frame(
    opcode: Opcode,
    reply: bool,
    status: u16,
    request: u64,
    body: &impl Message,
    payload_len: usize,
) -> Vec<u8> {
    let body_len = body.encoded_len() as u32;
    let header = Header { opcode, reply, status, request, body_len, payload_len: payload_len as u32 };
    let mut out = Vec::with_capacity(HEADER_LEN + body_len as usize);
    out.extend(header.encode());
    body.encode_raw(&mut out);
    out
}

/// The body of a request or of a successful answer.
///
/// # Errors
/// [`FrameError::Body`]: close the connection.
pub fn decode_body<B: Message + Default>(opcode: Opcode, raw: &[u8]) -> Result<B, FrameError> {
    B::decode(raw).map_err(|e| FrameError::Body(opcode, e.to_string()))
}

/// The error that an answer with a non-zero status tells of.
pub fn decode_error(status: u16, raw: &[u8]) -> FsError {
    let message = pb::data::ErrorBody::decode(raw).map(|b| b.message).unwrap_or_default();
    FsError::new(Errno::from_code(status.into()), message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Header {
        Header {
            opcode: Opcode::PutShard,
            reply: true,
            status: 28,
            request: 1 << 40 | 3,
            body_len: 9,
            payload_len: 1 << 24,
        }
    }

    #[test]
    fn a_header_round_trips() {
        assert_eq!(Header::decode(&sample().encode()), Ok(sample()));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_refused(byte in 0..HEADER_LEN, bit in 0..8u8) {
            let mut raw = sample().encode();
            raw[byte] ^= 1 << bit;
            prop_assert!(Header::decode(&raw).is_err());
        }

        #[test]
        fn noise_never_panics(raw in proptest::collection::vec(any::<u8>(), HEADER_LEN)) {
            let raw: [u8; HEADER_LEN] = raw.try_into().unwrap();
            let _ = Header::decode(&raw);
            let _ = decode_body::<pb::data::PutShardRequest>(Opcode::PutShard, &raw);
        }
    }

    #[test]
    fn oversized_frames_are_refused() {
        let body = Header { body_len: BODY_MAX + 1, ..sample() };
        assert_eq!(Header::decode(&body.encode()), Err(FrameError::BodyTooLong(BODY_MAX + 1)));
        let payload = Header { payload_len: PAYLOAD_MAX + 1, ..sample() };
        assert_eq!(Header::decode(&payload.encode()), Err(FrameError::PayloadTooLong(PAYLOAD_MAX + 1)));
    }

    #[test]
    fn an_error_travels() {
        let e = FsError::new(Errno::ENOSPC, "target t3 (/flash/3) is full");
        let raw = encode_error(Opcode::PutShard, 5, &e);
        let header = Header::decode(raw[..HEADER_LEN].try_into().unwrap()).unwrap();
        assert_eq!((header.request, header.reply), (5, true));
        assert_eq!(decode_error(header.status, &raw[HEADER_LEN..]), e);
    }
}
