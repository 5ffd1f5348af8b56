//! Mounting FjordFS: our own FUSE layer and a thin adapter on the client library.
//!
//! No published FUSE library has the transports this one is shaped for, so it talks to the kernel itself.
//!
//! ```text
//! kernel ── transport ── worker ── request ── dispatch ── Filesystem ── adapter ── fjordfs_client
//!          io_uring      thread    parsing    routing     (trait)
//!          /dev/fuse
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`options`] | `-o` options |
//! | [`mount`] | mounting, as root or through fusermount3; unmounting |
//! | `session` | negotiation with the kernel, threads, taking over from a former process |
//! | `transport` | how requests come and answers go |
//! | `worker` | one thread: many requests in flight, panics and callers that die |
//! | `request`, `reply`, `abi` | the kernel's bytes, in and out |
//! | [`filesystem`] | what can be mounted |
//! | [`notify`] | telling the kernel what is stale |
//! | `held` | what the kernel has been told and may not have taken in |
//! | `adapter` | FjordFS as a [`filesystem::Filesystem`] |

mod abi;
mod adapter;
mod buffer;
mod directory;
mod dispatch;
mod ends;
pub mod filesystem;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod handles;
mod held;
mod interrupt;
mod kernel_cache;
mod lock_owners;
pub mod mount;
pub mod notify;
mod numbers;
pub mod options;
mod overtaken;
mod removed;
mod reply;
mod request;
mod session;
mod transport;
mod worker;

pub use adapter::{mount, mount_supervised, resume};
pub use filesystem::Filesystem;
pub use mount::{
    Mount, MountError, Remount, Unmounter, mount_filesystem, mount_kept, resume_filesystem, unmount_path,
};
pub use options::{Busy, MountOptions, OptionError, TransportChoice, UringFaults, UringOptions};
pub use session::{Agreed, Departure, SessionError};
pub use transport::selection::{TransportInfo, TransportKind, planned_transport};
