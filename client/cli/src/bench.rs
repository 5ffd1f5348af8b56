//! `fjord bench`: how fast a cluster is for the programs of this machine.
//!
//! | file | what it holds |
//! |---|---|
//! | `plan` | what is measured, and whether that can be |
//! | `target`, `directory`, `library` | what is measured: the operations, on a directory and through the library |
//! | `phases` | threads that run them |
//! | `watch` | progress, Ctrl-C |
//! | `stats`, `report` | medians, ratios, how they are shown |
//!
//! Rounds repeat all phases; with `--compare`, every phase runs on one side and then on the other, so that whatever
//! else the machine does meets both alike. Files are made below one directory of its own, which is removed at the end,
//! however it ends.

use std::{path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::Context;

use crate::{
    daemon,
    locate::{self, MetaArg},
    units::{ByteSize, Span},
};

mod directory;
mod library;
mod phases;
mod plan;
mod report;
mod stats;
mod target;
mod watch;

use directory::Directory;
use library::Library;
use plan::{Part, Plan};
use report::Report;
use target::Target;
use watch::{Interrupts, Watch};

/// Measure this cluster: streams, random reads, small files, metadata.
///
/// Runs on a directory of a mount as any program would, or with --library through the client library, where many
/// requests are under way at a time. Works in a directory of its own below PATH and removes it at the end, also after
/// Ctrl-C. Figures are medians of the rounds.
#[derive(clap::Args)]
#[command(after_help = "\
Parts (--only), by default all:
  write    sequential, every thread a file of its own, with fsync
  read     the same files, not from the page cache of this machine
  random   4 KiB reads anywhere in them, past the page cache
  small    files of --small-size: create, read, stat, delete; every thread has a directory
  meta     empty files: create, stat, delete

Examples:
  fjord bench /mnt/fjord/scratch
  fjord bench /mnt/fjord/scratch --threads 8 --size 8GiB --only write,read
  fjord bench /mnt/fjord/scratch --compare /var/tmp         ratios to a local disk
  fjord bench --library meta1:7440:/scratch --json")]
pub(crate) struct Args {
    /// Directory of a mount; with --library also HOST:PORT:/path, or with --meta an absolute path
    path: PathBuf,
    #[command(flatten)]
    meta: MetaArg,
    /// Go through the client library, not through the mount
    #[arg(long)]
    library: bool,
    /// Run the same on this directory, in turns, and show ratios
    #[arg(long, value_name = "DIR")]
    compare: Option<PathBuf>,
    /// Measure these parts only
    #[arg(long, value_name = "PART,...", value_enum, value_delimiter = ',', hide_possible_values = true)]
    only: Vec<Part>,
    /// Threads
    #[arg(short, long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Bytes that are written and read, by all threads together
    #[arg(short, long, value_name = "SIZE", default_value = "1GiB")]
    size: ByteSize,
    /// Small files, and empty files, of all threads together
    #[arg(short, long, value_name = "N", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    files: u64,
    /// Bytes of a small file
    #[arg(long, value_name = "SIZE", default_value = "4KiB")]
    small_size: ByteSize,
    /// How long random reads go on, each round
    #[arg(long, value_name = "DURATION", default_value = "5s")]
    time: Span,
    /// Rounds
    #[arg(short, long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// With --library: requests that each thread has under way
    #[arg(long, value_name = "N", requires = "library", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=4096))]
    in_flight: u16,
    /// Print the figures as JSON, every round's
    #[arg(long)]
    json: bool,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let plan = Plan::new(&args)?;
    let runtime = daemon::runtime()?;
    let watch = Arc::new(Watch::new(args.quiet));
    let interrupts = runtime.block_on(async { Interrupts::listen() }).context("cannot listen to signals")?;
    runtime.spawn(interrupts.obey(watch.clone()));

    let in_flight = args.library.then_some(args.in_flight);
    let mut scratch = Scratch::default();
    scratch.0.push(match in_flight {
        Some(n) => {
            let place = locate::locate(&args.meta, &args.path)?;
            Box::new(Library::new(place, runtime.handle(), n.into())?)
        }
        None => {
            plan::in_a_mount(&args.path)?;
            Box::new(Directory::new(&args.path)?)
        }
    });
    if let Some(dir) = &args.compare {
        scratch.0.push(Box::new(Directory::new(dir)?));
    }
    let targets: Vec<&dyn Target> = scratch.0.iter().map(AsRef::as_ref).collect();
    let measured = phases::measure(&plan, &targets, &watch);
    watch.finish();
    let report = Report::new(&plan, in_flight, &targets, &measured?);
    scratch.remove()?;
    if args.json {
        crate::report::print_json(&report)?;
    } else {
        crate::report::print(&report.text())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What the benchmark has made, removed whatever happens.
#[derive(Default)]
struct Scratch(Vec<Box<dyn Target>>);

impl Scratch {
    fn remove(mut self) -> anyhow::Result<()> {
        let mut removed = Ok(());
        for target in std::mem::take(&mut self.0) {
            removed = removed.and(target.remove());
        }
        removed
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for target in &self.0 {
            // The reason why this ends early is what the exit status tells.
            if let Err(e) = target.remove() {
                eprintln!("fjord: {}", crate::report::causes(&e));
            }
        }
    }
}
