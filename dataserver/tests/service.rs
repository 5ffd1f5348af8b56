//! The data server as its clients see it: shards in and out, restarts, damage, bad input.

#![allow(clippy::unwrap_used, reason = "a panic is the report of a test")]

mod common;

use std::{
    fs::OpenOptions,
    io::{Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use common::{Client, FakeMeta, bytes_of, config, put_request, start};
use fjordfs_dataserver::{Config, DataServer};
use fjordfs_proto::{
    BLOCK_SIZE_MAX, FsError, PAGE_SIZE, PROTOCOL_VERSION,
    block::{first_bad_page, page_crcs},
    error::Errno,
    frame::{self, BODY_MAX, HEADER_LEN, Header, Opcode},
    pb::data::*,
};

const WHOLE: &[(u32, u32)] = &[(0, u32::MAX)];

fn volumes(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(folder.join("volumes")).unwrap().map(|e| e.unwrap().path()).collect();
    found.sort();
    found
}

/// Where `needle` begins in the only volume.
fn find(folder: &Path, needle: &[u8]) -> (PathBuf, u64) {
    let path = volumes(folder).remove(0);
    let bytes = std::fs::read(&path).unwrap();
    let at = bytes.chunks(PAGE_SIZE).position(|page| page.starts_with(needle)).expect("not in the volume");
    (path, (at * PAGE_SIZE) as u64)
}

#[test]
fn shards_go_in_and_come_out() {
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let server = start(&meta, dir.path());
    let mut client = Client::connect(&server, "c1");
    let sizes = [1, 4095, 4096, 4097, 100_000, 5 << 20, BLOCK_SIZE_MAX];
    for (block, size) in (1..).zip(sizes) {
        client.put(block, &bytes_of(block, size)).unwrap();
        // A repeated put is no error; other bytes under the same name are.
        client.put(block, &bytes_of(block, size)).unwrap();
        assert_eq!(client.put(block, &bytes_of(block + 1, size)).unwrap_err().errno, Errno::EEXIST);
    }
    for (block, size) in (1..).zip(sizes) {
        let (reply, payload) = client.read(block, WHOLE).unwrap();
        let data = bytes_of(block, size);
        assert!(payload == data, "block {block}");
        assert_eq!((reply.shard_length as usize, reply.lengths), (size, vec![size as u32]));
        assert_eq!(reply.page_crcs, page_crcs(&data));
    }
    // Ranges: cut to whole pages or the shard's end, each with its checksums.
    let data = bytes_of(6, 5 << 20);
    let (reply, payload) =
        client.read(6, &[(8192, 5000), ((5 << 20) - 4096, 9999), (4 << 20, 4096), (1 << 30, 1)]).unwrap();
    assert_eq!(reply.lengths, [4096, 4096, 4096, 0]);
    let wanted = [&data[8192..12288], &data[(5 << 20) - 4096..], &data[4 << 20..(4 << 20) + 4096]].concat();
    assert!(payload == wanted);
    assert_eq!(first_bad_page(&payload, &reply.page_crcs), None);
    assert_eq!(client.read(6, &[(1, 4096)]).unwrap_err().errno, Errno::EINVAL);
    assert_eq!(client.read(99, WHOLE).unwrap_err().errno, Errno::ENOENT);

    client.sync();
    assert_eq!(client.list(), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(client.delete(&[2, 7, 1000]), 2);
    assert_eq!(client.read(7, WHOLE).unwrap_err().errno, Errno::ENOENT);
    assert_eq!(client.list(), [1, 3, 4, 5, 6]);
    let stat = client.stat();
    assert_eq!((stat.target, stat.shards, stat.puts), (1, 5, 7));
    assert_eq!(stat.shard_bytes, 1 + 4096 + 4097 + 100_000 + (5 << 20));
    assert!(stat.capacity > stat.free && stat.free > 0 && stat.reads >= 7, "{stat:?}");
    server.stop().unwrap();
}

#[test]
fn requests_are_pipelined_and_every_one_is_answered() {
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let server = start(&meta, dir.path());
    let mut client = Client::connect(&server, "c1");
    let mut waiting = std::collections::BTreeSet::new();
    for block in 1..=500 {
        let data = bytes_of(block, 3000 + block as usize * 7);
        waiting.insert(client.send(Opcode::PutShard, &put_request(block, &data), &data));
    }
    while !waiting.is_empty() {
        let reply = client.receive().unwrap();
        reply.result::<PutShardReply>().unwrap();
        assert!(waiting.remove(&reply.header.request));
    }
    // Several connections at once, each with many reads in flight.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut client = Client::connect(&server, "c1");
                let ranges = vec![Range { offset: 0, length: 1 << 20 }];
                let body = |block| ReadShardRequest {
                    target: 1,
                    block,
                    shard: 0,
                    ranges: ranges.clone(),
                    integrity: true,
                };
                let first = client.send(Opcode::ReadShard, &body(1), &[]);
                for block in 2..=300 {
                    client.send(Opcode::ReadShard, &body(block), &[]);
                }
                for _ in 1..=300 {
                    let reply = client.receive().unwrap();
                    let block = reply.header.request - first + 1;
                    assert!(reply.payload == bytes_of(block, 3000 + block as usize * 7));
                }
            });
        }
    });
    server.stop().unwrap();
}

#[test]
fn everything_is_there_after_a_restart() {
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    for round in 0..3u64 {
        let server = start(&meta, dir.path());
        let mut client = Client::connect(&server, "c1");
        let kept: Vec<u64> = (0..round).flat_map(|r| [10 * r + 2, 10 * r + 3]).collect();
        assert_eq!(client.list(), kept);
        for block in kept {
            assert!(client.read(block, WHOLE).unwrap().1 == bytes_of(block, 50_000));
        }
        (1..=3).for_each(|i| client.put(10 * round + i, &bytes_of(10 * round + i, 50_000)).unwrap());
        client.delete(&[10 * round + 1]);
        drop(client);
        server.stop().unwrap();
        if round == 1 {
            std::fs::remove_file(dir.path().join("index.checkpoint")).unwrap();
        }
    }
    assert_eq!(volumes(dir.path()).len(), 1);
}

#[test]
fn a_rotten_page_is_seen_by_its_checksum_and_only_that_page() {
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let server = start(&meta, dir.path());
    let mut client = Client::connect(&server, "c1");
    let data = bytes_of(1, 5 * PAGE_SIZE);
    client.put(1, &data).unwrap();
    server.stop().unwrap();
    let (path, at) = find(dir.path(), &data[..PAGE_SIZE]);
    let volume = OpenOptions::new().write(true).open(path).unwrap();
    volume.write_all_at(b"rot", at + 2 * PAGE_SIZE as u64 + 77).unwrap();
    drop(volume);

    let server = start(&meta, dir.path());
    let mut client = Client::connect(&server, "c1");
    let (reply, payload) = client.read(1, WHOLE).unwrap();
    assert_eq!(first_bad_page(&payload, &reply.page_crcs), Some(2));
    let (reply, payload) = client.read(1, &[(3 * PAGE_SIZE as u32, u32::MAX)]).unwrap();
    assert_eq!(first_bad_page(&payload, &reply.page_crcs), None);
}

#[test]
fn a_truncated_volume_costs_only_its_end() {
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let server = start(&meta, dir.path());
    let mut client = Client::connect(&server, "c1");
    (1..=3).for_each(|block| client.put(block, &bytes_of(block, 100_000)).unwrap());
    server.stop().unwrap();
    let (path, at) = find(dir.path(), &bytes_of(2, PAGE_SIZE));
    OpenOptions::new().write(true).open(path).unwrap().set_len(at + 5000).unwrap();

    let server = start(&meta, dir.path());
    let mut client = Client::connect(&server, "c1");
    assert_eq!(client.list(), [1]);
    assert!(client.read(1, WHOLE).unwrap().1 == bytes_of(1, 100_000));
    client.put(4, b"there is life afterwards").unwrap();
    client.sync();
    server.stop().unwrap();
    let server = start(&meta, dir.path());
    assert_eq!(Client::connect(&server, "c1").list(), [1, 4]);
}

#[test]
fn a_full_target_refuses_and_keeps_what_it_has() {
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let small = Config { capacity_max: Some(10 << 20), ..config(&meta, dir.path()) };
    let server = DataServer::start(small).unwrap();
    let mut client = Client::connect(&server, "c1");
    let full = (1..).find_map(|block| client.put(block, &bytes_of(block, 1 << 20)).err().map(|e| (block, e)));
    let (block, e) = full.unwrap();
    assert_eq!((block, e.errno), (10, Errno::ENOSPC));
    assert!(e.message.contains("is full") && e.message.contains(&dir.path().display().to_string()), "{e}");
    assert!(client.stat().free < 1 << 20);
    client.sync();
    for block in 1..10 {
        assert!(client.read(block, WHOLE).unwrap().1 == bytes_of(block, 1 << 20));
    }
    client.delete(&[3]);
    client.put(11, &bytes_of(11, 1 << 20)).unwrap();
}

#[test]
fn damaged_or_senseless_requests_are_refused_one_by_one() {
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let server = start(&meta, dir.path());
    let mut client = Client::connect(&server, "c1");
    let data = bytes_of(1, 3 * PAGE_SIZE);
    let mut damaged = data.clone();
    damaged[2 * PAGE_SIZE] ^= 1;
    let put = |client: &mut Client, request: &PutShardRequest, data: &[u8]| {
        client.call::<PutShardReply>(Opcode::PutShard, request, data).0.unwrap_err()
    };
    let good = put_request(1, &data);
    let e = put(&mut client, &good, &damaged);
    assert_eq!(e.errno, Errno::EBADMSG);
    assert!(e.message.contains("b1") && e.message.contains("page 2"), "{e}");
    assert_eq!(put(&mut client, &PutShardRequest { target: 9, ..good.clone() }, &data).errno, Errno::ENODEV);
    assert_eq!(put(&mut client, &PutShardRequest { policy: 99, ..good.clone() }, &data).errno, Errno::EINVAL);
    assert_eq!(put(&mut client, &good, &data[1..]).errno, Errno::EINVAL);
    // The connection has kept its place in the stream all along.
    client.put(1, &data).unwrap();
    assert_eq!(client.stat().bad_pages, 1);
}

#[test]
fn who_does_not_speak_the_protocol_is_shown_out() {
    let (meta, dir) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
    let server = start(&meta, dir.path());
    let header = |opcode, body_len, payload_len| {
        Header { opcode, reply: false, status: 0, request: 5, body_len, payload_len }.encode()
    };

    let e = Client::raw(server.address()).hello(PROTOCOL_VERSION, "c2").unwrap_err();
    assert!(e.message.contains("cluster c1") && e.message.contains("'c2'"), "{e}");
    let e = Client::raw(server.address()).hello(PROTOCOL_VERSION + 1, "c1").unwrap_err();
    assert!(e.errno == Errno::EPROTO && e.message.contains("version"), "{e}");

    // No Hello.
    let mut client = Client::raw(server.address());
    client.send(Opcode::Stat, &StatRequest {}, &[]);
    assert_eq!(client.receive().unwrap().result::<StatReply>().unwrap_err().errno, Errno::EPROTO);
    assert!(client.receive().is_none());

    // A corrupt header, after a good request that is still answered.
    let mut client = Client::connect(&server, "c1");
    let mut raw = header(Opcode::Stat, 0, 0);
    raw[16] ^= 1;
    client.send(Opcode::Stat, &StatRequest {}, &[]);
    client.socket.write_all(&raw).unwrap();
    let mut answers: Vec<_> =
        std::iter::from_fn(|| client.receive()).map(|r| r.result::<StatReply>()).collect();
    answers.sort_by_key(Result::is_err);
    assert!(answers.len() == 2 && answers[0].is_ok());
    assert!(answers[1].as_ref().unwrap_err().message.contains("checksum"), "{answers:?}");

    // Oversized, with more behind it; the answer carries the request's id.
    let mut client = Client::connect(&server, "c1");
    client.socket.write_all(&header(Opcode::PutShard, 0, BLOCK_SIZE_MAX as u32 + 1)).unwrap();
    client.socket.write_all(&vec![7; 1 << 20]).unwrap();
    let reply = client.receive().unwrap();
    assert_eq!(reply.header.request, 5);
    assert!(reply.result::<PutShardReply>().unwrap_err().message.contains("at most"));
    assert!(client.receive().is_none());
    let mut client = Client::connect(&server, "c1");
    client.socket.write_all(&header(Opcode::Stat, BODY_MAX + 1, 0)).unwrap();
    assert!(client.receive().unwrap().result::<StatReply>().unwrap_err().message.contains("body"));

    // A body that is none, a payload where none belongs, a second Hello, an answer.
    let bad = [
        (header(Opcode::ReadShard, 4, 0), vec![0xff; 4]),
        (header(Opcode::PutShard, 4, 4), vec![0xff; 8]),
        (header(Opcode::Stat, 0, 4), vec![0; 4]),
        (header(Opcode::Hello, 0, 0), vec![]),
    ];
    for (raw, rest) in bad {
        let mut client = Client::connect(&server, "c1");
        client.socket.write_all(&[&raw[..], &rest].concat()).unwrap();
        assert_eq!(client.receive().unwrap().result::<StatReply>().unwrap_err().errno, Errno::EPROTO);
    }

    // Noise, silence, and half a frame.
    let mut noise = Client::raw(server.address());
    noise.socket.write_all(&bytes_of(3, 100_000)).ok();
    assert!(noise.receive().is_none());
    let mut half = Client::connect(&server, "c1");
    half.socket.write_all(&header(Opcode::PutShard, 100, 100)[..HEADER_LEN - 5]).unwrap();
    drop(half);

    Client::connect(&server, "c1").put(1, b"still at your service").unwrap();
    server.stop().unwrap();
}

#[test]
fn clients_on_this_host_come_over_a_unix_socket_and_others_when_its_name_is_taken() {
    use std::os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    };
    let hello = |cluster: &str| {
        let name = frame::local_name(cluster, fjordfs_proto::ServerId(1));
        let mut socket = UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?)?;
        let hello = HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            cluster_id: cluster.into(),
            client: "test".into(),
            ..Default::default()
        };
        socket.write_all(&frame::encode(Opcode::Hello, false, 9, &hello, 0))?;
        let mut head = [0; HEADER_LEN];
        socket.read_exact(&mut head)?;
        let header = Header::decode(&head).unwrap();
        let mut body = vec![0; header.body_len as usize];
        socket.read_exact(&mut body)?;
        Ok::<_, std::io::Error>(frame::decode_body::<HelloReply>(Opcode::Hello, &body).unwrap())
    };
    let cluster = format!("local-{}", std::process::id());
    let (meta, dir) = (FakeMeta::start(&cluster), tempfile::tempdir().unwrap());
    let server = start(&meta, dir.path());
    let greeting = hello(&cluster).unwrap();
    assert_eq!((greeting.server, greeting.cluster_id, greeting.targets), (1, cluster.clone(), vec![1]));
    server.stop().unwrap();
    // Stopped, it has let go of the name.
    let name = frame::local_name(&cluster, fjordfs_proto::ServerId(1));
    let taken = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap();
    let server = start(&meta, dir.path());
    let mut client = Client::connect(&server, &cluster);
    client.put(1, &bytes_of(1, 5000)).unwrap();
    assert_eq!(client.read(1, WHOLE).unwrap().1, bytes_of(1, 5000));
    drop(taken);
}

/// One request over a connection that reads and writes.
fn call<B: prost::Message + Default>(
    socket: &mut (impl Read + Write),
    opcode: Opcode,
    body: &impl prost::Message,
) -> Result<B, FsError> {
    socket.write_all(&frame::encode(opcode, false, 9, body, 0)).unwrap();
    let mut head = [0; HEADER_LEN];
    socket.read_exact(&mut head).unwrap();
    let header = Header::decode(&head).unwrap();
    let mut body = vec![0; header.body_len as usize];
    socket.read_exact(&mut body).unwrap();
    match header.status {
        0 => Ok(frame::decode_body(opcode, &body).unwrap()),
        status => Err(frame::decode_error(status, &body)),
    }
}

#[test]
fn what_is_put_is_read_from_the_memory_of_clients_on_this_host() {
    use std::os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixStream},
    };
    let cluster = format!("lent-{}", std::process::id());
    let (meta, dir) = (FakeMeta::start(&cluster), tempfile::tempdir().unwrap());
    let server = start(&meta, dir.path());
    let here = |bytes: &[u8]| MemoryPiece {
        address: bytes.as_ptr().expose_provenance() as u64,
        length: bytes.len() as u32,
    };
    let secret = *b"0123456789abcdef";
    let hello = HelloRequest {
        protocol_version: PROTOCOL_VERSION,
        cluster_id: cluster.clone(),
        probe: Some(MemoryProbe { address: here(&secret).address, content: secret.to_vec().into() }),
        ..Default::default()
    };
    let name = frame::local_name(&cluster, fjordfs_proto::ServerId(1));
    let mut local = UnixStream::connect_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap();
    assert!(call::<HelloReply>(&mut local, Opcode::Hello, &hello).unwrap().reads_memory);
    let bytes = bytes_of(1, 5_000_000);
    let cut = [0, 1, 4097, 3_000_000, bytes.len()];
    let memory: Vec<_> = cut.windows(2).map(|cut| here(&bytes[cut[0]..cut[1]])).collect();
    let put = PutShardRequest { memory, ..put_request(1, &bytes) };
    call::<PutShardReply>(&mut local, Opcode::PutShard, &put).unwrap();
    let mut client = Client::connect(&server, &cluster);
    assert!(client.read(1, WHOLE).unwrap().1 == bytes);

    let refused = |socket: &mut UnixStream, put: PutShardRequest| {
        call::<PutShardReply>(socket, Opcode::PutShard, &put).unwrap_err().errno
    };
    let nowhere = MemoryPiece { address: 4096, length: bytes.len() as u32 };
    let of_block = |block, memory| PutShardRequest { memory, ..put_request(block, &bytes) };
    assert_eq!(refused(&mut local, of_block(2, vec![nowhere])), Errno::EFAULT);
    let mut others = bytes.clone();
    others[4_000_000] ^= 1;
    assert_eq!(refused(&mut local, of_block(2, vec![here(&others)])), Errno::EBADMSG);
    assert_eq!(refused(&mut local, of_block(2, vec![here(&bytes), here(&bytes)])), Errno::EINVAL);
    assert_eq!(client.read(2, WHOLE).unwrap_err().errno, Errno::ENOENT);
    call::<PutShardReply>(&mut local, Opcode::PutShard, &of_block(2, vec![here(&bytes)])).unwrap();

    // Over TCP nobody knows whose memory it would be.
    let mut remote = Client::raw(server.address()).socket;
    assert!(!call::<HelloReply>(&mut remote, Opcode::Hello, &hello).unwrap().reads_memory);
    let put = of_block(3, vec![here(&bytes)]);
    assert_eq!(call::<PutShardReply>(&mut remote, Opcode::PutShard, &put).unwrap_err().errno, Errno::EFAULT);
    server.stop().unwrap();
}
