//! `fjord target` and `fjord server`: what there is, and taking targets into service and out of it.

mod add;

use std::process::ExitCode;

use fjordfs_proto::pb::meta::{ChangeTargetRequest, TargetChange};

use crate::{
    daemon,
    locate::{self, MetaArg, ShowArgs},
    report, rpc,
    status::Status,
};

/// Show targets, take them into service, and out of it: while clients read and write.
#[derive(clap::Subcommand)]
#[command(after_help = "\
Examples:
  fjord target list
  fjord target add /mnt/nvme7   on the host of the data server
  fjord target drain t7      move its shards to others, then:
  fjord target remove t7
  fjord target replace t7    the disk in the place of t7 was changed
  fjord target keep t7       not drained after all")]
pub(crate) enum Verb {
    /// Show all targets
    List(ShowArgs),
    /// Give a folder of this host to its data server, as one more target
    Add(add::Args),
    /// Move everything that a target holds to others
    Drain(OneArgs),
    /// Leave a target in service that was being drained
    Keep(OneArgs),
    /// Forget a target that holds nothing any more, or that is gone for good
    Remove(RemoveArgs),
    /// Let another target take the place of one in all its groups
    Replace(ReplaceArgs),
}

/// Show data servers.
#[derive(clap::Subcommand)]
#[command(after_help = "\
Examples:
  fjord server list
  fjord server list --json | jq '.[] | select(.state != \"up\")'")]
pub(crate) enum ServerVerb {
    /// Show all data servers
    List(ShowArgs),
}

#[derive(clap::Args)]
pub(crate) struct OneArgs {
    #[command(flatten)]
    meta: MetaArg,
    /// The target, as `fjord target list` calls it
    #[arg(value_name = "tN")]
    target: TargetName,
}

#[derive(clap::Args)]
pub(crate) struct RemoveArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Also when groups have not been rebuilt without it: blocks that are nowhere else are LOST
    #[arg(long)]
    force: bool,
}

#[derive(clap::Args)]
pub(crate) struct ReplaceArgs {
    #[command(flatten)]
    one: OneArgs,
    /// The target that takes its place [default: the newest of the same data server and path]
    #[arg(value_name = "tM")]
    with: Option<TargetName>,
}

/// `t7`, or `7`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct TargetName(u64);

impl std::str::FromStr for TargetName {
    type Err = String;

    fn from_str(text: &str) -> Result<TargetName, String> {
        let id = text.strip_prefix('t').unwrap_or(text).parse().ok().filter(|id| *id > 0);
        id.map(TargetName).ok_or_else(|| {
            format!("'{text}' is not a target: write t and its number, as `fjord target list` shows it")
        })
    }
}

pub(crate) fn run(verb: &Verb) -> anyhow::Result<ExitCode> {
    let (one, change, with, force) = match verb {
        Verb::List(args) => {
            let status = status(args)?;
            if args.json {
                report::print_json(&status.targets)?;
            } else {
                report::print(&report::lines(&status.target_table()))?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        Verb::Add(args) => return add::run(args),
        Verb::Drain(one) => (one, TargetChange::Drain, 0, false),
        Verb::Keep(one) => (one, TargetChange::Keep, 0, false),
        Verb::Remove(args) => (&args.one, TargetChange::Remove, 0, args.force),
        Verb::Replace(args) => (&args.one, TargetChange::Replace, args.with.map_or(0, |t| t.0), false),
    };
    let meta = locate::cluster(&one.meta, None)?;
    let request = ChangeTargetRequest { target: one.target.0, change: change.into(), with, force };
    let message = daemon::control_runtime()?.block_on(rpc::change_target(&meta, request))?;
    report::print(&format!("{message}\n"))?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn run_server(verb: &ServerVerb) -> anyhow::Result<ExitCode> {
    let ServerVerb::List(args) = verb;
    let status = status(args)?;
    if args.json {
        report::print_json(&status.servers)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = report::table(&["SERVER", "NAME", "ADDRESS", "STATE", ">TARGETS", ">TARGETS UP"]);
    for server in &status.servers {
        let targets = || status.targets.iter().filter(|t| t.server == server.id);
        table.add_row([
            fjordfs_proto::ServerId(server.id).to_string(),
            server.name.clone(),
            server.address.clone(),
            server.state.to_owned(),
            targets().count().to_string(),
            targets().filter(|t| t.state == "up").count().to_string(),
        ]);
    }
    report::print(&report::lines(&table))?;
    Ok(ExitCode::SUCCESS)
}

fn status(args: &ShowArgs) -> anyhow::Result<Status> {
    let meta = locate::cluster(&args.meta, None)?;
    let reply = daemon::control_runtime()?.block_on(rpc::status(&meta))?;
    Status::new(meta, reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_named_as_it_is_shown() {
        assert_eq!("t7".parse(), Ok(TargetName(7)));
        assert_eq!("7".parse(), Ok(TargetName(7)));
        for bad in ["", "t", "t0", "s7", "-1", "t7x"] {
            assert!(bad.parse::<TargetName>().is_err(), "{bad}");
        }
    }
}
