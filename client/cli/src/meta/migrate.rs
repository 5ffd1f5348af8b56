//! `fjord meta migrate`: the metadata moves to another engine.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context;
use fjordfs_metaserver::{
    migrate::{Progress, migrate},
    store::Place,
};

use crate::{
    report,
    units::{ByteSize, grouped},
};

/// How often it says how far it is.
const SAY: Duration = Duration::from_secs(2);

/// Move the metadata to another engine, while no metaserver runs.
///
/// Everything is copied, read back and compared; then the old store is closed, and refuses to be served. Interrupted, it
/// is run again.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord meta migrate fjall:/var/lib/fjord/meta etcd://a:2379,b:2379,c:2379/fjord
  fjord meta migrate etcd://a:2379,b:2379,c:2379/fjord 'postgres://fjord@p1,p2/fjord?password-file=/etc/fjord/password'")]
pub(crate) struct Args {
    /// Where the metadata is: fjall:DIR, etcd://HOST:PORT,.../PREFIX or postgres://USER@HOST,.../DATABASE
    from: String,
    /// Where it is to be; there must be nothing yet
    to: String,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let (from, to) = (super::place(&args.from)?, super::place(&args.to)?);
    anyhow::ensure!(from != to, "{from} is where the metadata is already");
    let begun = Instant::now();
    let mut said = begun;
    let done = migrate(&from, &to, |progress| {
        if said.elapsed() >= SAY {
            said = Instant::now();
            eprintln!("{}", sentence(&progress));
        }
    });
    let done = done.with_context(|| format!("the metadata in {from} was not moved"))?;
    let seconds = begun.elapsed().as_secs_f64();
    report::print(&format!("{} in {seconds:.1} s\n{}\n", sentence(&done), next(&to)))?;
    Ok(ExitCode::SUCCESS)
}

fn sentence(progress: &Progress) -> String {
    format!(
        "{} records copied ({}), {} read back and identical",
        grouped(progress.copied),
        ByteSize(progress.bytes),
        grouped(progress.verified)
    )
}

fn next(to: &Place) -> String {
    match to {
        Place::Fjall(folder) => format!("start the metaserver with --data {}", folder.display()),
        other => format!("start the metaservers with --store {other} (and the options of its address)"),
    }
}
