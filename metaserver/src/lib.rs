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
//! | [`fsck`] | the checker, and repairs |
//! | [`backup`] | all records in one file, and back |
//! | `snapshot` | the store as it was, while operations go on |
//! | [`migrate`] | moving everything to another engine |
//!
//! # Splitting the namespace over several owners
//! Not built; this is how it fits what is. One owner executes everything today, and its thread is the ceiling. A **part**
//! is a set of directories with one owner. Everything is in part 0 now.
//!
//! *What belongs to what.* A directory belongs to one part, its entries ('D') and what their inodes have ('A', 'E', 'Y')
//! with it. The directory's inode says which (a new tag; absent means 0). Clients come to an inode by way of its directory,
//! so they learn its part from the lookup, and treat it as a hint: an owner that is asked for what is not its own answers with
//! the part that it knows of. A file with links in several directories belongs to the part of its first; the others' entries
//! name it as remote.
//!
//! *Owners and fences.* Each part has an owner's record as there is one now (part 0 keeps its key, others append their number).
//! A transaction of one part expects and writes that record, so parts do not wait for each other, and one take-over
//! concerns one part. Any metaserver can own any number of parts.
//!
//! *Operations across two owners* (rename or link into another part, removing a directory whose parent is elsewhere). The
//! owner of the target decides. It asks the other to *lend*: to settle its transactions under way, check its half
//! (entry there, directory empty, leases recalled) and answer with its half of the writes and its record, and to commit
//! nothing until it hears more. One transaction then expects both records and writes both with all writes: it is
//! applied whole under both fences or not at all. Whoever of the two hears nothing reads both records, as after any
//! unknown outcome: they tell whether it happened. If the decider dies its successor's fence makes the transaction
//! impossible, and the lender goes on. Lending is asked for in the order of part numbers, so two owners do not wait for each
//! other in a circle. Moving a directory below another across parts needs the chain of ancestors, which no single owner
//! sees: those renames pass through part 0, one at a time, as they do on one kernel.
//!
//! *Movement.* Keys hold ids, not parts, so nothing is copied: the old owner recalls the leases of the directory, settles,
//! and lends; one transaction under both fences rewrites the directory's tag. Locks and open files of its inodes go to the
//! new owner in the answer. Which directories to move is decided by counting operations for each top few.
//!
//! *Hot directories.* Entries are sorted by the hash of their names, so a range of hashes can be a part of its own with the
//! same keys. Its owner counts entries and times for itself, and the directory's owner sums them when it is asked for attributes.
//!
//! *What is shared today and must not be.* Counters ('C') append the part; each leases its inode and block numbers in
//! ranges. A session is attached to each owner it needs, with slots of its own there ('s' appends the part), and is ended by part 0.
//! Block liveness ('B', 'X', 'Q') belongs to the part that leased the block's number: others write what they let go of as
//! records addressed to it, in the batch that lets go, and it applies them. The cache over a store answers for keys of its own
//! parts only. The cluster map stays with part 0.

mod acl;
pub mod backup;
mod block_ids;
mod config;
mod core;
mod executor;
mod extents;
pub mod fsck;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod healing;
mod hot_extents;
mod keys;
mod label;
mod leases;
mod liveness;
mod locks;
mod membership;
pub mod migrate;
mod names;
mod opens;
mod ops;
mod orphans;
mod records;
mod refusal;
#[cfg(test)]
mod scale;
mod server;
mod service;
mod session;
mod snapshot;
pub mod store;
mod store_label;
mod syncer;
#[cfg(test)]
mod testing;
mod txn;
mod upkeep;
mod xattrs;

pub use config::{Config, PORT_DEFAULT};
pub use label::FolderError;
pub use server::{MetaServer, StartError, StopError, serve_store};
pub use service::Connection;
pub use upkeep::Upkeep;
