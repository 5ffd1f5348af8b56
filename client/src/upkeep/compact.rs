//! What is left of mostly dead blocks, and files that lie in many small pieces, are written anew.
//!
//! # Safety
//! Bytes are read as any client reads them, written to a file without a name, and synced. Then one operation of the metaserver lets the
//! file that they came from have them in the place of the old ones, unless somebody has changed it since it was opened: whoever changes a
//! file wins. So at every moment a file has its bytes, whatever dies, and the nameless file goes with its session. A block whose
//! bytes several files share, or one in several places, is left alone: moved, they would be shared no more.

use std::collections::{BTreeMap, BTreeSet};

use fjordfs_proto::{
    FsError, FsResult, InodeId, Policy, ROOT_INODE,
    error::Errno,
    pb::meta::{BlockUse, FileKind, UsesRequest},
};

use super::{
    BLOCKS, Pace, Tell, admin,
    holdings::{self, Sparse},
};
use crate::{AttrChange, Client, CopiedRange, File, NewFile};

/// Bytes and pieces that are written anew before they take their places: what is read once more if this process dies.
const BATCH_BYTES: u64 = 128 << 20;
const BATCH_PIECES: usize = 4096;

/// Bytes read at a time.
const PORTION: u64 = 4 << 20;

/// A file lies in many small pieces when it has so many, of so few bytes on average.
const SCATTERED_EXTENTS: u32 = 64;
const SCATTERED_BYTES: u64 = 256 << 10;

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Compaction {
    /// Blocks of which files use less than this are written anew, percent.
    pub below: u64,
    /// Bytes per second that are read at most; 0 is no limit.
    pub rate: u64,
    /// Nothing is moved.
    pub dry_run: bool,
}

/// What there is to do, and what was done.
#[derive(Clone, Debug, Default)]
pub struct Compacted {
    /// Blocks of which files use little.
    pub sparse_blocks: u64,
    /// Bytes of these that no file uses: redundancy not counted.
    pub dead_bytes: u64,
    /// Files in many small pieces.
    pub scattered_files: u64,
    /// Written anew.
    pub moved_bytes: u64,
    /// Pieces of files that these were.
    pub moved_pieces: u64,
    /// Pieces of files that were changed or removed meanwhile.
    pub changed_pieces: u64,
    /// Pieces left where they are, since their bytes are shared.
    pub shared_pieces: u64,
    /// Pieces that could not be read.
    pub unreadable_pieces: u64,
}

/// Bytes of a file that are to be moved.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Piece {
    ino: u64,
    offset: u64,
    length: u64,
}

/// Moves what there is to be moved.
///
/// # Errors
/// When servers do not answer. What has been moved stays moved.
pub async fn compact(client: &Client, wanted: Compaction, tell: Tell<'_>) -> FsResult<Compacted> {
    let sparse = holdings::sparse(client, wanted.below, wanted.rate, tell).await?;
    tell("looking for files in many pieces".to_owned());
    let asked =
        UsesRequest { blocks: Vec::new(), extents_min: SCATTERED_EXTENTS, extent_bytes_max: SCATTERED_BYTES };
    let scattered = admin::uses(client, asked).await?.scattered;
    let mut done = Compacted {
        sparse_blocks: sparse.len() as u64,
        dead_bytes: sparse.iter().map(|s| s.bytes.saturating_sub(s.live)).sum(),
        scattered_files: scattered.len() as u64,
        ..Compacted::default()
    };
    if !wanted.dry_run {
        let pace = Pace::new(wanted.rate);
        let mut mover = Mover { client, batches: BTreeMap::new(), done: &mut done, pace, tell };
        mover.everything(&sparse, scattered).await?;
    }
    Ok(done)
}

/// Pieces of blocks whose bytes are each used once, and how many others there are.
fn exclusive(mut uses: Vec<BlockUse>) -> (Vec<BlockUse>, usize) {
    uses.sort_unstable_by_key(|u| (u.block, u.block_offset));
    let mut shared = 0;
    let mut out = Vec::with_capacity(uses.len());
    for block in uses.chunk_by(|a, b| a.block == b.block) {
        let overlap = block.windows(2).any(|pair| {
            u64::from(pair[0].block_offset) + u64::from(pair[0].length) > u64::from(pair[1].block_offset)
        });
        if overlap {
            shared += block.len();
        } else {
            out.extend_from_slice(block);
        }
    }
    (out, shared)
}

/// Ascending, and neighbours as one.
fn joined(pieces: impl IntoIterator<Item = Piece>) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = pieces.into_iter().collect();
    pieces.sort_unstable();
    let mut out: Vec<Piece> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        match out.last_mut() {
            Some(last) if last.ino == piece.ino && last.offset + last.length == piece.offset => {
                last.length += piece.length;
            }
            _ => out.push(piece),
        }
    }
    out
}

/// Bytes that were written anew and have yet to take the place of the old ones.
struct Move {
    file: File,
    piece: Piece,
    /// Where they are in the nameless file.
    at: u64,
    version: u64,
}

/// Moves to files of one policy.
struct Batch {
    anew: File,
    end: u64,
    moves: Vec<Move>,
}

struct Mover<'a> {
    client: &'a Client,
    batches: BTreeMap<u32, Batch>,
    done: &'a mut Compacted,
    pace: Pace,
    tell: Tell<'a>,
}

/// The file, or these bytes of it, are not there any more.
fn is_gone(e: &FsError) -> bool {
    matches!(e.errno, Errno::ENOENT | Errno::ESTALE | Errno::EAGAIN)
}

impl Mover<'_> {
    async fn everything(&mut self, sparse: &[Sparse], scattered: Vec<u64>) -> FsResult<()> {
        for some in sparse.chunks(BLOCKS) {
            let uses = self.uses(some.iter().map(|sparse| sparse.block).collect()).await?;
            let pieces = uses.iter().map(|u| Piece { ino: u.ino, offset: u.offset, length: u.length.into() });
            self.take(joined(pieces)).await?;
        }
        for ino in scattered {
            let pieces = self.pieces_of(ino).await?;
            self.take(pieces).await?;
        }
        for (_, batch) in std::mem::take(&mut self.batches) {
            self.settle(batch).await?;
        }
        Ok(())
    }

    /// Uses of blocks that share nothing.
    async fn uses(&mut self, blocks: Vec<u64>) -> FsResult<Vec<BlockUse>> {
        let asked = UsesRequest { blocks, ..UsesRequest::default() };
        let (uses, shared) = exclusive(admin::uses(self.client, asked).await?.uses);
        self.done.shared_pieces += shared as u64;
        Ok(uses)
    }

    /// All bytes of a file that lie in blocks which share nothing, unless the file is gone.
    async fn pieces_of(&mut self, ino: u64) -> FsResult<Vec<Piece>> {
        let extents = match self.client.extents(InodeId(ino)).await {
            Ok(extents) => extents,
            Err(e) if is_gone(&e) => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let blocks: BTreeSet<u64> =
            extents.iter().flat_map(|(_, extent)| extent.pieces().map(|piece| piece.block.0)).collect();
        let blocks: Vec<u64> = blocks.into_iter().collect();
        let mut pieces = Vec::new();
        for some in blocks.chunks(BLOCKS) {
            let uses = self.uses(some.to_vec()).await?;
            let of_it = uses.into_iter().filter(|u| u.ino == ino);
            pieces.extend(of_it.map(|u| Piece { ino, offset: u.offset, length: u.length.into() }));
        }
        Ok(joined(pieces))
    }

    async fn take(&mut self, pieces: Vec<Piece>) -> FsResult<()> {
        for mut piece in pieces {
            while piece.length > 0 {
                let now = Piece { length: piece.length.min(BATCH_BYTES), ..piece };
                self.write_anew(now).await?;
                (piece.offset, piece.length) = (piece.offset + now.length, piece.length - now.length);
            }
        }
        Ok(())
    }

    /// Copies a piece into the nameless file of its policy.
    async fn write_anew(&mut self, piece: Piece) -> FsResult<()> {
        let (attr, file) = match self.client.open(InodeId(piece.ino)).await {
            Ok(opened) => opened,
            Err(e) if is_gone(&e) => {
                self.done.changed_pieces += 1;
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        file.keep_access_time();
        let mut batch = match self.batches.remove(&attr.policy) {
            Some(batch) => batch,
            None => self.batch(attr.policy).await?,
        };
        let (at, mut copied) = (batch.end, 0);
        while attr.kind() == FileKind::Regular && copied < piece.length {
            let portion = (piece.length - copied).min(PORTION);
            let parts = match file.read_at(piece.offset + copied, portion as usize).await {
                Ok(parts) => parts,
                Err(e) => {
                    tracing::warn!("inode {} at {}: {e}", piece.ino, piece.offset + copied);
                    self.done.unreadable_pieces += 1;
                    break;
                }
            };
            let before = copied;
            for part in parts {
                let length = part.len() as u64;
                batch.anew.write_at(at + copied, part).await?;
                copied += length;
            }
            self.pace.did(copied - before).await;
            if copied == before {
                break;
            }
        }
        batch.end += copied;
        if copied > 0 {
            let piece = Piece { length: copied, ..piece };
            batch.moves.push(Move { file, piece, at, version: attr.data_version });
        }
        if batch.end >= BATCH_BYTES || batch.moves.len() >= BATCH_PIECES {
            self.settle(batch).await?;
        } else {
            self.batches.insert(attr.policy, batch);
        }
        Ok(())
    }

    async fn batch(&self, policy: u32) -> FsResult<Batch> {
        let policy = Policy::from_code(policy).ok_or_else(|| {
            FsError::new(Errno::EPROTO, "a file has a policy that this release does not know")
        })?;
        let new = NewFile { mode: 0o600, umask: 0, uid: 0, gid: 0, exclusive: true };
        let (_, anew) = self.client.create_unnamed(ROOT_INODE, new).await?;
        self.client.setattr(anew.ino(), AttrChange { policy: Some(policy), ..AttrChange::default() }).await?;
        Ok(Batch { anew, end: 0, moves: Vec::new() })
    }

    /// Makes the new bytes safe, and has files take them.
    async fn settle(&mut self, batch: Batch) -> FsResult<()> {
        let Batch { anew, moves, .. } = batch;
        anew.fsync().await?;
        for Move { file, piece, at, version } in moves {
            let mut moved = 0;
            while moved < piece.length {
                let range = CopiedRange {
                    from: at + moved,
                    to: piece.offset + moved,
                    length: piece.length - moved,
                    clear_suid: false,
                    same_as: Some(version),
                };
                match file.copy_from(&anew, range).await {
                    Ok(0) => break,
                    Ok(more) => moved += more,
                    Err(e) if is_gone(&e) => {
                        self.done.changed_pieces += 1;
                        break;
                    }
                    Err(e) => return Err(e),
                }
            }
            self.done.moved_bytes += moved;
            self.done.moved_pieces += u64::from(moved == piece.length);
            file.close().await?;
        }
        (self.tell)(format!("{} MiB moved", self.done.moved_bytes >> 20));
        anew.close().await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_share_bytes_are_left_alone() {
        let of = |ino, block, block_offset, length| BlockUse { ino, offset: 0, block, block_offset, length };
        let apart = [of(1, 7, 0, 100), of(2, 7, 100, 50), of(3, 8, 40, 10)];
        let shared = [of(1, 9, 0, 100), of(2, 9, 99, 5), of(3, 9, 500, 5)];
        let (kept, left) = exclusive(shared.iter().chain(&apart).cloned().collect());
        assert_eq!((kept, left), (apart.to_vec(), 3));
    }

    #[test]
    fn neighbours_are_moved_together() {
        let piece = |ino, offset, length| Piece { ino, offset, length };
        let joined = joined([piece(2, 0, 5), piece(1, 10, 5), piece(1, 0, 10), piece(1, 16, 1)]);
        assert_eq!(joined, [piece(1, 0, 15), piece(1, 16, 1), piece(2, 0, 5)]);
    }
}
