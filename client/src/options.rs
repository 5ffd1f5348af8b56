//! What a client can be told.

use std::{sync::Arc, time::Duration};

use crate::{Handover, Network};

/// Settings of a [`crate::Client`]. All have defaults that suit a training node.
#[derive(Clone, Debug)]
pub struct Options {
    /// Shown to administrators: host, process, mount point.
    pub description: String,
    /// Hard cap on the bytes of file data that this client keeps in memory: dirty, cached and in flight.
    pub memory_max: u64,
    /// How long an operation waits for servers that do not answer before it fails with `ETIMEDOUT`.
    pub operation_timeout: Duration,
    /// How long a read waits for one copy before it asks another one as well.
    pub hedge_delay: Duration,
    /// By when dirty data is committed without being asked for, where servers take it that fast.
    pub dirty_age_max: Duration,
    /// How far a sequential reader is read ahead, bytes.
    pub readahead: u64,
    /// Whether what sequential readers have passed is dropped from this client's memory while the files that are read so are more than
    /// it can hold. For readers that cache below, as the kernel does for a mount: the memory is better used for what comes next.
    pub drop_behind: bool,
    /// Whether what nobody else uses is decided here and sent to the metaserver later, a second at most: names made and removed,
    /// attributes, and what was written at `close`. Others see everything at once all the same; what is at stake
    /// is that second, when this client dies. Otherwise all that waits for the metaserver.
    pub defer: bool,
    /// Whether reading is noted in access times, by the rules of `relatime`: the first after a change, and once a day.
    pub access_times: bool,
    /// Whether data servers on this host are reached through their Unix sockets, which costs about half the CPU time.
    pub local_sockets: bool,
    /// Whether shards of data servers on this host are read from their files, where this process may open those. The data servers
    /// then only tell where the shards are.
    pub local_reads: bool,
    /// Let data servers on this host, which are reached through their Unix sockets, read what is stored from this process's memory.
    pub local_writes: bool,
    /// Threads of the engine that carries connections and background work, and as many that batches are read on.
    pub threads: usize,
    /// Servers are reached through this instead of TCP and Unix sockets, and the client has no threads of its own: for programs with
    /// one runtime that does everything.
    pub network: Option<Arc<dyn Network>>,
    /// Where this client keeps what a successor needs to go on with its session. One that another process has left is gone on
    /// with.
    pub handover: Option<Arc<Handover>>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            description: format!("pid {}", std::process::id()),
            memory_max: 2 << 30,
            operation_timeout: Duration::from_secs(120),
            hedge_delay: Duration::from_millis(500),
            dirty_age_max: Duration::from_secs(1),
            readahead: 16 << 20,
            drop_behind: false,
            defer: true,
            access_times: true,
            local_sockets: true,
            local_reads: true,
            local_writes: true,
            threads: 2,
            network: None,
            handover: None,
        }
    }
}

impl Options {
    /// Least memory a client works with: a few blocks in flight.
    pub const MEMORY_MIN: u64 = 128 << 20;
    /// Most memory that can be named: more than any machine has.
    pub const MEMORY_MAX: u64 = 1 << 50;

    /// Within the bounds.
    fn memory(&self) -> u64 {
        self.memory_max.clamp(Self::MEMORY_MIN, Self::MEMORY_MAX)
    }

    /// Share of the memory that dirty data may take: an eighth is left for buffers in flight, and readers keep more than half of the
    /// rest.
    pub(crate) fn dirty_max(&self) -> u64 {
        self.memory() * 3 / 8
    }

    /// Share of the memory for block data already read while there is no dirty data, which takes its share from this.
    pub(crate) fn cache_max(&self) -> u64 {
        self.memory() * 7 / 8 - self.tables_max() - 2 * self.arena_max() - 2 * self.parity_max()
    }

    /// Share of the memory for the places and checksums of shards on this host: a thousandth of the data read at random, so this is
    /// enough for 16 times the whole memory.
    pub(crate) fn tables_max(&self) -> u64 {
        self.memory() / 64
    }

    /// Share of the memory for parity shards under way; as much is kept for the next ones. Four blocks of `ec:2+1` by
    /// default, as many bytes as are on the wire at a time.
    pub(crate) fn parity_max(&self) -> u64 {
        self.memory() / 64
    }

    /// Share of the memory that reads of shards on this host are done in: what a few streams have under way. As much is kept idle.
    pub(crate) fn arena_max(&self) -> u64 {
        (self.memory() / 64).min(32 << 20)
    }

    /// Share of the memory for reads under way that nobody waits for yet: half of what is left for buffers in flight.
    pub(crate) fn prefetch_max(&self) -> u64 {
        self.memory() / 16
    }

    /// Share of the memory for results of batches that are not taken yet: the other half.
    pub(crate) fn batch_max(&self) -> u64 {
        self.memory() / 16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_any_memory_are_part_of_it() {
        for memory_max in [0, Options::MEMORY_MIN, 2 << 30, Options::MEMORY_MAX, u64::MAX] {
            let options = Options { memory_max, ..Options::default() };
            let sum = options.dirty_max() + options.prefetch_max() + options.batch_max();
            assert!(sum < options.memory() && options.cache_max() < options.memory(), "{memory_max}");
        }
    }
}
