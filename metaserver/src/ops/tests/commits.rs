//! Extents, liveness of blocks, leases.

use fjordfs_proto::{BLOCK_SIZE_MAX, InodeId, ROOT_INODE, error::Errno::*, pb::meta::*};
use request::Op;
use response::Result as Reply;

use crate::testing::{World, errno, inline, run};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = BLOCK_SIZE_MAX as u64;

fn commit_of(files: Vec<FileCommit>) -> Commit {
    Commit { files, ..Commit::default() }
}

#[test]
fn blocks_in_order_are_one_extent() {
    let mut w = World::new();
    let (f, first) = (w.file("f"), w.lease(8));
    for i in 0..4 {
        w.write(f, vec![run(i * BLOCK, BLOCK, first + i, 0)]).unwrap();
    }
    let attr = w.write(f, vec![run(4 * BLOCK, 100, first + 4, 0)]).unwrap();
    assert_eq!((attr.size, attr.allocated, attr.data_version), (4 * BLOCK + 100, 4 * BLOCK + 100, 5));
    assert_eq!(w.extents(f), [(0, 4 * BLOCK + 100)]);
    w.check();

    w.remove(ROOT_INODE, "f", false).unwrap();
    assert_eq!(w.deleted_blocks(), (first..first + 5).collect::<Vec<_>>());
    assert_eq!(w.deleted_blocks(), [0u64; 0], "confirmed once, gone for good");
    let report = w.check();
    assert_eq!((report.blocks_leased, report.blocks_dead), (3, 0));
}

#[test]
fn an_overwritten_part_dies_and_the_rest_stays() {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(8));
    w.write(f, vec![run(0, 3 * BLOCK, b, 0)]).unwrap();
    // Covers the end of the first block, all of the second, the start of the third.
    w.write(f, vec![run(BLOCK - MIB, BLOCK + 2 * MIB, b + 3, 0)]).unwrap();
    assert_eq!(
        w.extents(f),
        [(0, BLOCK - MIB), (BLOCK - MIB, BLOCK + 2 * MIB), (2 * BLOCK + MIB, BLOCK - MIB)]
    );
    assert_eq!(w.deleted_blocks(), [b + 1]);
    w.check();
    w.truncate(f, BLOCK).unwrap();
    assert_eq!(w.deleted_blocks(), [b + 2, b + 4]);
    let attr = w.truncate(f, 10 * BLOCK).unwrap();
    assert_eq!((attr.size, attr.allocated), (10 * BLOCK, BLOCK), "growing makes a hole");
    w.check();
    w.truncate(f, 0).unwrap();
    assert_eq!(w.deleted_blocks(), [b, b + 3]);
    assert_eq!(w.check().blocks_live, 0);
}

#[test]
fn blocks_that_are_not_safe_replace_nothing() {
    let mut w = World::new();
    let (f, other, b) = (w.file("f"), w.file("other"), w.lease(20));
    let of = |ino: InodeId, extents| FileCommit { ino: ino.0, extents, ..FileCommit::default() };
    let unsynced = |w: &mut World, files: Vec<FileCommit>| match w
        .call(Op::Commit(Commit { files, unsynced: true, ..Commit::default() }))
        .unwrap()
    {
        Reply::Commit(reply) => reply,
        reply => panic!("{reply:?}"),
    };
    let goes = |w: &mut World, file| {
        let reply = unsynced(w, vec![file]);
        assert_eq!((reply.sync_first, reply.files.len(), reply.files[0].errno), (false, 1, 0));
    };
    // A file of two pieces with a hole, and bytes in the metadata.
    goes(&mut w, of(f, vec![run(0, 2 * MIB, b, 0), run(4 * MIB, MIB, b + 1, 0)]));
    goes(&mut w, of(f, vec![run(2 * MIB, MIB, b + 2, 0)]));
    goes(&mut w, of(f, vec![run(5 * MIB, MIB, b + 3, 0)]));
    w.write(other, vec![inline(0, b"small")]).unwrap();
    let before = (w.whole_extents(f), w.whole_extents(other));
    for extents in [
        vec![run(MIB, 10, b + 4, 0)],
        vec![run(3 * MIB, 2 * MIB, b + 4, 0)],
        vec![run(6 * MIB - 1, 10, b + 4, 0)],
    ] {
        let reply = unsynced(&mut w, vec![of(f, extents)]);
        assert_eq!((reply.sync_first, reply.files.len()), (true, 0));
    }
    // All or nothing: the other file of the commit would have replaced nothing.
    let third = w.file("third");
    let both = vec![of(third, vec![run(0, MIB, b + 4, 0)]), of(other, vec![run(0, 10, b + 4, MIB as u32)])];
    assert!(unsynced(&mut w, both.clone()).sync_first);
    assert_eq!((w.whole_extents(f), w.whole_extents(other)), before);
    assert_eq!(w.extents(third), []);
    assert_eq!(w.deleted_blocks(), [0u64; 0]);
    // What travels in the metadata is as safe as they are, and what is appended replaces nothing, wherever it comes to lie.
    goes(&mut w, of(other, vec![inline(0, b"other")]));
    let appended = FileCommit { append_base: Some(MIB), ..of(f, vec![run(MIB, 10, b + 5, 0)]) };
    goes(&mut w, appended);
    assert_eq!(w.extents(f).last(), Some(&(6 * MIB, 10)));
    w.commit(commit_of(both)).unwrap();
    assert_eq!((w.extents(third), w.extents(other)), (vec![(0, MIB)], vec![(0, 10)]));
    w.check();
}

#[test]
fn a_shared_block_lives_as_long_as_any_of_its_files() {
    let mut w = World::new();
    let b = w.lease(2);
    let files: Vec<InodeId> = (0..4).map(|i| w.file(&format!("f{i}"))).collect();
    let parts = files.iter().enumerate().map(|(i, ino)| FileCommit {
        ino: ino.0,
        extents: vec![run(0, 4096, b, 4096 * i as u32)],
        ..FileCommit::default()
    });
    let replies = w.commit(commit_of(parts.collect())).unwrap();
    assert!(replies.iter().all(|r| r.errno == 0 && r.attr.unwrap().size == 4096));
    w.check();
    for i in 0..3 {
        w.remove(ROOT_INODE, &format!("f{i}"), false).unwrap();
        assert_eq!(w.deleted_blocks(), [0u64; 0]);
        w.check();
    }
    w.truncate(files[3], 1).unwrap();
    assert_eq!(w.deleted_blocks(), [0u64; 0]);
    w.truncate(files[3], 0).unwrap();
    assert_eq!(w.deleted_blocks(), [b]);
    w.check();
}

#[test]
fn a_missing_file_does_not_fail_the_others() {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(4));
    let part = |ino: u64, extents| FileCommit { ino, extents, ..FileCommit::default() };
    let replies = w
        .commit(commit_of(vec![
            part(999, vec![run(0, 4096, b, 0), run(4096, 4096, b + 1, 0)]),
            part(f.0, vec![run(0, 4096, b, 4096)]),
            part(1, vec![run(0, 4096, b + 2, 0)]),
        ]))
        .unwrap();
    assert_eq!(replies.iter().map(|r| r.errno).collect::<Vec<_>>(), [116, 0, 21]);
    assert_eq!(w.deleted_blocks(), [b + 1, b + 2], "blocks with no live byte go at once");
    w.check();
    w.remove(ROOT_INODE, "f", false).unwrap();
    assert_eq!(w.deleted_blocks(), [b]);
}

#[test]
fn a_block_overwritten_within_its_commit_is_counted_right() {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(4));
    w.write(f, vec![run(0, 8192, b, 0), run(0, 8192, b + 1, 0), run(4096, 4096, b + 1, 8192)]).unwrap();
    assert_eq!(w.deleted_blocks(), [b]);
    w.check();
    assert_eq!(w.extents(f), [(0, 4096), (4096, 4096)]);
}

/// A client may not know yet that the session is over that they were leased to; what is committed beside them counts.
#[test]
fn blocks_of_others_are_not_abandoned_and_hold_up_no_commit() {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(3));
    let stranger = w.attach();
    let theirs = match w.call_as(stranger, Op::LeaseBlocks(LeaseBlocks { count: 2 })).unwrap() {
        Reply::LeaseBlocks(reply) => reply.first,
        other => panic!("{other:?}"),
    };
    let file =
        FileCommit { ino: f.0, size: 4096, extents: vec![run(0, 4096, b, 0)], ..FileCommit::default() };
    let commit = Commit { files: vec![file], abandoned: vec![b + 1, theirs, 12345], ..Commit::default() };
    w.commit(commit).unwrap();
    assert_eq!(w.extents(f), [(0, 4096)]);
    assert_eq!(w.deleted_blocks(), [b + 1]);
    let own = Op::Commit(Commit { abandoned: vec![theirs], ..Commit::default() });
    w.call_as(stranger, own).unwrap();
    assert_eq!(w.deleted_blocks(), [theirs], "it was still theirs");
    w.check();
}

#[test]
fn blocks_must_be_leased_and_are_named_once() {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(2));
    let stranger = w.attach();
    let theirs = match w.call_as(stranger, Op::LeaseBlocks(LeaseBlocks { count: 1 })).unwrap() {
        Reply::LeaseBlocks(reply) => reply.first,
        other => panic!("{other:?}"),
    };
    assert_eq!(errno(w.write(f, vec![run(0, 4096, theirs, 0)])), EINVAL);
    assert_eq!(errno(w.write(f, vec![run(0, 4096, 12345, 0)])), EINVAL);
    assert_eq!(errno(w.write(f, vec![run(0, 3 * BLOCK, b, 0)])), EINVAL, "the run leaves the lease");
    w.check();
    w.write(f, vec![run(0, 4096, b, 0)]).unwrap();
    assert_eq!(errno(w.write(f, vec![run(0, 4096, b, 4096)])), EINVAL);
    assert_eq!(errno(w.commit(Commit { abandoned: vec![b], ..Commit::default() })), EINVAL);
    w.commit(Commit { abandoned: vec![b + 1, b + 1], ..Commit::default() }).unwrap();
    assert_eq!(w.deleted_blocks(), [b + 1]);
    assert_eq!(errno(w.write(f, vec![run(0, 4096, b + 1, 0)])), EINVAL);
    assert_eq!(w.extents(f), [(0, 4096)]);
    w.check();
}

#[test]
fn a_hostile_extent_is_refused() {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(2));
    for extent in [
        run(0, 1 << 62, b, 0),
        run(0, 1 << 62, u64::MAX - 5, 0),
        run(u64::MAX - 5, 4096, b, 0),
        run(0, 0, b, 0),
    ] {
        let refused = errno(w.write(f, vec![extent]));
        assert!(matches!(refused, EINVAL | E2BIG), "{refused:?}");
    }
    assert!(matches!(errno(w.write(f, vec![inline(8000, &[1; 200])])), EINVAL));
    w.check();
}

#[test]
fn inline_bytes_are_kept_cut_and_replaced() {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(1));
    let attr = w.write(f, vec![inline(0, b"hello world")]).unwrap();
    assert_eq!((attr.size, attr.allocated), (11, 11));
    w.write(f, vec![inline(6, b"there")]).unwrap();
    w.truncate(f, 9).unwrap();
    let found: Vec<_> = w.whole_extents(f).into_iter().map(|e| (e.offset, e.data)).collect();
    assert_eq!(found, [(0, "hello ".into()), (6, "the".into())]);
    w.write(f, vec![run(0, 4096, b, 0)]).unwrap();
    assert_eq!(w.extents(f), [(0, 4096)]);
    w.check();
}

#[test]
fn appends_move_to_where_the_file_ends() {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(4));
    w.write(f, vec![run(0, 100, b, 0)]).unwrap();
    let append = |extents, base, size| {
        commit_of(vec![FileCommit {
            ino: f.0,
            extents,
            append_base: Some(base),
            size,
            ..FileCommit::default()
        }])
    };
    let reply = w.commit(append(vec![run(0, 50, b + 1, 0)], 0, 50)).unwrap().remove(0);
    assert_eq!((reply.appended_shift, reply.attr.unwrap().size), (100, 150));
    // The writer also wrote plainly up to its own end of file, which is beyond the server's.
    let reply =
        w.commit(append(vec![run(150, 10, b + 2, 0), run(160, 5, b + 3, 0)], 160, 165)).unwrap().remove(0);
    assert_eq!((reply.appended_shift, reply.attr.unwrap().size), (0, 165));
    assert_eq!(w.extents(f), [(0, 100), (100, 50), (150, 10), (160, 5)]);
    let c = w.lease(1);
    w.truncate(f, 20).unwrap();
    let reply = w.commit(append(vec![run(165, 7, c, 0)], 165, 172)).unwrap().remove(0);
    assert_eq!((reply.appended_shift, reply.attr.unwrap().size), (-145, 27));
    w.check();
}

/// A client took an append for small while it did not know of others' appends, and has heard of them since.
#[test]
fn an_inline_append_may_go_anywhere() {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(1));
    w.write(f, vec![run(0, 100_000, b, 0)]).unwrap();
    for base in [50_000, 0] {
        let extents = vec![inline(base, &[7; 200])];
        let file = FileCommit { ino: f.0, extents, append_base: Some(base), ..FileCommit::default() };
        assert_eq!(w.commit(commit_of(vec![file])).unwrap()[0].errno, 0);
    }
    assert_eq!(w.getattr(f).unwrap().size, 100_400);
    let extents = vec![inline(9000, &[7; 200])];
    let file = FileCommit { ino: f.0, extents, append_base: Some(50), ..FileCommit::default() };
    assert_eq!(errno(w.commit(commit_of(vec![file]))), EINVAL, "it lies too far back in what is appended");
    w.check();
}

#[test]
fn sizes_times_and_suid() {
    let mut w = World::new();
    let f = w.file("f");
    w.setattr(SetAttr { ino: f.0, mode: Some(0o6755), ..SetAttr::default() }).unwrap();
    let mtime = Some(Time { sec: 77, nsec: 1 });
    let part = FileCommit { ino: f.0, size: 500, mtime, clear_suid: true, ..FileCommit::default() };
    let attr = w.commit(commit_of(vec![part.clone()])).unwrap()[0].attr.unwrap();
    assert_eq!((attr.size, attr.mode, attr.mtime, attr.ctime), (500, 0o755, mtime, mtime));
    let version = attr.data_version;
    let attr = w.commit(commit_of(vec![FileCommit { size: 0, ..part.clone() }])).unwrap()[0].attr.unwrap();
    assert_eq!((attr.size, attr.data_version), (500, version), "nothing changed");
    let too_large = w.commit(commit_of(vec![FileCommit { size: 1 << 63, ..part }])).unwrap();
    assert_eq!(too_large[0].errno, 27);
    w.check();
}

#[test]
fn extents_come_in_pages() {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(100));
    // Backwards, so that no two neighbours are one run.
    w.write(f, (0..100).map(|i| run(i * 10_000, 10_000, b + 99 - i, 0)).collect()).unwrap();
    let open = w.open(f, 1).unwrap();
    assert_eq!(open.extents.as_ref().unwrap().extents.len(), 100);
    assert_eq!(open.extents.unwrap().next_offset, u64::MAX);
    let mut page =
        |offset, limit| match w.call(Op::GetExtents(GetExtents { ino: f.0, offset, limit })).unwrap() {
            Reply::Extents(reply) => {
                (reply.extents.iter().map(|e| e.offset).collect::<Vec<_>>(), reply.next_offset)
            }
            other => panic!("{other:?}"),
        };
    assert_eq!(page(5, 3), (vec![0, 10_000, 20_000], 30_000));
    assert_eq!(page(30_000, 2), (vec![30_000, 40_000], 50_000));
    assert_eq!(page(985_000, 2), (vec![980_000, 990_000], u64::MAX));
    assert_eq!(page(5_000_000, 2), (vec![], u64::MAX));
    w.check();
}

#[test]
fn a_fragmented_file_is_destroyed_in_steps() {
    let mut w = World::new();
    let f = w.file("f");
    let b = w.lease(1000);
    w.write(f, (0..1000).map(|i| run(i * 10_000, 10_000, b + 999 - i, 0)).collect()).unwrap();
    w.remove(ROOT_INODE, "f", false).unwrap();
    let report = w.check();
    assert!(report.extents > 900, "{report:?}");
    w.restart();
    w.reattach(w.session, &[]);
    assert_eq!(w.deleted_blocks().len(), 1000);
    assert_eq!(w.check().extents, 0);
}

#[test]
fn leases_are_refused_before_there_are_targets() {
    let mut w = World::bare(std::sync::Arc::new(crate::store::MemoryStore::default()));
    w.session = w.attach();
    assert_eq!(errno(w.call(Op::LeaseBlocks(LeaseBlocks { count: 5 }))), ENOSPC);
    assert_eq!(errno(w.call(Op::LeaseBlocks(LeaseBlocks { count: 0 }))), EINVAL);
}
