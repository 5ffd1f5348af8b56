//! The binary `fjord`: daemons, mount and the admin verbs.
//!
//! Thin on purpose: [`cli`] says what can be typed, each verb has a file of its own, and everything that is not
//! about a person at a terminal is in the library crates.
//!
//! | file | what it holds |
//! |---|---|
//! | `up` | a whole cluster on this machine, supervised |
//! | `meta`, `data`, `mount` | the three daemons |
//! | `umount`, `status`, `df`, `stat`, `layout` | admin verbs |
//! | `fsck`, `gc` | checks, garbage |
//! | `transfer` | import and export |
//! | `bench` | how fast it is |
//! | `locate` | which cluster, and which path in it, an argument means |
//! | `config`, `units` | TOML files, sizes and durations |
//! | `daemon`, `holders`, `mounts` | signals and readiness, who keeps a mount busy, what is mounted |
#![allow(clippy::print_stdout, reason = "printing is what a command line tool does")]

use std::process::ExitCode;

use clap::Parser;

mod bench;
mod cli;
mod completions;
mod config;
mod daemon;
mod data;
mod df;
mod fsck;
mod gc;
mod holders;
mod layout;
mod locate;
mod logs;
mod meta;
mod mount;
mod mounts;
mod rebalance;
mod report;
mod rpc;
mod scrub;
mod stat;
mod status;
mod target;
mod transfer;
mod umount;
mod units;
mod up;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    let args = match mount::helper::translate(&args) {
        Ok(args) => args,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::from(2);
        }
    };
    match cli::run(cli::Cli::parse_from(args)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("fjord: {}", report::causes(&error));
            ExitCode::FAILURE
        }
    }
}
