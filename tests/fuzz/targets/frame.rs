//! Frames, as they come from a socket. Half of the inputs get a right magic and checksum, so that what lies behind is reached.
#![no_main]

use fjordfs_proto::{
    ClusterMap,
    crc32c::crc32c,
    frame::{HEADER_LEN, Header, Opcode, decode_body, decode_error},
    pb,
};
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|input: &[u8]| {
    let Some((choice, raw)) = input.split_first() else { return };
    let Some((header, body)) = raw.split_first_chunk::<HEADER_LEN>() else { return };
    let mut header = *header;
    if choice & 1 == 1 {
        let sound = Header { opcode: Opcode::Stat, reply: false, status: 0, request: 0, body_len: 0, payload_len: 0 };
        header[..5].copy_from_slice(&sound.encode()[..5]);
        let crc = crc32c(&header[..28]);
        header[28..].copy_from_slice(&crc.to_le_bytes());
    }
    if let Ok(decoded) = Header::decode(&header) {
        // What is believed can be said again.
        assert_eq!(Header::decode(&decoded.encode()), Ok(decoded.clone()));
        let _ = decode_error(decoded.status, body);
        match decoded.opcode {
            Opcode::PutShard => drop(decode_body::<pb::data::PutShardRequest>(decoded.opcode, body)),
            Opcode::ReadShard => drop(decode_body::<pb::data::ReadShardRequest>(decoded.opcode, body)),
            Opcode::ListShards => drop(decode_body::<pb::data::ListShardsRequest>(decoded.opcode, body)),
            _ => drop(decode_body::<pb::data::ReadShardReply>(decoded.opcode, body)),
        }
    }
    if let Ok(map) = pb::common::ClusterMap::decode(body)
        && let Ok(map) = ClusterMap::from_pb(map)
    {
        assert_eq!(ClusterMap::from_pb(map.to_pb()), Ok(map));
    }
});
