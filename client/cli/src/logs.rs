//! Logs go to standard error; `FJORD_LOG` filters them.

use std::io::IsTerminal;

use anyhow::Context;
use tracing_subscriber::EnvFilter;

/// Sets up logging. `level` holds unless the environment says otherwise.
pub(crate) fn init(level: &str) -> anyhow::Result<()> {
    let filter = match std::env::var("FJORD_LOG") {
        Ok(text) if !text.is_empty() => EnvFilter::try_new(&text).with_context(|| {
            format!("FJORD_LOG='{text}' is not a log filter: write a level such as debug, or module=level")
        })?,
        // Libraries below us speak of their own connection keeping; their warnings are worth a line, no more.
        _ => EnvFilter::new(format!("warn,fjord={level},fjordfs={level},{}", ours(level))),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    Ok(())
}

fn ours(level: &str) -> String {
    ["client", "fuse", "metaserver", "dataserver", "proto"].map(|c| format!("fjordfs_{c}={level}")).join(",")
}
