//! rename, with RENAME_NOREPLACE and RENAME_EXCHANGE. Atomic: one batch moves both names and both parents.

use fjordfs_proto::{
    FsResult, InodeId, ROOT_INODE,
    error::Errno,
    pb::meta::{Empty, Rename, Time},
};

use super::{Ctx, EMPTY, fail, time_of, touch_directory};
use crate::{keys, names, orphans, records, records::Inode, txn::Txn};

const NOREPLACE: u32 = 1;
const EXCHANGE: u32 = 2;

/// One end of the rename: a name, and what it leads to.
struct End {
    parent: InodeId,
    name: bytes::Bytes,
    ino: InodeId,
    inode: Inode,
}

pub(super) fn run(ctx: &mut Ctx<'_>, op: &Rename) -> FsResult<Empty> {
    let (from_parent, to_parent) = (InodeId(op.parent), InodeId(op.new_parent));
    if op.flags & !(NOREPLACE | EXCHANGE) != 0 || op.flags == NOREPLACE | EXCHANGE {
        return fail(Errno::EINVAL, format!("rename flags {:#x} are not supported", op.flags));
    }
    names::check(&op.name)?;
    names::check(&op.new_name)?;
    let now = time_of(ctx, op.time)?;
    ctx.txn.directory(from_parent)?;
    ctx.txn.directory(to_parent)?;
    let Some(source) = ctx.txn.dirent(from_parent, &op.name)? else {
        return Err(names::error(Errno::ENOENT, from_parent, &op.name, "does not exist"));
    };
    let target = ctx.txn.dirent(to_parent, &op.new_name)?;
    if op.flags == NOREPLACE && target.is_some() {
        return Err(names::error(Errno::EEXIST, to_parent, &op.new_name, "exists"));
    }
    if op.flags == EXCHANGE && target.is_none() {
        return Err(names::error(Errno::ENOENT, to_parent, &op.new_name, "does not exist"));
    }
    if target.is_some_and(|target| target.ino == source.ino) {
        // Two names of one file, or one name: POSIX wants nothing done.
        return Ok(EMPTY);
    }
    let ino = InodeId(source.ino);
    let from = End { parent: from_parent, name: op.name.clone(), ino, inode: ctx.txn.inode(ino)? };
    // Within its directory nothing comes to lie below itself. Then the directories above are not even looked at: what a client has
    // decided must not wait for others to whom one of them is delegated.
    let moves = from_parent != to_parent;
    if moves && from.inode.is_dir() {
        refuse_below(ctx.txn, to_parent, ino)?;
    }
    match target {
        Some(target) => {
            let ino = InodeId(target.ino);
            let to = End { parent: to_parent, name: op.new_name.clone(), ino, inode: ctx.txn.inode(ino)? };
            if op.flags == EXCHANGE { exchange(ctx, from, to, now)? } else { replace(ctx, from, to, now)? }
        }
        None => shift(ctx, from, (to_parent, &op.new_name), 0, now)?,
    }
    Ok(EMPTY)
}

/// Puts the source under the new name, which is free now. `gone` directories left `to_parent` for it.
fn shift(
    ctx: &mut Ctx<'_>,
    from: End,
    (to_parent, to_name): (InodeId, &bytes::Bytes),
    gone: i64,
    now: Time,
) -> FsResult<()> {
    let links = i64::from(from.inode.is_dir());
    let from_parent = from.parent;
    ctx.txn.remove(keys::dirent(from_parent, &from.name));
    place(ctx, from, to_parent, to_name, now);
    if from_parent == to_parent {
        return touch_directory(ctx.txn, to_parent, -gone, now);
    }
    touch_directory(ctx.txn, from_parent, -links, now)?;
    touch_directory(ctx.txn, to_parent, links - gone, now)
}

fn replace(ctx: &mut Ctx<'_>, from: End, to: End, now: Time) -> FsResult<()> {
    let refuse = |errno, what| Err(names::error(errno, to.parent, &to.name, what));
    match (from.inode.is_dir(), to.inode.is_dir()) {
        (true, false) => return refuse(Errno::ENOTDIR, "is not a directory"),
        (false, true) => return refuse(Errno::EISDIR, "is a directory"),
        (true, true) if !ctx.txn.is_empty(&keys::dirents_after(to.ino, 0))? => {
            return refuse(Errno::ENOTEMPTY, "is a directory that is not empty");
        }
        _ => {}
    }
    let gone = i64::from(to.inode.is_dir());
    if !to.inode.is_dir() {
        ctx.opens.linger(to.ino);
    }
    let maybe_open = ctx.maybe_open(to.ino);
    orphans::lose_link(ctx.txn, maybe_open, to.ino, to.inode, now)?;
    shift(ctx, from, (to.parent, &to.name), gone, now)
}

fn exchange(ctx: &mut Ctx<'_>, from: End, to: End, now: Time) -> FsResult<()> {
    if from.parent != to.parent && to.inode.is_dir() {
        refuse_below(ctx.txn, from.parent, to.ino)?;
    }
    let links = i64::from(to.inode.is_dir()) - i64::from(from.inode.is_dir());
    let (from_parent, from_name) = (from.parent, from.name.clone());
    let (to_parent, to_name) = (to.parent, to.name.clone());
    place(ctx, from, to_parent, &to_name, now);
    place(ctx, to, from_parent, &from_name, now);
    if from_parent == to_parent {
        return touch_directory(ctx.txn, to_parent, 0, now);
    }
    touch_directory(ctx.txn, from_parent, links, now)?;
    touch_directory(ctx.txn, to_parent, -links, now)
}

/// Gives an inode its new name.
fn place(ctx: &mut Ctx<'_>, end: End, parent: InodeId, name: &bytes::Bytes, now: Time) {
    let End { ino, mut inode, .. } = end;
    inode.ctime = Some(now);
    if inode.is_dir() {
        (inode.parent, inode.name) = (parent.0, name.clone());
    }
    ctx.txn.put_dirent(parent, name, ino, inode.kind);
    ctx.txn.put_inode(ino, &inode);
}

/// A directory may not move into itself or below itself.
fn refuse_below(txn: &mut Txn, parent: InodeId, moved: InodeId) -> FsResult<()> {
    let mut at = parent;
    // No path is deeper than there are inodes; more steps than that are a cycle in a damaged store.
    for _ in 0..=txn.counters().inodes {
        if at == moved {
            return fail(Errno::EINVAL, format!("directory {moved} cannot be moved below itself"));
        }
        if at == ROOT_INODE {
            return Ok(());
        }
        at = InodeId(txn.inode(at)?.parent);
    }
    Err(records::damaged(&format!("directory {parent} is not below the root")))
}
