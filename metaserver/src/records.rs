//! Values of the records in the store. Their keys, and the table of all of them, are in `keys.rs`.
//!
//! Every value is a protobuf message, written by hand here because nothing else ever reads it. Room for later
//! versions is protobuf's: a new field gets a new tag and means "as before" when it is absent; a tag is never reused.
//! A change that an older server would get wrong raises `FORMAT_VERSION` in `label.rs`, which older servers refuse.

use bytes::Bytes;
use fjordfs_proto::{
    Extent, FsError, FsResult, InodeId, Source,
    error::Errno,
    operation::DIRECTORY_SIZE,
    pb::meta::{Attr, FileKind, Time},
};
use prost::Message;

/// 'A': an inode.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Inode {
    #[prost(enumeration = "FileKind", tag = "1")]
    pub(crate) kind: i32,
    #[prost(uint32, tag = "2")]
    pub(crate) mode: u32,
    #[prost(uint32, tag = "3")]
    pub(crate) uid: u32,
    #[prost(uint32, tag = "4")]
    pub(crate) gid: u32,
    #[prost(uint32, tag = "5")]
    pub(crate) nlink: u32,
    #[prost(uint64, tag = "6")]
    pub(crate) size: u64,
    #[prost(uint64, tag = "7")]
    pub(crate) allocated: u64,
    #[prost(uint32, tag = "8")]
    pub(crate) rdev: u32,
    #[prost(message, optional, tag = "9")]
    pub(crate) atime: Option<Time>,
    #[prost(message, optional, tag = "10")]
    pub(crate) mtime: Option<Time>,
    #[prost(message, optional, tag = "11")]
    pub(crate) ctime: Option<Time>,
    #[prost(message, optional, tag = "12")]
    pub(crate) btime: Option<Time>,
    #[prost(uint32, tag = "13")]
    pub(crate) policy: u32,
    #[prost(uint64, tag = "14")]
    pub(crate) data_version: u64,
    /// Directories: where it is, for "..", and to refuse moving it below itself. 0 once it is removed.
    #[prost(uint64, tag = "15")]
    pub(crate) parent: u64,
    /// Directories: its name in `parent`.
    #[prost(bytes = "bytes", tag = "16")]
    pub(crate) name: Bytes,
    /// Symbolic links: where they point.
    #[prost(bytes = "bytes", tag = "17")]
    pub(crate) target: Bytes,
    /// Bytes that the names of its extended attributes take in a list, each with a zero byte at its end.
    #[prost(uint32, tag = "18")]
    pub(crate) xattr_list: u32,
    /// Made without a name (O_TMPFILE) and not given one yet: unlike other unlinked files it can be.
    #[prost(bool, tag = "19")]
    pub(crate) unnamed: bool,
}

impl Inode {
    pub(crate) fn is_dir(&self) -> bool {
        self.kind() == FileKind::Directory
    }

    pub(crate) fn is_regular(&self) -> bool {
        self.kind() == FileKind::Regular
    }

    /// As it travels.
    pub(crate) fn attr(&self, ino: InodeId) -> Attr {
        let size = match self.kind() {
            FileKind::Directory => DIRECTORY_SIZE,
            FileKind::Symlink => self.target.len() as u64,
            _ => self.size,
        };
        Attr {
            ino: ino.0,
            kind: self.kind,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            nlink: self.nlink,
            size,
            allocated: self.allocated,
            rdev: self.rdev,
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            btime: self.btime,
            policy: self.policy,
            data_version: self.data_version,
            xattrs: self.xattr_list > 0,
        }
    }
}

/// 'D': an entry of a directory.
#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct Dirent {
    #[prost(uint64, tag = "1")]
    pub(crate) ino: u64,
    #[prost(enumeration = "FileKind", tag = "2")]
    pub(crate) kind: i32,
}

/// 'E': a run of file bytes; its file offset is in the key.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ExtentRecord {
    #[prost(uint64, tag = "1")]
    length: u64,
    #[prost(uint64, tag = "2")]
    block: u64,
    #[prost(uint32, tag = "3")]
    block_offset: u32,
    #[prost(uint32, tag = "4")]
    pub(crate) layout: u32,
    #[prost(bytes = "bytes", tag = "5")]
    data: Bytes,
}

impl ExtentRecord {
    pub(crate) fn new(extent: &Extent) -> ExtentRecord {
        match &extent.source {
            Source::Blocks { addr, layout } => ExtentRecord {
                length: extent.length,
                block: addr.block.0,
                block_offset: addr.offset,
                layout: layout.code(),
                data: Bytes::new(),
            },
            Source::Inline(data) => {
                ExtentRecord { length: extent.length, data: data.clone(), ..Default::default() }
            }
        }
    }

    /// The extent; `EIO` when the record contradicts itself, which only a damaged store can cause.
    pub(crate) fn extent(self, ino: InodeId, offset: u64) -> FsResult<Extent> {
        let wire = fjordfs_proto::pb::meta::Extent {
            offset,
            length: self.length,
            block: self.block,
            block_offset: self.block_offset,
            layout: self.layout,
            data: self.data,
        };
        Extent::from_pb(wire)
            .map(|(_, extent)| extent)
            .map_err(|e| damaged(&format!("{e} of {ino}: its record contradicts itself")))
    }
}

/// 'B': bytes of a block that extents reach. Present only for blocks that are, or once were, more than one piece.
#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct LiveBlock {
    #[prost(uint64, tag = "1")]
    pub(crate) live: u64,
}

/// 'R': block ids leased to a session; the first is in the key.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct LeasedRange {
    #[prost(uint32, tag = "1")]
    pub(crate) count: u32,
    /// One bit per id, least significant first: 1 once it was committed or abandoned.
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) taken: Vec<u8>,
}

/// 'X': consecutive blocks that nothing reaches; the first is in the key.
#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct DeadRun {
    #[prost(uint64, tag = "1")]
    pub(crate) count: u64,
    /// Layout they were written with; 0 when nobody knows: then every group that could have taken them.
    #[prost(uint32, tag = "2")]
    pub(crate) layout: u32,
}

/// 'S': a client.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct SessionRecord {
    #[prost(string, tag = "1")]
    pub(crate) client: String,
    #[prost(message, optional, tag = "2")]
    pub(crate) created: Option<Time>,
    /// Numbers for inodes that it makes by itself, oldest first.
    #[prost(message, repeated, tag = "3")]
    pub(crate) inodes: Vec<InodeRange>,
}

impl SessionRecord {
    /// The numbers leased to it.
    pub(crate) fn ranges(&self) -> crate::ops::InodeRanges {
        self.inodes.iter().map(|range| range.first..range.first + u64::from(range.count)).collect()
    }
}

/// Consecutive inode numbers.
#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct InodeRange {
    #[prost(uint64, tag = "1")]
    pub(crate) first: u64,
    #[prost(uint32, tag = "2")]
    pub(crate) count: u32,
}

/// 's': the last mutation of a slot and its answer.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct SlotRecord {
    #[prost(uint64, tag = "1")]
    pub(crate) sequence: u64,
    /// The encoded `Response`.
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) response: Bytes,
}

/// 'C': id allocators and totals.
#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct Counters {
    #[prost(uint64, tag = "1")]
    pub(crate) next_inode: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) next_block: u64,
    #[prost(uint64, tag = "3")]
    pub(crate) next_session: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) next_server: u64,
    #[prost(uint64, tag = "5")]
    pub(crate) next_target: u64,
    /// Inodes in use, orphans included.
    #[prost(uint64, tag = "6")]
    pub(crate) inodes: u64,
    /// Blocks in 'X' records and 'Q' records.
    #[prost(uint64, tag = "7")]
    pub(crate) queued: u64,
    /// 'O' records.
    #[prost(uint64, tag = "8")]
    pub(crate) orphans: u64,
    /// Scrubs that administrators have asked for.
    #[prost(uint64, tag = "9")]
    pub(crate) scrubs: u64,
    /// Blocks are being moved until all targets hold about as many.
    #[prost(bool, tag = "10")]
    pub(crate) rebalancing: bool,
    /// Of the last start: it grows with every start, also on another engine, whose own begins anew.
    #[prost(uint64, tag = "11")]
    pub(crate) fence: u64,
    /// Which run of the host's kernel that start was in; 0: none is known, or the engine does not depend on it.
    #[prost(uint64, tag = "12")]
    pub(crate) boot: u64,
    /// Inodes below `aged_below` count as changed at the start in another run of the kernel: the version of their bytes is this at least.
    #[prost(uint64, tag = "13")]
    pub(crate) version_floor: u64,
    #[prost(uint64, tag = "14")]
    pub(crate) aged_below: u64,
}

/// 'T': a target, besides what the cluster map says.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct TargetRecord {
    #[prost(string, tag = "1")]
    pub(crate) uuid: String,
    #[prost(string, tag = "2")]
    pub(crate) path: String,
    #[prost(uint64, tag = "3")]
    pub(crate) server: u64,
    /// It is to be emptied and removed.
    #[prost(bool, tag = "4")]
    pub(crate) leaving: bool,
    /// It was removed: it is in the map no more, and its shards are not wanted back.
    #[prost(bool, tag = "5")]
    pub(crate) removed: bool,
    /// Epoch of the last map that took a place from it: until it says that it has nothing of others by that map or a later one,
    /// blocks that were there may still be.
    #[prost(uint64, tag = "6")]
    pub(crate) displaced: u64,
    /// The same of maps that took a place from it while it could not be read: who took the place has not asked it, and it may have
    /// what nobody else has. It is not removed before it has said what that is, and has got rid of it.
    #[prost(uint64, tag = "7")]
    pub(crate) unasked: u64,
}

/// Decodes a stored value; `what` names it when it is damaged.
pub(crate) fn decode<M: Message + Default>(value: Bytes, what: impl FnOnce() -> String) -> FsResult<M> {
    M::decode(value).map_err(|e| damaged(&format!("{}: {e}", what())))
}

/// The store holds something it should not.
pub(crate) fn damaged(what: &str) -> FsError {
    FsError::new(Errno::EIO, format!("the metadata store is damaged: {what}; run `fjord fsck`"))
}
