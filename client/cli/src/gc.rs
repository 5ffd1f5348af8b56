//! `fjord gc`: shards that nothing reaches, and blocks of which little is left.

mod compact;

use std::process::ExitCode;

use fjordfs_proto::pb::meta::MendRequest;
use serde::Serialize;

use crate::{
    daemon,
    fsck::progress,
    holdings,
    locate::{self, MetaArg, ShowArgs},
    report, rpc,
    units::{self, ByteSize},
};

/// Give space back while the filesystem is in use: delete shards that nothing reaches, move what is left of mostly dead blocks.
///
/// Blocks that lose their last byte are deleted by themselves, and so are those of clients that die. Garbage is what a target brings
/// back that was away for long, or what a restored backup knows nothing of. Small files share blocks, which keep their space until
/// the last of them is removed, or until they are compacted.
#[derive(clap::Subcommand)]
#[command(after_help = "\
Examples:
  fjord gc status            what is waiting to be deleted
  fjord gc run --dry-run     how much garbage is there?
  fjord gc run
  fjord gc compact --dry-run how much space is in mostly dead blocks?
  fjord gc compact --rate 100MiB")]
pub(crate) enum Verb {
    /// Show what is waiting to be deleted
    Status(ShowArgs),
    /// Compare what targets hold with what there is, and delete the rest
    Run(RunArgs),
    /// Write anew what is left of mostly dead blocks, and files that lie in many pieces
    Compact(compact::Args),
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

#[derive(Serialize)]
struct Waiting {
    /// Deletions that data servers have yet to confirm, one for each target and block.
    deletions: u64,
    /// Removed files that are still open.
    orphans: u64,
}

#[derive(Serialize)]
struct Collected {
    shards_seen: u64,
    garbage_shards: usize,
    garbage_bytes: u64,
    /// Deletions that were queued.
    deletions: u64,
    /// Targets that could not be listed.
    unseen: Vec<u64>,
}

pub(crate) fn run(verb: &Verb) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Status(args) => {
            let meta = locate::cluster(&args.meta, None)?;
            let status = daemon::control_runtime()?.block_on(rpc::status(&meta))?;
            let waiting = Waiting { deletions: status.blocks_to_delete, orphans: status.orphans };
            if args.json {
                report::print_json(&waiting)?;
            } else {
                report::print(&format!(
                    "{} deletions wait for data servers, {} removed files are still open\n",
                    units::grouped(waiting.deletions),
                    units::grouped(waiting.orphans)
                ))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Verb::Run(args) => collect(args),
        Verb::Compact(args) => compact::run(args),
    }
}

fn collect(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let meta = locate::cluster(&args.meta, None)?;
    let collected = daemon::control_runtime()?.block_on(async {
        let bar = progress();
        let found = holdings::compare(&meta, &|what| bar.set_message(what)).await?;
        bar.finish_and_clear();
        let mut deletions = 0;
        if !args.dry_run && !found.garbage.is_empty() {
            let (cluster_id, garbage) = (found.cluster_id.clone(), found.garbage_to_pb());
            deletions = rpc::mend(&meta, MendRequest { cluster_id, garbage, missing: Vec::new() }).await?;
        }
        Ok::<_, anyhow::Error>(Collected {
            shards_seen: found.shards,
            garbage_shards: found.garbage_shards(),
            garbage_bytes: found.garbage_bytes,
            deletions,
            unseen: found.unseen.into_keys().collect(),
        })
    })?;
    if args.json {
        report::print_json(&collected)?;
    } else {
        let mut text = format!(
            "{} shards, {} of them with {} are garbage; {} deletions are on their way\n",
            units::grouped(collected.shards_seen),
            units::grouped(collected.garbage_shards as u64),
            ByteSize(collected.garbage_bytes),
            units::grouped(collected.deletions)
        );
        for target in &collected.unseen {
            text += &format!("target t{target} could not be listed: run it again when it is up\n");
        }
        report::print(&text)?;
    }
    Ok(if collected.unseen.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
