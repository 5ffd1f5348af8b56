//! What is measured: the operations of the phases, on some filesystem.

use std::{ops::Range, time::Instant};

use bytes::Bytes;

use super::watch::Watch;

/// What is done to each of many small files.
#[derive(Clone, Debug)]
pub(super) enum FileOp {
    /// Made, written, closed.
    Create(Bytes),
    /// Opened, read whole (so many bytes), closed.
    Read(usize),
    Stat,
    Delete,
}

/// Random reads of one thread.
#[derive(Default, Debug)]
pub(super) struct Reads {
    pub(super) count: u64,
    /// Of each read, in microseconds; empty where reads are not waited for one by one.
    pub(super) latencies_us: Vec<u32>,
}

/// Bytes of a random read.
pub(super) const RANDOM_READ: usize = 4096;

/// Bytes written and read at a time in a stream.
pub(super) const PIECE: usize = 1 << 20;

/// A side of the comparison. Names are below a directory of the benchmark's own. Errors name the file.
pub(super) trait Target: Send + Sync {
    /// What is shown to the user.
    fn name(&self) -> String;

    /// Bytes that still fit.
    fn free(&self) -> anyhow::Result<u64>;

    /// Whether random reads go past this machine's page cache.
    fn direct(&self) -> bool;

    fn make_dir(&self, name: &str) -> anyhow::Result<()>;

    /// Writes a file of `len` bytes from start to end, piece by piece, with fsync.
    fn write(&self, name: &str, len: u64, piece: &Bytes, watch: &Watch) -> anyhow::Result<()>;

    /// Reads it from start to end.
    fn read(&self, name: &str, len: u64, watch: &Watch) -> anyhow::Result<()>;

    /// Reads [`RANDOM_READ`] bytes at pages of the file that `dice` gives, until a time.
    fn random(&self, name: &str, dice: &mut Dice, until: Instant, watch: &Watch) -> anyhow::Result<Reads>;

    /// Does the same to files `f0`, `f1`, … of a directory.
    fn files(&self, op: &FileOp, dir: &str, files: Range<u64>, watch: &Watch) -> anyhow::Result<()>;

    /// Makes what is read next come from further away than this machine's page cache, as far as that can be done
    /// without disturbing others.
    fn forget(&self) -> anyhow::Result<()>;

    /// Removes everything. What is gone already is no error.
    fn remove(&self) -> anyhow::Result<()>;
}

/// Page numbers below a bound, pseudo-random and the same in every run.
#[derive(Clone, Debug)]
pub(super) struct Dice {
    state: u64,
    pages: u64,
}

impl Dice {
    pub(super) fn new(seed: u64, bytes: u64) -> Dice {
        Dice { state: seed, pages: (bytes / RANDOM_READ as u64).max(1) }
    }

    /// Offset of a page.
    pub(super) fn offset(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % self.pages * RANDOM_READ as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn dice_stay_inside_and_reach_everything() {
        let mut dice = Dice::new(1, 16 * RANDOM_READ as u64 + 100);
        let seen: HashSet<u64> = (0..1000).map(|_| dice.offset()).collect();
        assert_eq!(seen.len(), 16);
        assert!(seen.iter().all(|at| at % 4096 == 0 && at / 4096 < 16));
        assert_eq!(Dice::new(1, 100).offset(), 0, "less than a page");
    }
}
