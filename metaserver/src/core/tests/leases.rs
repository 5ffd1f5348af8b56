//! Leases, recalls and delegations, and what becomes of files that are removed meanwhile.

use super::*;
use crate::{core::Outcome, leases::RecallId};

/// Sends a request and answers with what its answer waits for and whether it may be cached.
fn ask(w: &mut World, session: SessionId, op: Op) -> (usize, bool, Vec<u64>) {
    let sequence = w.sequences.entry(session).or_default();
    *sequence += 1;
    let request = Request { id: 9, slot: 0, sequence: *sequence, op: Some(op), ..Request::default() };
    let answer = w.answer(session, request);
    w.core.commit().unwrap();
    let changed = answer.response.changed.iter().map(|attr| attr.ino).collect();
    (answer.recalls.len(), answer.response.serial != 0, changed)
}

fn look(name: &str) -> Op {
    Op::Lookup(Lookup { parent: 1, name: name.to_owned().into(), ..Default::default() })
}

#[test]
fn what_others_cache_is_recalled_and_nobody_is_told_before() {
    let mut w = World::new();
    let (a, b) = (w.session, w.attach());
    assert_eq!(ask(&mut w, a, make("f", 0)), (0, true, vec![1]), "nobody else knows the directory");
    assert!(ask(&mut w, b, look("absent")).1, "absence is cached, too");
    assert!(w.core.take_recalls().is_empty());

    let (waits, cacheable, changed) = ask(&mut w, a, make("absent", 0));
    assert_eq!((waits, cacheable, changed), (2, false, vec![1]), "b, and a itself");
    // A reader waits as well, also for an error, and what has nothing to do with it does not.
    assert_eq!(ask(&mut w, a, look("absent")).0, 2);
    assert_eq!(ask(&mut w, b, make("absent", 0)).0, 2);
    assert_eq!(ask(&mut w, a, Op::GetAttr(GetAttr { ino: 2 })).0, 0);
    let recalls = w.core.take_recalls();
    assert_eq!(recalls.iter().map(|o| (o.session, o.ino)).collect::<Vec<_>>(), [(a, R), (b, R)]);
    for recall in &recalls {
        w.core.let_go(recall.session, &[recall.id.0], None, None);
    }
    assert_eq!(w.core.take_ended_recalls().len(), 2);
    assert_eq!(ask(&mut w, b, look("absent")), (0, true, vec![]));
}

/// The kernel of the host where something is changed caches the old until the answer has reached the program that asked for it.
#[test]
fn what_is_changed_by_its_only_holder_is_recalled_before_others_see_it() {
    let mut w = World::new();
    let (a, b, c) = (w.session, w.attach(), w.attach());
    let d = w.dir(R, "d");
    let below = |name: &str| Lookup { parent: d.0, name: name.to_owned().into(), ..Default::default() };
    let stat = Op::GetAttr(GetAttr { ino: d.0 });
    let mode = SetAttr { ino: d.0, mode: Some(0o700), ..SetAttr::default() };
    let Op::Make(made) = make("f", 0) else { panic!() };
    let made = Op::Make(Make { parent: d.0, ..made });
    let renamed =
        Rename { parent: d.0, name: "f".into(), new_parent: d.0, new_name: "g".into(), ..Rename::default() };
    let link = Link { ino: 0, parent: d.0, name: "h".into() };
    let xattr = SetXattr { ino: d.0, name: "user.x".into(), value: "y".into(), ..SetXattr::default() };
    let steps = [
        (Op::SetAttr(mode), stat.clone()),
        (made, Op::Lookup(below("f"))),
        (Op::Rename(renamed), Op::Lookup(below("f"))),
        (Op::Link(link), Op::Lookup(below("h"))),
        (Op::SetXattr(xattr), stat.clone()),
    ];
    for (mut change, look) in steps {
        if let Op::Link(link) = &mut change {
            link.ino = w.lookup(d, "g").unwrap().ino;
        }
        // Only a has heard of the directory.
        obey(&mut w);
        for other in [b, c] {
            w.core.leases.end_all(other);
        }
        assert!(ask(&mut w, a, stat.clone()).1, "{change:?}");
        assert_eq!(ask(&mut w, a, change.clone()).0, 0, "nobody is waited for: {change:?}");
        assert!(w.core.take_recalls().is_empty());
        // A link's directory and the file itself.
        let held = if matches!(change, Op::Link(_)) { 2 } else { 1 };
        let (waits, cacheable, _) = ask(&mut w, b, look.clone());
        assert_eq!((waits, cacheable), (held, false), "{change:?}");
        assert_eq!(ask(&mut w, c, look.clone()).0, held, "{change:?}");
        assert_eq!(ask(&mut w, a, look.clone()).0, held, "what it asks is answered when it has let go");
        let recalls = w.core.take_recalls();
        assert!(recalls.len() == held && recalls.iter().all(|order| order.session == a), "{recalls:?}");
        for recall in recalls {
            w.core.let_go(a, &[recall.id.0], None, None);
        }
        assert_eq!((ask(&mut w, b, look.clone()).0, ask(&mut w, c, look).0), (0, 0), "{change:?}");
    }
}

#[test]
fn nobody_sees_half_of_a_rename() {
    let mut w = World::new();
    let d = w.dir(R, "d");
    let (a, b, c) = (w.session, w.attach(), w.attach());
    let below =
        |name: &str| Op::Lookup(Lookup { parent: d.0, name: name.to_owned().into(), ..Default::default() });
    ask(&mut w, a, make("f", 0));
    ask(&mut w, c, look("absent"));
    obey(&mut w);
    // b knows that the file is not below, and has never seen where it is.
    assert!(ask(&mut w, b, below("f")).1 && ask(&mut w, c, look("absent")).1);
    let rename =
        Rename { parent: 1, name: "f".into(), new_parent: d.0, new_name: "f".into(), ..Rename::default() };
    ask(&mut w, a, Op::Rename(rename));
    // All obey but b. That somebody looks at the file itself has a recalled once more.
    for _ in 0..2 {
        for recall in w.core.take_recalls().into_iter().filter(|recall| recall.session != b) {
            w.core.let_go(recall.session, &[recall.id.0], None, None);
        }
        ask(&mut w, c, below("f"));
    }
    assert_eq!(ask(&mut w, c, look("f")).0, 1, "or the file would be in no place, with b's word for it");
    assert_eq!(ask(&mut w, c, below("f")).0, 1);
    w.core.let_go(b, &[], Some(&GivenBack { inos: vec![d.0], as_of: u64::MAX }), None);
    assert_eq!(ask(&mut w, c, look("f")).0, 0);
}

#[test]
fn an_answer_that_is_repeated_waits_for_whatever_is_recalled() {
    let mut w = World::new();
    let (a, b) = (w.session, w.attach());
    ask(&mut w, b, look("f"));
    let request = |op| Request { id: 9, slot: 5, sequence: 1, op: Some(op), ..Request::default() };
    let first = w.answer(a, request(make("f", 0)));
    w.core.commit().unwrap();
    let again = w.answer(a, request(make("f", 0)));
    assert_eq!((first.recalls, first.response.serial), (again.recalls.clone(), 0));
    assert!(!again.recalls.is_empty() && again.response.serial == 0);
}

#[test]
fn silence_ends_leases_and_disobedience_the_session() {
    let mut w = World::new();
    let (a, b) = (w.session, w.attach());
    ask(&mut w, b, look("f"));
    assert_eq!(ask(&mut w, a, make("f", 0)).0, 1);
    // b is not heard of: its leases run out, its session lives on.
    w.idle(Duration::from_secs(7));
    assert_eq!(w.core.take_ended_recalls().len(), 1);
    assert!(w.core.hear(b, w.now));

    ask(&mut w, b, look("g"));
    ask(&mut w, a, make("g", 0));
    for _ in 0..40 {
        w.pass(Duration::from_secs(1));
        w.core.hear(a, w.now);
        w.core.hear(b, w.now);
        w.tick();
    }
    assert!(!w.core.hear(b, w.now), "heard, but it did not obey");
}

/// What an operation waits for before it is executed at all.
fn postponed(w: &mut World, session: SessionId, op: Op) -> Vec<RecallId> {
    match w.core.request(
        session,
        Request { id: 9, slot: 7, sequence: 1, op: Some(op), ..Request::default() },
        w.now,
    ) {
        Outcome::Postponed(_, recalls) => recalls,
        Outcome::Answered(answer) => panic!("{answer:?}"),
        Outcome::Waiting => panic!("it waits for a lock"),
    }
}

#[test]
fn after_a_restart_everything_waits_for_what_was_decided_before() {
    let mut w = World::new();
    let (a, b) = (w.session, w.attach());
    w.file("f");
    w.restart();
    w.reattach(a, &[]);
    assert_eq!(postponed(&mut w, a, look("f")), [RecallId::GRACE]);
    w.call(Op::Sync(Sync {})).unwrap();
    w.reattach(b, &[]);
    assert_eq!(w.core.take_ended_recalls(), [RecallId::GRACE, RecallId::LOCKS]);
    assert_eq!(ask(&mut w, a, look("f")).0, 0);
}

#[test]
fn the_grace_ends_also_with_clients_that_stay_away_or_never_settle() {
    let mut w = World::new();
    let (a, b) = (w.session, w.attach());
    w.restart();
    w.reattach(a, &[]);
    w.idle(Duration::from_secs(7));
    assert_eq!(ask(&mut w, a, look("f")).0, 0, "b was silent for a lease's time");
    w.restart();
    w.reattach(a, &[]);
    for _ in 0..16 {
        w.core.hear(b, w.now);
        w.idle(Duration::from_secs(1));
    }
    assert_eq!(ask(&mut w, a, look("f")).0, 0, "b is heard, but has not sent anything");
}

/// A session that wants delegations.
fn willing(w: &mut World) -> SessionId {
    let welcome = w.core.attach(&Hello { delegations: true, ..hello(0) }, w.now).unwrap();
    w.core.commit().unwrap();
    SessionId(welcome.session)
}

fn directory(name: &str) -> Op {
    Op::Make(Make {
        parent: 1,
        name: name.to_owned().into(),
        kind: FileKind::Directory.into(),
        ..Make::default()
    })
}

#[test]
fn what_is_delegated_is_postponed_for_others_and_then_seen_as_it_was_left() {
    let mut w = World::new();
    let (a, b) = (willing(&mut w), w.session);
    let request = Request { id: 9, slot: 0, sequence: 1, op: Some(directory("d")), ..Request::default() };
    let made = w.answer(a, request).response;
    w.core.commit().unwrap();
    let Some(Reply::Entry(Entry { attr: Some(d), .. })) = made.result else { panic!("{made:?}") };
    assert_eq!(made.delegated, [1, d.ino], "nobody else has heard of the root, nor of what is new");
    let recalls =
        postponed(&mut w, b, Op::Lookup(Lookup { parent: d.ino, name: "f".into(), ..Default::default() }));
    let orders = w.core.take_recalls();
    assert_eq!(orders.iter().map(|o| (o.session, o.ino.0)).collect::<Vec<_>>(), [(a, d.ino)]);
    // What a had decided arrives before it obeys.
    let Reply::LeaseInodes(inodes) = w.send(a, 1, 1, Op::LeaseInodes(LeaseInodes { count: 9 })).unwrap()
    else {
        panic!()
    };
    let make = Make {
        parent: d.ino,
        name: "f".into(),
        kind: FileKind::Regular.into(),
        ino: inodes.first,
        ..Make::default()
    };
    let deferred = Request { id: 9, slot: 2, sequence: 1, deferred: true, op: Some(Op::Make(make.clone())) };
    let answer = w.answer(a, deferred.clone());
    assert!(answer.recalls.is_empty() && answer.response.result == Some(Reply::Empty(Empty {})));
    assert_eq!(w.answer(a, deferred).response.result, Some(Reply::Empty(Empty {})), "once");
    // The successor of a process that had decided it does not know under which number.
    let asked = w.send(a, 2, 1, Op::Make(Make { ino: 0, ..make })).unwrap();
    let Reply::Entry(Entry { attr: Some(made), .. }) = asked else { panic!("{asked:?}") };
    assert_eq!((made.ino, made.kind()), (inodes.first, FileKind::Regular));
    w.core.let_go(a, &[orders[0].id.0], None, None);
    assert_eq!(w.core.take_ended_recalls(), recalls);

    // The new file is delegated as well.
    let look = Op::Lookup(Lookup { parent: d.ino, name: "f".into(), ..Default::default() });
    postponed(&mut w, b, look.clone());
    let orders = w.core.take_recalls();
    assert_eq!(orders.iter().map(|o| o.ino.0).collect::<Vec<_>>(), [inodes.first]);
    w.core.let_go(a, &[orders[0].id.0], None, None);
    let Reply::Entry(found) = w.call(look).unwrap() else { panic!() };
    assert_eq!(found.attr.unwrap().ino, inodes.first);
    w.check();
}

/// Clients decide it with the directory alone delegated to them: whoever has what is above is not waited for.
#[test]
fn a_directory_is_renamed_where_it_is_without_a_look_at_those_above() {
    let mut w = World::new();
    let (a, b) = (willing(&mut w), w.session);
    let g = w.dir(R, "g");
    let d = w.dir(g, "d");
    w.dir(d, "x");
    w.dir(d, "z");
    w.core.leases.end_all(b);
    w.core.leases.delegate_new(a, d);
    w.core.leases.delegate_new(b, g);
    let rename = |name: &str, new_name: &str, flags| {
        let (name, new_name) = (name.to_owned().into(), new_name.to_owned().into());
        Op::Rename(Rename { parent: d.0, name, new_parent: d.0, new_name, flags, time: None })
    };
    for (sequence, op) in [(1, rename("x", "y", 0)), (2, rename("y", "z", 2))] {
        let request = Request { id: 9, slot: 0, sequence, deferred: true, op: Some(op) };
        let answer = w.answer(a, request);
        assert_eq!((answer.response.result, answer.recalls.len()), (Some(Reply::Empty(Empty {})), 0));
    }
    w.core.commit().unwrap();
    w.check();
}

/// What it has decided was told to its programs: others must not be shown the state without it and then have it changed.
#[test]
fn who_was_cut_off_is_waited_for_with_what_it_decided_until_its_session_is_over() {
    for (stream_ends, comes_back) in [(false, true), (false, false), (true, true), (true, false)] {
        let mut w = World::new();
        let (a, b) = (willing(&mut w), w.session);
        let request = Request { id: 9, slot: 0, sequence: 1, op: Some(directory("d")), ..Request::default() };
        let Some(Reply::Entry(Entry { attr: Some(d), .. })) = w.answer(a, request).response.result else {
            panic!()
        };
        w.core.commit().unwrap();
        let below = Op::Lookup(Lookup { parent: d.ino, name: "f".into(), ..Default::default() });
        let recalls = postponed(&mut w, b, below.clone());
        w.idle(Duration::from_secs(20));
        assert_eq!(w.core.take_ended_recalls(), [], "its stream is whole");
        if stream_ends {
            // A client that has heard nothing itself ends it, and so does the end of its process.
            w.core.detach(a, w.now);
            w.idle(Duration::from_secs(4));
            assert_eq!(w.core.take_ended_recalls(), [], "it may be coming back");
        }
        if comes_back {
            w.core.take_recalls();
            w.reattach(a, &[]);
            let [order] = w.core.take_recalls()[..] else { panic!("it is told again") };
            w.core.let_go(a, &[order.id.0], None, None);
        } else {
            w.idle(Duration::from_secs(if stream_ends { 2 } else { 11 }));
        }
        assert_eq!(w.core.take_ended_recalls(), recalls, "{stream_ends} {comes_back}");
        assert_eq!(w.core.hear(a, w.now), comes_back || stream_ends, "its session is over otherwise");
        assert_eq!(w.call(below).unwrap_err().errno, ENOENT);
    }
}

#[test]
fn inode_numbers_are_their_sessions_alone_and_used_once() {
    let mut w = World::new();
    let (a, b) = (w.session, w.attach());
    let Reply::LeaseInodes(inodes) = w.call(Op::LeaseInodes(LeaseInodes { count: 2 })).unwrap() else {
        panic!()
    };
    let make = |name: &str, ino| {
        Op::Make(Make {
            name: name.to_owned().into(),
            parent: 1,
            kind: FileKind::Regular.into(),
            ino,
            ..Make::default()
        })
    };
    assert_eq!(errno(w.call_as(b, make("f", inodes.first))), EINVAL);
    assert_eq!(errno(w.call(make("f", inodes.first + 2))), EINVAL);
    w.restart();
    w.reattach(a, &[]);
    w.reattach(b, &[]);
    w.call(make("f", inodes.first)).unwrap();
    assert_eq!(errno(w.call(make("g", inodes.first))), EINVAL, "used");
    assert!(w.file("g").0 > inodes.first + 1, "never given out again");
    assert_eq!(errno(w.call(Op::LeaseInodes(LeaseInodes { count: 0 }))), EINVAL);
    w.check();
}

#[test]
fn a_lookup_brings_neighbours_that_are_news_and_recall_nobody() {
    let mut w = World::new();
    let (a, b, c) = (w.session, w.attach(), willing(&mut w));
    let files: Vec<InodeId> = (0..9).map(|i| w.file(&format!("f{i}"))).collect();
    ask(&mut w, b, look("absent"));
    obey(&mut w);
    // What c has decided is delegated to it.
    assert!(ask(&mut w, b, look("absent")).1);
    let Reply::LeaseInodes(inodes) = w.send(c, 1, 1, Op::LeaseInodes(LeaseInodes { count: 9 })).unwrap()
    else {
        panic!()
    };
    let Op::Make(delegated) = make("delegated", 0) else { panic!() };
    let op = Some(Op::Make(Make { ino: inodes.first, ..delegated }));
    w.answer(c, Request { id: 9, slot: 2, sequence: 1, deferred: true, op });
    for recall in w.core.take_recalls() {
        w.core.let_go(recall.session, &[recall.id.0], None, None);
    }
    w.idle(Duration::from_secs(2));
    let look = |w: &mut World, name: &str, neighbours| {
        let (parent, name) = (1, name.to_owned().into());
        let op = Op::Lookup(Lookup { parent, name, extents: true, neighbours });
        let sequence = w.sequences.entry(b).or_default();
        *sequence += 1;
        let request = Request { id: 9, slot: 0, sequence: *sequence, op: Some(op), ..Request::default() };
        let response = w.answer(b, request).response;
        let Some(Reply::Entry(entry)) = response.result else { panic!("{response:?}") };
        assert_ne!(response.serial, 0, "it can be cached");
        for neighbour in &entry.neighbours {
            let shown = neighbour.entry.as_ref().unwrap();
            assert!(shown.extents.is_some() && shown.neighbours.is_empty(), "{shown:?}");
            assert_eq!(
                w.lookup(R, std::str::from_utf8(&neighbour.name).unwrap()).unwrap(),
                shown.attr.unwrap()
            );
        }
        entry.neighbours.iter().map(|n| String::from_utf8(n.name.to_vec()).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(look(&mut w, "f0", 0), [""; 0]);
    let some = look(&mut w, "f1", 3);
    assert_eq!(some.len(), 3);
    let mut all = [some, look(&mut w, "f1", u32::MAX)].concat();
    all.sort();
    assert_eq!(
        all,
        (2..9).map(|i| format!("f{i}")).collect::<Vec<_>>(),
        "each once, and not what c alone has"
    );
    // They are leased as if b had asked.
    let change = |ino: InodeId| Op::SetAttr(SetAttr { ino: ino.0, mode: Some(0o600), ..SetAttr::default() });
    w.core.take_recalls();
    assert!(ask(&mut w, a, change(files[5])).0 > 0);
    let recalled: Vec<_> = w.core.take_recalls().iter().map(|order| (order.session, order.ino)).collect();
    assert!(recalled.contains(&(b, files[5])), "{recalled:?}");
    // What is recalled, or was a moment ago, nobody is told of unasked.
    w.core.let_go(
        b,
        &[],
        Some(&GivenBack { inos: files.iter().map(|f| f.0).collect(), as_of: u64::MAX }),
        None,
    );
    assert_eq!(look(&mut w, "f1", 99).len(), 7, "all but f5 and f1 itself");
}

#[test]
fn leases_end_with_their_inodes() {
    let mut w = World::new();
    let a = w.session;
    let before = w.core.status(w.now).sessions.iter().find(|s| s.session == a.0).map(|s| s.leases);
    for i in 0..10 {
        w.file(&format!("f{i}"));
        w.remove(R, &format!("f{i}"), false).unwrap();
    }
    let after = w.core.status(w.now).sessions.iter().find(|s| s.session == a.0).map(|s| s.leases);
    assert_eq!(before.unwrap() + 1, after.unwrap(), "the root's");
}

/// Everybody obeys.
fn obey(w: &mut World) {
    for recall in w.core.take_recalls() {
        w.core.let_go(recall.session, &[recall.id.0], None, None);
    }
}

/// Who has opened a file under its lease says so before it obeys the recall: until then nobody knows.
#[test]
fn a_file_without_a_name_stays_while_somebody_may_have_opened_it_under_a_lease() {
    for replaced in [false, true] {
        let mut w = World::new();
        let (a, b) = (w.session, w.attach());
        let f = w.file("f");
        w.open(f, 1).unwrap();
        assert!(ask(&mut w, b, look("f")).1, "b has a lease");
        if replaced {
            w.file("g");
            w.rename((R, "g"), (R, "f"), 0).unwrap();
        } else {
            w.remove(R, "f", false).unwrap();
        }
        w.close(1);
        // Longer than what was replaced lingers.
        for _ in 0..8 {
            w.pass(Duration::from_secs(1));
            w.core.hear(a, w.now);
            w.core.hear(b, w.now);
            w.tick();
        }
        w.call_as(b, Op::Open(Open { ino: f.0, handle: 2 })).unwrap();
        obey(&mut w);
        w.tick();
        w.getattr(f).unwrap();
        w.call_as(b, Op::Close(Close { handle: 2 })).unwrap();
        obey(&mut w);
        w.tick();
        assert_eq!(errno(w.getattr(f)), ESTALE);
        assert_eq!(w.check().orphans, 0);
    }
}
