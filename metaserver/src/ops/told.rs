//! What an answer tells its client that it may cache, and of which inodes.

use fjordfs_proto::{
    FsResult, InodeId,
    error::Errno,
    pb::meta::{Attr, request::Op, response::Result as Reply},
};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Directories whose entries the operation names.
    directories: Vec<InodeId>,
    /// That a name does not exist is knowledge, too.
    absence_counts: bool,
    /// Inodes whose attributes the answer shows.
    pub(crate) attributes: Vec<InodeId>,
    cacheable: bool,
}

impl Told {
    /// What the operation is about.
    pub(crate) fn by(op: &Op) -> Told {
        let directories = match op {
            Op::Lookup(op) => vec![op.parent],
            Op::Make(op) => vec![op.parent],
            Op::Link(op) => vec![op.parent],
            Op::Remove(op) => vec![op.parent],
            Op::Rename(op) => vec![op.parent, op.new_parent],
            Op::ReadDir(op) if op.attributes => vec![op.ino],
            _ => Vec::new(),
        };
        Told {
            directories: directories.into_iter().map(InodeId).collect(),
            absence_counts: matches!(op, Op::Lookup(_)),
            ..Told::default()
        }
    }

    /// With its result.
    pub(crate) fn and(mut self, result: &FsResult<Reply>) -> Told {
        let shown = |attr: &Option<Attr>| attr.as_ref().map(|attr| InodeId(attr.ino));
        self.attributes = match result {
            Ok(Reply::Entry(entry)) => {
                let neighbours = entry.neighbours.iter().filter_map(|named| named.entry.as_ref());
                [entry].into_iter().chain(neighbours).filter_map(|entry| shown(&entry.attr)).collect()
            }
            Ok(Reply::CopyRange(copy)) => shown(&copy.attr).into_iter().collect(),
            Ok(Reply::Open(open)) => shown(&open.attr).into_iter().collect(),
            Ok(Reply::Commit(commit)) => commit.files.iter().filter_map(|file| shown(&file.attr)).collect(),
            Ok(Reply::ReadDir(page)) => page.entries.iter().filter_map(|entry| shown(&entry.attr)).collect(),
            _ => Vec::new(),
        };
        self.cacheable = match result {
            Ok(_) => !self.directories.is_empty() || !self.attributes.is_empty(),
            Err(e) => self.absence_counts && e.errno == Errno::ENOENT,
        };
        self
    }

    pub(crate) fn cacheable(&self) -> bool {
        self.cacheable
    }

    /// All inodes that something is told of.
    pub(crate) fn inodes(&self) -> impl Iterator<Item = InodeId> {
        self.directories.iter().chain(&self.attributes).copied()
    }
}
