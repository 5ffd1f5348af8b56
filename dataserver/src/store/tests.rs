//! The store on the crashing device: whatever happens, synced shards stay, synced deletions stay, bytes are right.

mod killed;
mod repair;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering::SeqCst},
};

use fjordfs_proto::{
    BlockId, PAGE_SIZE, ShardNo,
    block::{first_bad_page, page_crcs},
};
use proptest::prelude::*;

use super::{
    NewShard, Store, StoreOptions,
    device::Device,
    error::StoreError,
    index::Entry,
    record::{parse_table, record_bytes, record_pages, table_at},
    sim::SimDevice,
};
use crate::buffer::PageBuf;

const UUID: [u8; 16] = [3; 16];
const OPTIONS: StoreOptions = StoreOptions { volume_size: 256 << 10, capacity_max: None };

fn bytes_of(block: u64, length: u32) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    for (i, chunk) in bytes.chunks_mut(8).enumerate() {
        chunk.copy_from_slice(
            &fjordfs_proto::cluster::mix(block ^ (i as u64) << 32).to_le_bytes()[..chunk.len()],
        );
    }
    bytes
}

fn new_shard(block: u64, data: &[u8]) -> (NewShard, PageBuf) {
    let length = data.len() as u32;
    let mut record = PageBuf::unpooled(record_pages(length));
    record.fill(0xaa);
    record[PAGE_SIZE..PAGE_SIZE + data.len()].copy_from_slice(data);
    (NewShard { block: BlockId(block), shard: ShardNo(0), policy: 2, length }, record)
}

async fn put(store: &Store<SimDevice>, block: u64, data: &[u8]) -> Result<(), StoreError> {
    let (new, record) = new_shard(block, data);
    store.put(new, record, &page_crcs(data)).await
}

/// Puts the same shard again in the place of its record.
async fn replace(store: &Store<SimDevice>, old: &Entry, data: &[u8]) -> Result<(), StoreError> {
    let (new, record) = new_shard(old.block.0, data);
    store.replace(old, new, record, &page_crcs(data)).await
}

/// The bytes of a shard, if they verify.
async fn get<D: Device>(store: &Store<D>, entry: &Entry) -> Option<Vec<u8>> {
    let pages = record_pages(entry.length);
    let record = store.read_record(entry, 0, PageBuf::unpooled(pages), 0..pages * PAGE_SIZE).await.unwrap();
    let data = record[PAGE_SIZE..PAGE_SIZE + entry.length as usize].to_vec();
    let crcs = parse_table(&record[table_at(entry.length)..], entry.length)?;
    first_bad_page(&data, crcs).is_none().then_some(data)
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn open(device: SimDevice, options: StoreOptions) -> (Arc<SimDevice>, Arc<Store<SimDevice>>) {
    let device = Arc::new(device);
    let store = Arc::new(Store::open(device.clone(), UUID, options).unwrap());
    (device, store)
}

#[derive(Clone, Debug)]
enum Op {
    Put(u32),
    /// Two puts of the same at once, the answer of both lost.
    PutTwice(u32),
    /// A put that is in flight until the crash.
    PutStalled(u32),
    Repeat(prop::sample::Index),
    Delete(prop::sample::Index),
    Replace(prop::sample::Index),
    Sync,
    Checkpoint,
    DamageCheckpoint,
    Crash(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let length = prop_oneof![1..20_000u32, Just(4096u32), Just(8192), 60_000..90_000u32];
    prop_oneof![
        8 => length.clone().prop_map(Op::Put),
        1 => length.clone().prop_map(Op::PutTwice),
        2 => length.prop_map(Op::PutStalled),
        1 => any::<prop::sample::Index>().prop_map(Op::Repeat),
        4 => any::<prop::sample::Index>().prop_map(Op::Delete),
        1 => any::<prop::sample::Index>().prop_map(Op::Replace),
        2 => Just(Op::Sync),
        2 => Just(Op::Checkpoint),
        1 => Just(Op::DamageCheckpoint),
        2 => any::<u64>().prop_map(Op::Crash),
    ]
}

/// What the store has promised.
#[derive(Default)]
struct Oracle {
    next_block: u64,
    length: BTreeMap<u64, u32>,
    /// Acknowledged and not deleted since.
    present: BTreeSet<u64>,
    /// Must be there after a crash.
    safe: BTreeSet<u64>,
    /// Deleted and acknowledged.
    deleted: BTreeSet<u64>,
    /// Must not be there after a crash.
    gone: BTreeSet<u64>,
    /// Perhaps only partly there.
    half: BTreeSet<u64>,
}

impl Oracle {
    fn new_block(&mut self, length: u32) -> (u64, Vec<u8>) {
        self.next_block += 1;
        self.length.insert(self.next_block, length);
        (self.next_block, bytes_of(self.next_block, length))
    }

    fn synced(&mut self) {
        self.safe = &self.present - &self.half;
        self.gone.append(&mut self.deleted.clone());
    }
}

/// A deletion that was never synced may have taken part of a shard, which its reader sees by the checksums.
fn half_deleted(block: u64, oracle: &Oracle) -> bool {
    oracle.deleted.contains(&block) || oracle.half.contains(&block)
}

async fn check(store: &Store<SimDevice>, device: &SimDevice, oracle: &mut Oracle, crashed: bool) {
    let (listed, end) = store.list(BlockId(0), 100_000, |_| true);
    assert!(end);
    let mut there = BTreeSet::new();
    for entry in &listed {
        let block = entry.block.0;
        there.insert(block);
        if !crashed {
            continue;
        }
        // Not `assert_eq`: a megabyte of numbers helps nobody.
        match get(store, entry).await {
            Some(bytes) => assert!(bytes == bytes_of(block, oracle.length[&block]), "wrong bytes: {entry:?}"),
            None => assert!(half_deleted(block, oracle), "damaged: {entry:?}"),
        }
    }
    if crashed {
        assert!(oracle.safe.is_subset(&there), "lost {:?}", oracle.safe.difference(&there));
        assert!(oracle.gone.is_disjoint(&there), "came back {:?}", oracle.gone.intersection(&there));
        oracle.half.extend(there.intersection(&oracle.deleted));
        // Recovery has synced what it believes, and has dropped the rest for good.
        oracle.gone = oracle.length.keys().filter(|b| !there.contains(b)).copied().collect();
        oracle.deleted.clear();
        (oracle.present, oracle.safe) = (there.clone(), &there - &oracle.half);
        // Nothing but labels and shards takes space.
        let records: u64 = listed.iter().map(|e| record_bytes(e.length)).sum();
        let volumes = device.volumes().unwrap().len();
        let whole = records as usize / PAGE_SIZE + volumes;
        assert!(device.data_pages() == whole || !oracle.half.is_empty() && device.data_pages() < whole);
    }
    assert_eq!(there, oracle.present);
    let stats = store.stats().unwrap();
    assert_eq!(stats.shards as usize, there.len());
    assert_eq!(stats.shard_bytes, listed.iter().map(|e| u64::from(e.length)).sum::<u64>());
}

async fn play(ops: Vec<Op>, holes_visible: bool) {
    let (mut device, mut store) = open(SimDevice::new(1 << 30, holes_visible), OPTIONS);
    let mut oracle = Oracle::default();
    let mut in_flight = Vec::new();
    for op in ops.into_iter().chain([Op::Crash(1)]) {
        let mut crashed = false;
        match op {
            Op::Put(length) => {
                let (block, data) = oracle.new_block(length);
                put(&store, block, &data).await.unwrap();
                oracle.present.insert(block);
            }
            Op::PutTwice(length) => {
                let (block, data) = oracle.new_block(length);
                let (a, b) = tokio::join!(put(&store, block, &data), put(&store, block, &data));
                a.and(b).unwrap();
                oracle.present.insert(block);
            }
            Op::PutStalled(length) => {
                let (block, data) = oracle.new_block(length);
                let (store, before) = (store.clone(), device.stalled.load(SeqCst));
                let mut stalled = Box::pin(async move { put(&store, block, &data).await });
                device.stall.store(true, SeqCst);
                while device.stalled.load(SeqCst) == before {
                    assert!(futures_util::poll!(stalled.as_mut()).is_pending());
                    tokio::task::yield_now().await;
                }
                device.stall.store(false, SeqCst);
                in_flight.push(stalled);
            }
            Op::Repeat(at) if !oracle.present.is_empty() => {
                let block = *oracle.present.iter().nth(at.index(oracle.present.len())).unwrap();
                let length = oracle.length[&block];
                if oracle.half.contains(&block) {
                    continue;
                }
                put(&store, block, &bytes_of(block, length)).await.unwrap();
                let other = put(&store, block, &bytes_of(block + 1, length)).await;
                assert!(matches!(other, Err(StoreError::Exists { .. })));
            }
            Op::Delete(at) if !oracle.present.is_empty() => {
                let block = *oracle.present.iter().nth(at.index(oracle.present.len())).unwrap();
                // From now on a crash may or may not find it.
                oracle.safe.remove(&block);
                assert_eq!(store.delete(&[BlockId(block), BlockId(block << 20)]).await.unwrap(), 1);
                oracle.present.remove(&block);
                oracle.deleted.insert(block);
                for late in [block, block << 20] {
                    let refused = put(&store, late, &bytes_of(late, 5000)).await;
                    assert!(matches!(refused, Err(StoreError::Deleted { .. })), "{late}: {refused:?}");
                }
            }
            Op::Replace(at) if !oracle.present.is_empty() => {
                let block = *oracle.present.iter().nth(at.index(oracle.present.len())).unwrap();
                let old = store.find(BlockId(block), ShardNo(0)).unwrap();
                replace(&store, &old, &bytes_of(block, oracle.length[&block])).await.unwrap();
                assert_ne!(store.find(BlockId(block), ShardNo(0)).unwrap(), old);
                oracle.half.remove(&block);
                oracle.synced();
            }
            Op::Repeat(_) | Op::Delete(_) | Op::Replace(_) => {}
            Op::Sync => {
                store.sync().await.unwrap();
                oracle.synced();
            }
            Op::Checkpoint => {
                store.checkpoint().await.unwrap();
                store.sync().await.unwrap();
                oracle.synced();
            }
            Op::DamageCheckpoint => device.damage_checkpoint(),
            Op::Crash(seed) => {
                in_flight.clear();
                (device, store) = open(device.crash(seed), OPTIONS);
                crashed = true;
            }
        }
        check(&store, &device, &mut oracle, crashed).await;
    }
    // Deleting everything gives everything back.
    let all: Vec<BlockId> = oracle.present.iter().map(|b| BlockId(*b)).collect();
    store.delete(&all).await.unwrap();
    store.checkpoint().await.unwrap();
    assert_eq!(store.counters.used.load(SeqCst), 0);
    assert!(store.volumes.read().len() <= 1);
    assert_eq!(device.data_pages(), store.volumes.read().len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]
    #[test]
    fn crashes_lose_nothing_that_was_synced(ops in proptest::collection::vec(op(), 1..60), holes_visible: bool) {
        run(play(ops, holes_visible));
    }
}

#[test]
fn a_put_and_a_deletion_at_the_same_moment_leave_nothing() {
    let (_, store) = open(SimDevice::new(1 << 30, true), OPTIONS);
    for block in 1..50 {
        run(async {
            let data = bytes_of(block, 5000);
            let (stored, _) = tokio::join!(put(&store, block, &data), async {
                // Between any two steps of the put.
                for _ in 0..block % 7 {
                    tokio::task::yield_now().await;
                }
                store.delete(&[BlockId(block)]).await.unwrap()
            });
            assert!(stored.is_ok() || matches!(stored, Err(StoreError::Deleted { .. })), "{stored:?}");
        });
    }
    assert_eq!(store.stats().unwrap().shards, 0);
}

#[test]
fn a_copy_of_a_volume_in_a_shard_is_not_taken_for_records() {
    run(async {
        let (device, store) = open(SimDevice::new(1 << 30, true), OPTIONS);
        put(&store, 1, &bytes_of(1, 9000)).await.unwrap();
        // A user's file that holds the first pages of this very volume, put and then torn at its header.
        let entry = store.find(BlockId(1), ShardNo(0)).unwrap();
        let mut copy = PageBuf::unpooled(5);
        let volume = store.volumes.read()[&entry.volume].clone();
        device.read_now(&volume.file, 4096, &mut copy).unwrap();
        put(&store, 2, &copy).await.unwrap();
        let torn = store.find(BlockId(2), ShardNo(0)).unwrap();
        store.delete(&[BlockId(1)]).await.unwrap();
        store.sync().await.unwrap();
        device.rot(torn.volume, torn.span().start + 16);
        let (_, store) = open(device.crash(0), OPTIONS);
        assert_eq!(store.list(BlockId(0), 10, |_| true), (vec![], true));
    });
}

#[test]
fn a_failed_sync_fails_the_target_for_good() {
    run(async {
        let (device, store) = open(SimDevice::new(1 << 30, true), OPTIONS);
        put(&store, 1, b"one").await.unwrap();
        device.fail_sync.store(true, SeqCst);
        assert!(matches!(store.sync().await, Err(StoreError::Failed { .. })));
        device.fail_sync.store(false, SeqCst);
        assert!(matches!(store.sync().await, Err(StoreError::Failed { .. })));
        assert!(matches!(put(&store, 2, b"two").await, Err(StoreError::Failed { .. })));
        assert!(store.failure().unwrap().contains("fdatasync of volume 1"));
        let entry = store.find(BlockId(1), ShardNo(0)).unwrap();
        assert_eq!(get(&store, &entry).await.unwrap(), b"one");
    });
}

#[test]
fn a_failed_write_fails_the_target_and_leaves_no_trace() {
    run(async {
        let (device, store) = open(SimDevice::new(1 << 30, true), OPTIONS);
        device.fail_write.store(true, SeqCst);
        assert!(matches!(put(&store, 1, b"one").await, Err(StoreError::Failed { .. })));
        assert!(matches!(store.find(BlockId(1), ShardNo(0)), Err(StoreError::Missing { .. })));
        assert_eq!(store.counters.used.load(SeqCst), 0);
    });
}

#[test]
fn one_sync_serves_all_who_wait() {
    run(async {
        let (device, store) = open(SimDevice::new(1 << 30, true), OPTIONS);
        put(&store, 1, b"one").await.unwrap();
        let results = futures_util::future::join_all((0..50).map(|_| store.sync())).await;
        assert!(results.iter().all(Result::is_ok));
        assert_eq!(device.syncs.load(SeqCst), 1);
        store.sync().await.unwrap();
        assert_eq!(device.syncs.load(SeqCst), 1);
    });
}

#[test]
fn a_full_disk_refuses_and_keeps_what_it_has() {
    run(async {
        let options = StoreOptions { volume_size: 1 << 30, ..OPTIONS };
        let (device, store) = open(SimDevice::new(300 << 20, true), options);
        let mut stored = 0;
        let full = loop {
            match put(&store, stored + 1, &bytes_of(7, 4 << 20)).await {
                Ok(()) => stored += 1,
                Err(e) => break e,
            }
        };
        assert!(matches!(full, StoreError::Full { .. }), "{full}");
        assert!(stored * 4 > 230, "only {stored} shards of 4 MiB fit into 300 MiB");
        // What is smaller may still fit, and what is deleted makes room.
        put(&store, 10_000, b"small").await.unwrap();
        store.sync().await.unwrap();
        let (_, store) = open(device.crash(4), options);
        assert_eq!(store.stats().unwrap().shards, stored + 1);
    });
}

#[test]
fn capacity_max_is_kept_to() {
    run(async {
        let options = StoreOptions { volume_size: 1 << 30, capacity_max: Some(1 << 20) };
        let (_, store) = open(SimDevice::new(1 << 40, true), options);
        for block in 1..=8 {
            put(&store, block, &bytes_of(block, 100_000)).await.unwrap();
        }
        assert!(matches!(put(&store, 9, &bytes_of(9, 300_000)).await, Err(StoreError::Full { .. })));
        let stats = store.stats().unwrap();
        assert_eq!(stats.capacity, 1 << 20);
        assert!(stats.free < 300_000, "{stats:?}");
        store.delete(&[BlockId(1), BlockId(2), BlockId(3)]).await.unwrap();
        put(&store, 9, &bytes_of(9, 300_000)).await.unwrap();
    });
}

#[test]
fn a_truncated_volume_costs_only_its_end() {
    run(async {
        let (device, store) = open(SimDevice::new(1 << 30, true), OPTIONS);
        for block in 1..=5 {
            put(&store, block, &bytes_of(block, 20_000)).await.unwrap();
        }
        for with_checkpoint in [false, true] {
            if with_checkpoint {
                store.checkpoint().await.unwrap();
            }
            store.sync().await.unwrap();
            let crashed = device.crash(0);
            let cut = store.find(BlockId(3), ShardNo(0)).unwrap();
            crashed.truncate(cut.volume, cut.span().end - 100);
            let (_, survivor) = open(crashed, OPTIONS);
            let (listed, _) = survivor.list(BlockId(0), 10, |_| true);
            assert_eq!(listed.iter().map(|e| e.block.0).collect::<Vec<_>>(), [1, 2]);
            put(&survivor, 6, b"goes on elsewhere").await.unwrap();
            assert_ne!(survivor.find(BlockId(6), ShardNo(0)).unwrap().volume, cut.volume);
        }
    });
}

#[test]
fn a_damaged_label_costs_nothing_that_the_index_knows() {
    run(async {
        let (device, store) = open(SimDevice::new(1 << 30, true), OPTIONS);
        put(&store, 1, b"one").await.unwrap();
        store.checkpoint().await.unwrap();
        let volume = store.find(BlockId(1), ShardNo(0)).unwrap().volume;
        device.rot(volume, 34);
        let (_, store) = open(device.crash(0), OPTIONS);
        let entry = store.find(BlockId(1), ShardNo(0)).unwrap();
        assert_eq!(get(&store, &entry).await.unwrap(), b"one");
        put(&store, 2, b"two").await.unwrap();
    });
}

#[test]
fn a_bad_sector_costs_one_page() {
    run(async {
        let (device, store) = open(SimDevice::new(1 << 30, true), OPTIONS);
        for block in 1..=3 {
            put(&store, block, &bytes_of(block, 20_000)).await.unwrap();
        }
        store.sync().await.unwrap();
        let ill = store.find(BlockId(2), ShardNo(0)).unwrap();
        let crashed = device.crash(0);
        *crashed.bad_sector.lock() = Some(ill.span().start + 2 * PAGE_SIZE as u64);
        let (_, store) = open(crashed, OPTIONS);
        let (listed, _) = store.list(BlockId(0), 10, |_| true);
        assert_eq!(listed.iter().map(|e| e.block.0).collect::<Vec<_>>(), [1, 2, 3]);
        for healthy in [&listed[0], &listed[2]] {
            assert!(get(&store, healthy).await == Some(bytes_of(healthy.block.0, 20_000)));
        }
        let page =
            store.read_record(&listed[1], PAGE_SIZE, PageBuf::unpooled(1), 0..PAGE_SIZE).await.unwrap();
        assert!(*page == bytes_of(2, 20_000)[..PAGE_SIZE]);
        let bad = store.read_record(&listed[1], 2 * PAGE_SIZE, PageBuf::unpooled(1), 0..PAGE_SIZE).await;
        assert!(matches!(bad, Err(StoreError::Io { .. })));
        assert_eq!(store.stats().unwrap().bad_pages, 1);
    });
}
