//! The view against an array of bytes, with a server that is an array of bytes too.

use super::*;
use fjordfs_proto::{BLOCK_SIZE_MAX, pb::meta::FileKind};
use proptest::prelude::*;
use std::collections::HashMap;

/// The metaserver and the data servers, as far as one file goes.
#[derive(Default)]
struct Server {
    size: u64,
    version: u64,
    extents: ExtentMap,
    blocks: HashMap<u64, Vec<u8>>,
    block_next: u64,
}

impl Server {
    fn attr(&self) -> Attr {
        Attr {
            ino: 7,
            kind: FileKind::Regular.into(),
            size: self.size,
            policy: 1,
            data_version: self.version,
            ..Attr::default()
        }
    }

    fn commit(&mut self, commit: &FileCommit) -> FileCommitReply {
        let shift = commit.append_base.map_or(0, |base| self.size as i64 - base as i64);
        let mut end = 0;
        for extent in &commit.extents {
            let (mut offset, extent) = Extent::from_pb(extent.clone()).unwrap();
            if commit.append_base.is_some_and(|base| offset >= base) {
                offset = offset.wrapping_add_signed(shift);
            }
            end = end.max(offset + extent.length);
            self.extents.insert(offset, extent);
        }
        self.size = self.size.max(end);
        self.version += 1;
        FileCommitReply { errno: 0, attr: Some(self.attr()), appended_shift: shift }
    }

    fn truncate(&mut self, size: u64) {
        self.extents.remove(size..u64::MAX);
        self.size = size;
        self.version += 1;
    }

    fn clear(&mut self, range: Range<u64>) {
        if !self.extents.remove(range).is_empty() {
            self.version += 1;
        }
    }

    fn append_by_another(&mut self, data: &[u8]) {
        self.extents.insert(self.size, Extent::inline(Bytes::copy_from_slice(data)));
        self.size += data.len() as u64;
        self.version += 1;
    }

    /// A page of at most two extents, so that paging is exercised.
    fn page(&self, from: u64) -> ExtentsReply {
        let hits: Vec<_> =
            self.extents.overlapping(from..u64::MAX).take(3).map(|(o, e)| e.to_pb(o)).collect();
        let next_offset = if hits.len() > 2 { hits[2].offset } else { u64::MAX };
        ExtentsReply { extents: hits.into_iter().take(2).collect(), next_offset, data_version: self.version }
    }
}

struct World {
    server: Server,
    view: View,
    /// What a reader on this client has to see.
    expected: Vec<u8>,
    /// Units that were taken, with their bytes, oldest first; the block is known once stored.
    units: Vec<(UnitId, Vec<Bytes>, bool)>,
}

impl World {
    fn new() -> World {
        let server = Server { block_next: 1, ..Server::default() };
        World { view: View::new(server.attr()), server, expected: Vec::new(), units: Vec::new() }
    }

    fn write(&mut self, offset: u64, data: &[u8], append: bool) {
        let end = offset as usize + data.len();
        if self.expected.len() < end {
            self.expected.resize(end, 0);
        }
        self.expected[offset as usize..end].copy_from_slice(data);
        self.view.write(offset, Bytes::copy_from_slice(data), Time::default(), append);
    }

    fn take(&mut self, max: u64) {
        let unit = UnitId::unused();
        let pieces = self.view.take_dirty(unit, 0, max);
        if !pieces.is_empty() {
            self.units.push((unit, pieces, false));
        }
    }

    fn store(&mut self, i: usize) {
        let Some((unit, pieces, stored)) = self.units.get_mut(i) else { return };
        if !std::mem::replace(stored, true) {
            let block = self.server.block_next;
            self.server.block_next += 1;
            self.server.blocks.insert(block, pieces.concat());
            self.view.unit_stored(*unit, BlockId(block), Layout::of(Policy::replica(1).unwrap(), 1));
        }
    }

    /// Commits the oldest unit; stored before when `block`, else inline.
    fn commit(&mut self, block: bool) {
        if self.units.is_empty() {
            return;
        }
        if block {
            self.store(0);
        }
        let (unit, ..) = self.units.remove(0);
        if let Some(commit) = self.view.commit_of(unit) {
            let reply = self.server.commit(&commit);
            self.view.unit_committed(unit, &commit, reply);
        }
    }

    fn flush(&mut self) {
        self.take(u64::MAX);
        while !self.units.is_empty() {
            self.commit(true);
        }
    }

    fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        for _ in 0..100 {
            match self.view.plan_read(offset, len) {
                ReadPlan::Extents(from) => {
                    let page = self.server.page(from);
                    self.view.learn_extents(from, page).unwrap();
                }
                ReadPlan::Parts(parts) => {
                    return parts
                        .into_iter()
                        .flat_map(|part| match part {
                            Part::Memory(bytes) => bytes.to_vec(),
                            Part::Zeros(len) => vec![0; len as usize],
                            Part::Block(p) => {
                                let block = &self.server.blocks[&p.block.0];
                                block[p.offset as usize..(p.offset + p.length) as usize].to_vec()
                            }
                        })
                        .collect();
                }
            }
        }
        panic!("extents never became known");
    }

    /// As a caller of `lseek` sees it; `None` is `ENXIO`.
    fn seek(&mut self, data: bool, offset: u64) -> Option<u64> {
        for _ in 0..100 {
            match self.view.seek(data, offset) {
                Seek::At(at) => return Some(at),
                Seek::Nowhere => return None,
                Seek::Extents(from) => {
                    let page = self.server.page(from);
                    self.view.learn_extents(from, page).unwrap();
                }
            }
        }
        panic!("extents never became known");
    }

    /// Every byte ever written is not 0, so the holes are the zeros.
    fn check_seeks(&mut self) -> Result<(), TestCaseError> {
        let expected = self.expected.clone();
        for offset in (0..expected.len() + 20).step_by(7) {
            let first = |hole: bool| (offset..expected.len()).find(|i| (expected[*i] == 0) == hole);
            let hole = (offset < expected.len()).then(|| first(true).unwrap_or(expected.len()) as u64);
            prop_assert_eq!(self.seek(false, offset as u64), hole, "hole from {}", offset);
            prop_assert_eq!(
                self.seek(true, offset as u64),
                first(false).map(|i| i as u64),
                "data from {}",
                offset
            );
        }
        Ok(())
    }

    fn check(&mut self) -> Result<(), TestCaseError> {
        let read = self.read(0, 1 << 20);
        prop_assert_eq!(read.len(), self.expected.len());
        prop_assert_eq!(&read, &self.expected);
        for offset in (0..read.len()).step_by(7) {
            let end = read.len().min(offset + 13);
            prop_assert_eq!(self.read(offset as u64, 13), &read[offset..end], "from {}", offset);
        }
        prop_assert_eq!(self.view.size(), self.expected.len() as u64);
        let dirty: u64 = self.view.local.iter().filter(|(_, s)| s.is_dirty()).map(|(_, s)| s.length).sum();
        prop_assert_eq!(self.view.dirty_bytes(), dirty);
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, Vec<u8>),
    Append(Vec<u8>),
    OthersAppend(Vec<u8>),
    Truncate(u64),
    Clear(u64, u64),
    Take(u64),
    Store(usize),
    Commit(bool),
    GetAttr,
    Flush,
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(1..=255u8, 1..60)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => (0..300u64, data()).prop_map(|(at, data)| Op::Write(at, data)),
        3 => data().prop_map(Op::Append),
        1 => data().prop_map(Op::OthersAppend),
        1 => (0..300u64).prop_map(Op::Truncate),
        1 => (0..300u64, 1..100u64).prop_map(|(at, len)| Op::Clear(at, at + len)),
        2 => (1..200u64).prop_map(Op::Take),
        2 => (0..3usize).prop_map(Op::Store),
        2 => any::<bool>().prop_map(Op::Commit),
        1 => Just(Op::GetAttr),
        1 => Just(Op::Flush),
    ]
}

proptest! {
    #[test]
    fn reads_see_every_write_whatever_is_on_its_way(ops in proptest::collection::vec(op(), 1..60)) {
        let mut w = World::new();
        for op in ops {
            match op {
                Op::Write(at, data) => {
                    if w.view.mixes_with_appends(at + data.len() as u64) {
                        w.flush();
                    }
                    w.write(at, &data, false);
                }
                Op::Append(data) => {
                    let at = match w.view.append_offset() {
                        Some(at) => at,
                        None => {
                            w.flush();
                            w.view.append_offset().unwrap()
                        }
                    };
                    w.write(at, &data, true);
                }
                // Another client appends: only while nothing of ours is under way, so that what we expect is plain.
                Op::OthersAppend(data) => {
                    w.flush();
                    w.server.append_by_another(&data);
                    w.expected.extend(&data);
                    let attr = w.server.attr();
                    w.view.learn_attr(attr);
                }
                Op::Truncate(size) => {
                    w.expected.resize(size as usize, 0);
                    w.view.begin_truncate(size);
                    w.server.truncate(size);
                    let attr = w.server.attr();
                    w.view.end_truncate(size, Some(attr));
                }
                Op::Clear(at, end) => {
                    w.flush();
                    let inside = (at as usize).min(w.expected.len())..(end as usize).min(w.expected.len());
                    w.expected[inside].fill(0);
                    w.view.begin_clear(at..end);
                    w.server.clear(at..end);
                    let attr = w.server.attr();
                    w.view.end_change(at..end, true, attr);
                }
                Op::Take(max) => w.take(max),
                Op::Store(i) => w.store(i),
                Op::Commit(block) => w.commit(block),
                Op::GetAttr => {
                    let attr = w.server.attr();
                    w.view.learn_attr(attr);
                }
                Op::Flush => w.flush(),
            }
            w.check()?;
        }
        w.check_seeks()?;
        w.flush();
        w.check()?;
        prop_assert!(!w.view.has_local());
        // A second client sees the same.
        w.view = View::new(w.server.attr());
        w.check_seeks()?;
        w.check()?;
    }
}

#[test]
fn appends_go_behind_those_of_others() {
    let mut w = World::new();
    let at = w.view.append_offset().unwrap();
    w.write(at, b"mine", true);
    w.server.append_by_another(b"theirs-");
    w.take(u64::MAX);
    // More is appended while the first part is on its way.
    let at = w.view.append_offset().unwrap();
    w.write(at, b"+more", true);
    w.commit(true);
    w.flush();
    assert_eq!(w.read(0, 100), b"theirs-mine+more");
}

#[test]
fn small_sequential_writes_become_one_run_and_full_blocks_are_found() {
    let mut view = View::new(Server::default().attr());
    for i in 0..1000u64 {
        view.write(i * 100, Bytes::from(vec![i as u8; 100]), Time::default(), false);
    }
    assert_eq!(view.local.len(), 1);
    let block = BLOCK_SIZE_MAX as u64;
    for i in 0..17u64 {
        view.write((1 << 40) + (i << 20), Bytes::from(vec![1; 1 << 20]), Time::default(), false);
    }
    let unit = UnitId::unused();
    let taken: usize = view.take_run(unit, block).unwrap().iter().map(Bytes::len).sum();
    assert_eq!(taken as u64, block);
    assert_eq!(view.dirty_bytes(), 100_000 + (1 << 20));
    assert!(view.take_run(UnitId::unused(), block).is_none());
}

#[test]
fn versions_made_here_are_told_from_those_of_others() {
    let mut w = World::new();
    w.write(0, b"mine", false);
    w.flush();
    w.write(2, b"more", false);
    w.flush();
    assert_eq!(w.view.own_versions(), 0..=2);
    w.server.append_by_another(b"theirs");
    w.view.learn_attr(w.server.attr());
    assert_eq!(w.view.own_versions(), 3..=3);
    w.expected.extend(b"theirs");
    w.write(0, b"again", false);
    w.server.append_by_another(b"!");
    w.flush();
    assert_eq!(w.view.own_versions(), 5..=5);
    // Appended bytes that moved are not where whoever cached them has them.
    let at = w.view.append_offset().unwrap();
    w.write(at, b"tail", true);
    w.server.append_by_another(b"?");
    w.flush();
    assert_eq!(w.view.own_versions(), 7..=7);
}

#[test]
fn an_absurd_shift_is_recognised() {
    let mut w = World::new();
    let at = w.view.append_offset().unwrap();
    w.write(at, b"tail", true);
    w.take(u64::MAX);
    let sent = w.view.commit_of(w.units[0].0).unwrap();
    assert!(w.view.can_shift(&sent, 0) && w.view.can_shift(&sent, 1 << 40));
    assert!(
        !w.view.can_shift(&sent, i64::MAX)
            && !w.view.can_shift(&sent, i64::MIN)
            && !w.view.can_shift(&sent, -1)
    );
    let plain = FileCommit { append_base: None, ..sent };
    assert!(w.view.can_shift(&plain, 0) && !w.view.can_shift(&plain, 5));
}

#[test]
fn what_was_set_counts_also_beside_attributes_of_before_the_last_commit() {
    let mut world = World::new();
    world.write(0, b"bytes", false);
    let before = world.view.attr;
    world.flush();
    let at = |sec| Some(Time { sec, nsec: 0 });
    world.view.attr.atime = at(50);
    world.view.attr.mtime = at(50);
    let set = SetAttr { ino: 7, atime: at(3), ..SetAttr::default() };
    world.view.set_attr(&set, Attr { atime: at(3), mtime: at(1), ctime: at(60), mode: 0o777, ..before });
    let attr = world.view.attr();
    assert_eq!((attr.atime, attr.mtime, attr.ctime, attr.size), (at(3), at(50), at(60), 5));
    assert_ne!(attr.mode, 0o777);
    let set = SetAttr { ino: 7, mode: Some(0o640), ..SetAttr::default() };
    world.view.set_attr(&set, Attr { atime: at(1), mode: 0o640, ..before });
    assert_eq!((world.view.attr().mode, world.view.attr().atime), (0o640, at(3)));
}

/// Whoever flushes has to begin anew then: the unit commits nothing, and what was there before must not be shown.
#[test]
fn a_unit_that_is_written_over_commits_nothing_and_that_is_noticed() {
    let mut w = World::new();
    w.write(0, b"first", false);
    w.write(10, b"beside it", false);
    let before = w.view.overwritten();
    w.take(u64::MAX);
    assert_eq!(w.view.overwritten(), before, "nothing was written over");
    w.write(0, b"other", false);
    w.write(10, b"beside it", false);
    assert!(w.view.commit_of(w.units[0].0).is_none());
    assert_ne!(w.view.overwritten(), before);
}
