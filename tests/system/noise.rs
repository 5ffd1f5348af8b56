//! Wrong input from the network: both servers refuse it, say so in their log, and go on.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::fs;

use fjordfs_proto::{
    META_MESSAGE_MAX, PROTOCOL_VERSION,
    block::page_crcs,
    frame::{self, BODY_MAX, Header, Opcode, PAYLOAD_MAX},
    pb::{data, meta},
};
use fjordfs_tests::{Cluster, Setup, fault, rng, wait::SOON};
use rand::Rng;

fn setup() -> Setup {
    Setup { servers: 1, policy: "replica:1".into(), ..Setup::default() }
}

fn hello(cluster_id: &str) -> Vec<u8> {
    let body = data::HelloRequest {
        protocol_version: PROTOCOL_VERSION,
        cluster_id: cluster_id.into(),
        client: "a test".into(),
        upkeep: false,
        probe: None,
    };
    frame::encode(Opcode::Hello, false, 1, &body, 0)
}

fn header(opcode: Opcode, body_len: u32, payload_len: u32) -> Vec<u8> {
    Header { opcode, reply: false, status: 0, request: 7, body_len, payload_len }.encode().to_vec()
}

/// Answers in a byte stream: their headers and what follows each.
fn answers(mut raw: &[u8]) -> Vec<(Header, Vec<u8>)> {
    let mut found = Vec::new();
    while raw.len() >= frame::HEADER_LEN {
        let (head, rest) = raw.split_at(frame::HEADER_LEN);
        let Ok(header) = Header::decode(head.try_into().expect("32 bytes")) else { break };
        let len = (header.body_len + header.payload_len) as usize;
        if rest.len() < len {
            break;
        }
        found.push((header, rest[..len].to_vec()));
        raw = &rest[len..];
    }
    found
}

#[test]
fn a_data_server_survives_every_kind_of_noise() {
    let seed = rng::seed("data_noise");
    let mut random = rng::stream(seed, 0);
    let mut cluster = Cluster::start("data-noise", setup());
    let (address, id) =
        (cluster.data_address(0), cluster.status().0["cluster_id"].as_str().unwrap().to_owned());
    let target = cluster.status().list("targets")[0]["id"].as_u64().unwrap();
    let greeting = hello(&id);
    let mut corrupt = greeting.clone();
    corrupt[17] ^= 4;
    let with_hello = |rest: &[u8]| [greeting.as_slice(), rest].concat();
    let noise: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", vec![]),
        ("half a header", greeting[..13].to_vec()),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("random bytes", rng::bytes(seed, 100_000)),
        ("a corrupt header", corrupt),
        ("a request before hello", header(Opcode::Stat, 0, 0)),
        ("an oversized body", with_hello(&header(Opcode::Stat, BODY_MAX + 1, 0))),
        ("an oversized payload", with_hello(&header(Opcode::PutShard, 0, PAYLOAD_MAX + 1))),
        ("the largest lengths", with_hello(&header(Opcode::PutShard, u32::MAX, u32::MAX))),
        (
            "a body that does not decode",
            with_hello(&[header(Opcode::ReadShard, 40, 0), vec![0xFF; 40]].concat()),
        ),
        (
            "an answer nobody asked for",
            with_hello(&{ frame::encode(Opcode::Stat, true, 9, &data::StatReply::default(), 0) }),
        ),
        ("a frame that ends too soon", with_hello(&header(Opcode::PutShard, 100, 1 << 20))),
        ("another cluster's hello", hello("another-cluster")),
    ];
    for (what, bytes) in &noise {
        let got = answers(&fault::send_noise(&address, bytes));
        eprintln!("{what}: {:?}", got.iter().map(|(h, _)| (h.opcode, h.status)).collect::<Vec<_>>());
        cluster.assert_running();
    }
    let wrong_cluster = answers(&fault::send_noise(&address, &hello("another-cluster")));
    assert!(wrong_cluster.iter().all(|(h, _)| h.status != 0), "a client of another cluster must be refused");
    // Well-formed requests that ask for nonsense are answered with an error, and the connection goes on.
    let payload = rng::bytes(seed, 5000);
    let put = |target, length, crcs: Vec<u8>, bytes: &[u8]| {
        let page_crcs = crcs.into();
        let body = data::PutShardRequest {
            target,
            block: 1 << 40,
            shard: 0,
            policy: 1,
            length,
            page_crcs,
            ..Default::default()
        };
        [frame::encode(Opcode::PutShard, false, 2, &body, bytes.len()), bytes.to_vec()].concat()
    };
    let crcs = page_crcs(&payload);
    let mut bad_crcs = crcs.clone();
    bad_crcs[0] ^= 1;
    let read = |target, block, offset, length| {
        let ranges = vec![data::Range { offset, length }];
        let body = data::ReadShardRequest { target, block, shard: 0, ranges, integrity: true };
        frame::encode(Opcode::ReadShard, false, 3, &body, 0)
    };
    for (what, request) in [
        ("an unknown target", put(999_999, 5000, crcs.clone(), &payload)),
        ("a length that is not the payload's", put(target, 4000, crcs.clone(), &payload)),
        ("checksums of other bytes", put(target, 5000, bad_crcs, &payload)),
        ("too few checksums", put(target, 5000, crcs[..4].to_vec(), &payload)),
        ("an empty shard", put(target, 0, vec![], &[])),
        ("an unknown block", read(target, 77 << 40, 0, 4096)),
        ("a range beyond any block", read(target, 77 << 40, u32::MAX - 4095, u32::MAX)),
        ("a read of an unknown target", read(12345, 1, 0, 4096)),
    ] {
        let stat = frame::encode(Opcode::Stat, false, 8, &data::StatRequest {}, 0);
        let got = answers(&fault::send_noise(&address, &with_hello(&[request, stat].concat())));
        let statuses: Vec<_> = got.iter().map(|(h, _)| (h.opcode, h.status)).collect();
        let refused = got
            .iter()
            .any(|(h, _)| matches!(h.opcode, Opcode::PutShard | Opcode::ReadShard) && h.status != 0);
        assert!(refused, "{what} was not refused: {statuses:?}");
        let goes_on = got.iter().any(|(h, _)| h.opcode == Opcode::Stat && h.status == 0);
        assert!(goes_on, "the connection was given up after {what}: {statuses:?}");
    }
    for _ in 0..30 {
        let mut bytes = with_hello(&put(target, 5000, crcs.clone(), &payload));
        let at = random.random_range(greeting.len()..bytes.len());
        bytes[at] ^= 1 << random.random_range(0..8);
        fault::send_noise_quick(&address, &bytes);
    }
    cluster.assert_running();
    let log = cluster.data(0).log();
    assert!(log.contains("magic") || log.contains("frame"), "the log tells of no bad frame:\n{log}");
    works(&cluster);
}

#[test]
fn a_metaserver_survives_every_kind_of_noise() {
    let seed = rng::seed("meta_noise");
    let mut cluster = Cluster::start("meta-noise", setup());
    let address = cluster.meta_address();
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let huge_frame = [0xFF, 0xFF, 0xFF, 0, 0, 0, 0, 0, 1];
    for (what, bytes) in [
        ("nothing", vec![]),
        ("HTTP/1", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("random bytes", rng::bytes(seed, 100_000)),
        ("a preface and random bytes", [preface.clone(), rng::bytes(seed + 1, 10_000)].concat()),
        (
            "an oversized HTTP/2 frame",
            [preface.as_slice(), &huge_frame, &rng::bytes(seed + 2, 100_000)].concat(),
        ),
        ("a data frame", hello("x")),
    ] {
        fault::send_noise_quick(&address, &bytes);
        eprintln!("{what}: survived");
        cluster.assert_running();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for (what, message, expected) in [
        ("no hello", meta::ClientMessage::default(), "hello"),
        ("an unknown version", greeting(meta::Hello { protocol_version: 999, ..good_hello() }), "version"),
        (
            "another cluster",
            greeting(meta::Hello { cluster_id: "another".into(), ..good_hello() }),
            "cluster",
        ),
        ("an oversized message", oversized(), ""),
    ] {
        let refusal = runtime.block_on(attach(&address, message));
        let said = refusal.expect_err(what).to_string().to_lowercase();
        assert!(said.contains(expected), "{what}: '{said}' does not mention '{expected}'");
        cluster.assert_running();
    }
    works(&cluster);
}

fn good_hello() -> meta::Hello {
    meta::Hello { protocol_version: PROTOCOL_VERSION, client: "a test".into(), ..Default::default() }
}

fn greeting(hello: meta::Hello) -> meta::ClientMessage {
    meta::ClientMessage { hello: Some(hello), ..Default::default() }
}

/// One request larger than any message may be.
fn oversized() -> meta::ClientMessage {
    let lookup = meta::Lookup {
        parent: 1,
        name: vec![b'x'; META_MESSAGE_MAX + (1 << 20)].into(),
        ..meta::Lookup::default()
    };
    let request = meta::Request { id: 1, op: Some(meta::request::Op::Lookup(lookup)), ..Default::default() };
    meta::ClientMessage { hello: Some(good_hello()), requests: vec![request], ..Default::default() }
}

/// Sends one message on a new stream and takes the first answer.
async fn attach(address: &str, message: meta::ClientMessage) -> Result<meta::ServerMessage, tonic::Status> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).expect("address");
    let channel = endpoint.connect().await.expect("the metaserver listens");
    let mut client = meta::meta_client::MetaClient::new(channel)
        .max_encoding_message_size(usize::MAX)
        .max_decoding_message_size(usize::MAX);
    let bounded = tokio::time::timeout(SOON, async {
        let (to, outgoing) = tokio::sync::mpsc::channel(1);
        to.send(message).await.expect("channel");
        let stream = tokio_stream::wrappers::ReceiverStream::new(outgoing);
        let mut answers = client.attach(stream).await?.into_inner();
        let first = answers.message().await?;
        drop(to);
        first.ok_or_else(|| tonic::Status::aborted("the stream ended without hello's answer"))
    });
    bounded.await.expect("the metaserver answers or refuses")
}

/// What the mount can do after all that.
fn works(cluster: &Cluster) {
    let mount = cluster.mount();
    let content = rng::bytes(1, 2 << 20);
    fs::write(mount.join("after"), &content).unwrap();
    mount.unmount();
    let mount = cluster.mount();
    assert!(fs::read(mount.join("after")).unwrap() == content);
    mount.unmount();
}
