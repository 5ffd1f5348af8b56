//! What the fuzzer of `tests/fuzz` reaches.

use prost::Message;

use crate::{
    ClusterMap,
    crc32c::crc32c,
    frame::{HEADER_LEN, Header, Opcode, decode_body, decode_error},
    pb,
};

/// Reads bytes as a frame, as it comes from a socket, and as a map. Whatever they are, nothing panics. Half of the inputs get a right magic and
/// checksum, so that what lies behind is reached.
pub fn frame(input: &[u8]) {
    let Some((choice, raw)) = input.split_first() else { return };
    let Some((header, body)) = raw.split_first_chunk::<HEADER_LEN>() else { return };
    let mut header = *header;
    if choice & 1 == 1 {
        let sound =
            Header { opcode: Opcode::Stat, reply: false, status: 0, request: 0, body_len: 0, payload_len: 0 };
        header[..5].copy_from_slice(&sound.encode()[..5]);
        let crc = crc32c(&header[..28]);
        header[28..].copy_from_slice(&crc.to_le_bytes());
    }
    if let Ok(decoded) = Header::decode(&header) {
        // What is believed can be said again.
        assert_eq!(Header::decode(&decoded.encode()), Ok(decoded));
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
}

#[cfg(test)]
#[path = "../../tests/fuzz/inputs.rs"]
mod inputs;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::inputs::{corpus, like};

    #[test]
    fn the_corpus_is_read() {
        corpus("frame").iter().for_each(|input| super::frame(input));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20000))]
        #[test]
        fn what_is_like_it_is_read_or_refused(input in like(corpus("frame"))) {
            super::frame(&input);
        }
    }
}
