//! Keys of the records in the store, and the only place that knows their layout.
//!
//! A key is one prefix byte and big-endian ids, so that one directory, one file, one session and one target's
//! deletions are each one range, and ranges are in numeric order.
//!
//! ```text
//! prefix  rest of the key                      value                what it is
//! 'A'     inode u64                            Inode                attributes, parent and name of a directory, symlink target
//! 'D'     parent u64 | cookie u64 | name       Dirent               an entry of a directory, in the order of its listing
//! 'E'     inode u64 | file offset u64          ExtentRecord         a run of file bytes
//! 'Y'     inode u64 | name                     the value        an extended attribute
//! 'B'     block u64                            LiveBlock            live bytes of a block that is more than one extent piece
//! 'R'     session u64 | first block u64        LeasedRange          block ids leased to a session, and which are used up
//! 'X'     first block u64                      DeadRun              blocks that nothing reaches, not yet queued per target
//! 'Q'     target u64 | block u64               (empty)              a deletion that a data server has yet to confirm
//! 'O'     inode u64                            (empty)              unlinked, but perhaps still open
//! 'Z'     inode u64                            (empty)              a destroyed file whose extents are still being removed
//! 'S'     session u64                          SessionRecord        a client
//! 's'     session u64 | slot u32               SlotRecord           last answer of a slot: exactly once
//! 'C'                                          Counters             id allocators and totals
//! 'M'                                          common.v1.ClusterMap the cluster map
//! 'T'     target u64                           TargetRecord         what is known of a target besides its place in the map
//! 'W'     width u32                            (empty)              a policy of this width is in use: every era has tables for it
//! 'F'                                          u32 big-endian       format version of the records, as in the label of a folder
//! '!'                                          text                 why this store is not to be served: it was moved, or a move did not end
//! 0x00    "commits"                            u64 big-endian       batches applied so far, of the embedded engine; as the next one
//! 0x00    "fence"                              u64 big-endian       the owner's epoch; belongs to the store itself
//! ```
//!
//! The values are messages of `schema/records.proto`, which has the keys as well, for dumps: a new kind of records belongs into it and into
//! the table of `backup/tables.rs`.
//!
//! Why extents are keyed by their start: an append that joins the last extent rewrites that record in place instead
//! of leaving a tombstone behind. The run that contains an offset is then one step backwards.

use std::ops::Range;

use fjordfs_proto::{BlockId, InodeId, SessionId, TargetId};

/// A key; short enough that a vector is fine.
pub(crate) type Key = Vec<u8>;

/// Cookies that the FUSE layer keeps for "." and ".."; no entry has them.
const COOKIES_RESERVED: u64 = 2;

fn key(prefix: u8, ids: &[u64]) -> Key {
    let mut key = Vec::with_capacity(1 + 8 * ids.len());
    key.push(prefix);
    for id in ids {
        key.extend(id.to_be_bytes());
    }
    key
}

/// All keys that begin with `prefix`.
fn under(prefix: Key) -> Range<Key> {
    let mut end = prefix.clone();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    prefix..end
}

fn id_at(key: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(at..at + 8)?.try_into().ok()?))
}

/// All records of one kind.
pub(crate) fn all(prefix: u8) -> Range<Key> {
    under(vec![prefix])
}

/// All records but the engine's own.
pub(crate) fn everything() -> Range<Key> {
    vec![1]..vec![u8::MAX]
}

/// First id of a key.
pub(crate) fn first_id(key: &[u8]) -> Option<u64> {
    id_at(key, 1)
}

/// Second id of a key.
pub(crate) fn second_id(key: &[u8]) -> Option<u64> {
    id_at(key, 9)
}

/// The inode whose attributes, entries, extents or extended attributes a key belongs to.
pub(crate) fn leased_inode(key: &[u8]) -> Option<InodeId> {
    match key.first() {
        Some(&(INODE | DIRENT | EXTENT | XATTR)) => first_id(key).map(InodeId),
        _ => None,
    }
}

pub(crate) const INODE: u8 = b'A';
pub(crate) const DIRENT: u8 = b'D';
pub(crate) const EXTENT: u8 = b'E';
pub(crate) const XATTR: u8 = b'Y';
pub(crate) const LIVE: u8 = b'B';
pub(crate) const RANGE: u8 = b'R';
pub(crate) const DEAD: u8 = b'X';
pub(crate) const DELETE: u8 = b'Q';
pub(crate) const ORPHAN: u8 = b'O';
pub(crate) const DESTROY: u8 = b'Z';
pub(crate) const SESSION: u8 = b'S';
pub(crate) const SLOT: u8 = b's';
pub(crate) const COUNTERS: u8 = b'C';
pub(crate) const MAP: u8 = b'M';
pub(crate) const TARGET: u8 = b'T';
pub(crate) const WIDTH: u8 = b'W';
pub(crate) const FORMAT: &[u8] = b"F";
pub(crate) const CLOSED: &[u8] = b"!";
/// The store's own records.
pub(crate) const FENCE: &[u8] = b"\0fence";
pub(crate) const COMMITS: &[u8] = b"\0commits";

pub(crate) fn inode(ino: InodeId) -> Key {
    key(INODE, &[ino.0])
}

/// Where a name stands in the listing of its directory: 63 bits, so that it fits a signed offset.
pub(crate) fn cookie(name: &[u8]) -> u64 {
    let hash = xxhash_rust::xxh3::xxh3_64(name) >> 1;
    if hash <= COOKIES_RESERVED { hash + COOKIES_RESERVED + 1 } else { hash }
}

pub(crate) fn dirent(parent: InodeId, name: &[u8]) -> Key {
    let mut key = key(DIRENT, &[parent.0, cookie(name)]);
    key.extend(name);
    key
}

/// Entries of a directory that come after `cookie`.
pub(crate) fn dirents_after(parent: InodeId, cookie: u64) -> Range<Key> {
    let end = under(key(DIRENT, &[parent.0])).end;
    let start = cookie.max(COOKIES_RESERVED).saturating_add(1);
    key(DIRENT, &[parent.0, start])..end
}

/// Cookie and name of a dirent's key.
pub(crate) fn split_dirent(key: &[u8]) -> Option<(u64, &[u8])> {
    Some((id_at(key, 9)?, key.get(17..)?))
}

pub(crate) fn extent(ino: InodeId, offset: u64) -> Key {
    key(EXTENT, &[ino.0, offset])
}

/// Extents of a file whose offset lies in the range.
pub(crate) fn extents(ino: InodeId, offsets: Range<u64>) -> Range<Key> {
    extent(ino, offsets.start)..extent(ino, offsets.end)
}

pub(crate) fn xattr(ino: InodeId, name: &[u8]) -> Key {
    let mut key = key(XATTR, &[ino.0]);
    key.extend(name);
    key
}

/// All extended attributes of an inode.
pub(crate) fn xattrs(ino: InodeId) -> Range<Key> {
    under(key(XATTR, &[ino.0]))
}

/// Name in an extended attribute's key.
pub(crate) fn split_xattr(key: &[u8]) -> Option<&[u8]> {
    key.get(9..)
}

pub(crate) fn live(block: BlockId) -> Key {
    key(LIVE, &[block.0])
}

/// Live records of blocks `first..=last`.
pub(crate) fn lives(first: BlockId, last: BlockId) -> Range<Key> {
    let mut end = live(last);
    end.push(0);
    live(first)..end
}

pub(crate) fn range(session: SessionId, first: BlockId) -> Key {
    key(RANGE, &[session.0, first.0])
}

pub(crate) fn ranges(session: SessionId) -> Range<Key> {
    under(key(RANGE, &[session.0]))
}

/// Ranges of a session that begin at `block` or before.
pub(crate) fn ranges_to(session: SessionId, block: BlockId) -> Range<Key> {
    let mut end = range(session, block);
    end.push(0);
    range(session, BlockId(0))..end
}

pub(crate) fn dead(first: BlockId) -> Key {
    key(DEAD, &[first.0])
}

pub(crate) fn delete(target: TargetId, block: BlockId) -> Key {
    key(DELETE, &[target.0, block.0])
}

pub(crate) fn deletes(target: TargetId) -> Range<Key> {
    under(key(DELETE, &[target.0]))
}

pub(crate) fn orphan(ino: InodeId) -> Key {
    key(ORPHAN, &[ino.0])
}

pub(crate) fn destroy(ino: InodeId) -> Key {
    key(DESTROY, &[ino.0])
}

pub(crate) fn session(id: SessionId) -> Key {
    key(SESSION, &[id.0])
}

pub(crate) fn slot(session: SessionId, slot: u32) -> Key {
    let mut key = key(SLOT, &[session.0]);
    key.extend(slot.to_be_bytes());
    key
}

pub(crate) fn slots(session: SessionId) -> Range<Key> {
    under(key(SLOT, &[session.0]))
}

pub(crate) fn target(id: TargetId) -> Key {
    key(TARGET, &[id.0])
}

pub(crate) fn width(width: usize) -> Key {
    let mut key = vec![WIDTH];
    key.extend((width as u32).to_be_bytes());
    key
}

/// Width of a width record's key.
pub(crate) fn split_width(key: &[u8]) -> Option<usize> {
    Some(u32::from_be_bytes(key.get(1..5)?.try_into().ok()?) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_one_range_in_cookie_order() {
        let (a, b) = (dirent(InodeId(7), b"a"), dirent(InodeId(8), b"a"));
        let range = dirents_after(InodeId(7), 0);
        assert!(range.contains(&a) && !range.contains(&b));
        assert!(!dirents_after(InodeId(7), cookie(b"a")).contains(&a));
        assert!(dirents_after(InodeId(7), cookie(b"a") - 1).contains(&a));
        assert_eq!(split_dirent(&a), Some((cookie(b"a"), b"a".as_slice())));
    }

    #[test]
    fn ranges_end_where_the_next_id_begins() {
        assert!(!deletes(TargetId(u64::MAX)).contains(&vec![DELETE + 1]));
        assert!(deletes(TargetId(255)).contains(&delete(TargetId(255), BlockId(u64::MAX))));
        assert!(!deletes(TargetId(255)).contains(&delete(TargetId(256), BlockId(0))));
        assert!(ranges_to(SessionId(1), BlockId(9)).contains(&range(SessionId(1), BlockId(9))));
        assert!(!ranges_to(SessionId(1), BlockId(9)).contains(&range(SessionId(1), BlockId(10))));
    }
}
