//! Backups of a store in memory, damaged in every place, and restored.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use fjordfs_proto::pb;
use proptest::prelude::*;
use prost::Message;

use super::{
    restore::{
        EPOCHS_PER_SECOND, EPOCHS_SKIPPED, IDS_PER_SECOND, IDS_SKIPPED, Onwards, TARGETS_SKIPPED, close, load,
    },
    tables::tests::any_pair,
    *,
};
use crate::{
    fsck, keys,
    label::Folder,
    records::{Counters, TargetRecord},
    store::{Batch, FjallOptions, FjallStore, Idle, MemoryStore, MetaStore, Order},
    store_label::Closed,
    testing::{World, run},
};

/// Nobody stops it.
pub(super) static GO: AtomicBool = AtomicBool::new(false);

pub(super) fn backup_of(store: &dyn MetaStore, created: u64) -> Vec<u8> {
    let mut file = Vec::new();
    let snapshot = store.snapshot().unwrap().unwrap();
    write::<StoreError>(&*snapshot, "cluster", created, |piece| {
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
    std::fs::write(&file, backup_of(&*w.store, 7)).unwrap();
    let (about, records) = verify(Form::Backup, &file, &GO).unwrap();
    assert_eq!((about.cluster_id.as_str(), about.created), ("cluster", 7));
    let store = Arc::new(MemoryStore::default());
    load(Form::Backup, &file, &*store, close(&*store, "memory", false).unwrap(), &GO).unwrap();
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
    let good = backup_of(&*w.store, 7);
    let path = Path::new("b");
    let check = |bytes: &[u8]| read(Form::Backup, path, bytes, |_, _| Ok(()));
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
    std::fs::write(&file, backup_of(&*w.store, 7)).unwrap();
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
        let said = restore(Form::Backup, &file, &data, None, false, &GO).unwrap_err().to_string();
        assert!(said.contains("interrupted") && said.contains("--force"), "{said}");
        let (_, records) = restore(Form::Backup, &file, &data, None, true, &GO).unwrap();
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
            let said = restore(Form::Backup, &file, &data, None, again, &GO).unwrap_err();
            assert!(matches!(said, BackupError::NotEmpty(_)), "{said}");
        }
    }
}

#[test]
fn a_file_appears_when_it_is_whole() {
    let w = world();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup");
    let good = backup_of(&*w.store, 7);
    let mut writer = Writer::create(Form::Backup, &file).unwrap();
    writer.write(&good[..good.len() - 1]).unwrap();
    assert!(writer.finish(&GO).is_err() && !file.exists(), "the connection broke");
    let mut writer = Writer::create(Form::Backup, &file).unwrap();
    writer.write(&good).unwrap();
    writer.finish(&GO).unwrap();
    let data = dir.path().join("meta");
    let (about, records) = restore(Form::Backup, &file, &data, None, false, &GO).unwrap();
    assert!(about.cluster_id == "cluster" && records > 200);
    assert!(restore(Form::Backup, &file, &data, None, false, &GO).is_err(), "there is metadata now");
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

fn all(store: &dyn MetaStore) -> Vec<Pair> {
    let all = keys::everything();
    store.scan(&all.start..&all.end, Order::Ascending, usize::MAX).unwrap()
}

/// The backup as a dump in a file.
fn dumped(backup: &[u8], file: &Path) {
    let mut writer = Writer::create(Form::Dump, file).unwrap();
    dump(backup, Path::new("b"), &GO, |piece| writer.write(piece)).unwrap();
    writer.finish(&GO).unwrap();
}

fn seconds_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    /// Backup, dump, load, backup: the records are those that a restore of the first backup makes.
    #[test]
    fn whatever_a_store_holds_comes_back_from_a_dump(
        pairs in proptest::collection::vec(any_pair(), 0..60)
    ) {
        let pairs: BTreeMap<_, _> = pairs.into_iter().collect();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("dump");
        let store = MemoryStore::default();
        let fence = store.take_over().unwrap();
        let writes = pairs.iter().map(|(key, value)| (key.clone(), Some(value.clone()))).collect();
        store.commit(Batch { writes }, fence).unwrap();
        // Of later than now: then no time has passed since.
        dumped(&backup_of(&store, seconds_now() + 1_000_000), &file);
        let loaded = MemoryStore::default();
        let fence = close(&loaded, "it", false).unwrap();
        // Counters, maps and targets that cannot be read are refused.
        let mut onwards = Onwards::default();
        let expected: Result<Vec<Pair>, String> = pairs
            .into_iter()
            .map(|(key, value)| Ok((key.clone(), onwards.record(&key, value, 0)?)))
            .collect();
        match (load(Form::Dump, &file, &loaded, fence, &GO), expected) {
            (Ok(_), Ok(expected)) => prop_assert_eq!(all(&loaded), expected),
            (Err(BackupError::Damaged { .. }), Err(_)) => {}
            (loaded, expected) => prop_assert!(false, "{:?} {:?}", loaded, expected),
        }
    }
}

#[test]
fn a_loaded_store_is_what_a_restored_one_is() {
    let w = world();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let backup = backup_of(&*w.store, seconds_now() + 1_000_000);
    std::fs::write(at("backup"), &backup).unwrap();
    dumped(&backup, &at("dump"));
    let made = [(Form::Backup, at("backup")), (Form::Dump, at("dump"))].map(|(form, file)| {
        let data = at(&format!("meta of {form}"));
        let made = restore(form, &file, &data, None, false, &GO).unwrap();
        for again in [false, true] {
            let said = restore(form, &file, &data, None, again, &GO).unwrap_err();
            assert!(matches!(said, BackupError::NotEmpty(_)), "{said}");
        }
        assert!(fsck::check_folder(&data).unwrap().is_clean());
        let folder = Folder::claim_existing(&data).unwrap();
        let store = FjallStore::open(&folder.store, FjallOptions::default()).unwrap();
        (made, all(&store))
    });
    assert_eq!(made[0], made[1]);
    assert!(made[0].1.len() > 200);
}

#[test]
fn what_is_not_whole_or_was_stopped_leaves_nothing() {
    let w = world();
    let dir = tempfile::tempdir().unwrap();
    let (file, data) = (dir.path().join("dump"), dir.path().join("meta"));
    let backup = backup_of(&*w.store, 7);
    let names = || {
        let entries = std::fs::read_dir(dir.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
    };
    for stop in [false, true] {
        let mut writer = Writer::create(Form::Dump, &file).unwrap();
        let stop = AtomicBool::new(stop);
        let torn = &backup[..backup.len() - 20];
        assert!(dump(torn, Path::new("b"), &stop, |piece| writer.write(piece)).is_err());
        assert!(writer.finish(&GO).is_err());
        assert!(names().is_empty(), "{:?}", names());
    }
    let mut writer = Writer::create(Form::Dump, &file).unwrap();
    dump(&backup[..], Path::new("b"), &GO, |piece| writer.write(piece)).unwrap();
    assert!(matches!(writer.finish(&AtomicBool::new(true)), Err(BackupError::Stopped)));
    assert!(names().is_empty());
    dumped(&backup, &file);
    let stopped = restore(Form::Dump, &file, &data, None, false, &AtomicBool::new(true));
    assert!(matches!(stopped, Err(BackupError::Stopped)));
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replacen(r#""nlink":1"#, r#""nlink":2"#, 1)).unwrap();
    let said = restore(Form::Dump, &file, &data, None, false, &GO).unwrap_err().to_string();
    assert!(said.contains(&file.display().to_string()) && said.contains(": line "), "{said}");
    assert_eq!(names(), ["dump"]);
}

#[test]
fn only_files_are_replaced_or_read_twice() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let _socket = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for form in [Form::Backup, Form::Dump] {
        for other in [socket.as_path(), dir.path()] {
            let said = Writer::create(form, other).err().unwrap().to_string();
            assert!(said.contains("not a regular file") && said.contains("name a new file"), "{said}");
            let said = restore(form, other, &dir.path().join("meta"), None, false, &GO).unwrap_err();
            assert!(said.to_string().contains("it is read twice"), "{said}");
        }
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// Before anything is written.
#[test]
fn records_that_a_restore_could_not_use_are_told_with_their_place() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (prefix, what) in [
        (keys::COUNTERS, "its counters cannot be read"),
        (keys::MAP, "its cluster map cannot"),
        (keys::TARGET, "a target cannot"),
    ] {
        let store = MemoryStore::default();
        let fence = store.take_over().unwrap();
        let garbage = [b"A".to_vec(), vec![prefix]].map(|key| (key, Some(Bytes::from_static(b"\x0a\xff"))));
        store.commit(Batch { writes: garbage.to_vec() }, fence).unwrap();
        let backup = backup_of(&store, 7);
        std::fs::write(at("backup"), &backup).unwrap();
        dumped(&backup, &at("dump"));
        for (form, place) in [(Form::Backup, "frame 1: "), (Form::Dump, "line 3: ")] {
            let file = at(&form.to_string());
            let said = restore(form, &file, &at("meta"), None, false, &GO).unwrap_err().to_string();
            assert!(said.contains(place) && said.contains(what), "{said}");
            assert!(!at("meta").exists());
        }
    }
}

/// Targets that were added since come with their numbers, and anything may have moved.
#[test]
fn a_restore_leaves_numbers_of_targets_free_and_takes_none_for_tidy() {
    let w = world();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup");
    std::fs::write(&file, backup_of(&*w.store, 7)).unwrap();
    let data = dir.path().join("meta");
    restore(Form::Backup, &file, &data, None, false, &GO).unwrap();
    let folder = Folder::claim_existing(&data).unwrap();
    let store = FjallStore::open(&folder.store, FjallOptions::default()).unwrap();
    let counters = Counters::decode(store.get(&[keys::COUNTERS]).unwrap().unwrap()).unwrap();
    assert!(counters.next_target >= TARGETS_SKIPPED && counters.next_server >= TARGETS_SKIPPED);
    let map = pb::common::ClusterMap::decode(store.get(&[keys::MAP]).unwrap().unwrap()).unwrap();
    let all = keys::all(keys::TARGET);
    let targets = store.scan(&all.start..&all.end, Order::Ascending, usize::MAX).unwrap();
    assert!(!targets.is_empty());
    for (_, record) in targets {
        let target = TargetRecord::decode(record).unwrap();
        assert_eq!((target.displaced, target.unasked), (map.epoch, map.epoch));
    }
}
