//! Checks the records of a store against each other, from a full scan.
//!
//! | checked | against |
//! |---|---|
//! | every entry | an inode of the same kind; a directory has one entry, and its own parent and name agree |
//! | link counts | entries; of a directory 2 + subdirectories; 0 means an orphan record |
//! | every directory | reached from the root |
//! | extents | an inode or a 'destroy' record, no overlap, below the file's size, joined where they agree |
//! | allocated bytes | the sum of the extents |
//! | extended attributes | an inode, and the length of its list |
//! | live bytes of blocks | the pieces of extents; without a record there is exactly one |
//! | every block | only one of: leased and unused, reached, queued for deletion |
//! | counters | above every id in use; totals agree |
//!
//! # On a live system
//! The check reads a snapshot, so it never sees half an operation and every problem is one. Repairs are made later, when more may have
//! happened; so most of them are differences: operations since then have changed what is counted and the count by the same
//! amount. The others look again whether they are still needed (`repair.rs`).

mod blocks;
pub(crate) mod repair;
pub(crate) mod runs;
mod tree;
pub(crate) mod uses;
mod xattrs;

#[cfg(test)]
mod tests;

use std::{cell::Cell, collections::BTreeSet, path::Path};

use bytes::Bytes;
use fjordfs_proto::{BlockId, FsResult, pb::meta::UsesRequest};
use prost::Message;

use self::repair::{Counted, Fix};
use crate::{
    keys::{self, Key},
    label::{Folder, FolderError},
    records::{self, Counters},
    store::{FjallOptions, FjallStore, Idle, Reading, StoreError},
};

/// Rows read at a time.
const PAGE: usize = 4096;
/// Problems listed one by one; more are only counted.
const PROBLEMS_LISTED: usize = 1000;

/// What a check found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report {
    /// One sentence each; at most a thousand.
    pub problems: Vec<String>,
    /// All problems, listed or not.
    pub problem_count: u64,
    /// Inodes.
    pub inodes: u64,
    /// Entries of directories.
    pub entries: u64,
    /// Extent records.
    pub extents: u64,
    /// Unlinked inodes that may be open.
    pub orphans: u64,
    /// Blocks that extents reach.
    pub blocks_live: u64,
    /// Block ids leased and not used.
    pub blocks_leased: u64,
    /// Blocks waiting to be deleted.
    pub blocks_dead: u64,
    /// What would mend the problems that can be mended.
    pub(crate) fixes: Vec<Fix>,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.problem_count == 0
    }

    /// Problems that can be mended.
    pub fn repairable(&self) -> u64 {
        self.fixes.len() as u64
    }

    fn fixable(&mut self, fix: Fix, what: impl Into<String>) {
        self.fixes.push(fix);
        self.problem(what);
    }

    fn problem(&mut self, what: impl Into<String>) {
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_LISTED {
            self.problems.push(what.into());
        }
    }
}

/// Why a check could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FsckError {
    /// The folder cannot be used: e.g. a metaserver runs on it.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The engine failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Checks the metadata in a metaserver's data folder. The metaserver must not be running.
///
/// # Errors
/// When the folder holds no metadata, is in use, or cannot be read.
pub fn check_folder(folder: &Path) -> Result<Report, FsckError> {
    let folder = Folder::claim_existing(folder)?;
    let store = FjallStore::open(&folder.store, FjallOptions::default())?;
    Ok(check(&Idle(&store))?)
}

/// Checks the records of a store nobody writes to meanwhile. Memory: a few words per inode and per block.
///
/// # Errors
/// When the engine fails; damaged records are problems of the report.
pub fn check(store: &dyn Reading) -> Result<Report, StoreError> {
    check_telling(store, &|_| {})
}

/// Like [`check`]; tells now and then how many records it has looked at.
///
/// # Errors
/// When the engine fails; damaged records are problems of the report.
pub fn check_telling(store: &dyn Reading, tell: &dyn Fn(u64)) -> Result<Report, StoreError> {
    let store = &Source { store, tell, read: Cell::new(0) };
    let mut report = Report::default();
    let counters: Counters = match store.store.get(&[keys::COUNTERS])? {
        Some(value) => Counters::decode(value).unwrap_or_else(|e| {
            report.problem(format!("the counters cannot be read: {e}"));
            Counters::default()
        }),
        None => {
            report.problem("there are no counters: the store was never opened by a metaserver");
            return Ok(report);
        }
    };
    let inodes = tree::check(store, &counters, &mut report)?;
    blocks::check(store, &counters, &inodes, &mut report)?;
    xattrs::check(store, &inodes, &mut report)?;
    Ok(report)
}

/// Which of some blocks a file reaches.
///
/// # Errors
/// When the engine fails.
pub fn reached(store: &dyn Reading, blocks: Vec<u64>) -> Result<BTreeSet<BlockId>, StoreError> {
    let mut reached = BTreeSet::new();
    uses::read(store, &UsesRequest { blocks, ..UsesRequest::default() }, |found| {
        if let uses::Found::Use(found) = found {
            reached.insert(BlockId(found.block));
        }
    })?;
    Ok(reached)
}

/// What is being checked.
struct Source<'a> {
    store: &'a dyn Reading,
    tell: &'a dyn Fn(u64),
    read: Cell<u64>,
}

/// Calls `f` for every record of a kind.
fn each(source: &Source<'_>, prefix: u8, mut f: impl FnMut(&Key, Bytes)) -> Result<(), StoreError> {
    let range = keys::all(prefix);
    let mut start = range.start;
    loop {
        let page = source.store.scan(&start..&range.end, PAGE)?;
        source.read.set(source.read.get() + page.len() as u64);
        (source.tell)(source.read.get());
        let full = page.len() == PAGE;
        if let Some((last, _)) = page.last() {
            start.clone_from(last);
            start.push(0);
        }
        for (key, value) in page {
            f(&key, value);
        }
        if !full {
            return Ok(());
        }
    }
}

/// Like [`each`], with the value decoded and the key's first id. What cannot be read is a problem.
fn each_record<M: Message + Default>(
    store: &Source<'_>,
    prefix: u8,
    report: &mut Report,
    mut f: impl FnMut(&mut Report, u64, &Key, M),
) -> Result<(), StoreError> {
    each(store, prefix, |key, value| {
        let what = || format!("record {}", key.escape_ascii());
        let record: FsResult<M> = records::decode(value, what);
        match (keys::first_id(key), record) {
            (Some(id), Ok(record)) => f(report, id, key, record),
            (None, _) => report.problem(format!("{} has a short key", what())),
            (_, Err(e)) => report.problem(e.message),
        }
    })
}
