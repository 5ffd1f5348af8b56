//! Damage of every kind that can be mended, mended while others work.

use std::sync::Arc;

use bytes::Bytes;
use fjordfs_proto::{
    BlockId, InodeId, ROOT_INODE,
    pb::meta::{FileKind, UsesRequest},
};
use prost::Message;

use super::*;
use crate::{
    records::{DeadRun, Dirent, ExtentRecord, Inode, LiveBlock},
    store::{Batch, MemoryStore},
    testing::{World, run},
};

type Writes = Vec<(Key, Option<Bytes>)>;

/// Writes past the metaserver, which then starts again.
fn damage(w: &mut World, writes: Writes) {
    let fence = w.store.take_over().unwrap();
    w.store.commit(Batch { writes }, fence).unwrap();
    let session = w.session;
    w.restart();
    w.reattach(session, &[]);
}

fn record<M: Message + Default>(w: &World, key: &Key) -> M {
    M::decode(w.store.get(key).unwrap().unwrap()).unwrap()
}

fn inode(w: &World, ino: InodeId, change: impl FnOnce(&mut Inode)) -> (Key, Option<Bytes>) {
    let key = keys::inode(ino);
    let mut inode: Inode = record(w, &key);
    change(&mut inode);
    (key, Some(inode.encode_to_vec().into()))
}

fn put(key: Key, record: &impl Message) -> (Key, Option<Bytes>) {
    (key, Some(record.encode_to_vec().into()))
}

/// Checks, lets `meanwhile` happen, and repairs.
fn mend(w: &mut World, problems: usize, meanwhile: impl FnOnce(&mut World)) {
    let found = check(&*w.core.snapshot().unwrap()).unwrap();
    assert!(found.problems.len() >= problems, "{found:#?}");
    meanwhile(w);
    let fixes = found.fixes.len() as u64;
    assert!(w.core.repair(&found.fixes, w.now).unwrap() <= fixes);
    w.core.commit().unwrap();
    w.tick();
    w.check();
}

#[test]
fn counts_are_set_right_while_they_change() {
    let mut w = World::on(Arc::new(MemoryStore::default()));
    let (d, b) = (w.dir(ROOT_INODE, "d"), w.lease(10));
    let f = w.make(d, "f", FileKind::Regular).unwrap();
    w.write(f, vec![run(0, 1 << 24, b, 0), run(2 << 24, 1 << 20, b + 1, 0)]).unwrap();
    w.write(f, vec![run(3 << 24, 1 << 20, b + 2, 0), run(5 << 24, 1 << 20, b + 2, 1 << 20)]).unwrap();
    w.set_xattr(f, "user.a", b"1", 0).unwrap();
    let mut counters: Counters = record(&w, &vec![keys::COUNTERS]);
    (counters.inodes, counters.orphans, counters.queued) = (90, 3, 7);
    let live = keys::live(BlockId(b + 2));
    assert_eq!(record::<LiveBlock>(&w, &live).live, 2 << 20);
    let writes = vec![
        put(vec![keys::COUNTERS], &counters),
        inode(&w, f, |i| (i.nlink, i.allocated, i.xattr_list) = (9, 1 << 30, 99)),
        inode(&w, d, |i| i.nlink = 1),
        put(live, &LiveBlock { live: 5 << 20 }),
    ];
    damage(&mut w, writes);
    mend(&mut w, 8, |w| {
        w.link(f, ROOT_INODE, "another").unwrap();
        w.write(f, vec![run(7 << 24, 1 << 20, b + 3, 0)]).unwrap();
        w.truncate(f, 5 << 24).unwrap();
        w.set_xattr(f, "user.b", b"1", 0).unwrap();
        w.dir(d, "below");
    });
    assert_eq!((w.getattr(f).unwrap().nlink, w.getattr(d).unwrap().nlink), (2, 3));
    w.remove(d, "f", false).unwrap();
    w.remove(ROOT_INODE, "another", false).unwrap();
    w.deleted_blocks();
    w.check();
}

/// Its blocks may be those of what cannot be read.
#[test]
fn records_that_cannot_be_read_are_told_to_who_looks_for_garbage() {
    let mut w = World::on(Arc::new(MemoryStore::default()));
    let b = w.lease(10);
    let f = w.file("f");
    w.write(f, vec![run(0, 1 << 24, b, 0)]).unwrap();
    let read = |w: &mut World| runs::read(&*w.core.snapshot().unwrap()).unwrap();
    assert_eq!(read(&mut w).unreadable, None);
    let mut extent: ExtentRecord = record(&w, &keys::extent(f, 0));
    extent.layout = 0xffff;
    let writes = vec![put(keys::extent(f, 0), &extent)];
    damage(&mut w, writes);
    let found = read(&mut w);
    assert!(found.live.is_empty() && found.unreadable.is_some(), "{:?}", found.unreadable);
}

#[test]
fn what_lost_its_name_is_found_again() {
    let mut w = World::on(Arc::new(MemoryStore::default()));
    let (d, b) = (w.dir(ROOT_INODE, "d"), w.lease(10));
    let below = w.dir(d, "below");
    let f = w.make(below, "f", FileKind::Regular).unwrap();
    w.write(f, vec![run(0, 1 << 24, b, 0)]).unwrap();
    let lonely = w.file("lonely");
    let writes = vec![
        (keys::dirent(d, b"below"), None),
        (keys::dirent(ROOT_INODE, b"lonely"), None),
        inode(&w, d, |i| i.nlink = 2),
        put(keys::dirent(d, b"nothing"), &Dirent { ino: 1 << 19, kind: FileKind::Regular.into() }),
    ];
    damage(&mut w, writes);
    mend(&mut w, 3, |w| {
        w.file("new");
    });
    let found = InodeId(w.lookup(ROOT_INODE, "lost+found").unwrap().ino);
    assert_eq!(w.lookup(found, &format!("i{}", lonely.0)).unwrap().ino, lonely.0);
    assert_eq!(w.lookup(found, &format!("i{}", below.0)).unwrap().ino, below.0);
    assert_eq!(w.lookup(below, "f").unwrap().size, 1 << 24);
    assert!(w.lookup(d, "nothing").is_err());
}

#[test]
fn live_blocks_are_not_deleted_and_extents_of_nobody_go() {
    let mut w = World::on(Arc::new(MemoryStore::default()));
    let (f, gone, b) = (w.file("f"), w.file("gone"), w.lease(20));
    w.write(f, vec![run(0, 4 << 24, b, 0)]).unwrap();
    w.write(gone, vec![run(0, 2 << 24, b + 10, 0)]).unwrap();
    let mut counters: Counters = record(&w, &vec![keys::COUNTERS]);
    counters.inodes -= 1;
    counters.queued += 4;
    let writes = vec![
        put(vec![keys::COUNTERS], &counters),
        put(keys::dead(BlockId(b + 1)), &DeadRun { count: 3, layout: 0 }),
        (keys::delete(fjordfs_proto::TargetId(1), BlockId(b)), Some(Bytes::new())),
        (keys::inode(gone), None),
        (keys::dirent(ROOT_INODE, b"gone"), None),
    ];
    // Not through a start: that would begin to expand the run.
    let fence = w.store.take_over().unwrap();
    w.store.commit(Batch { writes }, fence).unwrap();
    w.restart();
    let found = check(&*w.core.snapshot().unwrap()).unwrap();
    assert_eq!(w.core.repair(&found.fixes, w.now).unwrap(), found.fixes.len() as u64, "{found:#?}");
    w.core.commit().unwrap();
    let session = w.session;
    w.reattach(session, &[]);
    assert_eq!(w.deleted_blocks(), [b + 10, b + 11]);
    w.check();
}

#[test]
fn an_orphan_record_of_nothing_goes_and_a_back_pointer_is_set_right() {
    let mut w = World::on(Arc::new(MemoryStore::default()));
    let d = w.dir(ROOT_INODE, "d");
    let mut counters: Counters = record(&w, &vec![keys::COUNTERS]);
    counters.orphans += 1;
    let writes = vec![
        put(vec![keys::COUNTERS], &counters),
        (keys::orphan(InodeId(1 << 19)), Some(Bytes::new())),
        inode(&w, d, |i| i.name = "elsewhere".into()),
    ];
    damage(&mut w, writes);
    mend(&mut w, 2, |_| {});
}

#[test]
fn garbage_is_deleted_where_it_lies_and_nothing_that_may_be_in_use() {
    let mut w = World::on(Arc::new(MemoryStore::default()));
    let (f, b) = (w.file("f"), w.lease(10));
    w.write(f, vec![run(0, 1 << 24, b, 0)]).unwrap();
    w.truncate(f, 0).unwrap();
    w.deleted_blocks();
    let request = |cluster: &str, target: u64, blocks: Vec<u64>| fjordfs_proto::pb::meta::MendRequest {
        cluster_id: cluster.into(),
        garbage: vec![fjordfs_proto::pb::meta::DeletedBlocks { target, blocks }],
        missing: vec![],
    };
    let now = w.now;
    assert!(w.core.mend(&request("other", 1, vec![b]), now).is_err());
    assert!(w.core.mend(&request("cluster", 9, vec![b]), now).is_err());
    assert!(w.core.mend(&request("cluster", 1, vec![b, b + 1]), now).is_err(), "that one is leased");
    assert!(w.core.mend(&request("cluster", 1, vec![b + 10]), now).is_err(), "that one is to come");
    assert_eq!(w.core.mend(&request("cluster", 1, vec![b]), now).unwrap(), 1);
    assert_eq!(w.core.mend(&request("cluster", 1, vec![b]), now).unwrap(), 0, "it is queued");
    w.core.commit().unwrap();
    w.check();
    assert_eq!(w.deletions(), [(1, b)]);
    w.check();
}

#[test]
fn uses_of_blocks_and_files_of_many_small_pieces_are_found() {
    let mut w = World::new();
    let (f, g, b) = (w.file("f"), w.file("g"), w.lease(12));
    w.write(f, vec![run(0, 3000, b, 0), run(3000, 5000, b, 9000)]).unwrap();
    w.copy((f, 3000), (g, 500), 700).unwrap();
    for n in 0..10 {
        w.write(g, vec![run(10_000 * (n + 1), 100, b + 1 + n, 0)]).unwrap();
    }
    let ask = |blocks: &[u64], extents_min| {
        let asked = UsesRequest { blocks: blocks.to_vec(), extents_min, extent_bytes_max: 1000 };
        let (mut used, mut scattered) = (Vec::new(), Vec::new());
        super::uses::read(&crate::store::Idle(&*w.store), &asked, |found| match found {
            super::uses::Found::Use(u) => used.push((u.ino, u.offset, u.block, u.block_offset, u.length)),
            super::uses::Found::Scattered(ino) => scattered.push(ino),
        })
        .unwrap();
        (used, scattered)
    };
    let of_b = [(f.0, 0, b, 0, 3000), (f.0, 3000, b, 9000, 5000), (g.0, 500, b, 9000, 700)];
    assert_eq!(ask(&[b], 0), (of_b.to_vec(), vec![]));
    assert_eq!(ask(&[], 11), (vec![], vec![g]));
    assert_eq!(ask(&[b + 99], 12), (vec![], vec![]));
}
