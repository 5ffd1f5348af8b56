//! A killed process leaves to the next one what the device has not synced yet; a power failure after that.

use super::*;

/// The store as the next process finds it.
fn reopen(device: &Arc<SimDevice>) -> Arc<Store<SimDevice>> {
    Arc::new(Store::open(device.clone(), UUID, OPTIONS).unwrap())
}

#[test]
fn a_deletion_that_is_confirmed_after_a_kill_is_power_safe() {
    for seed in 0..40 {
        run(async {
            let (device, store) = open(SimDevice::new(1 << 30, seed % 2 == 0), OPTIONS);
            // Two volumes, so that the first is closed and not scanned again.
            for block in 1..=6 {
                put(&store, block, &bytes_of(block, 60_000)).await.unwrap();
            }
            store.checkpoint().await.unwrap();
            let volume = |block| store.find(BlockId(block), ShardNo(0)).unwrap().volume;
            assert_ne!(volume(1), volume(6));
            assert_eq!(store.delete(&[BlockId(1), BlockId(6)]).await.unwrap(), 2);
            drop(store);

            let store = reopen(&device);
            assert_eq!(store.delete(&[BlockId(1), BlockId(6)]).await.unwrap(), 0);
            store.sync().await.unwrap();
            let (_, store) = open(device.crash(seed), OPTIONS);
            let (listed, _) = store.list(BlockId(0), 10, |_| true);
            assert_eq!(listed.iter().map(|e| e.block.0).collect::<Vec<_>>(), [2, 3, 4, 5]);
        });
    }
}

#[test]
fn a_checkpoint_after_a_kill_leaves_out_only_what_is_gone_for_good() {
    for seed in 0..40 {
        run(async {
            let (device, store) = open(SimDevice::new(1 << 30, seed % 2 == 0), OPTIONS);
            for block in 1..=6 {
                put(&store, block, &bytes_of(block, 60_000)).await.unwrap();
            }
            store.checkpoint().await.unwrap();
            store.delete(&[BlockId(1)]).await.unwrap();
            drop(store);
            reopen(&device).checkpoint().await.unwrap();
            let (device, store) = open(device.crash(seed), OPTIONS);
            assert!(store.find(BlockId(1), ShardNo(0)).is_err());
            repair::nothing_else_is_there(&device, &store);
        });
    }
}

#[test]
fn a_put_that_is_found_after_a_kill_and_synced_is_power_safe() {
    for seed in 0..40 {
        run(async {
            let (device, store) = open(SimDevice::new(1 << 30, seed % 2 == 0), OPTIONS);
            put(&store, 1, &bytes_of(1, 60_000)).await.unwrap();
            if seed % 3 == 0 {
                store.checkpoint().await.unwrap();
            }
            // Over the end of a volume, so that it lies in one that is closed.
            for block in 2..=6 {
                put(&store, block, &bytes_of(block, 60_000)).await.unwrap();
            }
            drop(store);

            // A client that comes back asks for its shards, or puts them again, and syncs.
            let store = reopen(&device);
            for block in 1..=6 {
                store.find(BlockId(block), ShardNo(0)).unwrap();
                put(&store, block, &bytes_of(block, 60_000)).await.unwrap();
            }
            store.sync().await.unwrap();
            let (_, store) = open(device.crash(seed), OPTIONS);
            for block in 1..=6 {
                let entry = store.find(BlockId(block), ShardNo(0)).unwrap();
                assert!(get(&store, &entry).await == Some(bytes_of(block, 60_000)));
            }
        });
    }
}

#[test]
fn a_deletion_that_finds_nothing_waits_for_the_hole_that_another_makes() {
    run(async {
        let (device, store) = open(SimDevice::new(1 << 30, true), OPTIONS);
        put(&store, 1, &bytes_of(1, 60_000)).await.unwrap();
        device.stall_punch.store(true, SeqCst);
        let blocks = [BlockId(1)];
        let mut first = Box::pin(store.delete(&blocks));
        while device.stalled.load(SeqCst) == 0 {
            assert!(futures_util::poll!(first.as_mut()).is_pending());
        }
        assert!(store.find(BlockId(1), ShardNo(0)).is_err());
        let mut second = Box::pin(store.delete(&blocks));
        for _ in 0..100 {
            assert!(futures_util::poll!(second.as_mut()).is_pending(), "confirmed, and the shard is there");
            tokio::task::yield_now().await;
        }
        drop(first);
        assert_eq!(second.await.unwrap(), 0, "when the other is over, so is this one");
    });
}
