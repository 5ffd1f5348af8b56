//! Making written bytes visible: all files of a Commit in one batch.
//!
//! Order: every block is checked against the session's leases first; then blocks that are more than one piece get their
//! live record, as if all extents were inserted; then the extents go in, and what cannot (its file is gone) is
//! released again. A block that ends with no live byte is queued for deletion by that release.
//!
//! **Power failures of data servers.** What was fsynced and then overwritten must be there afterwards, as it was or as it was
//! overwritten. So blocks that are not on stable storage replace nothing: their client is told to sync them first.

use std::collections::BTreeMap;

use fjordfs_proto::{
    BlockId, Extent, FILE_SIZE_MAX, FsResult, INLINE_MAX, InodeId, Source, TargetId,
    error::Errno,
    mode::without_suid,
    pb::meta::{Commit, CommitReply, FileCommit, FileCommitReply, MissingShards},
};

use super::{Ctx, Missed, fail};
use crate::{
    block_ids, extents,
    liveness::{self, Tally},
    records::Inode,
};

/// Most blocks of one Commit: 1 TiB of data.
const BLOCKS_MAX: usize = 1 << 16;
const NANOSECONDS: u32 = 1_000_000_000;

type Runs = Vec<(u64, Extent)>;

pub(super) fn run(ctx: &mut Ctx<'_>, op: Commit) -> FsResult<CommitReply> {
    let mut blocks = BTreeMap::new();
    let mut files: Vec<(FileCommit, Runs)> = Vec::with_capacity(op.files.len());
    for mut file in op.files {
        if file.mtime.is_some_and(|t| t.nsec >= NANOSECONDS) {
            return fail(
                Errno::EINVAL,
                format!("mtime of i{}: its nanoseconds are a second or more", file.ino),
            );
        }
        let mut runs = Runs::with_capacity(file.extents.len());
        for extent in std::mem::take(&mut file.extents) {
            let (offset, extent) = Extent::from_pb(extent)?;
            check_inline(&file, offset, &extent)?;
            tally(&mut blocks, &extent)?;
            ctx.missed.extend(missed(&extent, &op.missing));
            runs.push((offset, extent));
        }
        files.push((file, runs));
    }
    if op.unsynced {
        for (file, runs) in &files {
            if replaces(ctx, file, runs)? {
                return Ok(CommitReply { files: Vec::new(), sync_first: true });
            }
        }
    }
    block_ids::claim(ctx.txn, ctx.session, blocks.keys().copied())?;
    abandon(ctx, op.abandoned)?;
    liveness::adopt(ctx.txn, &blocks);
    let files =
        files.into_iter().map(|(file, runs)| commit_file(ctx, &file, runs)).collect::<FsResult<_>>()?;
    Ok(CommitReply { files, sync_first: false })
}

/// Whether bytes of a file would be replaced by blocks. What is appended replaces nothing, wherever the file ends by now.
fn replaces(ctx: &mut Ctx<'_>, file: &FileCommit, runs: &Runs) -> FsResult<bool> {
    let ino = InodeId(file.ino);
    let Some(inode) = ctx.txn.find_inode(ino)?.filter(|inode| inode.allocated > 0) else { return Ok(false) };
    for (at, extent) in runs {
        let written_there = *at < inode.size && file.append_base.is_none_or(|base| *at < base);
        if written_there
            && matches!(extent.source, Source::Blocks { .. })
            && let (there, _) = extents::page(ctx.txn, ino, *at, 1)?
            && there.first().is_some_and(|(next, _)| *next < at + extent.length)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Inline bytes lie at the beginning of a file, or of what was appended: that may go anywhere, here or already at the client,
/// which took it for small while it did not know of others' appends.
fn check_inline(file: &FileCommit, offset: u64, extent: &Extent) -> FsResult<()> {
    let FileCommit { ino, append_base, .. } = file;
    let at = append_base.and_then(|base| offset.checked_sub(base)).unwrap_or(offset);
    if matches!(extent.source, Source::Inline(_)) && at + extent.length > INLINE_MAX {
        return fail(
            Errno::EINVAL,
            format!(
                "inline bytes of i{ino} at {at}: only the first {INLINE_MAX} bytes of a file, or of an append, may be inline"
            ),
        );
    }
    Ok(())
}

fn tally(blocks: &mut BTreeMap<BlockId, Tally>, extent: &Extent) -> FsResult<()> {
    for piece in extent.pieces() {
        let tally = blocks.entry(piece.block).or_default();
        tally.pieces += 1;
        tally.bytes += u64::from(piece.length);
        if blocks.len() > BLOCKS_MAX {
            return fail(Errno::E2BIG, format!("a Commit may name {BLOCKS_MAX} blocks: split it"));
        }
    }
    Ok(())
}

/// Which of the blocks that lack shards the extent names. A block that several extents name is told several times, which is harmless.
fn missed<'a>(extent: &Extent, missing: &'a [MissingShards]) -> impl Iterator<Item = Missed> + use<'a> {
    let named = match &extent.source {
        Source::Blocks { addr, layout } if !missing.is_empty() => {
            let last = extent.pieces().last().map_or(addr.block, |piece| piece.block);
            Some((addr.block..=last, layout.width()))
        }
        _ => None,
    };
    missing.iter().filter_map(move |lacks| {
        let (_, width) = named.as_ref().filter(|(blocks, _)| blocks.contains(&BlockId(lacks.block)))?;
        let targets = lacks.targets.iter().copied().map(TargetId).collect();
        Some(Missed { block: BlockId(lacks.block), width: *width, targets })
    })
}

/// Ids of others are passed over: a client may not know yet that the session is over that they were leased to, and they are swept with it.
/// What is committed beside them is not to blame.
fn abandon(ctx: &mut Ctx<'_>, mut blocks: Vec<u64>) -> FsResult<()> {
    blocks.sort_unstable();
    blocks.dedup();
    let blocks = block_ids::claim_own(ctx.txn, ctx.session, blocks.into_iter().map(BlockId))?;
    for run in blocks.chunk_by(|a, b| a + 1 == *b) {
        liveness::bury(ctx.txn, BlockId(run[0]), run.len() as u64, None);
    }
    Ok(())
}

fn commit_file(ctx: &mut Ctx<'_>, file: &FileCommit, mut runs: Runs) -> FsResult<FileCommitReply> {
    let ino = InodeId(file.ino);
    let inode = ctx.txn.find_inode(ino)?;
    let (mut inode, size, shift) = match plan(inode, file, &mut runs) {
        Ok(plan) => plan,
        Err(errno) => {
            for (_, extent) in &runs {
                liveness::release(ctx.txn, extent, 0..extent.length)?;
            }
            return Ok(FileCommitReply { errno: errno.code(), ..Default::default() });
        }
    };
    if !runs.is_empty() || size != inode.size {
        inode.data_version = ctx.start.next_version(ino, inode.data_version);
        let mtime = file.mtime.unwrap_or(ctx.now);
        (inode.mtime, inode.ctime) = (Some(mtime), Some(file.ctime.unwrap_or(mtime)));
    }
    for (offset, extent) in runs {
        let end = offset + extent.length;
        extents::insert(ctx.txn, ino, &mut inode, offset, extent)?;
        inode.size = inode.size.max(end);
    }
    inode.size = inode.size.max(size);
    if file.clear_suid {
        inode.mode = without_suid(inode.mode);
    }
    ctx.txn.put_inode(ino, &inode);
    Ok(FileCommitReply { errno: 0, attr: Some(inode.attr(ino)), appended_shift: shift })
}

/// Checks one file's part and moves its appended runs to the end of the file: the inode, its size afterwards, and the
/// shift. Nothing is written yet, so that a refusal concerns this file only.
fn plan(inode: Option<Inode>, file: &FileCommit, runs: &mut Runs) -> Result<(Inode, u64, i64), Errno> {
    let inode = inode.ok_or(Errno::ESTALE)?;
    if !inode.is_regular() {
        return Err(if inode.is_dir() { Errno::EISDIR } else { Errno::EINVAL });
    }
    let mut size = file.size;
    let mut shift = 0;
    if let Some(base) = file.append_base {
        if base > FILE_SIZE_MAX {
            return Err(Errno::EFBIG);
        }
        // Runs below the base are plain writes of the same client: the file ends behind them, too.
        let written = runs.iter().filter(|(at, _)| *at < base).map(|(at, extent)| at + extent.length).max();
        let end = inode.size.max(written.unwrap_or(0)).min(FILE_SIZE_MAX);
        shift = end as i64 - base as i64;
        for (at, _) in runs.iter_mut().filter(|(at, _)| *at >= base) {
            *at = at.checked_add_signed(shift).ok_or(Errno::EINVAL)?;
        }
        if size > base {
            size = size.checked_add_signed(shift).ok_or(Errno::EINVAL)?;
        }
    }
    let ends = runs.iter().map(|(at, extent)| at.saturating_add(extent.length));
    let size = ends.chain([size, inode.size]).max().unwrap_or(inode.size);
    if size > FILE_SIZE_MAX {
        return Err(Errno::EFBIG);
    }
    Ok((inode, size, shift))
}
