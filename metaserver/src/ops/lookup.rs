//! Name to inode.

use bytes::Bytes;
use fjordfs_proto::{
    FsResult, InodeId,
    error::Errno,
    pb::meta::{Entry, Lookup, Neighbour},
};
use prost::Message;

use super::{Ctx, entry, get_extents};
use crate::{
    keys, names,
    records::{self, Dirent, Inode},
    store::Order,
};

/// A file of more extents is large: one question more is nothing to its reader.
const EXTENTS_MAX: usize = 4;

/// Most neighbours of an answer, and about how many bytes they may take.
const NEIGHBOURS_MAX: usize = 512;
const NEIGHBOURS_BYTES: usize = 256 << 10;
/// About what one takes besides what is sent.
const NEIGHBOUR_BYTES: usize = 64;
/// Entries that are looked at beyond twice the ones that are wanted: many may be known to the client.
const PASSED_MAX: usize = 16;
/// Entries read at once.
const ROWS: usize = 32;

pub(super) fn run(ctx: &mut Ctx<'_>, op: &Lookup) -> FsResult<Entry> {
    let parent = InodeId(op.parent);
    names::check(&op.name)?;
    let Some(found) = ctx.txn.dirent(parent, &op.name)? else {
        // Only an absent name needs the parent: its error says why there is none.
        ctx.txn.directory(parent)?;
        return Err(names::error(Errno::ENOENT, parent, &op.name, "does not exist"));
    };
    let ino = InodeId(found.ino);
    let inode = ctx.txn.inode(ino)?;
    let mut entry = shown(ctx, ino, &inode, op.extents)?;
    entry.neighbours = neighbours(ctx, op)?;
    Ok(entry)
}

fn shown(ctx: &mut Ctx<'_>, ino: InodeId, inode: &Inode, extents: bool) -> FsResult<Entry> {
    let mut entry = entry(ino, inode);
    if extents && inode.is_regular() {
        let page = get_extents::page(ctx.txn, ino, inode, 0, EXTENTS_MAX)?;
        entry.extents = (page.next_offset == u64::MAX).then_some(page);
    }
    Ok(entry)
}

/// Entries behind the one that was asked for in the order of a listing, and from its beginning when it ends.
fn neighbours(ctx: &mut Ctx<'_>, op: &Lookup) -> FsResult<Vec<Neighbour>> {
    let wanted = (op.neighbours as usize).min(NEIGHBOURS_MAX);
    if wanted == 0 {
        return Ok(Vec::new());
    }
    let parent = InodeId(op.parent);
    let behind = keys::dirents_after(parent, keys::cookie(&op.name));
    let before = keys::dirents_after(parent, 0).start..keys::dirent(parent, &op.name);
    let (mut found, mut bytes, mut left) = (Vec::new(), 0, 2 * wanted + PASSED_MAX);
    for mut rest in [behind, before] {
        loop {
            let rows = ctx.txn.scan(&rest, Order::Ascending, ROWS.min(left))?;
            let Some((last, _)) = rows.last() else { break };
            rest.start = [last.as_slice(), &[0]].concat();
            left -= rows.len();
            for (key, value) in rows {
                if found.len() >= wanted || bytes >= NEIGHBOURS_BYTES {
                    return Ok(found);
                }
                if let Some(neighbour) = neighbour(ctx, op, &key, value)? {
                    bytes += NEIGHBOUR_BYTES + neighbour.encoded_len();
                    found.push(neighbour);
                }
            }
        }
    }
    Ok(found)
}

/// One entry, unless it is known, or would have to be taken back from somebody.
fn neighbour(ctx: &mut Ctx<'_>, op: &Lookup, key: &[u8], value: Bytes) -> FsResult<Option<Neighbour>> {
    let Some((_, name)) = keys::split_dirent(key) else { return Ok(None) };
    let dirent: Dirent = records::decode(value, || format!("an entry of inode {}", op.parent))?;
    let ino = InodeId(dirent.ino);
    if !ctx.leases.is_news(ctx.session, ino) {
        return Ok(None);
    }
    // One that is damaged is told to whoever looks it up.
    let Ok(inode) = ctx.txn.inode(ino) else { return Ok(None) };
    let entry = shown(ctx, ino, &inode, op.extents)?;
    Ok(Some(Neighbour { name: name.to_vec().into(), entry: Some(entry) }))
}
