use fjordfs_proto::{
    FsResult,
    pb::meta::{
        DirEntry, Entry, GetAttr, Lookup, ReadDir, ReadDirReply, request::Op, response::Result as Reply,
    },
};

use super::*;
use crate::leases::table::{Bounds, Sent};

const ROOT: InodeId = InodeId(1);
const NOW: Time = Time { sec: 100, nsec: 7 };

fn made(ino: u64, kind: FileKind, mode: u32) -> FsResult<Reply> {
    let nlink = if kind == FileKind::Directory { 2 } else { 1 };
    let attr = Attr { ino, kind: kind.into(), mode, nlink, ..Attr::default() };
    Ok(Reply::Entry(Entry { attr: Some(attr), ..Entry::default() }))
}

fn make(parent: u64, name: &'static str, kind: FileKind, ino: u64) -> Make {
    Make { parent, name: name.into(), kind: kind.into(), mode: 0o666, umask: 0o022, ino, ..Make::default() }
}

/// A table with directory 9 in the root, both delegated.
fn table() -> Table {
    let mut t = Table::new(Bounds { inodes: 64, names: 256 });
    let op = Op::Make(make(1, "d", FileKind::Directory, 0));
    let sent = t.sent(&op, 1);
    t.settled(&op, &sent);
    t.learn(
        &op,
        &sent,
        &made(9, FileKind::Directory, 0o2755),
        1,
        &[Attr { ino: 1, nlink: 3, kind: FileKind::Directory.into(), ..Attr::default() }],
    );
    let look = Op::GetAttr(GetAttr { ino: 1 });
    t.learn(&look, &Sent::default(), &made(1, FileKind::Directory, 0o755), 2, &[]);
    t.delegated(&[1, 9]);
    t
}

fn remove(t: &mut Table, parent: u64, name: &'static str, directory: bool) -> Option<Removed> {
    t.remove_here(&mut Remove { parent, name: name.into(), directory, time: None }, NOW, 20)
}

#[test]
fn what_is_made_here_is_as_the_server_will_make_it() {
    let mut t = table();
    let mut file = make(9, "f", FileKind::Regular, 50);
    let attr = t.make_here(&mut file, NOW, 10).unwrap();
    assert_eq!((attr.mode, attr.nlink, attr.mtime, file.time), (0o644, 1, Some(NOW), Some(NOW)));
    let sub = t.make_here(&mut make(9, "sub", FileKind::Directory, 51), NOW, 11).unwrap();
    assert_eq!((sub.mode, sub.nlink, sub.size), (0o2644, 2, 4096), "setgid is inherited");
    let parent = t.attr(InodeId(9)).unwrap();
    assert_eq!((parent.nlink, parent.ctime), (3, Some(NOW)));
    assert_eq!(t.name(InodeId(9), b"f"), Some(Some(InodeId(50))));
    // Below it, everything is known and delegated at once.
    t.make_here(&mut make(51, "deep", FileKind::Regular, 52), NOW, 12).unwrap();
    assert!(t.make_here(&mut make(9, "f", FileKind::Regular, 53), NOW, 13).is_none(), "it exists");
    let link = Make { target: "there".into(), ..make(9, "l", FileKind::Symlink, 54) };
    assert_eq!(t.make_here(&mut link.clone(), NOW, 14).unwrap().mode, 0o666, "no umask for links");
    assert_eq!(t.target(InodeId(54)).unwrap(), "there");
}

#[test]
fn what_is_not_certain_is_asked_for() {
    let mut t = table();
    let file = |t: &mut Table, make: &Make| t.make_here(&mut make.clone(), NOW, 10).is_some();
    assert!(!file(&mut t, &make(1, "x", FileKind::Regular, 50)), "nobody knows whether the root has that");
    assert!(!file(&mut t, &make(9, "x", FileKind::Symlink, 50)), "no target");
    assert!(!file(&mut t, &Make { unnamed: true, ..make(9, "x", FileKind::Regular, 50) }));
    t.demote(&[InodeId(9)]);
    assert!(!file(&mut t, &make(9, "x", FileKind::Regular, 50)), "not delegated");
    t.delegated(&[9]);
    let op = Op::Make(make(9, "y", FileKind::Regular, 0));
    let sent = t.sent(&op, 11);
    assert!(!file(&mut t, &make(9, "x", FileKind::Regular, 50)), "another operation in it is under way");
    t.settled(&op, &sent);
    assert!(file(&mut t, &make(9, "x", FileKind::Regular, 50)));
    assert!(remove(&mut t, 1, "d", true).is_none(), "it is not empty");
    assert!(remove(&mut t, 9, "x", true).is_none() && remove(&mut t, 9, "absent", false).is_none());
    let set = SetAttr { ino: 50, size: Some(1), ..SetAttr::default() };
    assert!(t.set_attr_here(&mut set.clone(), NOW, 12).is_none());
}

#[test]
fn names_go_and_move() {
    let mut t = table();
    for (name, ino) in [("a", 50), ("b", 51), ("c", 52)] {
        t.make_here(&mut make(9, name, FileKind::Regular, ino), NOW, 10).unwrap();
    }
    let mut rename =
        Rename { parent: 9, name: "a".into(), new_parent: 9, new_name: "b".into(), ..Rename::default() };
    assert_eq!(t.rename_here(&mut rename.clone(), NOW, 11), Some(()));
    assert_eq!((t.name(InodeId(9), b"a"), t.name(InodeId(9), b"b")), (Some(None), Some(Some(InodeId(50)))));
    assert_eq!(t.attr(InodeId(51)), None);
    (rename.name, rename.flags) = ("c".into(), NOREPLACE);
    assert_eq!(t.rename_here(&mut rename, NOW, 12), None, "the server says EEXIST");
    assert_eq!(remove(&mut t, 9, "b", false), Some(Removed { ino: InodeId(50), last: true }));
    assert_eq!(remove(&mut t, 9, "c", false).unwrap().ino, InodeId(52));
    assert_eq!(remove(&mut t, 1, "d", true), Some(Removed { ino: InodeId(9), last: true }));
    assert_eq!((t.name(ROOT, b"d"), t.attr(ROOT).unwrap().nlink), (Some(None), 1));
}

#[test]
fn attributes_change_as_on_the_server() {
    let mut t = table();
    t.make_here(&mut Make { mode: 0o4755, ..make(9, "f", FileKind::Regular, 50) }, NOW, 10).unwrap();
    let mut chown = SetAttr { ino: 50, uid: Some(5), mtime_now: true, ..SetAttr::default() };
    let later = Time { sec: 200, nsec: 0 };
    let attr = t.set_attr_here(&mut chown, later, 11).unwrap();
    assert_eq!((attr.uid, attr.mode, attr.mtime, attr.ctime), (5, 0o755, Some(later), Some(later)));
    assert_eq!((chown.mtime, chown.mtime_now, chown.ctime), (Some(later), false, Some(later)));
}

#[test]
fn answers_from_before_a_decision_are_no_news() {
    let mut t = table();
    let look = Op::Lookup(Lookup { parent: 9, name: "f".into(), ..Default::default() });
    let early = t.sent(&look, 10);
    t.make_here(&mut make(9, "f", FileKind::Regular, 50), NOW, 11).unwrap();
    t.settled(&look, &early);
    let absent = Err(fjordfs_proto::FsError::new(fjordfs_proto::error::Errno::ENOENT, "not yet"));
    t.learn(&look, &early, &absent, 3, &[Attr { ino: 9, nlink: 2, ..Attr::default() }]);
    assert_eq!(t.name(InodeId(9), b"f"), Some(Some(InodeId(50))));
    assert_eq!(t.attr(InodeId(9)), None, "changed by somebody's mutation and here: neither has all of it");
    assert!(t.make_here(&mut make(9, "g", FileKind::Regular, 51), NOW, 12).is_none());
    let late = t.sent(&Op::GetAttr(GetAttr { ino: 9 }), 13);
    t.learn(&Op::GetAttr(GetAttr { ino: 9 }), &late, &made(9, FileKind::Directory, 0o755), 4, &[]);
    assert!(t.attr(InodeId(9)).is_some());
}

#[test]
fn they_are_none_either_once_the_delegation_is_given_up() {
    let mut t = table();
    let list = Op::ReadDir(ReadDir { ino: 9, attributes: true, ..ReadDir::default() });
    t.make_here(&mut make(9, "old", FileKind::Regular, 50), NOW, 10).unwrap();
    let early = t.sent(&list, 11);
    let mut rename =
        Rename { parent: 9, name: "old".into(), new_parent: 9, new_name: "new".into(), ..Rename::default() };
    t.rename_here(&mut rename, NOW, 12).unwrap();
    t.demote(&[InodeId(9), InodeId(50)]);
    t.settled(&list, &early);
    let attr = Some(Attr { ino: 50, kind: FileKind::Regular.into(), nlink: 1, ..Attr::default() });
    let entries = vec![DirEntry { name: "old".into(), ino: 50, attr, ..DirEntry::default() }];
    let page = Ok(Reply::ReadDir(ReadDirReply { entries, end: true, parent: 1 }));
    t.learn(&list, &early, &page, 3, &[]);
    let names = [&b"old"[..], b"new"].map(|name| t.name(InodeId(9), name));
    assert_eq!(names, [Some(None), Some(Some(InodeId(50)))], "the listing was made before the rename");
    let late = t.sent(&list, 13);
    t.settled(&list, &late);
    t.learn(&list, &late, &page, 4, &[]);
    assert_eq!(t.name(InodeId(9), b"old"), Some(Some(InodeId(50))), "somebody has linked it since");
}
