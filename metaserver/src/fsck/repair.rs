//! Mending what a check has found, on the live store.
//!
//! Time has passed since the snapshot that was checked. What is a difference stays one, since every operation changes what is counted
//! and the count together; everything else is looked at again and left alone when it has changed.

use fjordfs_proto::{
    BlockId, FsResult, InodeId, ROOT_INODE,
    pb::meta::{FileKind, Time},
};

use crate::{
    keys, liveness, orphans,
    records::{DeadRun, Inode, LiveBlock},
    store::Order,
    txn::Txn,
};

/// Where inodes without a name get one.
const LOST_AND_FOUND: &[u8] = b"lost+found";

/// A total of the counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Counted {
    Inodes,
    Orphans,
    Queued,
}

/// What mends a problem.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Fix {
    /// A link count is off.
    Links { ino: u64, by: i64 },
    /// The allocated bytes are off.
    Allocated { ino: u64, by: i64 },
    /// The length of the list of extended attributes is off.
    XattrList { ino: u64, by: i64 },
    /// A total is off.
    Count { of: Counted, by: i64 },
    /// The live bytes of a block are off.
    Live { block: u64, by: i64 },
    /// A block of several pieces has no record.
    NoLive { block: u64, live: u64 },
    /// An entry leads to nothing: it goes.
    Entry { parent: u64, name: Vec<u8>, ino: u64 },
    /// A directory does not know where it is.
    Where { ino: u64, parent: u64, name: Vec<u8> },
    /// An orphan record is of nothing, or of something that has a name: it goes.
    NoOrphan { ino: u64 },
    /// An inode has neither name nor orphan record.
    Nameless { ino: u64, subdirectories: u32 },
    /// Extents have no inode: they go.
    Destroy { ino: u64 },
    /// A block that is in use is about to be deleted.
    Unbury { block: u64 },
}

/// Carries it out; false when there was nothing to do any more.
pub(crate) fn apply(txn: &mut Txn, fix: &Fix, now: Time) -> FsResult<bool> {
    match fix {
        Fix::Links { ino, by } => change(txn, *ino, |inode| inode.nlink = moved(inode.nlink, *by)),
        Fix::Allocated { ino, by } => {
            change(txn, *ino, |inode| inode.allocated = inode.allocated.saturating_add_signed(*by))
        }
        Fix::XattrList { ino, by } => {
            change(txn, *ino, |inode| inode.xattr_list = moved(inode.xattr_list, *by))
        }
        Fix::Count { of, by } => {
            let counters = txn.counters();
            let count = match of {
                Counted::Inodes => &mut counters.inodes,
                Counted::Orphans => &mut counters.orphans,
                Counted::Queued => &mut counters.queued,
            };
            *count = count.saturating_add_signed(*by);
            Ok(true)
        }
        Fix::Live { block, by } => {
            let key = keys::live(BlockId(*block));
            let Some(record) = txn.record::<LiveBlock>(&key)? else { return Ok(false) };
            match record.live.saturating_add_signed(*by) {
                0 => txn.remove(key),
                live => txn.put_record(key, &LiveBlock { live }),
            }
            Ok(true)
        }
        Fix::NoLive { block, live } => {
            let key = keys::live(BlockId(*block));
            if txn.get(&key)?.is_some() {
                return Ok(false);
            }
            txn.put_record(key, &LiveBlock { live: *live });
            Ok(true)
        }
        Fix::Entry { parent, name, ino } => {
            let parent = InodeId(*parent);
            let leads_there = txn.dirent(parent, name)?.is_some_and(|entry| entry.ino == *ino);
            if !leads_there || txn.find_inode(InodeId(*ino))?.is_some() {
                return Ok(false);
            }
            txn.remove(keys::dirent(parent, name));
            Ok(true)
        }
        Fix::Where { ino, parent, name } => {
            let leads_there = txn.dirent(InodeId(*parent), name)?.is_some_and(|entry| entry.ino == *ino);
            if !leads_there {
                return Ok(false);
            }
            change(txn, *ino, |inode| (inode.parent, inode.name) = (*parent, name.clone().into()))
        }
        Fix::NoOrphan { ino } => {
            let ino = InodeId(*ino);
            let named = txn.find_inode(ino)?.is_none_or(|inode| inode.nlink > 0);
            if txn.get(&keys::orphan(ino))?.is_none() || !named {
                return Ok(false);
            }
            orphans::remove(txn, ino);
            Ok(true)
        }
        Fix::Nameless { ino, subdirectories } => name(txn, InodeId(*ino), *subdirectories, now),
        Fix::Destroy { ino } => {
            let ino = InodeId(*ino);
            if txn.find_inode(ino)?.is_some() {
                return Ok(false);
            }
            txn.put(keys::destroy(ino), Default::default());
            txn.pending().destroyed = true;
            Ok(true)
        }
        Fix::Unbury { block } => unbury(txn, *block),
    }
}

fn moved(count: u32, by: i64) -> u32 {
    u32::try_from(i64::from(count).saturating_add(by).max(0)).unwrap_or(u32::MAX)
}

fn change(txn: &mut Txn, ino: u64, how: impl FnOnce(&mut Inode)) -> FsResult<bool> {
    let ino = InodeId(ino);
    let Some(mut inode) = txn.find_inode(ino)? else { return Ok(false) };
    how(&mut inode);
    txn.put_inode(ino, &inode);
    Ok(true)
}

/// One that counts links gets a name in `/lost+found`; one that counts none was about to go, and goes with the next start.
fn name(txn: &mut Txn, ino: InodeId, subdirectories: u32, now: Time) -> FsResult<bool> {
    let Some(mut inode) = txn.find_inode(ino)? else { return Ok(false) };
    if txn.get(&keys::orphan(ino))?.is_some() {
        return Ok(false);
    }
    if inode.nlink == 0 {
        orphans::add(txn, ino);
        return Ok(true);
    }
    let found = lost_and_found(txn, now)?;
    let name = format!("i{ino}", ino = ino.0).into_bytes();
    if txn.dirent(found, &name)?.is_some() {
        return Ok(false);
    }
    inode.nlink = 1;
    if inode.is_dir() {
        inode.nlink = 2 + subdirectories;
        (inode.parent, inode.name) = (found.0, name.clone().into());
        let mut folder = txn.directory(found)?;
        folder.nlink += 1;
        txn.put_inode(found, &folder);
    }
    txn.put_dirent(found, &name, ino, inode.kind);
    txn.put_inode(ino, &inode);
    Ok(true)
}

/// The folder, made when there is none.
fn lost_and_found(txn: &mut Txn, now: Time) -> FsResult<InodeId> {
    if let Some(entry) = txn.dirent(ROOT_INODE, LOST_AND_FOUND)? {
        txn.directory(InodeId(entry.ino))?;
        return Ok(InodeId(entry.ino));
    }
    let mut root = txn.directory(ROOT_INODE)?;
    root.nlink += 1;
    let counters = txn.counters();
    let ino = InodeId(counters.next_inode);
    counters.next_inode += 1;
    counters.inodes += 1;
    let folder = Inode {
        kind: FileKind::Directory.into(),
        mode: 0o700,
        nlink: 2,
        atime: Some(now),
        mtime: Some(now),
        ctime: Some(now),
        btime: Some(now),
        policy: root.policy,
        parent: ROOT_INODE.0,
        name: LOST_AND_FOUND.to_vec().into(),
        ..Inode::default()
    };
    txn.put_inode(ROOT_INODE, &root);
    txn.put_inode(ino, &folder);
    txn.put_dirent(ROOT_INODE, LOST_AND_FOUND, ino, folder.kind);
    Ok(ino)
}

/// Takes a block out of the queues of deletion.
fn unbury(txn: &mut Txn, block: u64) -> FsResult<bool> {
    let mut found = false;
    let to_here = keys::all(keys::DEAD).start..keys::dead(BlockId(block.saturating_add(1)));
    if let Some((key, _)) = txn.scan(&to_here, Order::Descending, 1)?.pop()
        && let Some(first) = keys::first_id(&key)
        && let Some(run) = txn.record::<DeadRun>(&key)?
        && block - first < run.count
    {
        txn.remove(key);
        txn.counters().queued = txn.counters().queued.saturating_sub(run.count);
        let layout = fjordfs_proto::Layout::from_code(run.layout);
        liveness::bury(txn, BlockId(first), block - first, layout);
        liveness::bury(txn, BlockId(block + 1), first + run.count - block - 1, layout);
        found = true;
    }
    let targets: Vec<u64> = txn
        .scan(&keys::all(keys::TARGET), Order::Ascending, usize::MAX)?
        .iter()
        .filter_map(|(key, _)| keys::first_id(key))
        .collect();
    for target in targets {
        let key = keys::delete(fjordfs_proto::TargetId(target), BlockId(block));
        if txn.get(&key)?.is_some() {
            txn.remove(key);
            let queued = &mut txn.counters().queued;
            *queued = queued.saturating_sub(1);
            found = true;
        }
    }
    Ok(found)
}
