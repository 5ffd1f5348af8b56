//! Access times.

use std::time::Duration;

use fjordfs_proto::{
    InodeId, ROOT_INODE,
    error::Errno::*,
    pb::meta::{Accessed, SetAttr, Time, request::Op},
};

use crate::testing::{World, errno};

fn at(sec: i64) -> Option<Time> {
    Some(Time { sec, nsec: 7 })
}

fn read(w: &mut World, ino: InodeId, time: i64, before: Option<Time>) {
    let op = Accessed { ino: ino.0, time: at(time), before };
    w.call(Op::Accessed(op)).unwrap();
}

#[test]
fn the_first_read_after_a_change_counts_and_one_a_day() {
    let mut w = World::new();
    let f = w.file("f");
    let made = w.getattr(f).unwrap();
    read(&mut w, f, 1001, made.atime);
    let attr = w.getattr(f).unwrap();
    assert_eq!((attr.atime, attr.mtime, attr.ctime), (at(1001), made.mtime, made.ctime));
    // Others that had not heard of it.
    read(&mut w, f, 1002, made.atime);
    assert_eq!(w.getattr(f).unwrap().atime, at(1001));
    // Who has written what is not committed yet.
    read(&mut w, f, 1003, at(1001));
    assert_eq!(w.getattr(f).unwrap().atime, at(1003));
    let day = 24 * 3600;
    read(&mut w, f, 1003 + day, made.atime);
    assert_eq!(w.getattr(f).unwrap().atime, at(1003 + day));
    w.pass(Duration::from_secs(2 * 24 * 3600));
    w.setattr(SetAttr { ino: f.0, mtime_now: true, ..SetAttr::default() }).unwrap();
    read(&mut w, f, 1005 + 2 * day, made.atime);
    assert_eq!(w.getattr(f).unwrap().atime, at(1005 + 2 * day));
    w.restart();
    w.reattach(w.session, &[]);
    assert_eq!(w.getattr(f).unwrap().atime, at(1005 + 2 * day));
    w.check();
}

#[test]
fn what_is_gone_or_wrong_changes_nothing() {
    let mut w = World::new();
    let f = w.file("f");
    let made = w.getattr(f).unwrap();
    let wrong = Op::Accessed(Accessed {
        ino: f.0,
        time: Some(Time { sec: 1, nsec: 1_000_000_000 }),
        before: made.atime,
    });
    assert_eq!(errno(w.call(wrong)), EINVAL);
    assert_eq!(w.getattr(f).unwrap(), made);
    w.remove(ROOT_INODE, "f", false).unwrap();
    read(&mut w, f, 2000, made.atime);
    assert_eq!(errno(w.getattr(f)), ESTALE);
    w.check();
}

#[test]
fn nobody_is_recalled_and_no_delegation_taken_back() {
    let mut w = World::new();
    let f = w.file("f");
    let made = w.getattr(f).unwrap();
    let other = w.attach();
    // `answer` panics if anything stands in the way; there is nobody to be told.
    let op = Op::Accessed(Accessed { ino: f.0, time: at(1001), before: made.atime });
    w.call_as(other, op).unwrap();
    assert!(w.core.take_recalls().is_empty());
    assert_eq!(w.getattr(f).unwrap().atime, at(1001));
}
