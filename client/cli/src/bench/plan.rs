//! What is measured, and whether that makes sense.

use std::{path::Path, time::Duration};

use anyhow::{bail, ensure};
use bytes::Bytes;

use super::{
    Args,
    target::{Dice, PIECE, Target},
};
use crate::{
    locate::{self, MetaArg},
    units::{self, ByteSize},
};

/// Parts of the measurement.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub(super) enum Part {
    Write,
    Read,
    Random,
    Small,
    Meta,
}

const ALL: [Part; 5] = [Part::Write, Part::Read, Part::Random, Part::Small, Part::Meta];

/// Smallest share of a thread in the bytes: below that, opening and syncing is what would be measured.
const SHARE_MIN: u64 = PIECE as u64;

/// Largest small file.
const SMALL_MAX: u64 = 16 << 20;

/// A checked wish.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) parts: Vec<Part>,
    pub(super) threads: u64,
    /// Bytes of each thread's file.
    pub(super) share: u64,
    pub(super) files: u64,
    pub(super) small_size: u64,
    pub(super) time: Duration,
    pub(super) rounds: u16,
}

impl Plan {
    /// # Errors
    /// Wishes that cannot be measured, with what to change.
    pub(super) fn new(args: &Args) -> anyhow::Result<Plan> {
        let parts: Vec<Part> =
            ALL.into_iter().filter(|part| args.only.is_empty() || args.only.contains(part)).collect();
        let threads = u64::from(args.threads);
        let plan = Plan {
            parts,
            threads,
            share: args.size.0 / threads / SHARE_MIN * SHARE_MIN,
            files: args.files,
            small_size: args.small_size.0,
            time: args.time.0,
            rounds: args.rounds,
        };
        if plan.streams() {
            ensure!(
                plan.share > 0,
                "--size {} is less than {} for each of the {threads} threads: make it larger, or use fewer --threads",
                args.size,
                ByteSize(SHARE_MIN),
            );
        }
        if plan.has(Part::Random) {
            ensure!(
                (Duration::from_millis(100)..=Duration::from_secs(3600)).contains(&plan.time),
                "--time must be between 100ms and 1h"
            );
        }
        if plan.has(Part::Small) {
            ensure!(
                (1..=SMALL_MAX).contains(&plan.small_size),
                "--small-size must be between 1 byte and {}: for empty files there is the part meta, for larger ones write",
                ByteSize(SMALL_MAX)
            );
        }
        if plan.has(Part::Small) || plan.has(Part::Meta) {
            ensure!(plan.files >= threads, "--files {} are fewer than the {threads} --threads", plan.files);
        }
        Ok(plan)
    }

    pub(super) fn has(&self, part: Part) -> bool {
        self.parts.contains(&part)
    }

    /// Whether large files are needed, if only to be read.
    pub(super) fn streams(&self) -> bool {
        [Part::Write, Part::Read, Part::Random].into_iter().any(|part| self.has(part))
    }

    /// Small or empty files of one thread.
    pub(super) fn files_of(&self, thread: u64) -> u64 {
        self.files / self.threads + u64::from(thread < self.files % self.threads)
    }

    /// # Errors
    /// When what is to be written does not fit.
    pub(super) fn check_space(&self, target: &dyn Target) -> anyhow::Result<()> {
        let large = if self.streams() { self.share * self.threads } else { 0 };
        // A small file takes at least a block on most filesystems.
        let small = if self.has(Part::Small) { self.files * self.small_size.max(4096) } else { 0 };
        let needed = large.max(small);
        let free = target.free()?;
        // Deleted data of the last round may not be free yet.
        if free < 2 * needed {
            bail!(
                "{}: {} are free, twice {} are wanted: use a smaller --size, or fewer --files",
                target.name(),
                ByteSize(free),
                ByteSize(needed)
            );
        }
        Ok(())
    }

    pub(super) fn describe(&self, in_flight: Option<u16>) -> String {
        let mut words = vec![units::count(self.threads, "thread")];
        if let Some(n) = in_flight {
            words.push(format!("{} of each under way", units::count(n.into(), "request")));
        }
        if self.streams() {
            words.push(format!("{} in all", ByteSize(self.share * self.threads)));
        }
        if self.has(Part::Small) {
            words.push(format!("{} of {}", units::count(self.files, "file"), ByteSize(self.small_size)));
        }
        words.push(units::count(self.rounds.into(), "round"));
        words.join(", ")
    }
}

/// # Errors
/// When a directory is not in a mount of ours: a figure of another filesystem under our name would mislead.
pub(super) fn in_a_mount(path: &Path) -> anyhow::Result<()> {
    match locate::locate(&MetaArg::default(), path) {
        Ok(place) if place.mountpoint.is_some() => Ok(()),
        Ok(_) => bail!("{} is not a directory of a mount: add --library, or name one", path.display()),
        Err(_) => bail!(
            "{} is not in a FjordFS mount: name a directory that is, or use --library; other filesystems can be \
             measured beside ours with --compare",
            path.display()
        ),
    }
}

/// A name that no other run has.
pub(super) fn scratch_name() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("fjord-bench-{}-{:x}", std::process::id(), now.as_nanos())
}

/// Bytes that do not compress.
pub(super) fn noise(len: usize) -> Bytes {
    let mut dice = Dice::new(7, u64::MAX);
    let words = (0..len.div_ceil(6)).flat_map(|_| {
        let [_, _, bytes @ ..] = (dice.offset() >> 12).to_be_bytes();
        bytes
    });
    words.take(len).collect::<Vec<u8>>().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::{CommandFactory, FromArgMatches};

    fn plan(words: &str) -> Result<Plan, String> {
        let mut cli = Cli::command();
        let line = ["fjord", "bench", "/mnt/x"].into_iter().chain(words.split_whitespace());
        let found = cli.try_get_matches_from_mut(line).map_err(|e| e.to_string())?;
        let (_, found) = found.subcommand().unwrap();
        Plan::new(&Args::from_arg_matches(found).unwrap()).map_err(|e| e.to_string())
    }

    #[test]
    fn everything_by_default() {
        let plan = plan("").unwrap();
        assert_eq!(plan.parts, ALL);
        assert_eq!((plan.threads, plan.share, plan.rounds), (4, 256 << 20, 3));
    }

    #[test]
    fn parts_come_in_their_order() {
        assert_eq!(plan("--only meta,write").unwrap().parts, [Part::Write, Part::Meta]);
        assert!(plan("--only random").unwrap().streams());
        assert!(!plan("--only meta,small").unwrap().streams());
        assert!(plan("--only sequential").unwrap_err().contains("sequential"));
    }

    #[test]
    fn shares_are_whole_pieces_and_files_are_divided() {
        let plan = plan("--size 10MiB --threads 3 --files 10").unwrap();
        assert_eq!(plan.share, 3 << 20);
        assert_eq!((0..3).map(|t| plan.files_of(t)).collect::<Vec<_>>(), [4, 3, 3]);
    }

    #[test]
    fn nonsense_is_refused_with_what_to_change() {
        for (words, said) in [
            ("--size 3MiB --threads 4", "--size"),
            ("--files 3 --threads 4", "--files"),
            ("--time 1ms", "--time"),
            ("--time 2h", "--time"),
            ("--small-size 0", "--small-size"),
            ("--small-size 1GiB", "--small-size"),
            ("--threads 0", "--threads"),
            ("--rounds 0", "--rounds"),
            ("--files 0", "--files"),
            ("--size nonsense", "nonsense"),
            ("--in-flight 0 --library", "--in-flight"),
            ("--in-flight 8", "--library"),
        ] {
            let error = plan(words).unwrap_err();
            assert!(error.contains(said), "{words}: {error}");
        }
        // Only what is measured is looked at.
        assert!(plan("--only meta --size 0 --time 1ms --small-size 0").is_ok());
    }

    #[test]
    fn noise_does_not_repeat() {
        let bytes = noise(100_001);
        assert_eq!(bytes.len(), 100_001);
        let mut counts = [0u32; 256];
        bytes.iter().for_each(|b| counts[*b as usize] += 1);
        assert!(counts.iter().all(|n| (200..600).contains(n)), "{counts:?}");
    }
}
