//! copy_file_range: the target's range gets the source's extents. Blocks are immutable, so sharing them is a copy.
//!
//! Compaction moves bytes by it: it writes a file's bytes anew, elsewhere, and has the file take those in their place, as long as
//! nobody has changed it ([`CopyRange::same_as`]).
//!
//! Order: what is shared is counted before anything is inserted, since what the target loses may be the same blocks.

use fjordfs_proto::{
    Extent, FILE_SIZE_MAX, FsResult, INLINE_MAX, InodeId, Policy, Source,
    error::Errno,
    interval::Run,
    mode::without_suid,
    pb::meta::{CopyRange, CopyRangeReply},
};

use super::{Ctx, fail};
use crate::{extents, liveness, records::Inode};

/// Most extents shared at once.
const EXTENTS_MAX: usize = 1024;
/// Most blocks shared at once: each gets a record.
const BLOCKS_MAX: usize = 4096;

/// A part of an extent, and how far it lies from the start of the range.
struct Part {
    whole: Extent,
    range: std::ops::Range<u64>,
    distance: u64,
}

pub(super) fn run(ctx: &mut Ctx<'_>, op: &CopyRange) -> FsResult<CopyRangeReply> {
    let (source_ino, target_ino) = (InodeId(op.source), InodeId(op.target));
    let source = regular(ctx, source_ino)?;
    let mut target = regular(ctx, target_ino)?;
    let length = op.length.min(source.size.saturating_sub(op.source_offset));
    if length == 0 {
        return Ok(CopyRangeReply { copied: 0, attr: Some(target.attr(target_ino)) });
    }
    if op.same_as.is_some_and(|version| version != target.data_version) {
        return fail(Errno::EAGAIN, format!("inode {target_ino}: it has changed meanwhile, read it again"));
    }
    if op.target_offset.checked_add(length).is_none_or(|end| end > FILE_SIZE_MAX) {
        return fail(Errno::EFBIG, format!("inode {target_ino}: the copy ends beyond the largest file"));
    }
    if source_ino == target_ino && op.source_offset.abs_diff(op.target_offset) < length {
        return fail(Errno::EINVAL, format!("inode {source_ino}: the ranges overlap"));
    }
    let (parts, copied) = shareable(ctx, op, length, &target)?;
    if copied == 0 {
        return fail(Errno::EOPNOTSUPP, format!("inode {source_ino}: its bytes cannot be shared, copy them"));
    }
    for part in &parts {
        liveness::share(ctx.txn, &part.whole, part.range.clone())?;
    }
    let range = op.target_offset..op.target_offset + copied;
    extents::remove(ctx.txn, target_ino, &mut target, range.clone())?;
    for part in parts {
        let extent = part.whole.slice(part.range);
        let end = range.start + part.distance + extent.len();
        extents::insert(ctx.txn, target_ino, &mut target, range.start + part.distance, extent)?;
        target.size = target.size.max(end);
    }
    target.size = target.size.max(range.end);
    if op.same_as.is_none() {
        target.data_version = ctx.start.next_version(target_ino, target.data_version);
        (target.mtime, target.ctime) = (Some(ctx.now), Some(ctx.now));
    }
    if op.clear_suid {
        target.mode = without_suid(target.mode);
    }
    ctx.txn.put_inode(target_ino, &target);
    Ok(CopyRangeReply { copied, attr: Some(target.attr(target_ino)) })
}

fn regular(ctx: &mut Ctx<'_>, ino: InodeId) -> FsResult<Inode> {
    let inode = ctx.txn.inode(ino)?;
    match inode.is_regular() {
        true => Ok(inode),
        false if inode.is_dir() => fail(Errno::EISDIR, format!("inode {ino} is a directory")),
        false => fail(Errno::EINVAL, format!("inode {ino} is not a regular file")),
    }
}

/// Parts of the source's extents from the start of the range on, up to the first that cannot be shared, and how many bytes
/// of the range they and the holes between them cover.
fn shareable(ctx: &mut Ctx<'_>, op: &CopyRange, length: u64, target: &Inode) -> FsResult<(Vec<Part>, u64)> {
    let (found, next) = extents::page(ctx.txn, InodeId(op.source), op.source_offset, EXTENTS_MAX)?;
    let end = op.source_offset + length;
    let mut covered = next.map_or(end, |next| next.min(end)) - op.source_offset;
    let (mut parts, mut blocks) = (Vec::new(), 0);
    for (at, whole) in found.into_iter().filter(|(at, _)| *at < end) {
        let (from, to) = (at.max(op.source_offset), (at + whole.len()).min(end));
        let distance = from - op.source_offset;
        blocks += whole.pieces().count();
        let may = match &whole.source {
            Source::Blocks { layout, .. } => {
                Policy::from_code(target.policy).is_some_and(|policy| layout.serves(policy))
            }
            Source::Inline(_) => op.target_offset + distance + (to - from) <= INLINE_MAX,
        };
        if !may || (blocks > BLOCKS_MAX && !parts.is_empty()) {
            covered = distance;
            break;
        }
        parts.push(Part { whole, range: from - at..to - at, distance });
    }
    Ok((parts, covered))
}
