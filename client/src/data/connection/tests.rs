//! Connections to a server in this process that says hello and answers reads with what they asked for.

use std::{
    io::{Read, Write},
    net::TcpListener,
    os::{linux::net::SocketAddrExt, unix::net::UnixListener},
    task::Poll,
};

use fjordfs_proto::{
    frame::{HEADER_LEN, Header, local_name},
    pb::data::{Range, ReadShardReply, ReadShardRequest},
};

use super::*;

/// Answers one client after the other, each on a thread.
fn serve<S: Read + Write + Send + 'static>(
    incoming: impl Iterator<Item = S> + Send + 'static,
    hello: HelloReply,
) {
    std::thread::spawn(move || {
        for mut stream in incoming {
            let hello = hello.clone();
            std::thread::spawn(move || while answer(&mut stream, &hello).is_ok() {});
        }
    });
}

/// A payload that says where it is from.
fn bytes(range: &Range) -> Vec<u8> {
    (range.offset..range.offset + range.length).map(|i| (i / 7) as u8).collect()
}

fn answer(stream: &mut (impl Read + Write), hello: &HelloReply) -> io::Result<()> {
    let mut head = [0; HEADER_LEN];
    stream.read_exact(&mut head)?;
    let header = Header::decode(&head).unwrap();
    let mut body = vec![0; header.body_len as usize];
    stream.read_exact(&mut body)?;
    let mut payload = vec![0; header.payload_len as usize];
    stream.read_exact(&mut payload)?;
    match header.opcode {
        Opcode::Hello => stream.write_all(&frame::encode(header.opcode, true, header.request, hello, 0)),
        Opcode::PutShard => {
            let told = ReadShardReply {
                shard_length: payload.iter().map(|b| u32::from(*b)).sum(),
                ..Default::default()
            };
            stream.write_all(&frame::encode(header.opcode, true, header.request, &told, 0))
        }
        _ => {
            let request: ReadShardRequest = frame::decode_body(header.opcode, &body).unwrap();
            let payload = bytes(&request.ranges[0]);
            let reply = ReadShardReply::default();
            stream.write_all(&frame::encode(header.opcode, true, header.request, &reply, payload.len()))?;
            stream.write_all(&payload)
        }
    }
}

fn read(offset: u32, length: u32) -> ReadShardRequest {
    ReadShardRequest { ranges: vec![Range { offset, length }], ..Default::default() }
}

/// Server 7 of a cluster over TCP, and who listens under its local name.
fn servers(cluster: &str, local: Option<HelloReply>) -> Peer {
    let cluster_id = format!("{cluster}-{}", std::process::id());
    let genuine = HelloReply { server: 7, cluster_id: cluster_id.clone(), ..Default::default() };
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap().to_string();
    let tcp = std::iter::from_fn(move || tcp.accept().ok().map(|(stream, _)| stream));
    serve(tcp, genuine.clone());
    if let Some(hello) = local {
        let name = local_name(&cluster_id, ServerId(7));
        let name = std::os::unix::net::SocketAddr::from_abstract_name(name).unwrap();
        let unix = UnixListener::bind_addr(&name).unwrap();
        let hello = if hello.server == 7 { genuine } else { hello };
        serve(std::iter::from_fn(move || unix.accept().ok().map(|(stream, _)| stream)), hello);
    }
    Peer {
        server: ServerId(7),
        address,
        cluster_id,
        client: "test".into(),
        local: true,
        lends: true,
        network: None,
    }
}

async fn open(engine: &Engine, peer: &Peer) -> Arc<Connection> {
    Connection::open(engine, peer, &Pool::new(0, 64 << 20)).await.unwrap()
}

fn genuine() -> Option<HelloReply> {
    Some(HelloReply { server: 7, ..Default::default() })
}

#[tokio::test]
async fn a_server_on_this_host_is_reached_over_its_unix_socket_and_others_over_tcp() {
    let engine = Engine::start(1).unwrap();
    let here = servers("here", genuine());
    assert_eq!(*open(&engine, &here).await.way(), Way::Local);
    assert_eq!(*open(&engine, &Peer { local: false, ..here }).await.way(), Way::Tcp("asked for".into()));
    let elsewhere = servers("elsewhere", None);
    let way = open(&engine, &elsewhere).await.way().to_string();
    assert!(way.contains("no such server in this network namespace"), "{way}");
    let impostor = servers("impostor", Some(HelloReply { server: 8, ..Default::default() }));
    let way = open(&engine, &impostor).await.way().to_string();
    assert!(way.contains("it is server s8"), "{way}");
}

#[tokio::test]
async fn a_server_in_another_network_namespace_is_not_mistaken_for_one_here() {
    let here = servers("namespace", genuine());
    let there = std::thread::spawn(move || {
        // SAFETY: concerns this thread only.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return None;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        Some(Socket::local(&here.cluster_id, here.server).unwrap_err())
    });
    match there.join().unwrap() {
        Some(why) => assert!(why.contains("network namespace"), "{why}"),
        None => eprintln!("skipped: no right to make a network namespace"),
    }
}

/// Many at once, some given up at any point, some not polled although it is their turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_find_their_callers_whoever_leaves() {
    for cluster in ["lanes-local", "lanes-tcp"] {
        let engine = Engine::start(2).unwrap();
        let peer = servers(cluster, genuine());
        let connection = open(&engine, &Peer { local: cluster == "lanes-local", ..peer }).await;
        let mut tasks = Vec::new();
        for task in 0..8u32 {
            let connection = connection.clone();
            tasks.push(tokio::spawn(async move {
                let mut memory = vec![0; 3 << 20];
                let beside = read(5, 9000);
                for i in 0..40u32 {
                    let request =
                        read(task * 1000 + i, [100, 4096, 70_000, 3 << 20][(task + i) as usize % 4]);
                    let length = request.ranges[0].length as usize;
                    let whole = connection.request_into(Opcode::ReadShard, &request, &mut memory[..length]);
                    match i % 5 {
                        0 => {
                            // Given up at some point of its life.
                            let time = Duration::from_micros(u64::from(i * 37 % 900));
                            let _ = tokio::time::timeout(time, whole).await;
                        }
                        1 => {
                            // Begun, then not polled while another one of the same connection is awaited.
                            let mut whole = Box::pin(whole);
                            if let Poll::Ready(answer) = futures_util::poll!(whole.as_mut()) {
                                // Another caller's turn has brought the answer already.
                                drop(whole);
                                check(answer.unwrap(), &request, &memory);
                                continue;
                            }
                            let other = connection.request(Opcode::ReadShard, &beside, Vec::new());
                            assert_eq!(other.await.unwrap().payload, bytes(&beside.ranges[0]));
                            let answer = whole.await.unwrap();
                            check(answer, &request, &memory);
                        }
                        _ => {
                            let answer = whole.await.unwrap();
                            check(answer, &request, &memory);
                        }
                    }
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert!(connection.usable());
    }
}

fn check(answer: Answer, request: &ReadShardRequest, memory: &[u8]) {
    let got = [&memory[..answer.direct], &answer.payload].concat();
    assert!(got == bytes(&request.ranges[0]));
}

#[tokio::test]
async fn a_payload_larger_than_the_kernel_takes_at_once_arrives_whole() {
    let engine = Engine::start(1).unwrap();
    let connection = open(&engine, &servers("large", genuine())).await;
    let parts: Vec<Bytes> = (0..16u8).map(|i| Bytes::from(vec![i; 1 << 20])).collect();
    let (body, small) = (ReadShardRequest::default(), read(3, 5000));
    let put = connection.request(Opcode::PutShard, &body, parts);
    let behind = connection.request(Opcode::ReadShard, &small, Vec::new());
    let (put, behind) = futures_util::future::join(put, behind).await;
    let told: ReadShardReply = frame::decode_body(Opcode::PutShard, &put.unwrap().body).unwrap();
    assert_eq!(told.shard_length, (0..16).sum::<u32>() << 20);
    assert_eq!(behind.unwrap().payload, bytes(&small.ranges[0]));
}

#[tokio::test]
async fn whoever_waits_when_the_server_goes_is_told() {
    let engine = Engine::start(1).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        answer(&mut stream, &HelloReply { server: 7, cluster_id: "gone".into(), ..Default::default() })
            .unwrap();
        // A request is taken and never answered.
        let _ = stream.read(&mut [0; 100]);
    });
    let peer = Peer {
        server: ServerId(7),
        address,
        cluster_id: "gone".into(),
        client: String::new(),
        local: false,
        lends: false,
        network: None,
    };
    let connection = open(&engine, &peer).await;
    let error = connection.request(Opcode::ReadShard, &read(0, 1), Vec::new()).await.unwrap_err();
    assert!(error.errno == Errno::EHOSTUNREACH && error.message.contains("closed"), "{error}");
    assert!(!connection.usable());
    let again = connection.request(Opcode::ReadShard, &read(0, 1), Vec::new()).await;
    assert_eq!(again.unwrap_err().errno, Errno::EHOSTUNREACH);
}
