//! What keeps a filesystem in shape while it is in use: finding what targets hold against what there should be, deleting garbage,
//! and writing anew what is left of mostly dead blocks.
//!
//! It is all done through a [`Client`](crate::Client): by `fjord fsck` and `fjord gc`, and on a schedule by the process of the metaserver that
//! owns the metadata, so that one does it at a time.
//!
//! | module | what it does |
//! |---|---|
//! | `admin` | the metaserver's calls that this takes |
//! | `holdings` | shards against extents: missing, lost, garbage, mostly dead |
//! | `repair` | the metaserver is told what is missing, and what is garbage |
//! | `collect` | garbage is deleted |
//! | `files` | which files blocks belong to, by name |
//! | `compact` | what is left of mostly dead blocks is moved |
//!
//! **What can never be deleted** is a block that something reaches, or may come to reach. Nothing is deleted here: the metaserver is told
//! what was found, and it queues deletions as it does for blocks that die, behind its log.

mod admin;
mod collect;
mod compact;
mod files;
mod holdings;
mod repair;

use std::time::{Duration, Instant};

pub use collect::{Collected, collect};
pub use compact::{Compacted, Compaction, compact};
pub use files::files_of;
pub use holdings::{Findings, Missing, compare};
pub use repair::repair;

/// Blocks that are asked about at a time.
const BLOCKS: usize = 65_536;

/// Hears what is being done, for people.
pub type Tell<'a> = &'a (dyn Fn(String) + Sync);

/// Keeps to so many bytes per second.
struct Pace {
    /// 0 is no limit.
    rate: u64,
    since: Instant,
    bytes: u64,
}

impl Pace {
    fn new(rate: u64) -> Pace {
        Pace { rate, since: Instant::now(), bytes: 0 }
    }

    async fn did(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.rate > 0 {
            let due = Duration::from_secs_f64(self.bytes as f64 / self.rate as f64);
            tokio::time::sleep(due.saturating_sub(self.since.elapsed())).await;
        }
    }
}
