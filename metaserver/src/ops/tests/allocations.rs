//! fallocate.

use fjordfs_proto::{BLOCK_SIZE_MAX, ROOT_INODE, error::Errno::*, pb::meta::*};
use request::Op;

use crate::testing::{World, errno, inline, run};

const BLOCK: u64 = BLOCK_SIZE_MAX as u64;

#[test]
fn a_hole_takes_its_blocks_away_and_nothing_else() {
    let mut w = World::new();
    let (f, b) = (w.file("f"), w.lease(4));
    w.write(f, vec![run(0, 4 * BLOCK, b, 0)]).unwrap();
    w.pass(std::time::Duration::from_secs(5));
    let attr = w.allocate(f, BLOCK - 100..3 * BLOCK + 100, true).unwrap();
    assert_eq!((attr.size, attr.allocated, attr.data_version), (4 * BLOCK, 2 * BLOCK - 200, 2));
    assert_eq!((attr.mtime.unwrap().sec, attr.ctime.unwrap().sec), (1005, 1005));
    assert_eq!(w.extents(f), [(0, BLOCK - 100), (3 * BLOCK + 100, BLOCK - 100)]);
    assert_eq!(w.deleted_blocks(), [b + 1, b + 2]);
    w.check();
    let again = w.allocate(f, BLOCK..2 * BLOCK, true).unwrap();
    assert_eq!(again.data_version, 2, "a hole in a hole changes nothing");
    w.allocate(f, 0..u64::MAX >> 1, true).unwrap();
    assert_eq!(w.deleted_blocks(), [b, b + 3]);
    assert_eq!(w.getattr(f).unwrap().size, 4 * BLOCK);
    w.check();
}

#[test]
fn inline_bytes_are_cut() {
    let mut w = World::new();
    let f = w.file("f");
    w.write(f, vec![inline(0, b"hello world")]).unwrap();
    w.allocate(f, 2..5, true).unwrap();
    let found: Vec<_> = w.whole_extents(f).into_iter().map(|e| (e.offset, e.data)).collect();
    assert_eq!(found, [(0, "he".into()), (5, " world".into())]);
    w.check();
}

#[test]
fn a_file_is_extended_as_far_as_it_would_fit() {
    let mut w = World::new();
    let f = w.file("f");
    let attr = w.allocate(f, 10..1000, false).unwrap();
    assert_eq!((attr.size, attr.allocated, attr.data_version), (1000, 0, 1));
    assert_eq!(w.allocate(f, 0..500, false).unwrap().size, 1000);
    assert_eq!(errno(w.allocate(f, 0..1 << 40, false)), ENOSPC, "two copies, and half of two TiB is free");
    assert_eq!(errno(w.allocate(f, 0..1 << 63, false)), EFBIG);
    assert_eq!(errno(w.allocate(ROOT_INODE, 0..1, false)), EISDIR);
    w.setattr(SetAttr { ino: f.0, mode: Some(0o4755), ..SetAttr::default() }).unwrap();
    let op =
        Allocate { ino: f.0, length: 1, size: 2000, clear: true, clear_suid: true, ..Allocate::default() };
    w.call(Op::Allocate(op)).unwrap();
    let attr = w.getattr(f).unwrap();
    assert_eq!((attr.mode, attr.size), (0o755, 2000));
    w.check();
}
