//! Access control lists and the modes beside them.

use fjordfs_proto::{InodeId, ROOT_INODE, error::Errno::*, pb::meta::*};
use request::Op;
use response::Result as Reply;

use crate::{
    acl::tests::{NAMED, list},
    testing::{World, errno},
};

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";
const MINIMAL: &[(u16, u16, u32)] = &[(1, 6, 0), (4, 4, 0), (0x20, 0, 0)];

fn make(w: &mut World, parent: InodeId, kind: FileKind, umask: u32) -> Attr {
    let name = format!("{kind:?}{umask}").into();
    let target = if kind == FileKind::Symlink { "there".into() } else { Default::default() };
    let make =
        Make { parent: parent.0, name, kind: kind.into(), mode: 0o666, umask, target, ..Make::default() };
    match w.call(Op::Make(make)).unwrap() {
        Reply::Entry(entry) => entry.attr.unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_list_sets_the_mode_and_the_mode_the_list() {
    let mut w = World::new();
    let f = w.file("f");
    assert_eq!(w.set_xattr(f, ACCESS, &list(NAMED), 0).unwrap().mode, 0o761);
    w.setattr(SetAttr { ino: f.0, mode: Some(0o1640), ..SetAttr::default() }).unwrap();
    let expected = [(1, 6, 0), (2, 7, 1000), (4, 5, 0), (8, 4, 50), (0x10, 4, 0), (0x20, 0, 0)];
    assert_eq!(w.get_xattr(f, ACCESS).unwrap(), list(&expected));
    let attr = w.set_xattr(f, ACCESS, &list(MINIMAL), 0).unwrap();
    assert_eq!((attr.mode, attr.xattrs), (0o1640, false), "the mode says it all");
    w.set_xattr(f, ACCESS, &list(NAMED), 0).unwrap();
    assert_eq!(w.set_xattr(f, ACCESS, &list(&[]), 0).unwrap().mode, 0o1761, "removed, and the mode stays");
    w.remove_xattr(f, ACCESS).unwrap();
    assert_eq!(errno(w.get_xattr(f, ACCESS)), ENODATA);
    assert_eq!(errno(w.set_xattr(f, ACCESS, b"12345", 0)), EOPNOTSUPP);
    assert_eq!(errno(w.set_xattr(f, DEFAULT, &list(NAMED), 0)), EACCES);
    let link = w.make(ROOT_INODE, "link", FileKind::Symlink).unwrap();
    assert_eq!(errno(w.set_xattr(link, ACCESS, &list(NAMED), 0)), EOPNOTSUPP);
    w.check();
}

#[test]
fn whoever_may_not_pass_on_the_groups_rights_does_not() {
    let mut w = World::new();
    let f = w.file("f");
    w.setattr(SetAttr { ino: f.0, mode: Some(0o2770), ..SetAttr::default() }).unwrap();
    let set = SetXattr {
        ino: f.0,
        name: ACCESS.into(),
        value: list(NAMED).into(),
        clear_sgid: true,
        ..SetXattr::default()
    };
    w.call(Op::SetXattr(set)).unwrap();
    assert_eq!(w.getattr(f).unwrap().mode, 0o761);
}

#[test]
fn a_default_list_takes_the_place_of_the_umask() {
    let mut w = World::new();
    let d = w.dir(ROOT_INODE, "d");
    assert_eq!(make(&mut w, d, FileKind::Regular, 0o027).mode, 0o640);
    w.set_xattr(d, DEFAULT, &list(NAMED), 0).unwrap();
    let file = make(&mut w, d, FileKind::Regular, 0o077);
    assert_eq!((file.mode, file.xattrs), (0o660, true));
    let dir = make(&mut w, d, FileKind::Directory, 0o077);
    assert_eq!(dir.mode, 0o660);
    assert_eq!(w.get_xattr(InodeId(dir.ino), DEFAULT).unwrap(), list(NAMED));
    assert_eq!(w.list_xattrs(InodeId(file.ino)), [ACCESS]);
    let link = make(&mut w, d, FileKind::Symlink, 0o077);
    assert_eq!((link.mode, link.xattrs), (0o666, false));
    w.set_xattr(d, DEFAULT, &list(MINIMAL), 0).unwrap();
    let plain = make(&mut w, d, FileKind::Fifo, 0o077);
    assert_eq!((plain.mode, plain.xattrs), (0o640, false));
    w.check();
}
