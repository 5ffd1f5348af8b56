//! create, mkdir, mknod, symlink, O_TMPFILE: one operation, since only the kind and the name differ.

use fjordfs_proto::{
    FsResult, HandleId, InodeId, Policy, ROOT_INODE, SYMLINK_MAX,
    error::Errno,
    operation::new_attr,
    pb::meta::{Entry, FileKind, Make, Time},
};

use super::{Ctx, acl, entry, fail, time_of, touch_directory};
use crate::{
    names, orphans,
    records::{Dirent, Inode},
    txn::Txn,
};

pub(super) fn run(ctx: &mut Ctx<'_>, op: &Make) -> FsResult<Entry> {
    let (parent_ino, kind) = (InodeId(op.parent), op.kind());
    if !op.unnamed {
        names::check(&op.name)?;
    }
    let parent = ctx.txn.directory(parent_ino)?;
    if op.handle != 0 && kind != FileKind::Regular {
        return fail(Errno::EINVAL, "only a regular file can be opened as it is made");
    }
    if op.unnamed && (op.handle == 0 || !op.name.is_empty()) {
        return fail(Errno::EINVAL, "a file without a name has to be opened, and has none");
    }
    if !op.unnamed
        && let Some(found) = ctx.txn.dirent(parent_ino, &op.name)?
    {
        return existing(ctx, op, found);
    }
    check_kind(op, kind)?;

    let now = time_of(ctx, op.time)?;
    let ino = number(ctx, op)?;
    ctx.txn.counters().inodes += 1;
    let attr = new_attr(op, &parent.attr(parent_ino), ino.0, now);
    let is_dir = kind == FileKind::Directory;
    let mut inode = Inode {
        kind: attr.kind,
        mode: attr.mode,
        uid: attr.uid,
        gid: attr.gid,
        nlink: attr.nlink,
        unnamed: op.unnamed,
        rdev: attr.rdev,
        atime: attr.atime,
        mtime: attr.mtime,
        ctime: attr.ctime,
        btime: attr.btime,
        policy: attr.policy,
        parent: if is_dir { parent_ino.0 } else { 0 },
        name: if is_dir { op.name.clone() } else { Default::default() },
        target: op.target.clone(),
        ..Inode::default()
    };
    acl::inherit(ctx, (parent_ino, &parent), ino, &mut inode, op.umask)?;
    ctx.txn.put_inode(ino, &inode);
    if op.unnamed {
        orphans::add(ctx.txn, ino);
    } else {
        ctx.txn.put_dirent(parent_ino, &op.name, ino, inode.kind);
        touch_directory(ctx.txn, parent_ino, i64::from(is_dir), now)?;
    }
    if op.handle != 0 {
        ctx.opens.open(ctx.session, HandleId(op.handle), ino)?;
    }
    Ok(entry(ino, &inode))
}

/// The new inode's number: the next one, or what the client chose of its own.
fn number(ctx: &mut Ctx<'_>, op: &Make) -> FsResult<InodeId> {
    if op.ino == 0 {
        let counters = ctx.txn.counters();
        counters.next_inode += 1;
        return Ok(InodeId(counters.next_inode - 1));
    }
    let ino = InodeId(op.ino);
    if !ctx.inodes.iter().any(|range| range.contains(&op.ino)) || ctx.txn.find_inode(ino)?.is_some() {
        return fail(Errno::EINVAL, format!("inode {ino} is not {}'s to make", ctx.session));
    }
    Ok(ino)
}

/// The name is taken: only a non-exclusive create of a regular file goes on, by opening it.
fn existing(ctx: &mut Ctx<'_>, op: &Make, found: Dirent) -> FsResult<Entry> {
    let refuse = |errno, what| Err(names::error(errno, InodeId(op.parent), &op.name, what));
    if op.exclusive || op.handle == 0 {
        return refuse(Errno::EEXIST, "exists");
    }
    let ino = InodeId(found.ino);
    let inode = ctx.txn.inode(ino)?;
    match inode.kind() {
        FileKind::Regular => {}
        FileKind::Directory => return refuse(Errno::EISDIR, "is a directory"),
        _ => return refuse(Errno::EEXIST, "exists and is not a regular file"),
    }
    ctx.opens.open(ctx.session, HandleId(op.handle), ino)?;
    Ok(entry(ino, &inode))
}

fn check_kind(op: &Make, kind: FileKind) -> FsResult<()> {
    match kind {
        FileKind::Unspecified => fail(Errno::EINVAL, format!("unknown file kind {}", op.kind)),
        FileKind::Symlink if op.target.is_empty() => {
            fail(Errno::ENOENT, "a symbolic link needs a target that is not empty")
        }
        FileKind::Symlink if op.target.len() > SYMLINK_MAX => fail(
            Errno::ENAMETOOLONG,
            format!("the link's target has {} bytes, {SYMLINK_MAX} are allowed", op.target.len()),
        ),
        FileKind::Symlink if op.target.contains(&0) => {
            fail(Errno::EINVAL, "the link's target contains a zero byte")
        }
        FileKind::Symlink => Ok(()),
        _ if !op.target.is_empty() => fail(Errno::EINVAL, "only a symbolic link has a target"),
        _ => Ok(()),
    }
}

/// The root directory of a new filesystem, owned by root and writable as `/` is.
pub(crate) fn make_root(txn: &mut Txn, policy: Policy, now: Time) {
    let root = Inode {
        kind: FileKind::Directory.into(),
        mode: 0o755,
        nlink: 2,
        // Whoever makes a filesystem may write to it.
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        atime: Some(now),
        mtime: Some(now),
        ctime: Some(now),
        btime: Some(now),
        policy: policy.code().into(),
        parent: ROOT_INODE.0,
        ..Inode::default()
    };
    txn.put_inode(ROOT_INODE, &root);
    txn.counters().inodes += 1;
}
