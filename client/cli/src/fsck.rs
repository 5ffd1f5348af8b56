//! `fjord fsck`: whether everything fits together.

use std::{collections::BTreeMap, io::IsTerminal, process::ExitCode, time::Duration};

use fjordfs_client::upkeep::{self, Findings};
use fjordfs_proto::pb::meta::FsckReport;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::{
    daemon,
    locate::{self, MetaArg},
    report, rpc, transfer,
    units::{self, ByteSize, count},
};

/// Problems and blocks told one by one; --json tells more.
const TOLD: usize = 20;

/// Check the filesystem while it is in use: names and inodes, extents and blocks, and the shards on targets.
///
/// Changes nothing without --repair. With it, counts are set right, entries that lead nowhere are removed, what has no name
/// gets one in /lost+found, missing shards are made again from the others, and garbage is deleted. Blocks of which too few
/// shards are left cannot be repaired. Exit status: 0 when all is well, or was repaired; 1 when problems are left.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord fsck
  fjord fsck --repair
  fjord fsck --no-shards                metadata only: asks no data server
  fjord fsck --json | jq .metadata.problems")]
pub(crate) struct Args {
    #[command(flatten)]
    meta: MetaArg,
    /// Mend what can be mended
    #[arg(long)]
    repair: bool,
    /// Do not look at what targets hold
    #[arg(long)]
    no_shards: bool,
    /// Print JSON; the names of its fields are stable
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Serialize)]
struct Outcome {
    clean: bool,
    metadata: Metadata,
    shards: Option<Shards>,
}

impl Outcome {
    fn new(metadata: Metadata, shards: Option<Shards>, repair: bool) -> Outcome {
        let whole = |found: &Shards| {
            found.lost.is_empty()
                && found.unseen.is_empty()
                && found.unreadable.is_empty()
                && (repair || found.missing.is_empty() && found.garbage.is_empty())
        };
        let clean = metadata.left == 0 && shards.as_ref().is_none_or(whole);
        Outcome { clean, metadata, shards }
    }
}

/// [`Findings`], for programs.
#[derive(Serialize)]
struct Shards {
    shards: u64,
    missing: Vec<MissingBlock>,
    lost: Vec<u64>,
    /// Files that had bytes in these.
    lost_files: Vec<String>,
    garbage: BTreeMap<u64, Vec<u64>>,
    garbage_bytes: u64,
    unseen: BTreeMap<u64, String>,
    /// Why nothing counts as garbage; empty when it does.
    unreadable: String,
}

#[derive(Serialize)]
struct MissingBlock {
    block: u64,
    targets: Vec<u64>,
}

impl Shards {
    fn new(found: Findings, lost_files: Vec<String>) -> Shards {
        let missing = |m: upkeep::Missing| MissingBlock { block: m.block, targets: m.targets };
        Shards {
            shards: found.shards,
            missing: found.missing.into_iter().map(missing).collect(),
            lost: found.lost,
            lost_files,
            garbage: found.garbage,
            garbage_bytes: found.garbage_bytes,
            unseen: found.unseen,
            unreadable: found.unreadable,
        }
    }
}

impl Shards {
    fn garbage_shards(&self) -> usize {
        self.garbage.values().map(Vec::len).sum()
    }

    fn missing_shards(&self) -> usize {
        self.missing.iter().map(|missing| missing.targets.len()).sum()
    }
}

#[derive(Serialize)]
struct Metadata {
    inodes: u64,
    entries: u64,
    extents: u64,
    orphans: u64,
    blocks: u64,
    problem_count: u64,
    problems: Vec<String>,
    repairable: u64,
    repaired: u64,
    left: u64,
    problems_left: Vec<String>,
}

impl From<FsckReport> for Metadata {
    fn from(r: FsckReport) -> Metadata {
        Metadata {
            inodes: r.inodes,
            entries: r.entries,
            extents: r.extents,
            orphans: r.orphans,
            blocks: r.blocks_live,
            problem_count: r.problem_count,
            problems: r.problems,
            repairable: r.repairable,
            repaired: r.repaired,
            left: r.left,
            problems_left: r.problems_left,
        }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let meta = locate::cluster(&args.meta, None)?;
    let outcome = daemon::control_runtime()?.block_on(check(&meta, args))?;
    if args.json {
        report::print_json(&outcome)?;
    } else {
        report::print(&text(&outcome, args.repair))?;
    }
    Ok(if outcome.clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn check(meta: &str, args: &Args) -> anyhow::Result<Outcome> {
    let bar = progress();
    let records = |n| bar.set_message(format!("metadata: {} records", units::grouped(n)));
    let metadata = Metadata::from(rpc::fsck(meta, args.repair, records).await?);
    let shards = match args.no_shards {
        true => None,
        false => Some(shards(meta, args.repair, &bar).await?),
    };
    bar.finish_and_clear();
    Ok(Outcome::new(metadata, shards, args.repair))
}

/// What targets hold; what is missing and what is too much is seen to if `repair`.
async fn shards(meta: &str, repair: bool, bar: &ProgressBar) -> anyhow::Result<Shards> {
    let client = transfer::connect(meta, "fsck").await?;
    let found = upkeep::compare(&client, 0, &|what| bar.set_message(what)).await?;
    if repair && found.missing.len() + found.garbage.len() > 0 {
        upkeep::repair(&client, &found).await?;
    }
    let lost_files = match found.lost.is_empty() {
        true => Vec::new(),
        false => upkeep::files_of(&client, &found.lost, &|what| bar.set_message(what)).await?,
    };
    client.shutdown().await?;
    Ok(Shards::new(found, lost_files))
}

/// A line that says what is being done; none where nobody looks.
pub(crate) fn progress() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

fn text(outcome: &Outcome, repair: bool) -> String {
    let Outcome { clean, metadata: m, shards } = outcome;
    let mut lines = vec![format!(
        "metadata: {}, {}, {}, {}",
        count(m.inodes, "inode"),
        count(m.entries, "name"),
        count(m.extents, "extent"),
        count(m.blocks, "block")
    )];
    lines.extend(m.problems.iter().take(TOLD).map(|problem| format!("  {problem}")));
    if m.problem_count > TOLD as u64 {
        lines.push(format!("  and {} more", units::grouped(m.problem_count - TOLD as u64)));
    }
    match (m.problem_count, repair) {
        (0, _) => {}
        (n, false) => {
            lines.push(format!("  {}, {} of them can be repaired", count(n, "problem"), m.repairable));
        }
        (n, true) => lines.push(format!(
            "  {}, {} made, {} left",
            count(n, "problem"),
            count(m.repaired, "repair"),
            count(m.left, "problem")
        )),
    }
    if let Some(found) = shards {
        lines.push(format!("shards: {} on the targets that were listed", units::grouped(found.shards)));
        for (target, why) in &found.unseen {
            lines.push(format!("  target t{target} could not be listed: {why}"));
        }
        if found.missing_shards() > 0 {
            let what =
                if repair { "being restored, `fjord status` shows how far that is" } else { "not restored" };
            lines.push(format!(
                "  missing: {} of {}, {what}",
                count(found.missing_shards() as u64, "shard"),
                count(found.missing.len() as u64, "block")
            ));
        }
        if !found.unreadable.is_empty() {
            lines.push(format!("  garbage was not looked for: {}", found.unreadable));
        }
        if found.garbage_shards() > 0 {
            lines.push(format!(
                "  garbage: {} with {}, {}",
                count(found.garbage_shards() as u64, "shard"),
                ByteSize(found.garbage_bytes),
                if repair { "being deleted" } else { "`fjord gc run` deletes them" }
            ));
        }
        if !found.lost.is_empty() {
            let blocks: Vec<String> = found.lost.iter().take(TOLD).map(|b| format!("b{b}")).collect();
            let more = if found.lost.len() > TOLD { ", ..." } else { "" };
            lines.push(format!(
                "  LOST: {}: {}{more}",
                count(found.lost.len() as u64, "block"),
                blocks.join(", ")
            ));
            lines.push(format!("  of {}:", count(found.lost_files.len() as u64, "file")));
            lines.extend(found.lost_files.iter().take(TOLD).map(|file| format!("    {file}")));
            if let Some(more) = found.lost_files.len().checked_sub(TOLD).filter(|more| *more > 0) {
                lines.push(format!("    and {} more", units::grouped(more as u64)));
            }
        }
    }
    lines.push(if *clean { "all is well".to_owned() } else { "there are problems".to_owned() });
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_garbage_was_not_looked_for_is_told_and_is_a_problem() {
        for (unreadable, clean) in [("", true), ("an extent of i7 makes no sense", false)] {
            let found = Findings { unreadable: unreadable.to_owned(), ..Findings::default() };
            let shards = Some(Shards::new(found, Vec::new()));
            let outcome = Outcome::new(Metadata::from(FsckReport::default()), shards, true);
            let told = text(&outcome, true);
            assert_eq!(
                (outcome.clean, told.contains("garbage was not looked for: an extent")),
                (clean, !clean)
            );
        }
    }
}
