//! Making, finding, listing and removing.

use std::collections::BTreeSet;

use fjordfs_proto::{InodeId, ROOT_INODE, error::Errno::*, pb::meta::*};
use request::Op;
use response::Result as Reply;

use crate::{
    testing::{World, errno, run},
    txn::Txn,
};

const R: InodeId = ROOT_INODE;

#[test]
fn names_are_checked() {
    let mut w = World::new();
    let long = "x".repeat(256);
    for (name, expected) in [
        ("", ENOENT),
        (".", EINVAL),
        ("..", EINVAL),
        ("a/b", EINVAL),
        ("a\0b", EINVAL),
        (&long, ENAMETOOLONG),
    ] {
        assert_eq!(errno(w.make(R, name, FileKind::Regular)), expected, "{name:?}");
        assert_eq!(errno(w.lookup(R, name)), expected, "{name:?}");
        assert_eq!(errno(w.remove(R, name, false)), expected, "{name:?}");
        assert_eq!(errno(w.rename((R, "a"), (R, name), 0)), expected, "{name:?}");
    }
    w.file(&long[..255]);
    w.check();
}

#[test]
fn parents_must_be_directories_that_exist() {
    let mut w = World::new();
    let (file, dir) = (w.file("f"), w.dir(R, "d"));
    assert_eq!(errno(w.make(file, "x", FileKind::Regular)), ENOTDIR);
    assert_eq!(errno(w.lookup(file, "x")), ENOTDIR);
    assert_eq!(errno(w.make(InodeId(999), "x", FileKind::Regular)), ESTALE);
    w.open(dir, 1).unwrap();
    w.remove(R, "d", true).unwrap();
    assert_eq!(w.getattr(dir).unwrap().nlink, 0, "an open directory stays until it is closed");
    assert_eq!(errno(w.make(dir, "x", FileKind::Regular)), ENOENT);
    w.close(1);
    assert_eq!(errno(w.getattr(dir)), ESTALE);
    w.check();
}

#[test]
fn link_counts_and_times() {
    let mut w = World::new();
    assert_eq!(w.getattr(R).unwrap().nlink, 2);
    w.pass(std::time::Duration::from_secs(5));
    let dir = w.dir(R, "d");
    let root = w.getattr(R).unwrap();
    assert_eq!((root.nlink, root.mtime.unwrap().sec, root.ctime.unwrap().sec), (3, 1005, 1005));
    assert_eq!(root.btime.unwrap().sec, 1000);

    let file = w.file("f");
    w.pass(std::time::Duration::from_secs(5));
    let linked = w.link(file, dir, "g").unwrap();
    assert_eq!((linked.nlink, linked.ctime.unwrap().sec, linked.mtime.unwrap().sec), (2, 1010, 1005));
    assert_eq!(w.getattr(dir).unwrap().mtime.unwrap().sec, 1010);
    assert_eq!(errno(w.link(file, dir, "g")), EEXIST);
    assert_eq!(errno(w.link(dir, R, "e")), EPERM);

    w.pass(std::time::Duration::from_secs(5));
    w.remove(R, "f", false).unwrap();
    let left = w.getattr(file).unwrap();
    assert_eq!((left.nlink, left.ctime.unwrap().sec), (1, 1015));
    w.remove(dir, "g", false).unwrap();
    assert_eq!(errno(w.getattr(file)), ESTALE);
    w.remove(R, "d", true).unwrap();
    assert_eq!(w.getattr(R).unwrap().nlink, 2);
    assert_eq!(w.check().inodes, 1);
}

#[test]
fn removal_checks_what_it_removes() {
    let mut w = World::new();
    let dir = w.dir(R, "d");
    w.make(dir, "x", FileKind::Regular).unwrap();
    w.file("f");
    assert_eq!(errno(w.remove(R, "d", false)), EISDIR);
    assert_eq!(errno(w.remove(R, "f", true)), ENOTDIR);
    assert_eq!(errno(w.remove(R, "d", true)), ENOTEMPTY);
    assert_eq!(errno(w.remove(R, "g", false)), ENOENT);
    w.check();
}

#[test]
fn every_kind_can_be_made() {
    let mut w = World::new();
    for (i, kind) in [
        FileKind::Regular,
        FileKind::Directory,
        FileKind::Symlink,
        FileKind::Fifo,
        FileKind::Socket,
        FileKind::CharDevice,
        FileKind::BlockDevice,
    ]
    .into_iter()
    .enumerate()
    {
        let ino = w.make(R, &i.to_string(), kind).unwrap();
        assert_eq!(w.getattr(ino).unwrap().kind(), kind);
    }
    assert_eq!(errno(w.make(R, "x", FileKind::Unspecified)), EINVAL);
    assert_eq!(errno(w.make(R, "1", FileKind::Directory)), EEXIST);
    let link = w.lookup(R, "2").unwrap();
    assert_eq!(link.size, 5);
    let Reply::ReadLink(reply) = w.call(Op::ReadLink(ReadLink { ino: link.ino })).unwrap() else { panic!() };
    assert_eq!(reply.target, "there");
    assert_eq!(errno(w.call(Op::ReadLink(ReadLink { ino: 1 }))), EINVAL);
    let long = Make {
        parent: 1,
        name: "l".into(),
        kind: FileKind::Symlink.into(),
        target: vec![b'x'; 4096].into(),
        ..Make::default()
    };
    assert_eq!(errno(w.call(Op::Make(long))), ENAMETOOLONG);
    w.check();
}

#[test]
fn setgid_directories_pass_on_their_group() {
    let mut w = World::new();
    let dir = w.dir(R, "d");
    w.setattr(SetAttr { ino: dir.0, mode: Some(0o2775), gid: Some(50), ..SetAttr::default() }).unwrap();
    let (file, below) = (w.make(dir, "f", FileKind::Regular).unwrap(), w.dir(dir, "e"));
    let (file, below) = (w.getattr(file).unwrap(), w.getattr(below).unwrap());
    assert_eq!((file.gid, file.mode), (50, 0o644));
    assert_eq!((below.gid, below.mode), (50, 0o2644));
    w.check();
}

#[test]
fn a_create_that_is_not_exclusive_opens_what_is_there() {
    let mut w = World::new();
    let create = |name: &str, exclusive, handle| {
        Op::Make(Make {
            parent: 1,
            name: name.to_owned().into(),
            kind: FileKind::Regular.into(),
            handle,
            exclusive,
            ..Make::default()
        })
    };
    let Reply::Entry(first) = w.call(create("f", true, 1)).unwrap() else { panic!() };
    let Reply::Entry(second) = w.call(create("f", false, 2)).unwrap() else { panic!() };
    assert_eq!(first.attr.unwrap().ino, second.attr.unwrap().ino);
    assert_eq!(errno(w.call(create("f", true, 3))), EEXIST);
    w.dir(R, "d");
    assert_eq!(errno(w.call(create("d", false, 4))), EISDIR);
    w.remove(R, "f", false).unwrap();
    w.close(1);
    w.getattr(InodeId(first.attr.unwrap().ino)).unwrap();
    w.close(2);
    assert_eq!(errno(w.getattr(InodeId(first.attr.unwrap().ino))), ESTALE);
    w.check();
}

#[test]
fn attributes_are_set_one_by_one() {
    let mut w = World::new();
    let ino = w.file("f");
    let set = |set: SetAttr| SetAttr { ino: ino.0, ..set };
    w.pass(std::time::Duration::from_secs(7));
    let a = w.setattr(set(SetAttr { mode: Some(0o104755), ..SetAttr::default() })).unwrap();
    assert_eq!((a.mode, a.ctime.unwrap().sec, a.mtime.unwrap().sec), (0o4755, 1007, 1000));
    let time = Time { sec: 3, nsec: 999_999_999 };
    let a = w.setattr(set(SetAttr { mtime: Some(time), atime_now: true, ..SetAttr::default() })).unwrap();
    assert_eq!((a.mtime, a.atime.unwrap().sec), (Some(time), 1007));
    let bad = Time { sec: 3, nsec: 1_000_000_000 };
    assert_eq!(errno(w.setattr(set(SetAttr { mtime: Some(bad), ..SetAttr::default() }))), EINVAL);
    assert_eq!(errno(w.truncate(ino, 1 << 63)), EFBIG);
    assert_eq!(errno(w.truncate(R, 0)), EISDIR);
    w.check();
}

#[test]
fn a_policy_needs_its_targets_and_is_inherited() {
    let mut w = World::new();
    let dir = w.dir(R, "d");
    let set = |code| SetAttr { ino: dir.0, policy: Some(code), ..SetAttr::default() };
    let refused = w.setattr(set(3)).unwrap_err();
    assert!(refused.message.contains("replica:3 needs 3 targets and the cluster has 2"), "{refused}");
    let refused = w.setattr(set(8 << 8 | 2)).unwrap_err();
    assert!(refused.message.contains("ec:8+2 needs 10 targets and the cluster has 2"), "{refused}");
    assert_eq!(errno(w.setattr(set(77))), EINVAL);
    let epoch = w.core.members().map().epoch;
    w.setattr(set(1)).unwrap();
    let map = w.core.members().map().clone();
    assert!(map.epoch > epoch && map.eras.iter().all(|era| era.tables.contains_key(&1)));
    let file = w.make(dir, "f", FileKind::Regular).unwrap();
    assert_eq!(w.getattr(file).unwrap().policy, 1);
    assert_eq!(w.getattr(R).unwrap().policy, 2);
    // A file can have another one as long as it has no bytes; nothing else can.
    let of = |ino: InodeId, code| SetAttr { ino: ino.0, policy: Some(code), ..SetAttr::default() };
    w.setattr(of(file, 2)).unwrap();
    assert_eq!(w.getattr(file).unwrap().policy, 2);
    let block = w.lease(1);
    w.write(file, vec![run(0, 3000, block, 0)]).unwrap();
    assert_eq!(errno(w.setattr(of(file, 1))), EINVAL);
    let hole = w.file("hole");
    w.truncate(hole, 10).unwrap();
    let pipe = w.make(R, "pipe", FileKind::Fifo).unwrap();
    assert_eq!([hole, pipe].map(|ino| errno(w.setattr(of(ino, 1)))), [EINVAL; 2]);
    w.check();
}

#[test]
fn a_listing_comes_in_pages_and_survives_change() {
    let mut w = World::new();
    let dir = w.dir(R, "d");
    let names: BTreeSet<String> = (0..300).map(|i| format!("n{i}")).collect();
    for name in &names {
        w.make(dir, name, FileKind::Regular).unwrap();
    }
    let (mut seen, mut cookie) = (BTreeSet::new(), 0);
    for page in 0.. {
        let reply = w.read_dir(dir, cookie, 7).unwrap();
        assert_eq!(reply.parent, R.0);
        assert!(reply.entries.len() <= 7);
        for entry in &reply.entries {
            assert!(entry.cookie > cookie.max(2), "cookies grow, and 0 to 2 are not used");
            assert_eq!(entry.attr.unwrap().ino, entry.ino);
            cookie = entry.cookie;
            assert!(seen.insert(String::from_utf8(entry.name.to_vec()).unwrap()), "listed twice");
        }
        if reply.end {
            break;
        }
        // An entry that was listed goes, and a new one comes: the others are listed once all the same.
        w.remove(dir, seen.iter().find(|name| name.starts_with('n')).unwrap().clone().as_str(), false).ok();
        w.make(dir, &format!("new{page}"), FileKind::Regular).unwrap();
    }
    assert!(names.is_subset(&seen));
    let file = w.file("f");
    assert_eq!(errno(w.read_dir(file, 0, 0)), ENOTDIR);
    w.check();
}

#[test]
fn a_directory_knows_its_parent() {
    let mut w = World::new();
    let a = w.dir(R, "a");
    let b = w.dir(a, "b");
    w.rename((a, "b"), (R, "c"), 0).unwrap();
    let mut parent = |ino: InodeId| match w.call(Op::GetParent(GetParent { ino: ino.0 })).unwrap() {
        Reply::GetParent(reply) => (reply.parent, reply.name),
        other => panic!("{other:?}"),
    };
    assert_eq!(parent(b), (R.0, "c".into()));
    assert_eq!(parent(R), (R.0, "".into()));
    w.check();
}

#[test]
fn statfs_adds_up() {
    let mut w = World::new();
    w.file("f");
    let Reply::StatFs(reply) = w.call(Op::StatFs(StatFs {})).unwrap() else { panic!() };
    assert_eq!((reply.capacity, reply.free, reply.inodes, reply.policy), (2 << 40, 2 << 39, 2, 2));
}

#[test]
fn a_file_without_a_name_is_gone_unless_it_gets_one() {
    let mut w = World::new();
    let unnamed = |name: &str, handle| {
        Op::Make(Make {
            parent: 1,
            name: name.to_owned().into(),
            kind: FileKind::Regular.into(),
            mode: 0o600,
            unnamed: true,
            handle,
            ..Make::default()
        })
    };
    assert_eq!(errno(w.call(unnamed("", 0))), EINVAL);
    assert_eq!(errno(w.call(unnamed("x", 1))), EINVAL);
    let make = |w: &mut World, handle| match w.call(unnamed("", handle)).unwrap() {
        Reply::Entry(entry) => InodeId(entry.attr.unwrap().ino),
        other => panic!("{other:?}"),
    };
    let (lost, kept) = (make(&mut w, 1), make(&mut w, 2));
    assert_eq!(w.getattr(lost).unwrap().nlink, 0);
    assert_eq!(w.check().orphans, 2);
    w.restart();
    w.reattach(w.session, &[(1, lost), (2, kept)]);
    assert_eq!(w.link(kept, R, "named").unwrap().nlink, 1);
    w.close(1);
    w.close(2);
    w.idle(std::time::Duration::from_secs(7));
    assert_eq!(errno(w.getattr(lost)), ESTALE);
    assert_eq!(w.lookup(R, "named").unwrap().ino, kept.0);
    w.open(kept, 3).unwrap();
    w.remove(R, "named", false).unwrap();
    assert_eq!(errno(w.link(kept, R, "again")), ENOENT, "a name is given once");
    assert_eq!(w.check().orphans, 1);
}

#[test]
fn what_has_all_the_links_that_can_be_counted_gets_no_more() {
    let mut w = World::new();
    let (f, d) = (w.file("f"), w.dir(R, "d"));
    let mut txn = Txn::new(w.store.clone()).unwrap();
    txn.begin();
    for ino in [f, d] {
        let mut inode = txn.inode(ino).unwrap();
        inode.nlink = u32::MAX;
        txn.put_inode(ino, &inode);
    }
    txn.accept();
    let fence = w.store.take_over().unwrap();
    w.store.commit(txn.take_batch().unwrap(), fence).unwrap();
    w.restart();
    w.reattach(w.session, &[]);
    assert_eq!(errno(w.link(f, R, "g")), EMLINK);
    assert_eq!(errno(w.lookup(R, "g")), ENOENT);
    assert_eq!(errno(w.make(d, "sub", FileKind::Directory)), EMLINK);
    assert_eq!(errno(w.lookup(d, "sub")), ENOENT);
    w.make(d, "file", FileKind::Regular).unwrap();
}
