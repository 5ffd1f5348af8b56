//! FjordFS data server: keeps shards on flash and hands them out.
//!
//! ```text
//!   client ══ TCP or Unix socket ══► connection ──► ops/put_shard, read_shard, ... ──► store ──► files (io_uring, O_DIRECT)
//!                                    (one core, one ring each)                          │
//!   metaserver ◄── gRPC ── membership (its own thread) ── deletions ────────────────────┘
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | `config`, `error` | what a server is told; why it does not start |
//! | `added` | targets that were added while it ran |
//! | `server` | the order in which the parts come up and go down |
//! | `listen`, `lent` | where clients connect; the memory of one on this host |
//! | `runtime` | tasks, timers and the io_uring of one core |
//! | `cores` | threads, each with an io_uring runtime, and those that accept |
//! | `connection` | frames in, answers out |
//! | `ops` | one file per operation |
//! | `store` | the shards of one target: volumes, index, recovery |
//! | `membership` | registration, heartbeats, deletions |
//! | `heal`, `peer` | completing placement groups; a connection to another data server |
//! | `buffer`, `uring`, `blocking` | page-aligned memory; reads, writes and transfers on the ring; threads for the rest |

pub mod added;
mod blocking;
mod buffer;
mod config;
mod connection;
mod cores;
mod error;
mod heal;
mod lent;
mod listen;
mod membership;
mod node;
mod ops;
mod peer;
mod placing;
mod runtime;
mod server;
mod store;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod testing;
mod uring;

// The tests' helpers name this crate from outside.
#[cfg(test)]
extern crate self as fjordfs_dataserver;

pub use config::{Config, TargetConfig};
pub use error::{StartError, StopError};
pub use server::DataServer;
pub use store::label::LabelError;

/// What the fuzzer of `tests/fuzz` reaches.
#[cfg(any(test, fuzzing))]
pub mod fuzzing {
    pub use crate::store::fuzzing::run as recover;
}
