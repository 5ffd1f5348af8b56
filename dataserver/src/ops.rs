//! The operations of the data protocol, one file each. A connection decodes frames and calls these; what they return is
//! sent back by it.

mod delete_shards;
mod list_shards;
mod locate_shard;
pub(crate) mod put_shard;
pub(crate) mod read_shard;
mod report_shard;
mod stat;
mod sync;

use std::ops::Range;

use fjordfs_proto::{
    BlockId, FsError, FsResult, ShardNo,
    error::Errno,
    frame::{self, Header, Opcode},
};
use prost::Message;
use tokio::sync::OwnedSemaphorePermit;

use crate::{buffer::PageBuf, connection::Answer, node::Node};

/// A successful answer: the encoded body, and the payload where it lies.
pub(crate) struct Output {
    body: Vec<u8>,
    payload: Vec<(PageBuf, Range<usize>)>,
}

impl Output {
    fn with_payload(body: &impl Message, payload: Vec<(PageBuf, Range<usize>)>) -> Output {
        Output { body: body.encode_to_vec(), payload }
    }
}

impl<M: Message> From<M> for Output {
    fn from(body: M) -> Output {
        Output::with_payload(&body, Vec::new())
    }
}

/// Runs any operation that has no payload of its own.
pub(crate) async fn run(node: &Node, header: &Header, body: &[u8]) -> FsResult<Output> {
    let opcode = header.opcode;
    match opcode {
        Opcode::ReadShard => read_shard::run(node, &frame::decode_body(opcode, body)?).await,
        Opcode::DeleteShards => {
            Ok(delete_shards::run(node, &frame::decode_body(opcode, body)?).await?.into())
        }
        Opcode::ListShards => Ok(list_shards::run(node, &frame::decode_body(opcode, body)?).await?.into()),
        Opcode::LocateShard => Ok(locate_shard::run(node, &frame::decode_body(opcode, body)?).await?.into()),
        Opcode::ReportShard => Ok(report_shard::run(node, &frame::decode_body(opcode, body)?)?.into()),
        Opcode::Sync => Ok(sync::run(node, &frame::decode_body(opcode, body)?).await?.into()),
        Opcode::Stat => Ok(stat::run(node)?.into()),
        Opcode::Hello | Opcode::PutShard => {
            Err(FsError::new(Errno::EPROTO, format!("{opcode:?} is not expected here")))
        }
    }
}

/// The frame that answers a request. `permit` is held until it has been sent.
pub(crate) fn answer(header: &Header, result: FsResult<Output>, permit: OwnedSemaphorePermit) -> Answer {
    match result {
        Err(e) => Answer::new(frame::encode_error(header.opcode, header.request, &e), Some(permit)),
        Ok(output) => {
            let payload_len: usize = output.payload.iter().map(|(_, range)| range.len()).sum();
            let head = Header {
                opcode: header.opcode,
                reply: true,
                status: 0,
                request: header.request,
                body_len: output.body.len() as u32,
                payload_len: payload_len as u32,
            };
            let mut bytes = head.encode().to_vec();
            bytes.extend(output.body);
            Answer::new(bytes, Some(permit)).with_payload(output.payload)
        }
    }
}

fn shard_no(shard: u32) -> FsResult<ShardNo> {
    let no = u8::try_from(shard)
        .map_err(|_| FsError::new(Errno::EINVAL, format!("shard {shard} of a block: at most 255")))?;
    Ok(ShardNo(no))
}

fn block_ids(blocks: &[u64]) -> Vec<BlockId> {
    blocks.iter().copied().map(BlockId).collect()
}
