//! `fjord gc`: shards that nothing reaches, and blocks of which little is left.

use std::process::ExitCode;

use fjordfs_client::{
    Client, FsResult,
    upkeep::{self, Collected, Compacted, Compaction, Tell},
};
use fjordfs_proto::pb::meta::{GcReport, StatusReply};
use serde::Serialize;

use crate::{
    daemon,
    fsck::progress,
    locate::{self, MetaArg, ShowArgs},
    report, rpc, transfer,
    units::{self, ByteSize},
};

/// Give space back while the filesystem is in use: delete shards that nothing reaches, move what is left of mostly dead blocks.
///
/// Blocks that lose their last byte are deleted by themselves, and so are those of clients that die. Garbage is what a target brings
/// back that was away for long, or what a restored backup knows nothing of. Small files share blocks, which keep their space until
/// the last of them is removed, or until they are compacted. The metaserver does both by itself every week (`fjord meta --gc-interval`).
#[derive(clap::Subcommand)]
#[command(after_help = "\
Examples:
  fjord gc status            what is waiting to be deleted, and what the last collection did
  fjord gc start             collect and compact now, in the metaserver's process
  fjord gc run --dry-run     how much garbage is there?
  fjord gc run               delete it, in this process
  fjord gc compact --dry-run how much space is in mostly dead blocks?
  fjord gc compact --rate 100MiB")]
pub(crate) enum Verb {
    /// Show what is waiting to be deleted, and what the metaserver's last collection did
    Status(ShowArgs),
    /// Have the metaserver collect and compact now
    Start(StartArgs),
    /// Compare what targets hold with what there is, and delete the rest
    Run(RunArgs),
    /// Write anew what is left of mostly dead blocks, and files that lie in many pieces
    Compact(CompactArgs),
}

#[derive(clap::Args)]
pub(crate) struct StartArgs {
    #[command(flatten)]
    meta: MetaArg,
}

#[derive(clap::Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    meta: MetaArg,
    /// Delete nothing
    #[arg(long)]
    dry_run: bool,
    /// Print JSON; the names of its fields are stable
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct CompactArgs {
    #[command(flatten)]
    meta: MetaArg,
    /// Blocks of which files use less than this are written anew, percent
    #[arg(long, value_name = "PERCENT", default_value_t = BELOW_DEFAULT, value_parser = clap::value_parser!(u64).range(1..=100))]
    below: u64,
    /// Read at most this much per second; 0 is no limit
    #[arg(long, value_name = "SIZE", default_value = "0")]
    rate: ByteSize,
    /// Move nothing
    #[arg(long)]
    dry_run: bool,
    /// Print JSON; the names of its fields are stable
    #[arg(long)]
    json: bool,
}

/// Half of a block: moving it costs no more than it frees.
pub(crate) const BELOW_DEFAULT: u64 = 50;

#[derive(Serialize)]
struct Waiting {
    /// Deletions that data servers have yet to confirm, one for each target and block.
    deletions: u64,
    /// Removed files that are still open.
    orphans: u64,
    /// Absent where the metaserver's program does not collect.
    background: Option<Background>,
}

/// Collection in the metaserver's process.
#[derive(Serialize)]
struct Background {
    interval_ms: u64,
    running: bool,
    doing: String,
    runs: u64,
    ended_ms: u64,
    problem: String,
    garbage_shards: u64,
    garbage_bytes: u64,
    deletions: u64,
    sparse_blocks: u64,
    dead_bytes: u64,
    moved_bytes: u64,
}

impl From<GcReport> for Background {
    fn from(r: GcReport) -> Background {
        Background {
            interval_ms: r.interval_ms,
            running: r.running,
            doing: r.doing,
            runs: r.runs,
            ended_ms: r.ended_ms,
            problem: r.problem,
            garbage_shards: r.garbage_shards,
            garbage_bytes: r.garbage_bytes,
            deletions: r.deletions,
            sparse_blocks: r.sparse_blocks,
            dead_bytes: r.dead_bytes,
            moved_bytes: r.moved_bytes,
        }
    }
}

#[derive(Serialize)]
struct CollectedJson {
    shards_seen: u64,
    garbage_shards: u64,
    garbage_bytes: u64,
    /// Deletions that were queued.
    deletions: u64,
    /// Targets that could not be listed.
    unseen: Vec<u64>,
}

#[derive(Serialize)]
struct CompactedJson {
    sparse_blocks: u64,
    dead_bytes: u64,
    scattered_files: u64,
    moved_bytes: u64,
    moved_pieces: u64,
    changed_pieces: u64,
    shared_pieces: u64,
    unreadable_pieces: u64,
}

pub(crate) fn run(verb: &Verb) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Status(args) => {
            let meta = locate::cluster(&args.meta, None)?;
            let waiting = Waiting::from(daemon::control_runtime()?.block_on(rpc::status(&meta))?);
            if args.json {
                report::print_json(&waiting)?;
            } else {
                report::print(&waiting.text())?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Verb::Start(args) => {
            let meta = locate::cluster(&args.meta, None)?;
            let message = daemon::control_runtime()?.block_on(rpc::start_gc(&meta))?;
            report::print(&format!("{message}\n"))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Run(args) => collect(args),
        Verb::Compact(args) => compact(args),
    }
}

impl From<StatusReply> for Waiting {
    fn from(status: StatusReply) -> Waiting {
        Waiting {
            deletions: status.blocks_to_delete,
            orphans: status.orphans,
            background: status.gc.map(Background::from),
        }
    }
}

impl Waiting {
    fn text(&self) -> String {
        let mut text = format!(
            "{} deletions wait for data servers, {} removed files are still open\n",
            units::grouped(self.deletions),
            units::grouped(self.orphans)
        );
        if let Some(background) = &self.background {
            text += &background.text();
        }
        text
    }
}

impl Background {
    fn text(&self) -> String {
        let every = match self.interval_ms {
            0 => "the metaserver collects when it is told to (`fjord gc start`)".to_owned(),
            ms => {
                format!("the metaserver collects every {}", units::Span(std::time::Duration::from_millis(ms)))
            }
        };
        let mut text = every;
        if self.running {
            text += &format!("; it is at it: {}", self.doing);
        }
        text.push('\n');
        let ended = std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_millis(self.ended_ms));
        if let Some(ended) = ended.filter(|_| self.runs > 0) {
            text += &format!(
                "last at {}: garbage: {} with {}; {} moved out of {}\n",
                humantime::format_rfc3339_seconds(ended),
                units::count(self.garbage_shards, "shard"),
                ByteSize(self.garbage_bytes),
                ByteSize(self.moved_bytes),
                units::count(self.sparse_blocks, "mostly dead block")
            );
            if !self.problem.is_empty() {
                text += &format!("  not complete: {}\n", self.problem);
            }
        }
        text
    }
}

/// Has `work` done with a session of its own, and shows how far it is. What was done before a failure stays done.
fn with_client<T>(meta: &str, work: impl AsyncFnOnce(&Client, Tell<'_>) -> FsResult<T>) -> anyhow::Result<T> {
    daemon::control_runtime()?.block_on(async {
        let client = transfer::connect(meta, "gc").await?;
        let bar = progress();
        let done = work(&client, &|what| bar.set_message(what)).await;
        bar.finish_and_clear();
        let ended = client.shutdown().await;
        let done = done?;
        ended?;
        Ok(done)
    })
}

fn collect(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let meta = locate::cluster(&args.meta, None)?;
    let done: Collected =
        with_client(&meta, async |client, tell| upkeep::collect(client, args.dry_run, 0, tell).await)?;
    let unseen: Vec<u64> = done.unseen.iter().map(|target| target.0).collect();
    let complete = unseen.is_empty();
    if args.json {
        report::print_json(&CollectedJson {
            shards_seen: done.shards_seen,
            garbage_shards: done.garbage_shards,
            garbage_bytes: done.garbage_bytes,
            deletions: done.deletions,
            unseen,
        })?;
    } else {
        let mut text = format!(
            "{} shards, {} of them with {} are garbage; {} deletions are on their way\n",
            units::grouped(done.shards_seen),
            units::grouped(done.garbage_shards),
            ByteSize(done.garbage_bytes),
            units::grouped(done.deletions)
        );
        for target in &unseen {
            text += &format!("target t{target} could not be listed: run it again when it is up\n");
        }
        report::print(&text)?;
    }
    Ok(if complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn compact(args: &CompactArgs) -> anyhow::Result<ExitCode> {
    let meta = locate::cluster(&args.meta, None)?;
    let wanted = Compaction { below: args.below, rate: args.rate.0, dry_run: args.dry_run };
    let done = with_client(&meta, async |client, tell| upkeep::compact(client, wanted, tell).await)?;
    if args.json {
        report::print_json(&CompactedJson {
            sparse_blocks: done.sparse_blocks,
            dead_bytes: done.dead_bytes,
            scattered_files: done.scattered_files,
            moved_bytes: done.moved_bytes,
            moved_pieces: done.moved_pieces,
            changed_pieces: done.changed_pieces,
            shared_pieces: done.shared_pieces,
            unreadable_pieces: done.unreadable_pieces,
        })?;
    } else {
        report::print(&compacted_text(&done, args.dry_run))?;
    }
    Ok(if done.unreadable_pieces == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn compacted_text(done: &Compacted, dry_run: bool) -> String {
    let mut text = format!(
        "{} with {} that no file uses, {} in many pieces\n",
        units::count(done.sparse_blocks, "mostly dead block"),
        ByteSize(done.dead_bytes),
        units::count(done.scattered_files, "file")
    );
    if !dry_run {
        text += &format!(
            "{} in {} pieces moved; {} pieces were changed or removed meanwhile, {} are shared and stay\n",
            ByteSize(done.moved_bytes),
            units::grouped(done.moved_pieces),
            units::grouped(done.changed_pieces),
            units::grouped(done.shared_pieces)
        );
    }
    if done.unreadable_pieces > 0 {
        text += &format!(
            "{} pieces could not be read: see `fjord fsck`\n",
            units::grouped(done.unreadable_pieces)
        );
    }
    text
}
