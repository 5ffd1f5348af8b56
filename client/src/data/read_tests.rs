//! Reads and writes against servers in this process that can be made to fail, lie, or keep silent.

use std::{
    collections::{BTreeMap, HashMap},
    io::{self, Read, Write},
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fjordfs_proto::{
    ClusterMap, Epoch, Policy, ServerId,
    cluster::{Era, PgTable, Server, ServerState, Target, TargetState},
    frame::{self, HEADER_LEN, Header, Opcode},
    pb::data::{HelloReply, PutShardReply, PutShardRequest, ReadShardReply, ReadShardRequest, SyncReply},
};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::*;
use crate::{
    Options,
    data::{Placed, Synced, Unsynced},
    engine::Engine,
};

/// How a server answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mood {
    Well,
    /// Answers, but with a byte that is not what was stored.
    Lies,
    /// As that, but of the shard's first, third, … page or of the others.
    LiesInOdd,
    LiesInEven,
    /// Answers with fewer bytes than there are.
    Short,
    /// Refuses reads and writes.
    Fails,
    /// Says that it has no such shard, and takes none.
    Lacks,
    /// Takes requests and says nothing.
    Silent,
    /// As that, but of syncs only.
    SilentSyncs,
    /// Reads what is put from the client's memory, or has lost the right to.
    ReadsMemory,
    ReadMemoryOnce,
}

/// Bytes and page checksums by block and shard.
type Shards = HashMap<(u64, u32), (Vec<u8>, Vec<u8>)>;

struct Stub {
    mood: Mutex<Mood>,
    shards: Mutex<Shards>,
    reads: AtomicU64,
    incarnation: AtomicU64,
    /// Puts that came without their bytes.
    lent: AtomicU64,
}

impl Stub {
    fn serve(self: Arc<Stub>, listener: TcpListener, id: u64) {
        std::thread::spawn(move || {
            for mut stream in std::iter::from_fn(|| listener.accept().ok().map(|(stream, _)| stream)) {
                let stub = self.clone();
                std::thread::spawn(move || while stub.answer(&mut stream, id).is_ok() {});
            }
        });
    }

    fn answer(&self, stream: &mut (impl Read + Write), id: u64) -> io::Result<()> {
        let mut head = [0; HEADER_LEN];
        stream.read_exact(&mut head)?;
        let header = Header::decode(&head).unwrap();
        let mut body = vec![0; header.body_len as usize];
        stream.read_exact(&mut body)?;
        let mut payload = vec![0; header.payload_len as usize];
        stream.read_exact(&mut payload)?;
        let (op, request) = (header.opcode, header.request);
        let refuse = |errno, what: &str| frame::encode_error(op, request, &FsError::new(errno, what));
        let mood = *self.mood.lock();
        let reply = match (op, mood) {
            (Opcode::Hello, _) => {
                let incarnation = self.incarnation.load(Ordering::Relaxed);
                let reads_memory = matches!(mood, Mood::ReadsMemory | Mood::ReadMemoryOnce);
                let (cluster_id, targets) = ("c".into(), vec![id]);
                let hello = HelloReply { server: id, cluster_id, targets, incarnation, reads_memory };
                frame::encode(op, true, request, &hello, 0)
            }
            (_, Mood::Silent) | (Opcode::Sync, Mood::SilentSyncs) => return Ok(()),
            (_, Mood::Fails) => refuse(Errno::EIO, "the device reports an error"),
            (_, Mood::Lacks) => refuse(Errno::ENOENT, "no such shard"),
            (Opcode::Sync, _) => frame::encode(op, true, request, &SyncReply {}, 0),
            (Opcode::PutShard, _) => {
                let put: PutShardRequest = frame::decode_body(op, &body).unwrap();
                assert!(put.memory.is_empty() || payload.is_empty());
                if mood == Mood::ReadMemoryOnce && !put.memory.is_empty() {
                    return stream.write_all(&refuse(Errno::EFAULT, "not any more"));
                }
                self.lent.fetch_add(u64::from(!put.memory.is_empty()), Ordering::Relaxed);
                for piece in &put.memory {
                    let start = std::ptr::with_exposed_provenance::<u8>(piece.address as usize);
                    // SAFETY: the client is this process, and keeps it until it is answered.
                    payload.extend(unsafe { std::slice::from_raw_parts(start, piece.length as usize) });
                }
                self.shards.lock().insert((put.block, put.shard), (payload, put.page_crcs.to_vec()));
                frame::encode(op, true, request, &PutShardReply {}, 0)
            }
            _ => {
                self.reads.fetch_add(1, Ordering::Relaxed);
                let read: ReadShardRequest = frame::decode_body(op, &body).unwrap();
                let shards = self.shards.lock();
                match shards.get(&(read.block, read.shard)) {
                    None => refuse(Errno::ENOENT, "no such shard"),
                    Some((bytes, crcs)) => {
                        let (from, length) = (read.ranges[0].offset as usize, read.ranges[0].length as usize);
                        let end = (from + length).min(bytes.len());
                        let mut payload = bytes[from..end].to_vec();
                        let mut crcs = crcs[from / 1024..4 * fjordfs_proto::block::pages(end)].to_vec();
                        match mood {
                            Mood::Lies => payload[length / 2] ^= 4,
                            Mood::LiesInOdd | Mood::LiesInEven => {
                                let odd = usize::from(mood == Mood::LiesInOdd);
                                let bad = (from / 4096..end.div_ceil(4096)).filter(|page| page % 2 == odd);
                                bad.for_each(|page| payload[page * 4096 - from] ^= 4);
                            }
                            Mood::Short => {
                                payload.truncate(payload.len() - 4096);
                                crcs.truncate(crcs.len() - 4);
                            }
                            _ => {}
                        }
                        let reply = ReadShardReply { page_crcs: crcs.into(), ..Default::default() };
                        let mut frame = frame::encode(op, true, request, &reply, payload.len());
                        frame.extend(payload);
                        frame
                    }
                }
            }
        };
        stream.write_all(&reply)
    }
}

/// A client of so many servers with a target each, all in one group, in this order.
struct World {
    stubs: Vec<Arc<Stub>>,
    data: Arc<DataClient>,
    map: watch::Sender<Arc<ClusterMap>>,
}

impl World {
    fn new(servers: u64, timeout: Duration) -> World {
        let mut map = ClusterMap {
            cluster_id: "c".into(),
            epoch: Epoch(1),
            servers: BTreeMap::new(),
            targets: BTreeMap::new(),
            eras: Vec::new(),
            default_policy: Policy::replica(1).unwrap(),
        };
        let mut stubs = Vec::new();
        for id in 1..=servers {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let stub = Arc::new(Stub {
                mood: Mutex::new(Mood::Well),
                shards: Mutex::default(),
                reads: AtomicU64::new(0),
                incarnation: AtomicU64::new(1),
                lent: AtomicU64::new(0),
            });
            stub.clone().serve(listener, id);
            stubs.push(stub);
            map.servers
                .insert(ServerId(id), Server { address, name: id.to_string(), state: ServerState::Up });
            let domain = id.to_string();
            map.targets.insert(
                TargetId(id),
                Target { server: ServerId(id), domain, state: TargetState::Up, full: false },
            );
        }
        let tables = (1..=servers as usize).map(|width| {
            (
                width,
                PgTable {
                    width,
                    members: (1..=width as u64).map(TargetId).collect(),
                    moves: BTreeMap::new(),
                },
            )
        });
        map.eras.push(Era { first_block: BlockId(1), tables: tables.collect() });
        let options = Options {
            local_sockets: false,
            hedge_delay: Duration::from_millis(50),
            operation_timeout: timeout,
            ..Options::default()
        };
        let (map, changes) = watch::channel(Arc::new(map));
        let engine = Arc::new(Engine::start(1).unwrap());
        World { stubs, data: Arc::new(DataClient::new(engine, changes, &options)), map }
    }

    fn mood(&self, server: usize, mood: Mood) {
        *self.stubs[server].mood.lock() = mood;
    }

    fn reads(&self) -> Vec<u64> {
        self.stubs.iter().map(|stub| stub.reads.swap(0, Ordering::Relaxed)).collect()
    }

    async fn put(&self, block: u64, policy: &str, bytes: &[u8]) -> Layout {
        let (layout, placed) = self.place(block, policy, bytes).await;
        assert_eq!(placed.unsynced.len() + placed.missing.len(), layout.width());
        layout
    }

    async fn place(&self, block: u64, policy: &str, bytes: &[u8]) -> (Layout, Placed) {
        let layout = Layout::of(policy.parse().unwrap(), bytes.len());
        let parts: Vec<Bytes> = bytes.chunks(100_000).map(Bytes::copy_from_slice).collect();
        let shards = self.data.encode(layout, &parts).await.unwrap();
        (layout, self.data.put(BlockId(block), layout, &shards, Duration::ZERO).await.unwrap())
    }

    fn declare_down(&self, target: u64) {
        self.map.send_modify(|map| {
            let mut down = ClusterMap::clone(map);
            down.targets.get_mut(&TargetId(target)).unwrap().state = TargetState::Down;
            *map = Arc::new(down);
        });
    }

    /// Reads both ways, which must agree.
    async fn read(&self, block: u64, layout: Layout, offset: u32, length: u32) -> FsResult<Bytes> {
        let range = BlockRange { block: BlockId(block), layout, offset, length };
        let read = self.data.read(range).await;
        let mut memory = vec![0; length as usize];
        let into = self.data.read_into(range, &mut memory).await;
        match (&read, &into) {
            (Ok(bytes), Ok(n)) => assert!(memory[..*n] == bytes[..]),
            (Err(a), Err(b)) => assert_eq!(a.errno, b.errno),
            _ => panic!("{read:?} and {into:?}"),
        }
        read
    }
}

fn block(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i % 251) as u8 ^ (i / 4096) as u8).collect()
}

const LONG: Duration = Duration::from_secs(60);

/// Offsets and lengths inside one shard, across a seam, and of everything, for shards of about 400 KiB.
const RANGES: [(u32, u32); 5] = [(0, 4096), (8192, 5000), (385_024, 40_000), (4096, 700_000), (0, 1_200_000)];

#[tokio::test]
async fn a_read_touches_the_shards_that_hold_its_range() {
    let world = World::new(5, LONG);
    let bytes = block(1_200_000);
    let layout = world.put(7, "ec:3+2", &bytes).await;
    assert_eq!(layout.shard_size(), Some(98 * 4096));
    world.reads();
    for ((offset, length), touched) in RANGES.into_iter().zip([
        [2, 0, 0, 0, 0],
        [2, 0, 0, 0, 0],
        [2, 2, 0, 0, 0],
        [2, 2, 0, 0, 0],
        [2, 2, 2, 0, 0],
    ]) {
        let got = world.read(7, layout, offset, length).await.unwrap();
        assert!(got == bytes[offset as usize..(offset + length) as usize]);
        assert_eq!(world.reads(), touched, "{length} bytes at {offset}, read twice");
    }
}

#[tokio::test]
async fn whatever_m_servers_do_the_bytes_are_right() {
    let bytes = block(1_200_000);
    for mood in [Mood::Lies, Mood::Short, Mood::Fails, Mood::Lacks, Mood::Silent] {
        for bad in [[0, 1], [1, 2], [2, 4], [0, 3], [3, 4]] {
            let world = World::new(5, LONG);
            let layout = world.put(7, "ec:3+2", &bytes).await;
            bad.iter().for_each(|server| world.mood(*server, mood));
            for (offset, length) in RANGES {
                let got = world.read(7, layout, offset, length).await.unwrap();
                assert!(got == bytes[offset as usize..(offset + length) as usize], "{bad:?} {mood:?}");
            }
        }
    }
}

#[tokio::test]
async fn with_more_than_m_bad_there_is_an_error_and_nothing_else() {
    let bytes = block(1_200_000);
    for mood in [Mood::Lies, Mood::Short, Mood::Fails, Mood::Lacks, Mood::Silent] {
        // As long as an operation may take: only silence is waited for.
        let timeout = if mood == Mood::Silent { Duration::from_secs(1) } else { LONG };
        let world = World::new(3, timeout);
        let layout = world.put(7, "ec:2+1", &bytes).await;
        [0, 2].iter().for_each(|server| world.mood(*server, mood));
        let error = world.read(7, layout, 0, 4096).await.unwrap_err();
        // Where shards are missing the extents may be stale: who has them looks again.
        let expected = if mood == Mood::Lacks { Errno::ENOENT } else { Errno::EIO };
        assert_eq!(error.errno, expected, "{mood:?}: {error}");
        let other = world.read(7, layout, 700_000 / 4096 * 4096, 4096).await.unwrap();
        assert!(other == bytes[700_000 / 4096 * 4096..][..4096], "the other data shard is well");
    }
}

#[tokio::test]
async fn scattered_damage_is_read_around_page_by_page() {
    let bytes = block(1_200_000);
    for policy in ["ec:2+1", "replica:2"] {
        let world = World::new(3, LONG);
        let layout = world.put(7, policy, &bytes).await;
        world.mood(0, Mood::LiesInOdd);
        world.mood(1, Mood::LiesInEven);
        assert!(world.read(7, layout, 4096, 300_000).await.unwrap() == bytes[4096..304_096], "{policy}");
        // Where the same page is bad on both there is nothing to be done.
        world.mood(1, Mood::LiesInOdd);
        assert_eq!(world.read(7, layout, 4096, 300_000).await.unwrap_err().errno, Errno::EIO, "{policy}");
    }
}

#[tokio::test]
async fn a_block_that_nobody_has_is_told_from_one_that_is_lost() {
    let world = World::new(3, LONG);
    for policy in ["ec:2+1", "replica:3"] {
        let layout = Layout::of(policy.parse().unwrap(), 1_200_000);
        assert_eq!(world.read(7, layout, 0, 4096).await.unwrap_err().errno, Errno::ENOENT, "{policy}");
    }
}

#[tokio::test]
async fn copies_are_read_around_trouble_as_well() {
    let bytes = block(50_000);
    for mood in [Mood::Lies, Mood::Fails, Mood::Lacks, Mood::Silent] {
        for well in 0..3 {
            let world = World::new(3, LONG);
            let layout = world.put(7, "ec:2+2", &bytes).await;
            assert_eq!(layout.policy().to_string(), "replica:3");
            (0..3).filter(|server| *server != well).for_each(|server| world.mood(server, mood));
            assert!(world.read(7, layout, 4096, 10_000).await.unwrap() == bytes[4096..14_096], "{mood:?}");
        }
    }
}

/// A server that keeps silent costs one bound, or a few; then it is not asked first any more.
#[tokio::test]
async fn a_silent_server_is_left_alone_and_comes_back() {
    let world = World::new(3, LONG);
    let bytes = block(1_200_000);
    let layout = world.put(7, "ec:2+1", &bytes).await;
    world.mood(0, Mood::Silent);
    for _ in 0..4 {
        world.read(7, layout, 0, 4096).await.unwrap();
    }
    world.reads();
    world.read(7, layout, 0, 4096).await.unwrap();
    assert_eq!(world.reads()[1..], [2, 2], "decoded at once, both times");
    world.mood(0, Mood::Well);
    let mut asked = 0;
    for _ in 0..100 {
        world.read(7, layout, 0, 4096).await.unwrap();
        asked = world.reads()[0];
        if asked == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(asked, 2, "a probe has brought it back");
}

#[tokio::test]
async fn a_put_says_who_has_no_shard() {
    let world = World::new(3, LONG);
    let bytes = block(1_200_000);
    let layout = Layout::of(Policy::ec(2, 1).unwrap(), bytes.len());
    let shards = world.data.encode(layout, &[Bytes::from(bytes.clone())]).await.unwrap();
    world.mood(1, Mood::Fails);
    let placed = world.data.put(BlockId(7), layout, &shards, Duration::ZERO).await.unwrap();
    assert_eq!(placed.missing.iter().map(|(target, _)| target.0).collect::<Vec<_>>(), [2]);
    assert!(world.read(7, layout, 0, 1_200_000).await.unwrap() == bytes);
    // One that is down is not waited for.
    world.mood(1, Mood::Silent);
    world.declare_down(2);
    let placed = world.data.put(BlockId(8), layout, &shards, Duration::ZERO).await.unwrap();
    assert_eq!(placed.missing.len(), 1);
    world.mood(0, Mood::Fails);
    let failed = world.data.put(BlockId(9), layout, &shards, Duration::ZERO).await.unwrap_err();
    assert_eq!(failed.missing.iter().map(|(target, _)| target.0).collect::<Vec<_>>(), [1, 2]);
}

#[tokio::test]
async fn what_is_put_is_lent_to_servers_that_read_it_and_sent_to_others() {
    let world = World::new(3, LONG);
    world.mood(0, Mood::ReadsMemory);
    world.mood(1, Mood::ReadMemoryOnce);
    let lent =
        || -> Vec<u64> { world.stubs.iter().map(|stub| stub.lent.swap(0, Ordering::Relaxed)).collect() };
    for (put, (length, expected)) in
        [(900_000, [1, 0, 0]), (900_000, [1, 0, 0]), (5000, [0; 3])].into_iter().enumerate()
    {
        let bytes = block(length);
        let layout = world.put(put as u64 + 1, "replica:3", &bytes).await;
        assert_eq!(lent(), expected, "{put}");
        let stored = |stub: &Arc<Stub>| stub.shards.lock()[&(put as u64 + 1, 0)].0 == bytes;
        assert!(stored(&world.stubs[0]), "{put}");
        assert!(world.read(put as u64 + 1, layout, 0, length as u32).await.unwrap() == bytes, "{put}");
    }
    // Bytes in many small pieces are quicker sent.
    let layout = Layout::of("replica:3".parse().unwrap(), 900_000);
    let parts: Vec<Bytes> = block(900_000).chunks(4096).map(Bytes::copy_from_slice).collect();
    let shards = world.data.encode(layout, &parts).await.unwrap();
    let placed = world.data.put(BlockId(9), layout, &shards, Duration::ZERO).await.unwrap();
    assert_eq!((placed.missing.len(), lent()), (0, vec![0; 3]));
}

#[tokio::test]
async fn a_silent_target_holds_up_one_put_and_is_asked_again_later() {
    let world = World::new(3, LONG);
    let bytes = block(1_200_000);
    let layout = Layout::of(Policy::ec(2, 1).unwrap(), bytes.len());
    let shards = world.data.encode(layout, &[Bytes::from(bytes)]).await.unwrap();
    let put = async |block| {
        let placed = world.data.put(BlockId(block), layout, &shards, Duration::ZERO).await.unwrap();
        placed.missing.into_iter().map(|(target, e)| (target.0, e.errno)).collect::<Vec<_>>()
    };
    world.mood(1, Mood::Silent);
    assert_eq!(put(7).await, [(2, Errno::ETIMEDOUT)]);
    world.mood(1, Mood::Well);
    assert_eq!(put(8).await, [(2, Errno::ETIMEDOUT)], "it is not asked for a while");
    let mut block = 9;
    while !put(block).await.is_empty() {
        tokio::time::sleep(Duration::from_millis(50)).await;
        block += 1;
    }
    assert!(world.stubs[1].shards.lock().contains_key(&(block, 1)), "a probe has brought it back");
    assert!(put(block + 1).await.is_empty());
}

#[tokio::test]
async fn a_put_that_nobody_answers_ends() {
    let world = World::new(1, LONG);
    let layout = Layout::of(Policy::replica(1).unwrap(), 5000);
    let shards = world.data.encode(layout, &[Bytes::from(block(5000))]).await.unwrap();
    world.mood(0, Mood::Silent);
    let failed = world.data.put(BlockId(7), layout, &shards, Duration::ZERO).await.unwrap_err();
    assert_eq!(failed.missing.iter().map(|(target, _)| target.0).collect::<Vec<_>>(), [1]);
}

#[tokio::test]
async fn what_others_have_put_is_safe_when_every_target_that_is_up_has_synced() {
    let world = World::new(3, Duration::from_secs(2));
    let of_others = world.data.unsynced_of_others();
    world.data.sync(&of_others).await.all().unwrap();
    world.mood(1, Mood::Fails);
    world.data.sync(&of_others).await.all().expect_err("one of them says nothing of the others");
    world.declare_down(2);
    world.data.sync(&of_others).await.all().expect("it is a loss that their policies survive");
}

#[tokio::test]
async fn a_slow_sync_is_not_waited_for_where_others_suffice_and_not_forgotten() {
    let world = World::new(3, LONG);
    let (_, placed) = world.place(7, "ec:2+1", &block(1_200_000)).await;
    world.mood(1, Mood::SilentSyncs);
    let synced = world.data.sync(&placed.unsynced).await;
    assert!(synced.lost.is_empty());
    let mut spare: Vec<_> =
        placed.unsynced.into_iter().filter(|s| synced.spare.contains(&s.place())).collect();
    assert_eq!(spare.iter().map(|s| s.place().0.0).collect::<Vec<_>>(), [2]);
    spare.iter_mut().for_each(Unsynced::becomes_spare);
    let again = world.data.sync(&spare).await;
    assert!(again.lost.is_empty() && again.spare == synced.spare, "nothing depends on it");
    world.mood(1, Mood::Well);
    let last = world.data.sync(&spare).await;
    assert!(last.lost.is_empty() && last.spare.is_empty(), "it is synced");
}

#[tokio::test]
async fn a_block_that_is_lost_is_told_from_the_others() {
    let world = World::new(2, LONG);
    let mut unsynced = Vec::new();
    for (number, policy) in [(7, "replica:1"), (8, "replica:2")] {
        unsynced.extend(world.place(number, policy, &block(5000)).await.1.unsynced);
    }
    // Its process is another one, and what it took is gone.
    world.stubs[0].incarnation.store(2, Ordering::Relaxed);
    world.stubs[0].shards.lock().clear();
    let world = Arc::new(world);
    let synced = from_another_lane(&world, unsynced).await;
    assert_eq!(synced.lost.keys().map(|place| place.1).collect::<Vec<_>>(), [BlockId(7)]);
}

/// The connections of the test's own lane stay as they are, unused.
async fn from_another_lane(world: &Arc<World>, unsynced: Vec<Unsynced>) -> Synced {
    let world = world.clone();
    let sync = move || {
        crate::engine::enter_lane(0);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(world.data.sync(&unsynced))
    };
    tokio::task::spawn_blocking(move || std::thread::spawn(sync).join().unwrap()).await.unwrap()
}
