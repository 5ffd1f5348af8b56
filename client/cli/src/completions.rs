//! `fjord completions`: shell completion scripts.

use std::{io, process::ExitCode};

use clap::CommandFactory;
use clap_complete::Shell;

/// Print a completion script for a shell.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord completions bash > /etc/bash_completion.d/fjord
  fjord completions zsh > ~/.zfunc/_fjord
  fjord completions fish > ~/.config/fish/completions/fjord.fish")]
pub(crate) struct Args {
    /// bash, zsh, fish, elvish or powershell
    shell: Shell,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    // Rendered first: clap_complete panics on a closed pipe, `write_all` reports it.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::cli::Cli::command(), "fjord", &mut script);
    io::Write::write_all(&mut io::stdout(), &script)?;
    Ok(ExitCode::SUCCESS)
}
