//! Random operations on the namespace against a slow, obvious model: a table of nodes and, per directory, a map of
//! names. After every run the checker scans the store.

use std::{collections::BTreeMap, time::Duration};

use fjordfs_proto::{InodeId, ROOT_INODE, error::Errno, error::Errno::*, pb::meta::FileKind};
use proptest::prelude::*;

use crate::testing::{World, run};

const HANDLES: u64 = 4;
/// Bytes that one unit of a size stands for.
const UNIT: u64 = 4096;

#[derive(Clone, Debug)]
enum Op {
    Make {
        dir: usize,
        name: usize,
        is_dir: bool,
    },
    Link {
        node: usize,
        dir: usize,
        name: usize,
    },
    Remove {
        dir: usize,
        name: usize,
        is_dir: bool,
    },
    Rename {
        from: (usize, usize),
        to: (usize, usize),
        flags: u32,
    },
    Open {
        node: usize,
        handle: u64,
    },
    Close {
        handle: u64,
    },
    /// Writes `length` units from a fresh block at `at`.
    Write {
        node: usize,
        at: u64,
        length: u64,
    },
    Truncate {
        node: usize,
        size: u64,
    },
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    // Few directories and names, so that operations meet.
    let (dir, name, node) = (0..6usize, 0..4usize, 0..12usize);
    let place = (dir.clone(), name.clone());
    prop_oneof![
        4 => (place.clone(), any::<bool>()).prop_map(|((dir, name), is_dir)| Op::Make { dir, name, is_dir }),
        1 => (node.clone(), place.clone()).prop_map(|(node, (dir, name))| Op::Link { node, dir, name }),
        2 => (place.clone(), any::<bool>()).prop_map(|((dir, name), is_dir)| Op::Remove { dir, name, is_dir }),
        4 => (place.clone(), place, 0..4u32).prop_map(|(from, to, flags)| Op::Rename { from, to, flags }),
        1 => (node.clone(), 1..=HANDLES).prop_map(|(node, handle)| Op::Open { node, handle }),
        1 => (1..=HANDLES).prop_map(|handle| Op::Close { handle }),
        3 => (node.clone(), 0..20u64, 1..8u64).prop_map(|(node, at, length)| Op::Write { node, at, length }),
        1 => (node, 0..25u64).prop_map(|(node, size)| Op::Truncate { node, size }),
        1 => Just(Op::Restart),
    ]
}

#[derive(Clone, Debug, Default)]
struct Node {
    /// `None` for a file.
    entries: Option<BTreeMap<String, usize>>,
    links: u32,
    opens: u32,
    /// Block of every unit, `None` for a hole.
    units: Vec<Option<u64>>,
    ino: u64,
}

/// Nodes stay in the table when they are gone.
struct Model {
    nodes: Vec<Node>,
    handles: BTreeMap<u64, usize>,
}

type Outcome = Result<(), Errno>;

impl Model {
    fn new() -> Model {
        let root = Node { entries: Some(BTreeMap::new()), links: 1, ino: ROOT_INODE.0, ..Node::default() };
        Model { nodes: vec![root], handles: BTreeMap::new() }
    }

    fn entry(&self, dir: usize, name: &str) -> Option<usize> {
        self.nodes[dir].entries.as_ref()?.get(name).copied()
    }

    fn exists(&self, node: usize) -> bool {
        self.nodes[node].links > 0 || self.nodes[node].opens > 0
    }

    fn check_dir(&self, dir: usize) -> Outcome {
        match &self.nodes[dir] {
            _ if !self.exists(dir) => Err(ESTALE),
            node if node.entries.is_none() => Err(ENOTDIR),
            node if node.links == 0 => Err(ENOENT),
            _ => Ok(()),
        }
    }

    fn is_dir(&self, node: usize) -> bool {
        self.nodes[node].entries.is_some()
    }

    fn is_below(&self, node: usize, top: usize) -> bool {
        node == top
            || self.nodes[top]
                .entries
                .iter()
                .flatten()
                .any(|(_, child)| self.is_dir(*child) && self.is_below(node, *child))
    }

    fn insert(&mut self, dir: usize, name: &str, node: usize) {
        self.nodes[dir].entries.as_mut().unwrap().insert(name.into(), node);
    }

    fn take(&mut self, dir: usize, name: &str) {
        self.nodes[dir].entries.as_mut().unwrap().remove(name);
    }

    fn link(&mut self, node: usize, dir: usize, name: &str) -> Outcome {
        self.check_dir(dir)?;
        if !self.exists(node) {
            return Err(ESTALE);
        }
        if self.is_dir(node) {
            return Err(EPERM);
        }
        if self.nodes[node].links == 0 {
            return Err(ENOENT);
        }
        if self.entry(dir, name).is_some() {
            return Err(EEXIST);
        }
        self.insert(dir, name, node);
        self.nodes[node].links += 1;
        Ok(())
    }

    fn remove(&mut self, dir: usize, name: &str, is_dir: bool) -> Outcome {
        self.check_dir(dir)?;
        let node = self.entry(dir, name).ok_or(ENOENT)?;
        match (is_dir, &self.nodes[node].entries) {
            (false, Some(_)) => return Err(EISDIR),
            (true, None) => return Err(ENOTDIR),
            (true, Some(entries)) if !entries.is_empty() => return Err(ENOTEMPTY),
            _ => {}
        }
        self.take(dir, name);
        self.nodes[node].links -= 1;
        Ok(())
    }

    fn rename(&mut self, from: (usize, &str), to: (usize, &str), flags: u32) -> Outcome {
        if flags == 3 {
            return Err(EINVAL);
        }
        self.check_dir(from.0)?;
        self.check_dir(to.0)?;
        let source = self.entry(from.0, from.1).ok_or(ENOENT)?;
        let target = self.entry(to.0, to.1);
        if flags == 1 && target.is_some() {
            return Err(EEXIST);
        }
        if flags == 2 && target.is_none() {
            return Err(ENOENT);
        }
        if target == Some(source) {
            return Ok(());
        }
        if self.is_dir(source) && self.is_below(to.0, source) {
            return Err(EINVAL);
        }
        if flags == 2 {
            let target = target.unwrap();
            if self.is_dir(target) && self.is_below(from.0, target) {
                return Err(EINVAL);
            }
            self.insert(from.0, from.1, target);
            self.insert(to.0, to.1, source);
            return Ok(());
        }
        if let Some(target) = target {
            match (self.is_dir(source), &self.nodes[target].entries) {
                (true, None) => return Err(ENOTDIR),
                (false, Some(_)) => return Err(EISDIR),
                (true, Some(entries)) if !entries.is_empty() => return Err(ENOTEMPTY),
                _ => {}
            }
            self.nodes[target].links -= 1;
        }
        self.take(from.0, from.1);
        self.insert(to.0, to.1, source);
        Ok(())
    }

    fn writable(&self, node: usize) -> Outcome {
        match self.exists(node) {
            false => Err(ESTALE),
            true if self.is_dir(node) => Err(EISDIR),
            true => Ok(()),
        }
    }
}

struct Pair {
    world: World,
    model: Model,
}

impl Pair {
    fn ino(&self, node: usize) -> InodeId {
        InodeId(self.model.nodes[node].ino)
    }

    fn node(&self, n: usize) -> usize {
        n % self.model.nodes.len()
    }

    fn step(&mut self, op: &Op) -> Result<(), TestCaseError> {
        let name = |n: usize| format!("n{n}");
        let (expected, found) = match op {
            Op::Make { dir, name: n, is_dir } => self.make(self.node(*dir), &name(*n), *is_dir),
            Op::Link { node, dir, name: n } => {
                let (node, dir) = (self.node(*node), self.node(*dir));
                let (ino, parent) = (self.ino(node), self.ino(dir));
                (self.model.link(node, dir, &name(*n)), self.world.link(ino, parent, &name(*n)).map(drop))
            }
            Op::Remove { dir, name: n, is_dir } => {
                let dir = self.node(*dir);
                let parent = self.ino(dir);
                (self.model.remove(dir, &name(*n), *is_dir), self.world.remove(parent, &name(*n), *is_dir))
            }
            Op::Rename { from, to, flags } => {
                let (from, to) = ((self.node(from.0), name(from.1)), (self.node(to.0), name(to.1)));
                let (a, b) = (self.ino(from.0), self.ino(to.0));
                let expected = self.model.rename((from.0, &from.1), (to.0, &to.1), *flags);
                let found = self.world.rename((a, &from.1), (b, &to.1), *flags);
                // What was replaced lingers, and is recalled when it goes.
                self.world.idle(Duration::from_secs(5));
                for recall in self.world.core.take_recalls() {
                    self.world.core.let_go(recall.session, &[recall.id.0], None, None);
                }
                (expected, found)
            }
            Op::Open { node, handle } => self.open(self.node(*node), *handle),
            Op::Close { handle } => {
                if let Some(node) = self.model.handles.remove(handle) {
                    self.model.nodes[node].opens -= 1;
                }
                self.world.close(*handle);
                (Ok(()), Ok(()))
            }
            Op::Write { node, at, length } => self.write(self.node(*node), *at, *length),
            Op::Truncate { node, size } => {
                let node = self.node(*node);
                let expected = self.model.writable(node);
                if expected.is_ok() {
                    self.model.nodes[node].units.resize(*size as usize, None);
                }
                (expected, self.world.truncate(self.ino(node), size * UNIT).map(drop))
            }
            Op::Restart => {
                self.world.restart();
                let held: Vec<_> = self.model.handles.iter().map(|(h, n)| (*h, self.ino(*n))).collect();
                self.world.reattach(self.world.session, &held);
                self.world.idle(Duration::from_secs(7));
                (Ok(()), Ok(()))
            }
        };
        // When several errors apply, which one is told first is not promised; that it fails is.
        prop_assert_eq!(
            expected.is_ok(),
            found.is_ok(),
            "{:?}: expected {:?}, found {:?}",
            op,
            expected,
            found
        );
        if let (Err(expected), Err(found)) = (expected, found)
            && !matches!(expected, ESTALE | ENOTDIR | ENOENT)
        {
            prop_assert_eq!(expected, found.errno, "{:?}", op);
        }
        Ok(())
    }

    fn make(&mut self, dir: usize, name: &str, is_dir: bool) -> (Outcome, fjordfs_proto::FsResult<()>) {
        let expected = match self.model.check_dir(dir) {
            Ok(()) if self.model.entry(dir, name).is_some() => Err(EEXIST),
            other => other,
        };
        let kind = if is_dir { FileKind::Directory } else { FileKind::Regular };
        let found = self.world.make(self.ino(dir), name, kind);
        if let (Ok(()), Ok(ino)) = (&expected, &found) {
            let entries = is_dir.then(BTreeMap::new);
            self.model.nodes.push(Node { entries, links: 1, ino: ino.0, ..Node::default() });
            self.model.insert(dir, name, self.model.nodes.len() - 1);
        }
        (expected, found.map(drop))
    }

    fn open(&mut self, node: usize, handle: u64) -> (Outcome, fjordfs_proto::FsResult<()>) {
        let expected = match (self.model.exists(node), self.model.handles.get(&handle)) {
            (false, _) => Err(ESTALE),
            (true, Some(held)) if *held != node => Err(EINVAL),
            _ => Ok(()),
        };
        let found = self.world.open(self.ino(node), handle).map(drop);
        if expected.is_ok() && self.model.handles.insert(handle, node).is_none() {
            self.model.nodes[node].opens += 1;
        }
        (expected, found)
    }

    fn write(&mut self, node: usize, at: u64, length: u64) -> (Outcome, fjordfs_proto::FsResult<()>) {
        let expected = self.model.writable(node);
        let block = self.world.lease(1);
        let found = self.world.write(self.ino(node), vec![run(at * UNIT, length * UNIT, block, 0)]).map(drop);
        if expected.is_ok() {
            let units = &mut self.model.nodes[node].units;
            units.resize(units.len().max((at + length) as usize), None);
            units[at as usize..(at + length) as usize].fill(Some(block));
        }
        (expected, found)
    }

    /// Everything the model knows, asked of the server.
    fn compare(&mut self) -> Result<(), TestCaseError> {
        let report = self.world.check();
        let existing = (0..self.model.nodes.len()).filter(|n| self.model.exists(*n)).count();
        prop_assert_eq!(report.inodes, existing as u64);
        for n in 0..self.model.nodes.len() {
            let node = self.model.nodes[n].clone();
            let ino = InodeId(node.ino);
            if !self.model.exists(n) {
                prop_assert_eq!(self.world.getattr(ino).unwrap_err().errno, ESTALE);
                continue;
            }
            let attr = self.world.getattr(ino).unwrap();
            match &node.entries {
                Some(entries) => {
                    let below = entries.values().filter(|child| self.model.is_dir(**child)).count() as u32;
                    prop_assert_eq!(attr.nlink, if node.links == 0 { 0 } else { 2 + below });
                    let listed = self.world.read_dir(ino, 0, 0).unwrap().entries;
                    let listed: BTreeMap<String, u64> = (listed.into_iter())
                        .map(|e| (String::from_utf8(e.name.to_vec()).unwrap(), e.ino))
                        .collect();
                    let expected: BTreeMap<String, u64> =
                        entries.iter().map(|(name, child)| (name.clone(), self.ino(*child).0)).collect();
                    prop_assert_eq!(listed, expected);
                }
                None => {
                    prop_assert_eq!(attr.nlink, node.links);
                    prop_assert_eq!(attr.size, node.units.len() as u64 * UNIT);
                    let used = node.units.iter().flatten().count() as u64;
                    prop_assert_eq!(attr.allocated, used * UNIT);
                    let mut units = vec![None; node.units.len()];
                    for e in self.world.whole_extents(ino) {
                        let range = (e.offset / UNIT) as usize..((e.offset + e.length) / UNIT) as usize;
                        units[range].fill(Some(e.block));
                    }
                    prop_assert_eq!(units, node.units);
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_namespace_behaves_like_the_model(ops in proptest::collection::vec(op(), 1..60)) {
        let mut pair = Pair { world: World::new(), model: Model::new() };
        for op in &ops {
            pair.step(op)?;
        }
        pair.compare()?;
    }
}
