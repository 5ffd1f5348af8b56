//! rename in all its cases.

use std::time::Duration;

use fjordfs_proto::{InodeId, ROOT_INODE, error::Errno::*, pb::meta::FileKind};

use crate::testing::{World, errno, run};

const R: InodeId = ROOT_INODE;
const NOREPLACE: u32 = 1;
const EXCHANGE: u32 = 2;

#[test]
fn a_file_moves_and_replaces() {
    let mut w = World::new();
    let (a, b, d) = (w.file("a"), w.file("b"), w.dir(R, "d"));
    w.rename((R, "a"), (d, "x"), 0).unwrap();
    assert_eq!(w.lookup(d, "x").unwrap().ino, a.0);
    assert_eq!(errno(w.lookup(R, "a")), ENOENT);
    w.rename((d, "x"), (R, "b"), 0).unwrap();
    assert_eq!(w.lookup(R, "b").unwrap().ino, a.0);
    assert_eq!(w.getattr(b).unwrap().nlink, 0, "somebody may be about to open what was replaced");
    assert_eq!(errno(w.rename((R, "nothing"), (R, "b"), 0)), ENOENT);
    w.check();
}

#[test]
fn types_must_agree() {
    let mut w = World::new();
    w.file("f");
    let (d, e) = (w.dir(R, "d"), w.dir(R, "e"));
    assert_eq!(errno(w.rename((R, "f"), (R, "d"), 0)), EISDIR);
    assert_eq!(errno(w.rename((R, "d"), (R, "f"), 0)), ENOTDIR);
    w.make(e, "x", FileKind::Regular).unwrap();
    assert_eq!(errno(w.rename((R, "d"), (R, "e"), 0)), ENOTEMPTY);
    w.remove(e, "x", false).unwrap();
    w.rename((R, "d"), (R, "e"), 0).unwrap();
    assert_eq!(w.lookup(R, "e").unwrap().ino, d.0);
    assert_eq!(w.getattr(R).unwrap().nlink, 3);
    w.check();
}

#[test]
fn directories_do_not_move_below_themselves() {
    let mut w = World::new();
    let a = w.dir(R, "a");
    let b = w.dir(a, "b");
    let c = w.dir(b, "c");
    assert_eq!(errno(w.rename((R, "a"), (a, "x"), 0)), EINVAL);
    assert_eq!(errno(w.rename((R, "a"), (c, "x"), 0)), EINVAL);
    assert_eq!(errno(w.rename((a, "b"), (R, "a"), 0)), ENOTEMPTY);
    assert_eq!(errno(w.rename((b, "c"), (R, "a"), EXCHANGE)), EINVAL);
    w.rename((b, "c"), (R, "c"), 0).unwrap();
    assert_eq!([R, a, b, c].map(|ino| w.getattr(ino).unwrap().nlink), [4, 3, 2, 2]);
    w.check();
}

#[test]
fn two_names_of_one_file_stay() {
    let mut w = World::new();
    let a = w.file("a");
    w.link(a, R, "b").unwrap();
    w.rename((R, "a"), (R, "b"), 0).unwrap();
    w.rename((R, "a"), (R, "a"), 0).unwrap();
    assert_eq!(w.getattr(a).unwrap().nlink, 2);
    w.lookup(R, "a").unwrap();
    w.check();
}

#[test]
fn noreplace_and_exchange() {
    let mut w = World::new();
    let (f, d) = (w.file("f"), w.dir(R, "d"));
    let e = w.dir(d, "e");
    assert_eq!(errno(w.rename((R, "f"), (R, "d"), NOREPLACE)), EEXIST);
    assert_eq!(errno(w.rename((R, "f"), (R, "g"), EXCHANGE)), ENOENT);
    assert_eq!(errno(w.rename((R, "f"), (R, "g"), EXCHANGE | NOREPLACE)), EINVAL);
    assert_eq!(errno(w.rename((R, "f"), (R, "g"), 4)), EINVAL);
    w.rename((R, "f"), (d, "e"), EXCHANGE).unwrap();
    assert_eq!(w.lookup(d, "e").unwrap().ino, f.0);
    assert_eq!(w.lookup(R, "f").unwrap().ino, e.0);
    assert_eq!([R, d, e].map(|ino| w.getattr(ino).unwrap().nlink), [4, 2, 2]);
    w.rename((R, "f"), (R, "d"), EXCHANGE).unwrap();
    assert_eq!(w.lookup(R, "d").unwrap().ino, e.0);
    w.check();
}

#[test]
fn a_replaced_open_file_lives_on() {
    let mut w = World::new();
    let (_, b) = (w.file("a"), w.file("b"));
    w.open(b, 7).unwrap();
    w.rename((R, "a"), (R, "b"), 0).unwrap();
    assert_eq!(w.getattr(b).unwrap().nlink, 0);
    assert_eq!(w.check().orphans, 1);
    w.idle(Duration::from_secs(9));
    assert_eq!(w.check().orphans, 1);
    w.close(7);
    assert_eq!(errno(w.getattr(b)), ESTALE);
    assert_eq!(w.check().orphans, 0);
}

#[test]
fn what_was_looked_up_before_it_was_replaced_can_be_opened() {
    let mut w = World::new();
    let (_, b) = (w.file("a"), w.file("b"));
    let first = w.lease(1);
    w.write(b, vec![run(0, 100, first, 0)]).unwrap();
    w.rename((R, "a"), (R, "b"), 0).unwrap();
    assert_eq!(w.open(b, 7).unwrap().extents.unwrap().extents.len(), 1);
    w.close(7);
    assert_eq!(w.check().orphans, 1, "the next may come");
    w.idle(Duration::from_secs(5));
    assert_eq!(errno(w.open(b, 8)), ESTALE);
    assert_eq!(w.check().orphans, 0);
}
