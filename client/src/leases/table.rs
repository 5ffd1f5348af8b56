//! What is cached under leases. Pure: no clock, no lock, no I/O.
//!
//! # Invariants
//! - An inode is in the table only while this session holds a lease on it.
//! - Names and attributes come from answers that may be cached, in the order in which the server executed them; an
//!   answer that may not be cached takes out what its operation was about.
//! - Of an inode that is delegated to this client, the table is ahead of the server: it has the effect of every operation that
//!   was decided here ([`super::decide`]). An answer from before the last of them is no news of that inode. While a
//!   mutation is under way that was not decided here, nothing is decided about the inodes it names.
//! - A name or an inode that an unanswered operation of this client is about to change is not shown: somebody else
//!   may have been told of the change before this client is.

use std::{collections::HashMap, num::NonZeroUsize, ops::RangeInclusive};

use bytes::Bytes;
use fjordfs_proto::{
    FsResult, InodeId,
    error::Errno,
    pb::meta::{
        Attr, Entry, ExtentsReply, FileKind, Make, Neighbour, Rename, Time, request::Op,
        response::Result as Reply,
    },
};
use lru::LruCache;

use super::{ahead::Ahead, extents::Extents};

/// RENAME_EXCHANGE of `renameat2(2)`.
pub(super) const EXCHANGE: u32 = 2;

/// Targets of symbolic links kept: a few hundred bytes each at most, mostly less.
const TARGETS_MAX: usize = 1 << 14;

/// Files of which it is remembered what this client committed last: what counts are those of the last seconds.
const COMMITTED_MAX: usize = 1 << 12;

/// What this client committed last to a file.
struct Committed {
    /// As its answer shows the file.
    attr: Attr,
    /// Since this version of the bytes nobody else has changed them.
    own_since: u64,
}

/// What is known under a name; `None` is that nothing is there.
pub(super) type Named = Option<InodeId>;

/// What is cached of one inode.
#[derive(Debug, Default)]
pub(super) struct Cached {
    pub(super) attr: Option<Attr>,
    pub(super) names: HashMap<Bytes, Named>,
    /// A directory whose names are all in `names`.
    pub(super) complete: bool,
    /// Nobody but this client can use it.
    pub(super) delegated: bool,
    /// Sequence of the last operation that was decided about it here.
    pub(super) decided: u64,
    /// Of a directory: how many entries to ask for when one is looked up.
    pub(super) ahead: Ahead,
}

impl Cached {
    /// A directory that certainly has no entries.
    pub(super) fn is_known_empty(&self) -> bool {
        self.complete && self.names.values().all(Option::is_none)
    }
}

/// An operation on its way, as the table remembers it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sent {
    /// Grows from one operation to the next, decided ones included.
    pub(super) sequence: u64,
    /// Inodes about which nothing may be decided until it is answered.
    busy: Vec<InodeId>,
    /// It takes a name away: from this inode, or from one that is not known.
    takes_from: Option<Option<InodeId>>,
}

/// Bounds of the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) inodes: usize,
    pub(super) names: usize,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Table {
    inodes: LruCache<InodeId, Cached>,
    names: usize,
    bounds: Bounds,
    /// Names that unanswered operations change, and how many of those there are.
    names_in_doubt: HashMap<(InodeId, Bytes), u32>,
    attrs_in_doubt: HashMap<InodeId, u32>,
    /// Inodes of unanswered mutations that were not decided here.
    busy: HashMap<InodeId, u32>,
    /// Inodes that unanswered operations take a name from; `None` when it is not known from which.
    losing_names: HashMap<Option<InodeId>, u32>,
    /// Where symbolic links point. A link never changes, and inode numbers are not used again, so these need no
    /// lease; and who has found a link can follow it although it was removed meanwhile.
    targets: LruCache<InodeId, Bytes>,
    /// Of files that were looked up, until they are opened.
    extents: Extents,
    /// Attributes of files as this client's last commits left them, leased or not.
    committed: LruCache<InodeId, Committed>,
    /// Highest serial of an answer taken in.
    serial: u64,
    /// Sequence of the operation whose answer is being taken in.
    asked: u64,
}

impl Table {
    pub(super) fn new(bounds: Bounds) -> Table {
        Table {
            inodes: LruCache::unbounded(),
            names: 0,
            bounds,
            names_in_doubt: HashMap::new(),
            attrs_in_doubt: HashMap::new(),
            busy: HashMap::new(),
            losing_names: HashMap::new(),
            targets: LruCache::new(const { NonZeroUsize::new(TARGETS_MAX).expect("not 0") }),
            extents: Extents::default(),
            committed: LruCache::new(const { NonZeroUsize::new(COMMITTED_MAX).expect("not 0") }),
            serial: 0,
            asked: 0,
        }
    }

    // ---- looking ----

    /// What is under a name, if that is known.
    pub(super) fn name(&mut self, parent: InodeId, name: &[u8]) -> Option<Named> {
        let cached = self.inodes.get(&parent)?;
        let found = match cached.names.get(name) {
            Some(found) => *found,
            None if cached.complete => None,
            None => return None,
        };
        let doubtful = !self.names_in_doubt.is_empty()
            && self.names_in_doubt.contains_key(&(parent, Bytes::copy_from_slice(name)));
        (!doubtful).then_some(found)
    }

    /// As [`Table::name`], for a program that looks the name up.
    pub(super) fn look_up(&mut self, parent: InodeId, name: &[u8]) -> Option<Named> {
        let found = self.name(parent, name)?;
        if let Some(cached) = self.inodes.peek_mut(&parent) {
            cached.ahead.hit();
        }
        Some(found)
    }

    /// A name that is not known is about to be asked for: how many neighbours to ask for with it.
    pub(super) fn neighbours(&mut self, parent: InodeId) -> u32 {
        self.inodes.peek_mut(&parent).map_or(0, |cached| cached.ahead.miss())
    }

    /// The attributes of an inode, if they are known.
    pub(super) fn attr(&mut self, ino: InodeId) -> Option<Attr> {
        let attr = self.inodes.get(&ino)?.attr?;
        (!self.attrs_in_doubt.contains_key(&ino)).then_some(attr)
    }

    /// The attributes of a regular file that can be opened under its lease, and its extents if those are known. One that may be losing its
    /// last name cannot: the server, which destroys it then, has been told only of what had been opened before.
    pub(super) fn openable(&mut self, ino: InodeId) -> Option<(Attr, Option<ExtentsReply>)> {
        if [Some(ino), None].iter().any(|losing| self.losing_names.contains_key(losing)) {
            return None;
        }
        let attr = self.attr(ino).filter(|attr| attr.kind() == FileKind::Regular)?;
        Some((attr, self.extents.get(ino).filter(|extents| extents.data_version == attr.data_version)))
    }

    /// Where a symbolic link points.
    pub(super) fn target(&mut self, ino: InodeId) -> Option<Bytes> {
        self.targets.get(&ino).cloned()
    }

    /// Attributes that an answer shows, unless this client has committed to the file since they were so. An answer may wait at the
    /// server, for others to let go of what they cached, and be passed by that of a commit; what was written was seen here
    /// before.
    pub(super) fn newest(&mut self, attr: Attr) -> Attr {
        match self.committed.peek(&InodeId(attr.ino)) {
            Some(committed) if committed.attr.data_version > attr.data_version => committed.attr,
            _ => attr,
        }
    }

    /// Data versions between which nobody but this client changed a file that it has committed to.
    pub(super) fn own_versions(&self, ino: InodeId) -> Option<RangeInclusive<u64>> {
        let committed = self.committed.peek(&ino)?;
        Some(committed.own_since..=committed.attr.data_version)
    }

    /// A commit was answered. Of two answers out of order the later version counts.
    fn has_committed(&mut self, attr: Attr, appended_shift: i64) {
        let version = attr.data_version;
        let own_since = match self.committed.peek(&InodeId(attr.ino)) {
            Some(last) if last.attr.data_version > version => return,
            Some(last) if version - last.attr.data_version <= 1 && appended_shift == 0 => last.own_since,
            // Whoever has cached appended bytes that moved has them where they are not.
            _ if appended_shift != 0 => version,
            _ => version.saturating_sub(1),
        };
        self.committed.put(InodeId(attr.ino), Committed { attr, own_since });
    }

    pub(super) fn serial(&self) -> u64 {
        self.serial
    }

    // ---- operations of this client ----

    /// An operation is about to be sent.
    pub(super) fn sent(&mut self, op: &Op, sequence: u64) -> Sent {
        let mut busy = inodes_changed(op);
        let takes_from = name_taken(op).and_then(|(parent, name)| match self.name(parent, name) {
            Some(None) => None,
            Some(Some(ino)) => Some(Some(ino)),
            None => Some(None),
        });
        if let Some(ino) = takes_from {
            *self.losing_names.entry(ino).or_default() += 1;
        }
        for (parent, name) in names_changed(op) {
            busy.extend(self.name(parent, &name).flatten());
            *self.names_in_doubt.entry((parent, name)).or_default() += 1;
        }
        for ino in &busy {
            *self.busy.entry(*ino).or_default() += 1;
        }
        if let Op::SetAttr(op) = op {
            *self.attrs_in_doubt.entry(InodeId(op.ino)).or_default() += 1;
        }
        Sent { sequence, busy, takes_from }
    }

    /// An operation was answered, or will never be.
    pub(super) fn settled(&mut self, op: &Op, sent: &Sent) {
        for ino in &sent.busy {
            lower(&mut self.busy, ino);
        }
        if let Some(ino) = &sent.takes_from {
            lower(&mut self.losing_names, ino);
        }
        for name in names_changed(op) {
            lower(&mut self.names_in_doubt, &name);
        }
        if let Op::SetAttr(op) = op {
            lower(&mut self.attrs_in_doubt, &InodeId(op.ino));
        }
    }

    /// Takes in an answer with its serial, and the attributes of what it changed besides.
    pub(super) fn learn(
        &mut self,
        op: &Op,
        sent: &Sent,
        result: &FsResult<Reply>,
        serial: u64,
        changed: &[Attr],
    ) {
        self.asked = sent.sequence;
        if let Ok(Reply::Entry(entry)) = result {
            self.lasting(entry);
        }
        if let Ok(Reply::Commit(commit)) = result {
            for (attr, file) in commit.files.iter().filter_map(|file| Some((file.attr?, file))) {
                self.has_committed(attr, file.appended_shift);
            }
        }
        if serial == 0 {
            // What is gone stays so, however old the news is. Of the others it is only known that they are not as they were.
            for attr in changed {
                let ino = InodeId(attr.ino);
                if attr.nlink == 0 {
                    self.forget(ino);
                } else {
                    self.outdate(ino);
                }
            }
            return self.doubt(op);
        }
        self.serial = self.serial.max(serial);
        match (op, result) {
            (Op::Lookup(op), Ok(Reply::Entry(entry))) => {
                self.found(op.parent, &op.name, entry);
                if let Some(directory) =
                    self.inodes.peek_mut(&InodeId(op.parent)).filter(|_| op.neighbours > 0)
                {
                    directory.ahead.came(entry.neighbours.len() as u32, op.neighbours);
                }
                for Neighbour { name, entry } in &entry.neighbours {
                    if let Some(entry) = entry {
                        self.lasting(entry);
                        self.found(op.parent, name, entry);
                    }
                }
            }
            (Op::Lookup(op), Err(e)) if e.errno == Errno::ENOENT => {
                self.learn_name(InodeId(op.parent), op.name.clone(), None);
            }
            (Op::Make(op), Ok(Reply::Entry(entry))) if !op.unnamed => {
                self.found(op.parent, &op.name, entry);
                self.made(op, entry);
            }
            (Op::Link(op), Ok(Reply::Entry(entry))) => self.found(op.parent, &op.name, entry),
            (Op::Remove(op), Ok(_)) => self.set_name(InodeId(op.parent), op.name.clone(), None),
            (Op::Rename(op), Ok(_)) if !changed.is_empty() => self.renamed(op),
            (_, Ok(Reply::Entry(entry))) => self.set_attrs(&entry.attr),
            (_, Ok(Reply::Open(open))) => self.set_attrs(&open.attr),
            (_, Ok(Reply::CopyRange(copy))) => self.set_attrs(&copy.attr),
            (_, Ok(Reply::Commit(commit))) => {
                self.set_attrs(commit.files.iter().filter_map(|f| f.attr.as_ref()))
            }
            (Op::ReadDir(op), Ok(Reply::ReadDir(page))) => {
                for entry in page.entries.iter().filter(|entry| entry.attr.is_some()) {
                    self.learn_name(InodeId(op.ino), entry.name.clone(), Some(InodeId(entry.ino)));
                    self.set_attrs(&entry.attr);
                }
            }
            _ => {}
        }
        for attr in changed {
            self.update(attr);
        }
    }

    /// Takes in what is true of an entry for good, or says of which version it is.
    fn lasting(&mut self, entry: &Entry) {
        let Some(ino) = entry.attr.map(|attr| InodeId(attr.ino)) else { return };
        if !entry.target.is_empty() {
            self.set_target(ino, &entry.target);
        }
        if let Some(extents) = &entry.extents {
            self.extents.put(ino, extents);
        }
    }

    fn found(&mut self, parent: u64, name: &Bytes, entry: &Entry) {
        if let Some(attr) = &entry.attr {
            self.learn_name(InodeId(parent), name.clone(), Some(InodeId(attr.ino)));
            self.set_attrs([attr]);
        }
    }

    /// Nobody else has had a directory yet that was just made: it is empty.
    fn made(&mut self, op: &Make, entry: &Entry) {
        if op.kind() == FileKind::Directory
            && let Some(cached) = entry.attr.and_then(|attr| self.inodes.get_mut(&InodeId(attr.ino)))
        {
            cached.complete = true;
        }
    }

    fn renamed(&mut self, op: &Rename) {
        let (from, to) = (InodeId(op.parent), InodeId(op.new_parent));
        let moved = self.inodes.peek(&from).and_then(|cached| cached.names.get(&op.name)).copied().flatten();
        let replaced =
            self.inodes.peek(&to).and_then(|cached| cached.names.get(&op.new_name)).copied().flatten();
        match op.flags & EXCHANGE {
            0 => self.set_name(from, op.name.clone(), None),
            _ => self.set_or_forget(from, &op.name, replaced),
        }
        self.set_or_forget(to, &op.new_name, moved);
    }

    fn set_or_forget(&mut self, parent: InodeId, name: &Bytes, to: Named) {
        match to {
            Some(ino) => self.set_name(parent, name.clone(), Some(ino)),
            None => self.forget_name(parent, name),
        }
    }

    /// Whether an inode was decided about after the operation whose answer is being taken in was sent. The answer is old also when
    /// the delegation has been given up since.
    fn is_ahead(&self, ino: InodeId) -> bool {
        self.inodes.peek(&ino).is_some_and(|cached| cached.decided > self.asked)
    }

    /// A name that an answer tells.
    fn learn_name(&mut self, parent: InodeId, name: Bytes, to: Named) {
        if !self.is_ahead(parent) {
            self.set_name(parent, name, to);
        }
    }

    pub(super) fn set_target(&mut self, ino: InodeId, target: &Bytes) {
        self.targets.put(ino, Bytes::copy_from_slice(target));
    }

    pub(super) fn set_name(&mut self, parent: InodeId, name: Bytes, to: Named) {
        // A name is a slice of the message it came in, which it must not keep alive.
        let name = Bytes::copy_from_slice(&name);
        let cached = self.inodes.get_or_insert_mut(parent, Cached::default);
        if cached.names.insert(name, to).is_none() {
            self.names += 1;
        }
    }

    fn forget_name(&mut self, parent: InodeId, name: &[u8]) {
        if let Some(cached) = self.inodes.peek_mut(&parent) {
            cached.complete = false;
        }
        self.drop_name(parent, name);
    }

    /// Takes a name out; in a directory that is known as a whole, that says that there is none.
    pub(super) fn drop_name(&mut self, parent: InodeId, name: &[u8]) {
        if let Some(cached) = self.inodes.peek_mut(&parent)
            && cached.names.remove(name).is_some()
        {
            self.names -= 1;
        }
    }

    pub(super) fn is_complete(&self, directory: InodeId) -> bool {
        self.inodes.peek(&directory).is_some_and(|cached| cached.complete)
    }

    pub(super) fn is_busy(&self, ino: InodeId) -> bool {
        self.busy.contains_key(&ino)
    }

    pub(super) fn get(&mut self, ino: InodeId) -> Option<&Cached> {
        self.inodes.get(&ino)
    }

    pub(super) fn insert(&mut self, ino: InodeId, cached: Cached) {
        self.inodes.put(ino, cached);
    }

    /// Changes the attributes of an inode by a decision; the new ones.
    pub(super) fn change(
        &mut self,
        ino: InodeId,
        sequence: u64,
        change: impl FnOnce(&mut Attr),
    ) -> Option<Attr> {
        let cached = self.inodes.get_mut(&ino)?;
        cached.decided = sequence;
        cached.attr.as_mut().map(|attr| {
            change(attr);
            *attr
        })
    }

    /// It was read.
    pub(super) fn set_access_time(&mut self, ino: InodeId, time: Time) {
        if let Some(attr) = self.inodes.get_mut(&ino).and_then(|cached| cached.attr.as_mut()) {
            attr.atime = Some(time);
        }
    }

    /// An answer says that these inodes are delegated to this client.
    pub(super) fn delegated(&mut self, inodes: &[u64]) {
        for ino in inodes {
            if let Some(cached) = self.inodes.peek_mut(&InodeId(*ino)) {
                cached.delegated = true;
            }
        }
    }

    /// Whether an inode is delegated to this client.
    pub(super) fn is_delegated(&self, ino: InodeId) -> bool {
        self.inodes.peek(&ino).is_some_and(|cached| cached.delegated)
    }

    /// Makes do without the delegations on these inodes.
    pub(super) fn demote(&mut self, inodes: &[InodeId]) {
        for ino in inodes {
            if let Some(cached) = self.inodes.peek_mut(ino) {
                cached.delegated = false;
            }
        }
    }

    /// What is known to be in a directory and delegated.
    pub(super) fn delegated_in(&self, directory: InodeId) -> Vec<InodeId> {
        let names = self.inodes.peek(&directory).map(|cached| cached.names.values());
        names.into_iter().flatten().flatten().copied().filter(|ino| self.is_delegated(*ino)).collect()
    }

    fn set_attrs<'a>(&mut self, attrs: impl IntoIterator<Item = &'a Attr>) {
        for attr in attrs {
            if self.is_ahead(InodeId(attr.ino)) {
                continue;
            }
            self.inodes.get_or_insert_mut(InodeId(attr.ino), Cached::default).attr = Some(*attr);
        }
    }

    /// New attributes of an inode that the answer did not grant a lease on.
    fn update(&mut self, attr: &Attr) {
        let ino = InodeId(attr.ino);
        if attr.nlink == 0 {
            self.forget(ino);
        } else if self.is_ahead(ino) {
            // Neither what is here nor what is told has all changes.
            self.outdate(ino);
        } else if let Some(cached) = self.inodes.peek_mut(&ino) {
            cached.attr = Some(*attr);
        }
    }

    /// What became of an operation may be old news by now.
    fn doubt(&mut self, op: &Op) {
        for (parent, name) in names_changed(op) {
            self.forget_name(parent, &name);
        }
        for ino in inodes_changed(op) {
            self.forget_attr(ino);
        }
    }

    /// Its attributes are not as they are here.
    fn outdate(&mut self, ino: InodeId) {
        if self.is_ahead(ino) {
            self.demote(&[ino]);
        }
        self.forget_attr(ino);
    }

    fn forget_attr(&mut self, ino: InodeId) {
        if let Some(cached) = self.inodes.peek_mut(&ino) {
            cached.attr = None;
        }
    }

    // ---- letting go ----

    /// Drops everything of an inode; whether it may be a directory.
    pub(super) fn forget(&mut self, ino: InodeId) -> bool {
        let Some(cached) = self.inodes.pop(&ino) else { return true };
        self.names -= cached.names.len();
        cached.attr.is_none_or(|attr| attr.kind() == FileKind::Directory)
    }

    /// Drops everything; what there was.
    pub(super) fn clear(&mut self) -> Vec<InodeId> {
        // A server that has started anew counts from the beginning, and may have lost commits. What is under way is asked again.
        self.serial = 0;
        self.committed.clear();
        let all = self.inodes.iter().map(|(ino, _)| *ino).collect();
        self.inodes.clear();
        self.names = 0;
        all
    }

    /// Drops what was not used for longest while the table is over its bounds, with some room to spare so that this
    /// is not needed at every answer.
    pub(super) fn shrink(&mut self) -> Vec<InodeId> {
        if self.inodes.len() <= self.bounds.inodes && self.names <= self.bounds.names {
            return Vec::new();
        }
        let (inodes, names) =
            (self.bounds.inodes - self.bounds.inodes / 16, self.bounds.names - self.bounds.names / 16);
        let mut dropped = Vec::new();
        while self.inodes.len() > inodes || self.names > names {
            let Some((ino, cached)) = self.inodes.pop_lru() else { break };
            self.names -= cached.names.len();
            dropped.push(ino);
        }
        dropped
    }
}

fn lower<K: std::hash::Hash + Eq>(counts: &mut HashMap<K, u32>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

/// Inodes that a mutation names and may change. A commit is one: its answer has attributes that a decision would be lost in.
fn inodes_changed(op: &Op) -> Vec<InodeId> {
    let inodes = match op {
        Op::Make(op) => vec![op.parent],
        Op::Link(op) => vec![op.ino, op.parent],
        Op::Remove(op) => vec![op.parent],
        Op::Rename(op) => vec![op.parent, op.new_parent],
        Op::SetAttr(op) => vec![op.ino],
        Op::SetXattr(op) => vec![op.ino],
        Op::RemoveXattr(op) => vec![op.ino],
        Op::Allocate(op) => vec![op.ino],
        Op::CopyRange(op) => vec![op.source, op.target],
        Op::Commit(op) => op.files.iter().map(|file| file.ino).collect(),
        _ => Vec::new(),
    };
    inodes.into_iter().map(InodeId).collect()
}

/// The name that an operation takes from what has it, if anything.
pub(super) fn name_taken(op: &Op) -> Option<(InodeId, &[u8])> {
    match op {
        Op::Remove(op) => Some((InodeId(op.parent), &op.name)),
        Op::Rename(op) => Some((InodeId(op.new_parent), &op.new_name)),
        _ => None,
    }
}

/// Names that an operation changes.
fn names_changed(op: &Op) -> Vec<(InodeId, Bytes)> {
    match op {
        Op::Make(op) => vec![(InodeId(op.parent), op.name.clone())],
        Op::Link(op) => vec![(InodeId(op.parent), op.name.clone())],
        Op::Remove(op) => vec![(InodeId(op.parent), op.name.clone())],
        Op::Rename(op) => {
            vec![(InodeId(op.parent), op.name.clone()), (InodeId(op.new_parent), op.new_name.clone())]
        }
        _ => Vec::new(),
    }
}

#[cfg(test)]
#[path = "table_tests.rs"]
mod tests;
