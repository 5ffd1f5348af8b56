//! The vocabulary of FjordFS: ids, policies, wire formats, and the arithmetic of layout and placement.
//!
//! Everything here is pure: no I/O, no clocks, no threads. The crates that do I/O (`fjordfs-client`,
//! `fjordfs-metaserver`, `fjordfs-dataserver`) agree with each other by sharing these definitions.
//!
//! | module | what it fixes |
//! |---|---|
//! | [`ids`] | one newtype per id |
//! | [`policy`] | redundancy of new blocks, and its 16-bit code |
//! | [`layout`] | how a block lies in shards: which shard has which bytes |
//! | [`coding`] | parity, and lost shards from others |
//! | [`block`] | sizes, and the CRC32C of each 4 KiB page |
//! | [`interval`] | non-overlapping runs over file offsets, the base of extent maps and dirty maps |
//! | [`extent`] | file bytes → block bytes |
//! | [`mode`] | suid and sgid |
//! | [`cluster`] | the cluster map: who holds which block |
//! | [`domain`] | failure domains: racks and hosts |
//! | [`placement`] | the function that fills placement groups |
//! | [`frame`] | the framed data protocol |
//! | [`error`] | errno and message, as they travel |
//! | [`pb`] | generated messages and gRPC stubs |

pub mod block;
pub mod cluster;
pub mod coding;
pub mod crc32c;
pub mod domain;
pub mod error;
pub mod extent;
pub mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod ids;
pub mod interval;
pub mod layout;
pub mod mode;
pub mod operation;
pub mod placement;
pub mod policy;

pub use block::{BLOCK_SIZE_MAX, PAGE_SIZE};
pub use cluster::ClusterMap;
pub use domain::Domain;
pub use error::{FsError, FsResult};
pub use extent::{Extent, ExtentMap, Source};
pub use ids::{BlockAddr, BlockId, Epoch, HandleId, InodeId, PgId, ServerId, SessionId, ShardNo, TargetId};
pub use layout::Layout;
pub use policy::Policy;

/// Version of both protocols; bumped when an older peer could misread a message.
/// 1: first. 2: leases, and `Make.umask`, which an older metaserver would not take from the mode.
pub const PROTOCOL_VERSION: u32 = 3;

/// The root directory's inode.
pub const ROOT_INODE: InodeId = InodeId(1);

/// Bytes at the start of a file that may be kept inside the metadata instead of in a block.
pub const INLINE_MAX: u64 = 8192;

/// Longest name of a directory entry, bytes.
pub const NAME_MAX: usize = 255;

/// Longest target of a symbolic link, bytes.
pub const SYMLINK_MAX: usize = 4095;

/// Longest name of an extended attribute, its namespace included, bytes.
pub const XATTR_NAME_MAX: usize = 255;

/// Longest value of an extended attribute, bytes.
pub const XATTR_VALUE_MAX: usize = 64 << 10;

/// Longest list of the names of an inode's extended attributes, each with the zero byte that ends it, bytes.
pub const XATTR_LIST_MAX: usize = 64 << 10;

/// Largest file, bytes: what a signed 64-bit offset can address.
pub const FILE_SIZE_MAX: u64 = i64::MAX as u64;

/// Largest message on the metadata stream, bytes.
pub const META_MESSAGE_MAX: usize = 32 << 20;

/// Generated code: messages and gRPC stubs.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::unwrap_used)]
pub mod pb {
    /// Messages that both protocols share.
    pub mod common {
        pub use v1::*;
        /// The package, so that generated code finds its neighbours.
        pub mod v1 {
            tonic::include_proto!("fjordfs.common.v1");
        }
    }
    /// The metadata protocol.
    pub mod meta {
        pub use v1::*;
        /// The package, so that generated code finds its neighbours.
        pub mod v1 {
            tonic::include_proto!("fjordfs.meta.v1");
        }
    }
    /// Bodies of the data protocol's frames.
    pub mod data {
        pub use v1::*;
        /// The package, so that generated code finds its neighbours.
        pub mod v1 {
            tonic::include_proto!("fjordfs.data.v1");
        }
    }
}
