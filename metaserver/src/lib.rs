//! The metadata service of FjordFS: namespace, extents, sessions, membership and placement.
//!
//! ```text
//!  clients ──Attach──▶ service/attach ─┐                       ┌─▶ ops/*        one file per operation
//!                                      ├─ jobs ─▶ executor ─▶ core ─▶ membership  data servers and the map
//!  data servers ─────▶ service/cluster ┘             │          │
//!                                                    │          └─▶ txn ─▶ store  overlay, then one batch
//!                       outbox ◀── answers ──────────┤
//!                          ▲                         └─▶ syncer                  log on stable storage
//!                          └── answers that wait for the log ──────┘
//! ```
//!
//! | module | what it is for |
//! |---|---|
//! | [`store`] | the engine trait, fjall, and an engine in memory |
//! | `keys`, `records` | layout of keys and values |
//! | `txn` | the view that operations work on |
//! | `ops`, `extents`, `xattrs`, `acl`, `liveness`, `block_ids`, `orphans`, `opens` | the namespace |
//! | `leases` | who caches what, and recalling it |
//! | `core` | the owner's state; pure |
//! | `executor`, `syncer` | who runs it, and who syncs the log |
//! | `membership` | data servers, targets and their states, eras, moves |
//! | `healing` | which groups are to be compared and completed, and how far that is |
//! | `service` | gRPC |
//! | [`fsck`] | the checker |

mod acl;
mod block_ids;
mod config;
mod core;
mod executor;
mod extents;
pub mod fsck;
mod healing;
mod hot_extents;
mod keys;
mod label;
mod leases;
mod liveness;
mod locks;
mod membership;
mod names;
mod opens;
mod ops;
mod orphans;
mod records;
mod refusal;
mod server;
mod service;
mod session;
pub mod store;
mod syncer;
#[cfg(test)]
mod testing;
mod txn;
mod xattrs;

pub use config::{Config, PORT_DEFAULT};
pub use label::FolderError;
pub use server::{MetaServer, StartError, StopError, serve_store};
pub use service::Connection;
