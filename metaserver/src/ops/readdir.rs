//! A page of a directory's entries, in the order of their cookies.
//!
//! A cookie is the hash of the name, so it stays valid while entries come and go, and needs no state here. Entries
//! of equal hash are never split over two pages: a page that ends with one takes all of them.

use fjordfs_proto::{
    FsResult, InodeId,
    pb::meta::{DirEntry, ReadDir, ReadDirReply},
};

use super::Ctx;
use crate::{
    keys,
    records::{self, Dirent},
    store::{Order, Pair},
};

/// Entries of a page when the client does not say.
const PAGE_DEFAULT: usize = 1024;
/// Most entries of a page.
const PAGE_MAX: usize = 4096;
/// A page ends once its entries take about this many bytes.
const PAGE_BYTES: usize = 256 << 10;
/// About what an entry takes besides its name, without and with attributes.
const ENTRY_BYTES: usize = 32;
const ATTR_BYTES: usize = 96;

pub(super) fn run(ctx: &mut Ctx<'_>, op: &ReadDir) -> FsResult<ReadDirReply> {
    let ino = InodeId(op.ino);
    let directory = ctx.txn.inode(ino)?;
    if !directory.is_dir() {
        ctx.txn.directory(ino)?;
    }
    let limit = if op.limit == 0 { PAGE_DEFAULT } else { (op.limit as usize).min(PAGE_MAX) };
    let mut rows = ctx.txn.scan(&keys::dirents_after(ino, op.cookie), Order::Ascending, limit + 1)?;

    let each = ENTRY_BYTES + if op.attributes { ATTR_BYTES } else { 0 };
    let mut bytes = 0;
    let fit = rows.iter().take(limit).take_while(|(key, _)| {
        let fits = bytes < PAGE_BYTES;
        bytes += key.len() + each;
        fits
    });
    let fit = fit.count();
    let end = rows.len() <= fit;
    let next = rows.get(fit).map(|(key, _)| key.clone());
    rows.truncate(fit);
    if let (Some(next), Some((last, _))) = (next, rows.last())
        && keys::second_id(&next) == keys::second_id(last)
        && let Some(cookie) = keys::second_id(last)
    {
        // A tie over the edge: take the rest of it.
        let rest = next..keys::dirents_after(ino, cookie).start;
        rows.extend(ctx.txn.scan(&rest, Order::Ascending, usize::MAX)?);
    }

    let entries = rows.into_iter().map(|row| entry(ctx, ino, row, op.attributes)).collect::<FsResult<_>>()?;
    Ok(ReadDirReply { entries, end, parent: directory.parent })
}

fn entry(ctx: &mut Ctx<'_>, parent: InodeId, (key, value): Pair, attributes: bool) -> FsResult<DirEntry> {
    let (cookie, name) = keys::split_dirent(&key)
        .ok_or_else(|| records::damaged(&format!("an entry of {parent} with a short key")))?;
    let found: Dirent = records::decode(value, || format!("an entry of {parent}"))?;
    let ino = InodeId(found.ino);
    let attr = if attributes { Some(ctx.txn.inode(ino)?.attr(ino)) } else { None };
    Ok(DirEntry { name: name.to_vec().into(), ino: found.ino, kind: found.kind, cookie, attr })
}
