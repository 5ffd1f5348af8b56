use fjordfs_proto::{
    FsError,
    pb::meta::{Commit, CommitReply, Empty, FileCommit, FileCommitReply, Lookup, Remove, SetAttr},
};
use proptest::prelude::*;

use super::*;

const DIR: InodeId = InodeId(1);

fn table() -> Table {
    Table::new(Bounds { inodes: 64, names: 256 })
}

fn attr(ino: u64, kind: FileKind, mode: u32) -> Attr {
    Attr { ino, kind: kind.into(), mode, nlink: 1, ..Attr::default() }
}

fn lookup(name: &'static str) -> Op {
    Op::Lookup(Lookup { parent: DIR.0, name: name.into(), ..Default::default() })
}

fn entry(attr: Attr) -> FsResult<Reply> {
    Ok(Reply::Entry(Entry { attr: Some(attr), ..Entry::default() }))
}

fn absent() -> FsResult<Reply> {
    Err(FsError::new(Errno::ENOENT, "nothing there"))
}

fn make(name: &'static str, kind: FileKind) -> Op {
    Op::Make(Make { parent: DIR.0, name: name.into(), kind: kind.into(), ..Make::default() })
}

fn rename(name: &'static str, new_name: &'static str, flags: u32) -> Op {
    Op::Rename(Rename {
        parent: DIR.0,
        name: name.into(),
        new_parent: DIR.0,
        new_name: new_name.into(),
        flags,
        time: None,
    })
}

/// An answer to an operation that was just sent.
fn told(t: &mut Table, op: &Op, result: &FsResult<Reply>, serial: u64, changed: &[Attr]) {
    t.learn(op, &Sent::default(), result, serial, changed);
}

const EMPTY: FsResult<Reply> = Ok(Reply::Empty(Empty {}));

#[test]
fn what_was_found_and_what_was_not_is_known_until_it_is_forgotten() {
    let mut t = table();
    assert_eq!(t.name(DIR, b"a"), None);
    let a = attr(7, FileKind::Regular, 0o644);
    told(&mut t, &lookup("a"), &entry(a), 1, &[]);
    told(&mut t, &lookup("b"), &absent(), 2, &[]);
    assert_eq!((t.name(DIR, b"a"), t.name(DIR, b"b")), (Some(Some(InodeId(7))), Some(None)));
    assert_eq!(t.attr(InodeId(7)), Some(a));
    assert_eq!(t.name(DIR, b"c"), None);
    assert!(!t.forget(InodeId(7)), "a file has no names in it");
    assert_eq!((t.name(DIR, b"a"), t.attr(InodeId(7))), (Some(Some(InodeId(7))), None));
    assert!(t.forget(DIR));
    assert_eq!(t.name(DIR, b"a"), None);
    assert_eq!(t.serial(), 2);
}

#[test]
fn neighbours_of_what_was_found_can_be_opened_without_asking() {
    let mut t = table();
    assert_eq!(t.neighbours(DIR), 0, "the directory is new: nothing says that more of it will be wanted");
    told(&mut t, &lookup("a"), &entry(attr(7, FileKind::Regular, 0o644)), 1, &[]);
    assert!(t.neighbours(DIR) > 0);
    let near = attr(8, FileKind::Regular, 0o600);
    let extents = ExtentsReply { next_offset: u64::MAX, ..ExtentsReply::default() };
    let found = Entry { attr: Some(near), extents: Some(extents.clone()), ..Entry::default() };
    let link =
        Entry { attr: Some(attr(9, FileKind::Symlink, 0o777)), target: "near".into(), ..Entry::default() };
    let named =
        |name: &'static str, entry: &Entry| Neighbour { name: name.into(), entry: Some(entry.clone()) };
    let answer = |ino| {
        let neighbours = vec![named("near", &found), named("link", &link)];
        let attr = Some(attr(ino, FileKind::Regular, 0o644));
        Ok(Reply::Entry(Entry { attr, neighbours, ..Entry::default() }))
    };
    // One that may not be cached tells nothing of them.
    told(&mut t, &lookup("b"), &answer(10), 0, &[]);
    assert_eq!((t.name(DIR, b"near"), t.openable(InodeId(8)), t.target(InodeId(9))), (None, None, None));
    told(&mut t, &lookup("b"), &answer(10), 2, &[]);
    assert_eq!(t.look_up(DIR, b"near"), Some(Some(InodeId(8))));
    assert_eq!(t.openable(InodeId(8)), Some((near, Some(extents))));
    assert_eq!((t.name(DIR, b"link"), t.target(InodeId(9))), (Some(Some(InodeId(9))), Some("near".into())));
    assert!(t.neighbours(DIR) > 8, "what is used is worth more of it");
    t.forget(DIR);
    assert_eq!(t.name(DIR, b"near"), None);
}

#[test]
fn an_answer_that_may_not_be_cached_takes_out_what_it_was_about() {
    let mut t = table();
    told(&mut t, &lookup("a"), &absent(), 1, &[]);
    let parent = attr(DIR.0, FileKind::Directory, 0o755);
    told(&mut t, &lookup("x"), &absent(), 2, &[parent]);
    assert_eq!(t.attr(DIR), Some(parent));
    told(&mut t, &make("a", FileKind::Regular), &entry(attr(7, FileKind::Regular, 0)), 0, &[]);
    assert_eq!((t.name(DIR, b"a"), t.attr(InodeId(7)), t.attr(DIR)), (None, None, None));
    assert_eq!(t.name(DIR, b"x"), Some(None));
}

/// Whatever shows attributes has them leased: the server takes it that they are known here from then on.
#[test]
fn every_answer_that_shows_attributes_is_taken_in() {
    use fjordfs_proto::pb::meta::{
        Allocate, Commit, CommitReply, CopyRange, CopyRangeReply, FileCommitReply, Open, OpenReply,
    };
    let after = |size| Attr { size, ..attr(7, FileKind::Regular, 0o644) };
    let shown = |size| Some(after(size));
    let file = FileCommitReply { attr: shown(4), ..FileCommitReply::default() };
    let copy = Op::CopyRange(CopyRange { source: 6, target: 7, ..CopyRange::default() });
    let answers = [
        (
            Op::Open(Open { ino: 7, ..Open::default() }),
            Reply::Open(OpenReply { attr: shown(1), ..OpenReply::default() }),
        ),
        (
            Op::SetAttr(SetAttr { ino: 7, ..SetAttr::default() }),
            Reply::Entry(Entry { attr: shown(2), ..Entry::default() }),
        ),
        (
            Op::Allocate(Allocate { ino: 7, ..Allocate::default() }),
            Reply::Entry(Entry { attr: shown(3), ..Entry::default() }),
        ),
        (
            Op::Commit(Commit::default()),
            Reply::Commit(CommitReply { files: vec![file], ..CommitReply::default() }),
        ),
        (copy.clone(), Reply::CopyRange(CopyRangeReply { copied: 5, attr: shown(5) })),
    ];
    let mut t = table();
    told(&mut t, &lookup("a"), &entry(after(0)), 1, &[]);
    for ((op, reply), size) in answers.into_iter().zip(1..) {
        told(&mut t, &op, &Ok(reply), 1 + size, &[]);
        assert_eq!(t.attr(InodeId(7)), shown(size), "{op:?}");
    }
    // One that may not be cached leaves nothing known of what it may have changed.
    told(&mut t, &copy, &absent(), 0, &[]);
    assert_eq!(t.attr(InodeId(7)), None);
}

#[test]
fn what_this_client_is_changing_is_not_shown() {
    let mut t = table();
    told(&mut t, &lookup("a"), &absent(), 1, &[]);
    let op = make("a", FileKind::Regular);
    let sent = t.sent(&op, 1);
    t.sent(&op, 2);
    assert_eq!(t.name(DIR, b"a"), None);
    t.settled(&op, &sent);
    assert_eq!(t.name(DIR, b"a"), None, "the other is still under way");
    t.settled(&op, &sent);
    told(&mut t, &op, &entry(attr(7, FileKind::Regular, 0)), 2, &[]);
    assert_eq!(t.name(DIR, b"a"), Some(Some(InodeId(7))));
    let set = Op::SetAttr(SetAttr { ino: 7, ..SetAttr::default() });
    let sent = t.sent(&set, 3);
    assert_eq!(t.attr(InodeId(7)), None);
    t.settled(&set, &sent);
    assert!(t.attr(InodeId(7)).is_some());
}

/// Otherwise the server could destroy it without having heard of whoever opens it here.
#[test]
fn what_may_be_losing_its_last_name_is_not_opened_here() {
    let remove = |name: &'static str| {
        Op::Remove(Remove { parent: DIR.0, name: name.into(), directory: false, time: None })
    };
    let replace = rename("b", "a", 0);
    for (op, others) in [(remove("a"), true), (replace, true), (remove("not known"), false)] {
        let mut t = table();
        told(&mut t, &lookup("a"), &entry(attr(8, FileKind::Regular, 0o644)), 1, &[]);
        told(&mut t, &lookup("b"), &entry(attr(9, FileKind::Regular, 0o644)), 2, &[]);
        let sent = t.sent(&op, 1);
        assert_eq!((t.openable(InodeId(8)), t.openable(InodeId(9)).is_some()), (None, others), "{op:?}");
        // What the name leads to is in doubt by now.
        let again = t.sent(&op, 2);
        t.settled(&op, &sent);
        assert_eq!(t.openable(InodeId(8)), None, "{op:?}");
        t.settled(&op, &again);
        assert!(t.openable(InodeId(8)).is_some() && t.openable(InodeId(9)).is_some(), "{op:?}");
        assert!(t.losing_names.is_empty());
    }
    let mut t = table();
    told(&mut t, &lookup("a"), &entry(attr(8, FileKind::Regular, 0o644)), 1, &[]);
    // The answer had to wait for others, and may not be cached.
    told(&mut t, &remove("a"), &EMPTY, 0, &[Attr { ino: 8, ..Attr::default() }]);
    assert_eq!(t.openable(InodeId(8)), None);
}

#[test]
fn a_directory_made_here_is_known_as_a_whole() {
    let mut t = table();
    told(&mut t, &make("d", FileKind::Directory), &entry(attr(9, FileKind::Directory, 0o755)), 1, &[]);
    let d = InodeId(9);
    assert_eq!(t.name(d, b"anything"), Some(None));
    let made =
        Op::Make(Make { parent: 9, name: "f".into(), kind: FileKind::Regular.into(), ..Make::default() });
    told(&mut t, &made, &entry(attr(10, FileKind::Regular, 0)), 2, &[attr(9, FileKind::Directory, 0o755)]);
    assert_eq!(t.name(d, b"f"), Some(Some(InodeId(10))));
    // Nobody knows how this one ended: absence of other names is still known, this name is not.
    let removed = Op::Remove(Remove { parent: 9, name: "f".into(), directory: false, time: None });
    told(&mut t, &removed, &EMPTY, 0, &[]);
    assert_eq!(t.name(d, b"f"), None);
}

#[test]
fn renames_move_what_is_known() {
    let mut t = table();
    let dir = attr(DIR.0, FileKind::Directory, 0o755);
    told(&mut t, &lookup("a"), &entry(attr(7, FileKind::Regular, 0)), 1, &[]);
    told(&mut t, &rename("a", "b", 0), &EMPTY, 2, &[dir]);
    assert_eq!((t.name(DIR, b"a"), t.name(DIR, b"b")), (Some(None), Some(Some(InodeId(7)))));
    told(&mut t, &lookup("c"), &entry(attr(8, FileKind::Regular, 0)), 3, &[]);
    told(&mut t, &rename("b", "c", EXCHANGE), &EMPTY, 4, &[dir]);
    assert_eq!((t.name(DIR, b"b"), t.name(DIR, b"c")), (Some(Some(InodeId(8))), Some(Some(InodeId(7)))));
    // Two names of one file: rename does nothing.
    told(&mut t, &rename("b", "c", 0), &EMPTY, 5, &[]);
    assert_eq!(t.name(DIR, b"b"), Some(Some(InodeId(8))));
    // Nothing is known of the source.
    told(&mut t, &rename("u", "c", 0), &EMPTY, 6, &[dir]);
    assert_eq!((t.name(DIR, b"u"), t.name(DIR, b"c")), (Some(None), None));
}

#[test]
fn an_inode_without_links_is_forgotten() {
    let mut t = table();
    told(&mut t, &lookup("a"), &entry(attr(7, FileKind::Regular, 0)), 1, &[]);
    let removed = Op::Remove(Remove { parent: DIR.0, name: "a".into(), directory: false, time: None });
    told(&mut t, &removed, &EMPTY, 2, &[Attr { ino: 7, ..Attr::default() }]);
    assert_eq!((t.name(DIR, b"a"), t.attr(InodeId(7))), (Some(None), None));
}

/// Nobody else may have a lease on the file itself, so that nobody has it recalled.
#[test]
fn what_lost_one_of_its_names_is_asked_for_again_though_the_answer_may_be_old() {
    let mut t = table();
    let mut file = Attr { nlink: 2, ..attr(7, FileKind::Regular, 0o644) };
    told(&mut t, &lookup("a"), &entry(file), 1, &[]);
    assert_eq!(t.attr(InodeId(7)).map(|attr| attr.nlink), Some(2));
    file.nlink = 1;
    let removed = Op::Remove(Remove { parent: 1, name: Bytes::from_static(b"a"), ..Remove::default() });
    told(&mut t, &removed, &EMPTY, 0, &[file]);
    assert_eq!(t.attr(InodeId(7)), None);
}

#[test]
fn the_target_of_a_link_is_kept_when_the_link_is_gone() {
    let mut t = table();
    let link =
        Entry { attr: Some(attr(7, FileKind::Symlink, 0o777)), target: "there".into(), ..Entry::default() };
    told(&mut t, &lookup("a"), &Ok(Reply::Entry(link)), 1, &[]);
    t.forget(InodeId(7));
    assert_eq!(t.target(InodeId(7)).unwrap(), "there");
    for ino in 100..100 + TARGETS_MAX as u64 {
        let link =
            Entry { attr: Some(attr(ino, FileKind::Symlink, 0o777)), target: "x".into(), ..Entry::default() };
        told(&mut t, &lookup("a"), &Ok(Reply::Entry(link)), 2, &[]);
        t.forget(InodeId(ino));
    }
    assert_eq!(t.target(InodeId(7)), None);
}

proptest! {
    /// However much is learnt, the table stays within its bounds and tells of everything it drops.
    #[test]
    fn the_table_is_bounded(inos in proptest::collection::vec((1..40u64, 0..200u64), 0..600)) {
        let mut t = Table::new(Bounds { inodes: 32, names: 64 });
        let mut held = std::collections::HashSet::new();
        for (serial, (parent, ino)) in inos.into_iter().enumerate() {
            let op = Op::Lookup(Lookup { parent, name: ino.to_string().into(), ..Default::default() });
            told(&mut t, &op, &entry(attr(1000 + ino, FileKind::Regular, 0)), serial as u64 + 1, &[]);
            held.extend([InodeId(parent), InodeId(1000 + ino)]);
            for ino in t.shrink() {
                prop_assert!(held.remove(&ino));
            }
            prop_assert!(t.inodes.len() <= 32 && t.names <= 64);
            prop_assert_eq!(t.names, t.inodes.iter().map(|(_, c)| c.names.len()).sum::<usize>());
            prop_assert_eq!(t.inodes.len(), held.len());
        }
    }
}

#[test]
fn an_answer_from_before_a_commit_of_this_client_shows_nothing_older() {
    let mut t = table();
    let version =
        |data_version| Attr { data_version, size: data_version, ..attr(7, FileKind::Regular, 0o644) };
    assert_eq!(t.newest(version(1)), version(1));
    let commit = Op::Commit(Commit {
        files: vec![FileCommit { ino: 7, ..FileCommit::default() }],
        ..Commit::default()
    });
    let file = FileCommitReply { attr: Some(version(2)), ..FileCommitReply::default() };
    let reply = Ok(Reply::Commit(CommitReply { files: vec![file], ..CommitReply::default() }));
    // Others had to let go first, so it grants nothing; and it is recalled besides.
    told(&mut t, &commit, &reply, 0, &[]);
    t.forget(InodeId(7));
    assert_eq!(t.attr(InodeId(7)), None);
    assert_eq!(t.newest(version(1)), version(2), "a look that was answered late");
    assert_eq!(t.newest(version(3)), version(3), "others have written since");
    let file = FileCommitReply { attr: Some(version(1)), ..FileCommitReply::default() };
    let late = Ok(Reply::Commit(CommitReply { files: vec![file], ..CommitReply::default() }));
    told(&mut t, &commit, &late, 0, &[]);
    assert_eq!(t.newest(version(1)), version(2), "a commit that was answered late");
    t.clear();
    assert_eq!(t.newest(version(1)), version(1), "a metaserver may have lost it in a power failure");
}

#[test]
fn versions_that_only_this_client_has_made_are_known() {
    let mut t = table();
    let file = |version| Attr { data_version: version, ..attr(8, FileKind::Regular, 0o644) };
    let mut commit = |version, appended_shift| {
        let file = FileCommitReply { attr: Some(file(version)), appended_shift, errno: 0 };
        let reply = Ok(Reply::Commit(CommitReply { files: vec![file], ..CommitReply::default() }));
        told(&mut t, &Op::Commit(Commit::default()), &reply, 0, &[]);
        t.own_versions(InodeId(8)).unwrap()
    };
    assert_eq!(commit(5, 0), 4..=5);
    assert_eq!(commit(6, 0), 4..=6);
    assert_eq!(commit(5, 0), 4..=6, "an answer that comes late");
    assert_eq!(commit(6, 0), 4..=6, "nothing has changed");
    assert_eq!(commit(8, 0), 7..=8, "somebody else made one");
    assert_eq!(commit(9, 100), 9..=9, "what was appended has moved");
    assert_eq!(commit(10, 0), 9..=10);
    t.clear();
    assert_eq!(t.own_versions(InodeId(8)), None, "the metaserver may have lost them");
}
