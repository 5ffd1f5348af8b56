//! A data server that a test plays: what it lists and gives, and when, is up to the test.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
};

use fjordfs_proto::{
    block::page_crcs,
    frame::{self, HEADER_LEN, Header, Opcode},
    pb::data::*,
};
use prost::Message;

/// What the peer is asked.
pub enum Asked {
    List(ListShardsRequest),
    Read(ReadShardRequest),
}

/// What it answers.
pub enum Said {
    List(ListShardsReply),
    /// A whole shard.
    Shard(Vec<u8>),
    /// Never anything.
    Nothing,
}

/// Listens until the program ends. `answer` may block: each connection has a thread of its own.
pub fn start(answer: impl Fn(Asked) -> Said + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, answer) = (listener.local_addr().unwrap(), Arc::new(answer));
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let answer = answer.clone();
            std::thread::spawn(move || {
                // The other side hangs up when it gives a check up.
                let _ = serve(socket.unwrap(), &*answer);
            });
        }
    });
    address
}

fn serve(mut socket: TcpStream, answer: &impl Fn(Asked) -> Said) -> io::Result<()> {
    loop {
        let mut raw = [0; HEADER_LEN];
        socket.read_exact(&mut raw)?;
        let header = Header::decode(&raw).unwrap();
        let mut body = vec![0; header.body_len as usize];
        socket.read_exact(&mut body)?;
        let said = match header.opcode {
            Opcode::Hello => {
                socket.write_all(&reply(&header, &HelloReply::default(), &[]))?;
                continue;
            }
            Opcode::ListShards => answer(Asked::List(Message::decode(&*body).unwrap())),
            Opcode::ReadShard => answer(Asked::Read(Message::decode(&*body).unwrap())),
            other => panic!("{other:?} is not expected of a peer"),
        };
        match said {
            Said::List(list) => socket.write_all(&reply(&header, &list, &[]))?,
            Said::Shard(bytes) => {
                let length = bytes.len() as u32;
                let told = ReadShardReply {
                    lengths: vec![length],
                    page_crcs: page_crcs(&bytes).into(),
                    shard_length: length,
                };
                socket.write_all(&reply(&header, &told, &bytes))?;
            }
            Said::Nothing => {}
        }
    }
}

fn reply(header: &Header, body: &impl Message, payload: &[u8]) -> Vec<u8> {
    let mut frame = frame::encode(header.opcode, true, header.request, body, payload.len());
    frame.extend(payload);
    frame
}
