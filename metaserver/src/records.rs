//! Values of the records in the store. Their keys, and the table of all of them, are in `keys.rs`.
//!
//! Every value is a protobuf message; `schema/records.proto` says which, and how they may change. It is read by whoever reads a dump as well.

use bytes::Bytes;
use fjordfs_proto::{
    Extent, FsError, FsResult, InodeId, Source,
    error::Errno,
    operation::DIRECTORY_SIZE,
    pb::meta::{Attr, FileKind},
};
use prost::Message;

pub(crate) use self::schema::{
    Counters, DeadRun, Dirent, ExtentRecord, Inode, InodeRange, LeasedRange, LiveBlock, SessionRecord,
    SlotRecord, TargetRecord,
};

#[allow(missing_docs, unreachable_pub, dead_code, clippy::all, clippy::unwrap_used)]
pub(crate) mod schema {
    tonic::include_proto!("fjordfs.store.v1");
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

impl SessionRecord {
    /// The numbers leased to it.
    pub(crate) fn ranges(&self) -> crate::ops::InodeRanges {
        self.inodes.iter().map(|range| range.first..range.first + u64::from(range.count)).collect()
    }
}

/// Decodes a stored value; `what` names it when it is damaged.
pub(crate) fn decode<M: Message + Default>(value: Bytes, what: impl FnOnce() -> String) -> FsResult<M> {
    M::decode(value).map_err(|e| damaged(&format!("{}: {e}", what())))
}

/// The store holds something it should not.
pub(crate) fn damaged(what: &str) -> FsError {
    FsError::new(Errno::EIO, format!("the metadata store is damaged: {what}; run `fjord fsck`"))
}
