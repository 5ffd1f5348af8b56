//! The FjordFS client library: a POSIX-like namespace and files, straight from a Rust program, without a mount.
//!
//! ```no_run
//! # async fn example() -> fjordfs_client::FsResult<()> {
//! use fjordfs_client::{Client, Options};
//!
//! let client = Client::connect("127.0.0.1:7440", Options::default()).await?;
//! client.create_dir_all("/runs/7").await?;
//! let file = client.create_path("/runs/7/step-100.ckpt").await?;
//! file.write_at(0, bytes::Bytes::from_static(b"weights")).await?;
//! file.fsync().await?;
//! file.close().await?;
//! client.shutdown().await
//! # }
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`client`](Client) | begin and end of a session |
//! | `namespace`, `xattr` | operations on inodes and directories |
//! | [`path`](OpenOptions) | the same by path |
//! | [`file`](File) | open files: read, write, append, allocate, copy, seek, lock, flush, fsync |
//! | [`batch`](Batch) | many reads at once |
//! | [`prefetch`](Prefetch) | fetching what will be read |
//! | `write` | dirty bytes → blocks → commits |
//! | `cache` | verified block data in memory |
//! | `data` | shards over the framed protocol |
//! | `leases` | what may be used, and decided, without asking |
//! | `locks` | what is locked, to be told again after a reconnect |
//! | `decided` | operations that need not wait for the metaserver |
//! | [`handover`](Handover) | what a process leaves to the one that takes its place |
//! | `keeper` | commits what was written before others may see |
//! | `successor` | going on where a former process was killed |
//! | `meta` | the session stream |
//! | `engine` | threads |
//! | [`upkeep`] | comparing targets with the metadata, garbage collection, compaction |
//! | [`network`](Network) | other ways to the servers than TCP |

mod batch;
mod blocks;
mod cache;
mod client;
mod data;
mod decided;
mod engine;
mod file;
mod habits;
mod handover;
mod inode_ids;
mod keeper;
mod leases;
mod locks;
mod memory;
mod meta;
mod namespace;
mod network;
mod options;
mod path;
mod prefetch;
mod streams;
mod successor;
pub mod upkeep;
mod write;
mod xattr;

pub use batch::{Batch, BatchOptions, Finished, Order, ReadInto, ReadRequest};
pub use client::Client;
pub use engine::enter_lane;
pub use file::{Allocation, CopiedRange, File, Lock, LockOwner, Unanswered};
pub use fjordfs_proto::{
    FsError, FsResult, InodeId, ROOT_INODE,
    error::Errno,
    pb::meta::{Attr, DirEntry, FileKind, ReadDirReply, Time},
};
pub use handover::{Handover, LockUser};
pub use leases::Recalled;
pub use meta::owner::{CallError, Metaservers};
pub use namespace::{AttrChange, NewFile, NewNode, SetTime, StatFs};
pub use network::{Network, Wire};
pub use options::Options;
pub use path::OpenOptions;
pub use prefetch::{Planned, Prefetch};
pub use xattr::SetXattrMode;
