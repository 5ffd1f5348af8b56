//! Extended attributes.

use fjordfs_proto::{InodeId, ROOT_INODE, error::Errno::*, pb::meta::SetAttr};

use crate::testing::{World, errno};

const CREATE: u32 = 1;
const REPLACE: u32 = 2;

#[test]
fn they_are_set_read_listed_and_removed() {
    let mut w = World::new();
    let f = w.file("f");
    assert!(!w.getattr(f).unwrap().xattrs);
    w.pass(std::time::Duration::from_secs(5));
    let attr = w.set_xattr(f, "user.b", b"two", 0).unwrap();
    assert_eq!((attr.xattrs, attr.ctime.unwrap().sec, attr.mtime.unwrap().sec), (true, 1005, 1000));
    w.set_xattr(f, "user.a", b"", CREATE).unwrap();
    w.set_xattr(f, "trusted.c", &[0xff; 65_536], 0).unwrap();
    w.set_xattr(f, "user.b", b"three", REPLACE).unwrap();
    assert_eq!(w.get_xattr(f, "user.b").unwrap(), "three");
    assert_eq!(w.get_xattr(f, "user.a").unwrap(), "");
    assert_eq!(w.list_xattrs(f), ["trusted.c", "user.a", "user.b"]);
    w.check();
    w.restart();
    w.reattach(w.session, &[]);
    w.pass(std::time::Duration::from_secs(5));
    assert_eq!(w.remove_xattr(f, "trusted.c").unwrap().ctime.unwrap().sec, 1010);
    assert!(w.remove_xattr(f, "user.a").unwrap().xattrs);
    assert!(!w.remove_xattr(f, "user.b").unwrap().xattrs);
    assert!(w.list_xattrs(f).is_empty());
    w.check();
}

#[test]
fn wrong_ones_are_refused() {
    let mut w = World::new();
    let f = w.file("f");
    w.set_xattr(f, "user.a", b"1", 0).unwrap();
    assert_eq!(errno(w.set_xattr(f, "user.a", b"2", CREATE)), EEXIST);
    assert_eq!(errno(w.set_xattr(f, "user.b", b"2", REPLACE)), ENODATA);
    assert_eq!(errno(w.set_xattr(f, "user.b", b"2", 4)), EINVAL);
    assert_eq!(errno(w.set_xattr(f, "user.b", &[0; 65_537], 0)), E2BIG);
    assert_eq!(errno(w.get_xattr(f, "user.b")), ENODATA);
    assert_eq!(errno(w.remove_xattr(f, "user.b")), ENODATA);
    let long = format!("user.{}", "x".repeat(251));
    for (name, expected) in
        [("", ERANGE), (&long, ERANGE), ("user.", EINVAL), ("user.\0", EINVAL), ("other.a", EOPNOTSUPP)]
    {
        assert_eq!(errno(w.set_xattr(f, name, b"", 0)), expected, "{name:?}");
        assert_eq!(errno(w.get_xattr(f, name)), expected, "{name:?}");
        assert_eq!(errno(w.remove_xattr(f, name)), expected, "{name:?}");
    }
    w.set_xattr(f, &long[..255], b"", 0).unwrap();
    assert_eq!(errno(w.get_xattr(InodeId(999), "user.a")), ESTALE);
    assert_eq!(w.get_xattr(f, "user.a").unwrap(), "1");
    w.check();
}

#[test]
fn names_that_would_not_fit_a_list_are_refused() {
    let mut w = World::new();
    let f = w.file("f");
    let name = |i: usize| format!("user.{i:0250}");
    for i in 0..256 {
        w.set_xattr(f, &name(i), b"x", 0).unwrap();
    }
    assert_eq!(errno(w.set_xattr(f, &name(256), b"x", 0)), ENOSPC);
    w.set_xattr(f, &name(7), b"another value", 0).unwrap();
    w.remove_xattr(f, &name(8)).unwrap();
    w.set_xattr(f, &name(256), b"x", 0).unwrap();
    w.check();
}

#[test]
fn they_go_with_the_inode() {
    let mut w = World::new();
    let (f, g) = (w.file("f"), w.file("g"));
    w.set_xattr(f, "user.a", b"1", 0).unwrap();
    w.set_xattr(g, "user.a", b"1", 0).unwrap();
    w.open(f, 1).unwrap();
    w.remove(ROOT_INODE, "f", false).unwrap();
    assert_eq!(w.get_xattr(f, "user.a").unwrap(), "1", "as long as it is open");
    w.close(1);
    w.remove(ROOT_INODE, "g", false).unwrap();
    w.check();
}

#[test]
fn a_new_owner_does_not_get_the_old_ones_privileges() {
    let mut w = World::new();
    let (f, d) = (w.file("f"), w.dir(ROOT_INODE, "d"));
    let set = |ino: InodeId| SetAttr { ino: ino.0, ..SetAttr::default() };
    w.setattr(SetAttr { mode: Some(0o6755), ..set(f) }).unwrap();
    assert_eq!(w.setattr(SetAttr { gid: Some(1), ..set(f) }).unwrap().mode, 0o755);
    w.setattr(SetAttr { mode: Some(0o6745), ..set(f) }).unwrap();
    assert_eq!(w.setattr(SetAttr { uid: Some(1), ..set(f) }).unwrap().mode, 0o2745);
    w.setattr(SetAttr { mode: Some(0o6755), ..set(f) }).unwrap();
    let attr = w.setattr(SetAttr { size: Some(0), clear_suid: true, ..set(f) }).unwrap();
    assert_eq!(attr.mode, 0o755);
    w.setattr(SetAttr { mode: Some(0o6755), ..set(d) }).unwrap();
    assert_eq!(w.setattr(SetAttr { uid: Some(1), ..set(d) }).unwrap().mode, 0o6755);
}
