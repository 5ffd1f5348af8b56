//! Sessions, restarts, exactly-once, and an engine that fails; on both engines where the disk matters.

mod leases;

use std::{
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use fjordfs_proto::{InodeId, ROOT_INODE, SessionId, error::Errno::*, pb::meta::*};
use request::Op;
use response::Result as Reply;

use crate::{
    core::Event,
    ops::Start,
    refusal::Refusal,
    store::*,
    testing::{World, errno, hello, inline, registration, run},
};

const R: InodeId = ROOT_INODE;

fn make(name: &str, handle: u64) -> Op {
    let kind = FileKind::Regular.into();
    Op::Make(Make {
        parent: 1,
        name: name.to_owned().into(),
        kind,
        handle,
        exclusive: true,
        ..Make::default()
    })
}

fn fjall(folder: &Path) -> Arc<dyn MetaStore> {
    let small = FjallOptions { cache_bytes: 1 << 20, ..FjallOptions::default() };
    Arc::new(FjallStore::open(folder, small).unwrap())
}

/// Closes the engine and opens it again, as a new process would.
fn reopen(mut w: World, folder: &Path) -> World {
    let (now, session, sequences) = (w.now, w.session, std::mem::take(&mut w.sequences));
    w.store = Arc::new(MemoryStore::default());
    w.restart();
    drop(w);
    let mut w = World::bare(fjall(folder));
    (w.now, w.session, w.sequences) = (now, session, sequences);
    w.restart();
    w
}

#[test]
fn a_resent_mutation_is_answered_from_the_record_also_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut w = World::on(fjall(folder.path()));
    let session = w.session;
    let first = w.send(session, 3, 1, make("f", 0)).unwrap();
    assert_eq!(w.send(session, 3, 1, make("f", 0)).unwrap(), first, "not EEXIST");
    let mut w = reopen(w, folder.path());
    w.reattach(session, &[]);
    assert_eq!(w.send(session, 3, 1, make("f", 0)).unwrap(), first);
    assert_eq!(errno(w.send(session, 3, 2, make("f", 0))), EEXIST);
    // A refusal changed nothing and is not kept: the same again may succeed.
    w.send(session, 4, 1, Op::Remove(Remove { parent: 1, name: "f".into(), directory: false, time: None }))
        .unwrap();
    w.send(session, 3, 2, make("f", 0)).unwrap();
    assert_eq!(errno(w.send(session, 3, 1, make("g", 0))), EINVAL, "that sequence is over");
    assert_eq!(errno(w.send(session, 3, 0, make("g", 0))), EINVAL);
    assert_eq!(errno(w.send(session, 256, 1, make("g", 0))), EINVAL);
    w.check();
}

#[test]
fn a_resent_create_opens_its_handle_again() {
    let mut w = World::new();
    let session = w.session;
    let Reply::Entry(made) = w.send(session, 0, 1, make("f", 5)).unwrap() else { panic!() };
    let ino = InodeId(made.attr.unwrap().ino);
    w.restart();
    w.reattach(session, &[]);
    w.send(session, 0, 1, make("f", 5)).unwrap();
    w.idle(Duration::from_secs(7));
    w.send(session, 1, 1, Op::Remove(Remove { parent: 1, name: "f".into(), directory: false, time: None }))
        .unwrap();
    w.getattr(ino).unwrap();
    w.close(5);
    assert_eq!(errno(w.getattr(ino)), ESTALE);
    w.check();
}

#[test]
fn orphans_wait_for_everybody_of_before_the_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut w = World::on(fjall(folder.path()));
    let other = w.attach();
    let (kept, lost) = (w.file("kept"), w.file("lost"));
    w.open(kept, 1).unwrap();
    w.call_as(other, Op::Open(Open { ino: lost.0, handle: 1 })).unwrap();
    w.remove(R, "kept", false).unwrap();
    w.remove(R, "lost", false).unwrap();

    let mut w = reopen(w, folder.path());
    w.reattach(w.session, &[(1, kept)]);
    w.idle(Duration::from_secs(20));
    assert_eq!(w.check().orphans, 2, "the other client may still come back");
    let unlinked = w.make(R, "new", FileKind::Regular).unwrap();
    w.remove(R, "new", false).unwrap();
    w.getattr(unlinked).unwrap();

    w.idle(Duration::from_secs(20));
    assert_eq!(w.check().orphans, 1, "it timed out");
    assert_eq!(errno(w.getattr(lost)), ESTALE);
    assert_eq!(errno(w.getattr(unlinked)), ESTALE);
    w.getattr(kept).unwrap();
    w.close(1);
    assert_eq!(errno(w.getattr(kept)), ESTALE);
    w.check();
}

#[test]
fn a_session_that_ends_leaves_nothing() {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(10));
    w.open(f, 1).unwrap();
    w.write(f, vec![run(0, 4096, b + 3, 0)]).unwrap();
    w.remove(R, "f", false).unwrap();
    let other = w.attach();
    w.core.goodbye(w.session, w.now);
    w.core.commit().unwrap();
    assert!(matches!(w.core.take_events()[..], [Event::SessionEnded(..)]));
    w.session = other;
    assert_eq!(
        w.deleted_blocks(),
        (b..b + 10).collect::<Vec<_>>(),
        "swept, and the orphan's block with them"
    );
    let report = w.check();
    assert_eq!((report.blocks_leased, report.orphans, report.inodes), (0, 0, 1));
}

#[test]
fn a_silent_session_times_out_and_cannot_come_back() {
    let mut w = World::new();
    let quiet = w.attach();
    w.idle(Duration::from_secs(29));
    assert_eq!(w.core.status(w.now).sessions.len(), 2);
    w.idle(Duration::from_secs(3));
    let status = w.core.status(w.now);
    assert_eq!(status.sessions.iter().map(|s| s.session).collect::<Vec<_>>(), [w.session.0]);
    let refused = w.core.attach(&hello(quiet.0), w.now).unwrap_err();
    assert!(matches!(refused, Refusal::NotFound(why) if why.contains("mount again")));
}

#[test]
fn strangers_are_turned_away() {
    let mut w = World::new();
    let old = Hello { protocol_version: 99, ..hello(0) };
    assert!(
        matches!(w.core.attach(&old, w.now), Err(Refusal::Precondition(why)) if why.contains("version 99"))
    );
    let lost = Hello { cluster_id: "other".into(), ..hello(0) };
    assert!(matches!(w.core.attach(&lost, w.now), Err(Refusal::Precondition(why)) if why.contains("other")));
    let home = Hello { cluster_id: "cluster".into(), ..hello(0) };
    w.core.attach(&home, w.now).unwrap();
}

#[test]
fn ids_are_not_reused_after_a_restart() {
    let mut w = World::new();
    let (session, f, b) = (w.attach(), w.file("f"), w.lease(7));
    w.restart();
    w.reattach(w.session, &[]);
    w.reattach(session, &[]);
    assert!(w.attach().0 > session.0 + 1);
    assert!(w.file("g").0 > f.0 + 1);
    assert_eq!(w.lease(1), b + 7);
    w.check();
}

/// Whoever has seen bytes that a power failure has taken back knows that others have taken their place.
#[test]
fn versions_that_a_power_failure_took_back_are_not_given_to_other_bytes() {
    let changes: [fn(&mut World, InodeId) -> Attr; 4] = [
        |w, f| w.write(f, vec![inline(0, b"other")]).unwrap(),
        |w, f| w.truncate(f, 1).unwrap(),
        |w, f| w.allocate(f, 0..2, true).unwrap(),
        |w, f| {
            let source = w.file("source");
            w.write(source, vec![inline(0, b"bytes")]).unwrap();
            w.copy((source, 0), (f, 0), 5).unwrap().1
        },
    ];
    for change in changes {
        let mut w = World::new();
        let f = w.file("f");
        w.write(f, vec![inline(0, b"old")]).unwrap();
        let synced = MemoryStore::default();
        let fence = synced.take_over().unwrap();
        let writes = w.store.scan(&[]..&[0xff], Order::Ascending, usize::MAX).unwrap();
        let writes = writes.into_iter().map(|(key, value)| (key, Some(value))).collect();
        synced.commit(Batch { writes }, fence).unwrap();
        let seen = w.write(f, vec![inline(0, b"seen and lost")]).unwrap().data_version;

        w.store = Arc::new(synced);
        w.restart();
        w.reattach(w.session, &[]);
        let version = change(&mut w, f).data_version;
        assert!(version > seen, "{version} is not beyond {seen}");
        // Its writer knows by this that nobody else has changed it.
        assert_eq!(w.write(f, vec![inline(0, b"more")]).unwrap().data_version, version + 1);
        let made = w.file("made since");
        assert_eq!(w.write(made, vec![inline(0, b"new")]).unwrap().data_version, 1);
        w.check();
    }
}

/// Records that go on on another engine: its fence begins anew.
#[test]
fn versions_jump_on_another_engine_too() {
    let mut w = World::new();
    let f = w.file("f");
    w.write(f, vec![inline(0, b"old")]).unwrap();
    for _ in 0..5 {
        w.restart();
    }
    w.reattach(w.session, &[]);
    let moved = MemoryStore::default();
    let fence = moved.take_over().unwrap();
    let writes = w.store.scan(&[1]..&[0xff], Order::Ascending, usize::MAX);
    let writes = writes.unwrap().into_iter().map(|(key, value)| (key, Some(value))).collect();
    moved.commit(Batch { writes }, fence).unwrap();
    let seen = w.write(f, vec![inline(0, b"seen and lost")]).unwrap().data_version;
    w.store = Arc::new(moved);
    w.restart();
    w.reattach(w.session, &[]);
    let version = w.write(f, vec![inline(0, b"other")]).unwrap().data_version;
    assert!(version > seen, "{version} is not beyond {seen}");
}

/// A store of this run of the kernel.
struct Booted {
    inner: Arc<dyn MetaStore>,
    boot: u64,
}

impl MetaStore for Booted {
    fn get(&self, key: &[u8]) -> StoreResult<Option<Bytes>> {
        self.inner.get(key)
    }
    fn scan(&self, range: Range<&[u8]>, order: Order, limit: usize) -> StoreResult<Vec<Pair>> {
        self.inner.scan(range, order, limit)
    }
    fn commit(&self, batch: Batch, fence: Fence) -> StoreResult<Ticket> {
        self.inner.commit(batch, fence)
    }
    fn sync(&self) -> StoreResult<Ticket> {
        self.inner.sync()
    }
    fn take_over(&self) -> StoreResult<Fence> {
        self.inner.take_over()
    }
    fn name(&self) -> &'static str {
        "booted"
    }
    fn boot(&self) -> Option<u64> {
        Some(self.boot)
    }
}

/// A client that goes on over a power failure has seen bytes that are gone, and must not take them for newer than those that there are.
#[test]
fn after_another_boot_every_file_is_newer_than_what_anybody_has_seen() {
    let memory: Arc<dyn MetaStore> = Arc::new(MemoryStore::default());
    let booted = |boot| Arc::new(Booted { inner: memory.clone(), boot });
    let mut w = World::on(booted(1));
    let (f, untouched) = (w.file("f"), w.file("untouched"));
    let first = w.write(f, vec![inline(0, b"old")]).unwrap().data_version;
    assert_eq!(first, 1, "a new cluster has seen nothing fail");
    w.restart();
    w.reattach(w.session, &[]);
    let version = |w: &mut World, ino| w.getattr(ino).unwrap().data_version;
    assert_eq!(version(&mut w, f), first, "the metaserver only was started again");
    let seen = w.write(f, vec![inline(0, b"seen")]).unwrap().data_version;
    w.store = booted(2);
    w.restart();
    w.reattach(w.session, &[]);
    let after = version(&mut w, f);
    // Changes that were lost have counted further.
    assert!(after > seen + 1000 && version(&mut w, untouched) > seen, "{after} is not beyond {seen}");
    assert_eq!(w.lookup(ROOT_INODE, "f").unwrap().data_version, after);
    assert_eq!(w.write(f, vec![inline(0, b"new")]).unwrap().data_version, after + 1);
    let made = w.file("made");
    assert_eq!(w.write(made, vec![inline(0, b"new")]).unwrap().data_version, 1);
    let (f_then, made_then) = (version(&mut w, f), version(&mut w, made));
    w.restart();
    w.reattach(w.session, &[]);
    assert_eq!((version(&mut w, f), version(&mut w, made)), (f_then, made_then), "the same boot");
    w.check();
}

#[test]
fn versions_grow_whatever_the_fence_is() {
    let start = |fence| Start { fence: Fence(fence), first_inode: InodeId(100) };
    let old = |fence, last| start(fence).next_version(InodeId(99), last);
    for (fence, last) in [(1, 0), (1, 7), (3, 2 << 40), (2, 3 << 40), (u64::MAX, 0), (u64::MAX, u64::MAX - 1)]
    {
        assert!(old(fence, last) > last, "{fence} {last}");
    }
    assert!(old(3, 0) > old(2, (1 << 40) - 1), "the next start is beyond the one before");
    assert_eq!(start(9).next_version(InodeId(100), 0), 1);
}

/// An engine whose writes fail when told to.
struct Faulty {
    inner: MemoryStore,
    fail: AtomicBool,
}

impl MetaStore for Faulty {
    fn get(&self, key: &[u8]) -> StoreResult<Option<Bytes>> {
        self.inner.get(key)
    }
    fn scan(&self, range: Range<&[u8]>, order: Order, limit: usize) -> StoreResult<Vec<Pair>> {
        self.inner.scan(range, order, limit)
    }
    fn commit(&self, batch: Batch, fence: Fence) -> StoreResult<Ticket> {
        if self.fail.load(Ordering::Relaxed) {
            return Err(StoreError::NoSpace { folder: "/full/disk".into() });
        }
        self.inner.commit(batch, fence)
    }
    fn sync(&self) -> StoreResult<Ticket> {
        self.inner.sync()
    }
    fn take_over(&self) -> StoreResult<Fence> {
        self.inner.take_over()
    }
    fn name(&self) -> &'static str {
        "faulty"
    }
}

#[test]
fn nothing_is_acknowledged_once_the_engine_failed() {
    let store = Arc::new(Faulty { inner: MemoryStore::default(), fail: AtomicBool::new(false) });
    let mut w = World::on(store.clone());
    let f = w.file("f");
    w.write(f, vec![]).unwrap();
    store.fail.store(true, Ordering::Relaxed);
    let epoch = w.core.members().map().epoch;
    w.core.register(&registration("three", &["three"]), w.now).unwrap();
    let refused = w.call(make("g", 9)).unwrap_err();
    assert_eq!(refused.errno, ENOSPC);
    assert!(refused.message.contains("/full/disk"), "{refused}");
    assert_eq!(w.core.members().map().epoch, epoch, "the map does not run ahead of the store");
    assert_eq!(w.core.status(w.now).sessions[0].handles, 0, "nor do handles");

    store.fail.store(false, Ordering::Relaxed);
    assert_eq!(errno(w.call(make("g", 9))), ENOSPC, "a disk that failed is not trusted again");
    assert_eq!(errno(w.call(Op::Sync(Sync {}))), ENOSPC);
    w.getattr(f).unwrap();
    w.open(f, 3).unwrap();
    w.close(3);
    assert_eq!(errno(w.lookup(R, "g")), ENOENT);
    assert!(w.core.attach(&hello(0), w.now).is_err());
    w.tick();

    w.restart();
    w.reattach(w.session, &[]);
    w.call(make("g", 9)).unwrap();
    w.check();
}

#[test]
fn a_nearly_full_disk_takes_only_what_frees_space() {
    let mut w = World::new();
    let (f, block) = (w.file("f"), w.lease(2));
    w.core.set_low_space(Some("the metadata disk is full".into()));
    assert_eq!(errno(w.call(make("g", 0))), ENOSPC);
    assert_eq!(errno(w.call(Op::LeaseBlocks(LeaseBlocks { count: 1 }))), ENOSPC);
    assert_eq!(errno(w.write(f, vec![run(0, 4096, block, 0)])), ENOSPC);
    let abandoned = vec![block];
    w.commit(Commit { abandoned, ..Commit::default() }).unwrap();
    assert_eq!(w.deleted_blocks(), [block], "what could not be committed");
    w.remove(R, "f", false).unwrap();
    for told in [w.core.status(w.now).trouble, w.core.meta_status().trouble] {
        assert!(told.contains("the metadata disk is full"), "{told}");
    }
    w.core.set_low_space(None);
    assert_eq!(w.core.status(w.now).trouble, "");
    w.call(make("g", 0)).unwrap();
    w.check();
}

#[test]
fn a_failed_operation_in_a_burst_leaves_the_others_alone() {
    let mut w = World::new();
    let mut send = |slot, op| {
        let request = Request { id: 1, slot, sequence: 1, op: Some(op), ..Request::default() };
        w.answer(w.session, request).response.result.unwrap()
    };
    let remove = || Op::Remove(Remove { parent: 1, name: "f".into(), directory: false, time: None });
    assert!(matches!(send(0, make("f", 0)), Reply::Entry(_)));
    assert!(matches!(send(1, make("f", 0)), Reply::Error(_)));
    assert!(matches!(send(2, remove()), Reply::Empty(_)));
    assert!(matches!(send(3, remove()), Reply::Error(_)));
    assert!(matches!(send(4, make("f", 0)), Reply::Entry(_)));
    assert!(matches!(send(4, make("f", 0)), Reply::Entry(_)), "a resend within the burst");
    w.core.commit().unwrap();
    assert_eq!(w.check().inodes, 2);
}

#[test]
fn a_stall_of_the_server_is_not_held_against_anybody() {
    let mut w = World::new();
    w.pass(Duration::from_secs(60));
    w.tick();
    let status = w.core.status(w.now);
    assert_eq!(status.sessions.len(), 1);
    assert!(w.core.members().facts().capacity > 0, "data servers are up");
    w.idle(Duration::from_secs(31));
    assert_eq!(w.core.members().facts().capacity, 0, "silence is silence again");
}
