//! `with-engine etcd|postgres COMMAND...`: starts the servers of a metadata engine, runs a command with the address of an empty
//! store in `FJORD_STORE`, stops the servers, and ends with the command's exit status.

use std::process::{Command, ExitCode};

use fjordfs_tests::engines::{Etcd, Postgres};

const USAGE: &str = "usage: with-engine etcd|postgres COMMAND...";

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let (Some(engine), Some(program)) = (args.next(), args.next()) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let mut command = Command::new(program);
    command.args(args);
    match engine.to_str() {
        Some("etcd") => {
            let etcd = Etcd::start();
            run(&mut command, &etcd.url("fjord"))
        }
        Some("postgres") => {
            let mut postgres = Postgres::start();
            let url = postgres.url();
            run(&mut command, &url)
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn run(command: &mut Command, store: &str) -> ExitCode {
    match command.env("FJORD_STORE", store).status() {
        Ok(status) => {
            status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
        }
        Err(e) => {
            eprintln!("cannot run {}: {e}", command.get_program().display());
            ExitCode::FAILURE
        }
    }
}
