//! A damaged record is replaced by a good one: one of them is there at any moment, and the good one wins.

use super::*;

/// A store with three shards, of which the second has a rotten page.
async fn with_rotten_page(holes_visible: bool) -> (Arc<SimDevice>, Arc<Store<SimDevice>>, Entry) {
    let (device, store) = open(SimDevice::new(1 << 30, holes_visible), OPTIONS);
    for block in 1..=3 {
        put(&store, block, &bytes_of(block, 20_000)).await.unwrap();
    }
    store.sync().await.unwrap();
    let rotten = store.find(BlockId(2), ShardNo(0)).unwrap();
    device.rot(rotten.volume, rotten.span().start + 2 * PAGE_SIZE as u64);
    assert_eq!(get(&store, &rotten).await, None);
    (device, store, rotten)
}

/// Whether all pages but the rotten one can be read.
async fn good_pages_are_there(store: &Store<SimDevice>, entry: &Entry) -> bool {
    let data = bytes_of(entry.block.0, entry.length);
    let pages = data.len() / PAGE_SIZE;
    let range = PAGE_SIZE..PAGE_SIZE * (1 + pages);
    let read = store.read_record(entry, PAGE_SIZE, PageBuf::unpooled(1 + pages), range).await.unwrap();
    let pages = (1..).zip(data.chunks_exact(PAGE_SIZE)).filter(|(page, _)| *page != 2);
    pages.into_iter().all(|(page, wanted)| read[page * PAGE_SIZE..][..PAGE_SIZE] == *wanted)
}

#[test]
fn a_damaged_shard_stays_when_there_is_no_room_for_a_good_one() {
    run(async {
        let options = StoreOptions { volume_size: 1 << 30, ..OPTIONS };
        let (device, store) = open(SimDevice::new(20 << 20, true), options);
        let length = 1 << 20;
        let mut stored = 0;
        while put(&store, stored + 1, &bytes_of(stored + 1, length)).await.is_ok() {
            stored += 1;
        }
        store.checkpoint().await.unwrap();
        let rotten = store.find(BlockId(2), ShardNo(0)).unwrap();
        device.rot(rotten.volume, rotten.span().start + 2 * PAGE_SIZE as u64);
        let before = store.stats().unwrap();
        let used = store.counters.used.load(SeqCst);
        let full = replace(&store, &rotten, &bytes_of(2, length)).await;
        assert!(matches!(full, Err(StoreError::Full { .. })), "{full:?}");
        assert_eq!(store.find(BlockId(2), ShardNo(0)).unwrap(), rotten);
        assert!(good_pages_are_there(&store, &rotten).await);
        assert_eq!((store.stats().unwrap(), store.counters.used.load(SeqCst)), (before, used));
        store.sync().await.unwrap();
        let (_, store) = open(device.crash(1), options);
        assert_eq!(store.find(BlockId(2), ShardNo(0)).unwrap(), rotten);
        assert!(good_pages_are_there(&store, &rotten).await);
    });
}

#[test]
fn a_target_that_is_full_by_its_limit_is_repaired() {
    run(async {
        let options = StoreOptions { capacity_max: Some(2 * record_bytes(100_000)), ..OPTIONS };
        let (device, store) = open(SimDevice::new(1 << 30, true), options);
        put(&store, 1, &bytes_of(1, 100_000)).await.unwrap();
        put(&store, 2, &bytes_of(2, 100_000)).await.unwrap();
        let rotten = store.find(BlockId(2), ShardNo(0)).unwrap();
        device.rot(rotten.volume, rotten.span().start + 2 * PAGE_SIZE as u64);
        replace(&store, &rotten, &bytes_of(2, 100_000)).await.unwrap();
        let good = store.find(BlockId(2), ShardNo(0)).unwrap();
        assert!(get(&store, &good).await == Some(bytes_of(2, 100_000)));
        assert!(matches!(put(&store, 3, b"three").await, Err(StoreError::Full { .. })));
        let stats = store.stats().unwrap();
        assert_eq!((stats.shards, stats.shard_bytes), (2, 200_000));
        // Once it has been replaced, or deleted, the old entry is nothing to go by.
        let late = replace(&store, &rotten, &bytes_of(2, 100_000)).await;
        assert!(matches!(late, Err(StoreError::Missing { .. })), "{late:?}");
        store.delete(&[BlockId(2)]).await.unwrap();
        let late = replace(&store, &good, &bytes_of(2, 100_000)).await;
        assert!(matches!(late, Err(StoreError::Deleted { .. })), "{late:?}");
        assert_eq!(store.counters.used.load(SeqCst), record_bytes(100_000));
    });
}

/// Runs a repair until it stands still at the device and drops it there, as a kill does.
async fn cut_short(device: &SimDevice, store: &Store<SimDevice>, old: &Entry) {
    let data = bytes_of(old.block.0, old.length);
    let mut repair = Box::pin(replace(store, old, &data));
    while device.stalled.load(SeqCst) == 0 {
        assert!(futures_util::poll!(repair.as_mut()).is_pending());
        tokio::task::yield_now().await;
    }
}

#[test]
fn a_repair_that_a_crash_cuts_short_leaves_one_shard() {
    for seed in 0..80 {
        let (holes_visible, with_checkpoint) = (seed % 2 == 0, seed % 4 < 2);
        run(async {
            // While the good one is being written.
            let (device, store, rotten) = with_rotten_page(holes_visible).await;
            if with_checkpoint {
                store.checkpoint().await.unwrap();
            }
            device.stall.store(true, SeqCst);
            cut_short(&device, &store, &rotten).await;
            let (device, store) = open(device.crash(seed), OPTIONS);
            match store.find(BlockId(2), ShardNo(0)) {
                Ok(entry) if entry == rotten => assert!(good_pages_are_there(&store, &entry).await),
                Ok(entry) => assert!(get(&store, &entry).await == Some(bytes_of(2, 20_000))),
                // Without a checkpoint a start takes no record that does not verify.
                Err(e) => assert!(!with_checkpoint, "{e}"),
            }
            nothing_else_is_there(&device, &store);

            // When both are there.
            let (device, store, rotten) = with_rotten_page(holes_visible).await;
            if with_checkpoint {
                store.checkpoint().await.unwrap();
            }
            device.stall_punch.store(true, SeqCst);
            cut_short(&device, &store, &rotten).await;
            let (device, store) = open(device.crash(seed), OPTIONS);
            let entry = store.find(BlockId(2), ShardNo(0)).unwrap();
            assert!(get(&store, &entry).await == Some(bytes_of(2, 20_000)), "the good one must win");
            nothing_else_is_there(&device, &store);

            // When it is done, and nothing has been synced since.
            let (device, store, rotten) = with_rotten_page(holes_visible).await;
            if with_checkpoint {
                store.checkpoint().await.unwrap();
            }
            replace(&store, &rotten, &bytes_of(2, 20_000)).await.unwrap();
            let (device, store) = open(device.crash(seed), OPTIONS);
            let entry = store.find(BlockId(2), ShardNo(0)).unwrap();
            assert!(get(&store, &entry).await == Some(bytes_of(2, 20_000)));
            nothing_else_is_there(&device, &store);
        });
    }
}

/// Labels and the records of the index are all that takes space.
pub(super) fn nothing_else_is_there(device: &SimDevice, store: &Store<SimDevice>) {
    let (listed, _) = store.list(BlockId(0), 100, |_| true);
    let records: usize = listed.iter().map(|e| record_pages(e.length)).sum();
    assert_eq!(device.data_pages(), records + device.volumes().unwrap().len());
}

#[test]
fn a_repair_whose_hole_cannot_be_made_changes_nothing() {
    run(async {
        let (device, store, rotten) = with_rotten_page(true).await;
        store.checkpoint().await.unwrap();
        device.fail_punch.store(true, SeqCst);
        let failed = replace(&store, &rotten, &bytes_of(2, 20_000)).await;
        assert!(matches!(failed, Err(StoreError::Io { .. })), "{failed:?}");
        assert_eq!(store.find(BlockId(2), ShardNo(0)).unwrap(), rotten);
        assert!(good_pages_are_there(&store, &rotten).await);
        // The good record is there all the same, and the next start takes it.
        let (device, store) = open(device.crash(3), OPTIONS);
        let entry = store.find(BlockId(2), ShardNo(0)).unwrap();
        assert!(get(&store, &entry).await == Some(bytes_of(2, 20_000)));
        nothing_else_is_there(&device, &store);
    });
}

#[test]
fn a_hole_that_cannot_be_made_keeps_its_block_and_no_other() {
    run(async {
        let options = StoreOptions { volume_size: 1 << 30, ..OPTIONS };
        let (device, store) = open(SimDevice::new(1 << 31, true), options);
        for block in 1..=50 {
            put(&store, block, &bytes_of(block, 5000)).await.unwrap();
        }
        let bad = store.find(BlockId(20), ShardNo(0)).unwrap();
        *device.bad_hole.lock() = Some(bad.span().start);
        let all: Vec<BlockId> = (1..=60).map(BlockId).collect();
        let deletion = store.delete_each(&all).await.unwrap();
        assert_eq!((deletion.shards, deletion.kept.keys().collect::<Vec<_>>()), (49, vec![&BlockId(20)]));
        assert_eq!(store.list(BlockId(0), 100, |_| true).0, [bad]);
        assert!(matches!(store.delete(&all).await, Err(StoreError::Io { .. })));
        *device.bad_hole.lock() = None;
        assert_eq!(store.delete(&all).await.unwrap(), 1);
        nothing_else_is_there(&device, &store);
    });
}

#[test]
fn a_repair_and_a_deletion_at_the_same_moment_leave_nothing() {
    let (device, store) = open(SimDevice::new(1 << 30, true), OPTIONS);
    for block in 1..50 {
        run(async {
            let data = bytes_of(block, 5000);
            put(&store, block, &data).await.unwrap();
            let old = store.find(BlockId(block), ShardNo(0)).unwrap();
            let (repaired, _) = tokio::join!(replace(&store, &old, &data), async {
                // Between any two steps of the repair.
                for _ in 0..block % 7 {
                    tokio::task::yield_now().await;
                }
                store.delete(&[BlockId(block)]).await.unwrap()
            });
            let gone = [Ok(()), Err("missing"), Err("deleted")];
            let outcome = repaired.map_err(|e| match e {
                StoreError::Missing { .. } => "missing",
                StoreError::Deleted { .. } => "deleted",
                _ => "another error",
            });
            assert!(gone.contains(&outcome), "{outcome:?}");
        });
    }
    assert_eq!(store.stats().unwrap().shards, 0);
    assert_eq!(store.counters.used.load(SeqCst), 0);
    nothing_else_is_there(&device, &store);
}

#[test]
fn a_checkpoint_during_a_repair_names_what_there_is() {
    for seed in 0..60 {
        run(async {
            let (device, store, rotten) = with_rotten_page(seed % 2 == 0).await;
            store.checkpoint().await.unwrap();
            let data = bytes_of(2, 20_000);
            let (repaired, saved) = tokio::join!(replace(&store, &rotten, &data), async {
                for _ in 0..seed % 5 {
                    tokio::task::yield_now().await;
                }
                store.checkpoint().await
            });
            repaired.and(saved).unwrap();
            let (device, store) = open(device.crash(seed), OPTIONS);
            let entry = store.find(BlockId(2), ShardNo(0)).unwrap();
            assert!(get(&store, &entry).await == Some(data));
            nothing_else_is_there(&device, &store);
        });
    }
}
