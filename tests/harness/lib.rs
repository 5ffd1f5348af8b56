//! What the whole-system tests stand on: real `fjord` processes on loopback, real mounts, real damage.
//!
//! | module | what it gives |
//! |---|---|
//! | [`cluster`] | a metaserver and data servers as separate processes; kill, restart, status |
//! | [`mountpoint`] | a mount in a process of its own; unmount, kill |
//! | [`network`] | hosts of their own, and a network that cuts, delays and loses |
//! | [`disk`] | disks that fail, lie, lag, or forget what was not synced |
//! | [`chaos`] | schedules of faults, and a workload that knows what it was promised |
//! | [`differential`] | random operations on a mount and on a local directory |
//! | [`history`] | histories of a register, and whether an order explains them |
//! | [`locks`] | `fcntl` and `flock` |
//! | [`tree`] | deterministic random trees, and their comparison |
//! | [`fault`] | damage: flipped bytes, truncated files, small disks, noise on a socket |
//! | [`process`] | bounded commands and children that never outlive the test |
//! | [`scratch`] | folders on a real disk that go away again |
//! | [`wait`] | waiting with a bound, which says what it waited for |
//! | [`rng`] | seeds: printed, and taken from `FJORD_SEED` |
//!
//! # Rules
//! - Nothing asserts a time. Every wait has a bound, generous enough for a loaded two-core machine, and a failed one
//!   prints what it waited for and what it last saw.
//! - Whatever a test starts ends with it, also after a panic: children are killed by pid, mounts detached, folders
//!   removed (`FJORD_KEEP=1` keeps the folders). A child also dies with the test process itself.
//! - The binary under test is `FJORD_BIN`, else `fjord` of the profile that the tests were built in. `tests/run`
//!   builds it first.
//!
//! The tests need root (mounts, loop devices) and `/dev/fuse`.

pub mod aio;
pub mod chaos;
pub mod cluster;
pub mod differential;
pub mod disk;
pub mod engines;
pub mod fault;
pub mod history;
pub mod locks;
pub mod mountpoint;
pub mod network;
pub mod process;
pub mod rng;
pub mod scratch;
pub mod status;
pub mod tree;
pub mod wait;

pub use cluster::{Cluster, Setup};
pub use mountpoint::MountPoint;
pub use network::Network;
pub use process::{Process, Run, fjord, fjord_bin, run};
pub use scratch::Scratch;
pub use wait::wait_for;
