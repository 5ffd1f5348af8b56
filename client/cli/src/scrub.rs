//! `fjord scrub`: reading and verifying everything that targets hold.

use std::{process::ExitCode, time::Duration};

use fjordfs_proto::TargetId;

use crate::{
    daemon,
    locate::{self, MetaArg, ShowArgs},
    report, rpc,
    status::Status,
    units::{self, ByteSize},
};

/// Verify everything that the targets hold, and repair what is damaged.
///
/// Data servers do this by themselves every other week (`fjord data --scrub-interval`), at a bounded rate.
#[derive(clap::Subcommand)]
#[command(after_help = "\
Examples:
  fjord scrub start
  fjord scrub status
  fjord scrub status --json | jq '.[] | select(.shards_bad > .shards_repaired)'")]
pub(crate) enum Verb {
    /// Begin now, on all targets that are up
    Start(StartArgs),
    /// Show how far it is and what it found
    Status(ShowArgs),
}

#[derive(clap::Args)]
pub(crate) struct StartArgs {
    #[command(flatten)]
    meta: MetaArg,
}

pub(crate) fn run(verb: &Verb) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Start(args) => {
            let meta = locate::cluster(&args.meta, None)?;
            let message = daemon::control_runtime()?.block_on(rpc::scrub(&meta))?;
            report::print(&format!("{message}\n"))?;
        }
        Verb::Status(args) => {
            let meta = locate::cluster(&args.meta, None)?;
            let reply = daemon::control_runtime()?.block_on(rpc::status(&meta))?;
            let status = Status::new(meta, reply)?;
            if args.json {
                let scrubs: Vec<_> = status.targets.iter().map(|t| &t.scrub).collect();
                report::print_json(&scrubs)?;
            } else {
                report::print(&table(&status))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn table(status: &Status) -> String {
    let mut table = report::table(&["TARGET", "SCRUB", ">VERIFIED", ">OF", ">DAMAGED", ">REPAIRED", "PATH"]);
    for target in &status.targets {
        let s = &target.scrub;
        let since = Duration::from_millis(s.completed_ms);
        let done = match (s.running, s.completed_ms) {
            (true, _) => "running".to_owned(),
            (false, 0) => "not since its server started".to_owned(),
            (false, _) => match std::time::SystemTime::UNIX_EPOCH.checked_add(since) {
                Some(time) => format!("done {}", humantime::format_rfc3339_seconds(time)),
                None => "done".to_owned(),
            },
        };
        table.add_row([
            TargetId(target.id).to_string(),
            done,
            ByteSize(s.bytes_done).to_string(),
            ByteSize(s.bytes_total).to_string(),
            units::grouped(s.shards_bad),
            units::grouped(s.shards_repaired),
            target.path.clone(),
        ]);
    }
    report::lines(&table)
}
