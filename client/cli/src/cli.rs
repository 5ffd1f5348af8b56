//! What can be typed.

use std::{ffi::CStr, process::ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand};

use crate::{
    bench, completions, data, df, fsck, gc, layout, logs, meta, mount, rebalance, scrub, stat, status,
    target, transfer, umount, up,
};

const AFTER_HELP: &str = "\
Begin here:
  fjord up /mnt/fjord                      a whole filesystem on this machine
  fjord status                             is everything up?
  fjord import ~/dataset /mnt/fjord/data   parallel, resumable copy
  fjord bench /mnt/fjord                   how fast is it?

Which cluster: verbs that take a PATH find the cluster from the mount it lies in. Others take
--meta HOST:PORT (or FJORD_META), else the mount of the current folder, else the only FjordFS
mounted here, else 127.0.0.1:7440.

Exit status: 0 done; 1 failed (the reason is on standard error); 2 wrong usage.
Environment: FJORD_LOG filters the log, for example debug or fjordfs_client=trace.";

/// FjordFS, a parallel filesystem for AI training storage.
///
/// One metadata service, any number of data servers, and this program for all of it.
#[derive(Parser)]
#[command(name = "fjord", version, after_help = AFTER_HELP, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Up(up::Args),
    Meta(meta::Args),
    Data(data::Args),
    Mount(mount::Args),
    Umount(umount::Args),
    Status(status::Args),
    Df(df::Args),
    Import(transfer::ImportArgs),
    Export(transfer::ExportArgs),
    Stat(stat::Args),
    Bench(bench::Args),
    #[command(subcommand)]
    Layout(layout::Verb),
    #[command(subcommand)]
    Target(target::Verb),
    #[command(subcommand)]
    Server(target::ServerVerb),
    #[command(subcommand)]
    Scrub(scrub::Verb),
    Rebalance(rebalance::Args),
    Fsck(fsck::Args),
    #[command(subcommand)]
    Gc(gc::Verb),
    Completions(completions::Args),
}

impl Verb {
    /// Daemons tell what they do; verbs speak only when something is wrong.
    fn log_level(&self) -> &'static str {
        match self {
            Verb::Up(_) | Verb::Meta(_) | Verb::Data(_) | Verb::Mount(_) => "info",
            _ => "warn",
        }
    }
}

impl Verb {
    /// What `top` and `ps` call the daemons, so that their shares can be told apart.
    fn process_name(&self) -> Option<&'static CStr> {
        match self {
            Verb::Meta(_) => Some(c"fjord-meta"),
            Verb::Data(_) => Some(c"fjord-data"),
            Verb::Mount(_) => Some(c"fjord-mount"),
            _ => None,
        }
    }
}

/// Runs the verb; an error is the sentence to print before exit status 1.
pub(crate) fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    logs::init(cli.verb.log_level())?;
    if let Some(name) = cli.verb.process_name() {
        rustix::thread::set_name(name).context("cannot name this process")?;
    }
    match cli.verb {
        Verb::Up(args) => up::run(args),
        Verb::Meta(args) => meta::run(args),
        Verb::Data(args) => data::run(args),
        Verb::Mount(args) => mount::run(args),
        Verb::Umount(args) => umount::run(&args),
        Verb::Status(args) => status::run(&args),
        Verb::Df(args) => df::run(&args),
        Verb::Import(args) => transfer::run_import(args),
        Verb::Export(args) => transfer::run_export(args),
        Verb::Stat(args) => stat::run(&args),
        Verb::Bench(args) => bench::run(args),
        Verb::Layout(verb) => layout::run(&verb),
        Verb::Target(verb) => target::run(&verb),
        Verb::Rebalance(args) => rebalance::run(&args),
        Verb::Scrub(verb) => scrub::run(&verb),
        Verb::Fsck(args) => fsck::run(&args),
        Verb::Gc(verb) => gc::run(&verb),
        Verb::Server(verb) => target::run_server(&verb),
        Verb::Completions(args) => completions::run(&args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_fits_a_terminal() {
        let mut cli = Cli::command();
        cli.build();
        for verb in cli.get_subcommands_mut() {
            let after = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            for line in after.lines().chain(AFTER_HELP.lines()) {
                assert!(line.chars().count() < 100, "{}: '{line}' would be wrapped", verb.get_name());
            }
        }
    }

    #[test]
    fn every_verb_has_help_with_an_example() {
        for verb in Cli::command().get_subcommands_mut() {
            let help = verb.render_long_help().to_string();
            assert!(help.contains("fjord "), "{} has no example", verb.get_name());
            assert!(verb.get_about().is_some(), "{} has no description", verb.get_name());
        }
    }
}
