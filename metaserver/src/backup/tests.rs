//! Backups of a store in memory, damaged in every place, and restored.

use std::sync::Arc;

use super::*;
use crate::{
    fsck,
    store::{Idle, MemoryStore, Order},
    testing::{World, run},
};

fn backup_of(store: &dyn MetaStore) -> Vec<u8> {
    let mut file = Vec::new();
    let snapshot = store.snapshot().unwrap().unwrap();
    write::<StoreError>(&*snapshot, "cluster", 7, |piece| {
        file.extend(piece);
        Ok(())
    })
    .unwrap();
    file
}

fn world() -> World {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(10));
    w.write(f, vec![run(0, 3 << 24, b, 0)]).unwrap();
    for i in 0..200 {
        w.file(&format!("file {i}"));
    }
    w
}

#[test]
fn a_restored_store_is_the_same_and_goes_on_with_new_ids() {
    let w = world();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup");
    std::fs::write(&file, backup_of(&*w.store)).unwrap();
    let (about, records) = verify(&file).unwrap();
    assert_eq!((about.cluster_id.as_str(), about.created), ("cluster", 7));
    let store = Arc::new(MemoryStore::default());
    load(&file, &*store, close(&*store, "memory", false).unwrap()).unwrap();
    for again in [false, true] {
        assert!(matches!(close(&*store, "memory", again), Err(BackupError::NotEmpty(_))));
    }
    let all = |s: &dyn MetaStore| s.scan(&[1u8; 1]..&[0xff; 1], Order::Ascending, usize::MAX).unwrap();
    let (before, after) = (all(&*w.store), all(&*store));
    assert_eq!((before.len() as u64, after.len()), (records, before.len()));
    for (old, new) in before.iter().zip(&after) {
        assert_eq!(old.0, new.0);
        if ![keys::COUNTERS, keys::MAP, keys::TARGET].contains(&old.0[0]) {
            assert_eq!(old.1, new.1);
        }
    }
    assert!(fsck::check(&Idle(&*store)).unwrap().is_clean());
    let mut old = World { now: w.now, ..World::bare(store.clone()) };
    // The client of before has nothing to say.
    old.reattach(w.session, &[]);
    old.session = old.attach();
    let (before, after) = (w.core.members().map().epoch.0, old.core.members().map().epoch.0);
    assert!(after >= before + EPOCHS_SKIPPED);
    assert!(old.lease(1) >= IDS_SKIPPED && old.file("new").0 >= IDS_SKIPPED);
    old.check();
}

#[test]
fn whatever_is_damaged_or_missing_is_noticed() {
    let w = world();
    let good = backup_of(&*w.store);
    let path = Path::new("b");
    let check = |bytes: &[u8]| read(path, &mut &bytes[..], |_, _| Ok(()));
    check(&good).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        assert!(check(&bad).is_err(), "byte {at} of {}", good.len());
    }
    for length in (0..good.len()).step_by(7) {
        let torn = check(&good[..length]);
        assert!(matches!(torn, Err(BackupError::Damaged { .. })), "{length} bytes");
    }
    let behind: Vec<u8> = good.iter().copied().chain([0]).collect();
    assert!(check(&behind).unwrap_err().to_string().contains("behind its end"));
    assert!(check(b"something else altogether").unwrap_err().to_string().contains("not a backup"));
}

#[test]
fn a_restore_that_was_interrupted_is_not_opened() {
    let w = world();
    let store = Arc::new(MemoryStore::default());
    let fence = store.take_over().unwrap();
    let mut writes: Vec<_> = w
        .store
        .scan(&[1u8; 1]..&[0xff; 1], Order::Ascending, 50)
        .unwrap()
        .into_iter()
        .map(|(k, v)| (k, Some(v)))
        .collect();
    writes.push((keys::CLOSED.to_vec(), Some(Closed::restoring().encode())));
    store.commit(Batch { writes }, fence).unwrap();
    let opened = crate::core::Core::open(store, "cluster", &w.config, w.now);
    assert!(opened.err().unwrap().message.contains("restore again"));
}

/// Wherever it was interrupted: before and after the label of its folder, and with records of an older backup.
#[test]
fn a_restore_that_was_interrupted_is_begun_again_when_that_is_asked_for() {
    let w = world();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup");
    std::fs::write(&file, backup_of(&*w.store)).unwrap();
    for labelled in [false, true] {
        let data = dir.path().join(format!("meta-{labelled}"));
        {
            let mut folder = Folder::claim_unlabelled(&data, "cluster").unwrap();
            let store = FjallStore::open(&folder.store, FjallOptions::default()).unwrap();
            let fence = close(&store, "it", false).unwrap();
            if labelled {
                folder.label().unwrap();
                let older = vec![(b"z-older".to_vec(), Some(Bytes::from_static(b"gone by now")))];
                store.commit(Batch { writes: older }, fence).unwrap();
            }
        }
        let said = restore(&file, &data, None, false).unwrap_err().to_string();
        assert!(said.contains("interrupted") && said.contains("--force"), "{said}");
        let (_, records) = restore(&file, &data, None, true).unwrap();
        let checked = fsck::check_folder(&data).unwrap();
        assert!(checked.is_clean() && records > 200);
        {
            let folder = Folder::claim_existing(&data).unwrap();
            let store = FjallStore::open(&folder.store, FjallOptions::default()).unwrap();
            let all = keys::everything();
            let there = store.scan(&all.start..&all.end, Order::Ascending, usize::MAX).unwrap();
            assert_eq!(there.len() as u64, records);
        }
        for again in [false, true] {
            let said = restore(&file, &data, None, again).unwrap_err();
            assert!(matches!(said, BackupError::NotEmpty(_)), "{said}");
        }
    }
}

#[test]
fn a_file_appears_when_it_is_whole() {
    let w = world();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup");
    let good = backup_of(&*w.store);
    let mut writer = Writer::create(&file).unwrap();
    writer.write(&good[..good.len() - 1]).unwrap();
    assert!(writer.finish().is_err() && !file.exists(), "the connection broke");
    let mut writer = Writer::create(&file).unwrap();
    writer.write(&good).unwrap();
    writer.finish().unwrap();
    let data = dir.path().join("meta");
    let (about, records) = restore(&file, &data, None, false).unwrap();
    assert!(about.cluster_id == "cluster" && records > 200);
    assert!(restore(&file, &data, None, false).is_err(), "there is metadata now");
    assert!(fsck::check_folder(&data).unwrap().is_clean());
}

#[test]
fn a_later_restore_uses_no_ids_of_an_earlier_one() {
    let counters = Counters { next_block: 1, next_inode: 1, next_session: 1, ..Counters::default() };
    let restored = |age| {
        let value =
            Onwards::default().record(&[keys::COUNTERS], counters.encode_to_vec().into(), age).unwrap();
        Counters::decode(value).unwrap()
    };
    let (earlier, later) = (restored(10), restored(11));
    for (earlier, later) in [
        (earlier.next_block, later.next_block),
        (earlier.next_inode, later.next_inode),
        (earlier.next_session, later.next_session),
    ] {
        assert_eq!(later, earlier + IDS_PER_SECOND);
    }
    let map = pb::common::ClusterMap { epoch: 5, ..Default::default() };
    let epoch = |age| {
        let value = Onwards::default().record(&[keys::MAP], map.encode_to_vec().into(), age).unwrap();
        pb::common::ClusterMap::decode(value).unwrap().epoch
    };
    assert_eq!(epoch(11), epoch(10) + EPOCHS_PER_SECOND);
    assert!(epoch(0) > EPOCHS_SKIPPED);
}

/// Targets that were added since come with their numbers, and anything may have moved.
#[test]
fn a_restore_leaves_numbers_of_targets_free_and_takes_none_for_tidy() {
    let w = world();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup");
    std::fs::write(&file, backup_of(&*w.store)).unwrap();
    let data = dir.path().join("meta");
    restore(&file, &data, None, false).unwrap();
    let folder = Folder::claim_existing(&data).unwrap();
    let store = FjallStore::open(&folder.store, FjallOptions::default()).unwrap();
    let counters = Counters::decode(store.get(&[keys::COUNTERS]).unwrap().unwrap()).unwrap();
    assert!(counters.next_target >= TARGETS_SKIPPED && counters.next_server >= TARGETS_SKIPPED);
    let map = pb::common::ClusterMap::decode(store.get(&[keys::MAP]).unwrap().unwrap()).unwrap();
    let all = keys::all(keys::TARGET);
    let targets = store.scan(&all.start..&all.end, Order::Ascending, usize::MAX).unwrap();
    assert!(!targets.is_empty());
    for (_, record) in targets {
        assert_eq!(TargetRecord::decode(record).unwrap().displaced, map.epoch);
    }
}
