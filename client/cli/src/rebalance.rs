//! `fjord rebalance`: spreading old blocks over new targets.

use std::process::ExitCode;

use crate::{
    daemon,
    locate::{self, MetaArg},
    report, rpc,
};

/// Move blocks of before to targets that were added later, until all hold about as many.
///
/// It goes on in the background, some placement groups at a time and within the data servers' --rebuild-rate; `fjord status`
/// shows how far it is. Clients read and write meanwhile.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord rebalance
  fjord rebalance --stop")]
pub(crate) struct Args {
    #[command(flatten)]
    meta: MetaArg,
    /// Begin nothing else; what is being moved is finished
    #[arg(long)]
    stop: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let meta = locate::cluster(&args.meta, None)?;
    let message = daemon::control_runtime()?.block_on(rpc::rebalance(&meta, args.stop))?;
    report::print(&format!("{message}\n"))?;
    Ok(ExitCode::SUCCESS)
}
