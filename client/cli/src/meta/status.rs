//! `fjord meta status`: who owns the metadata, who stands by, and how its store is.

use std::{fmt::Write, process::ExitCode, time::Duration};

use fjordfs_proto::pb::meta::MetaStatusReply;
use serde::Serialize;

use crate::{
    daemon,
    locate::{self, MetaArg},
    report, rpc,
    units::{self, ByteSize},
};

/// Between the two looks that rates are taken from.
const LOOK: Duration = Duration::from_secs(1);

/// Show the metaserver that serves, its standbys and its store.
///
/// Exit status 1 when the store does not confirm that this metaserver owns it: then nobody is answered; or when changes are refused.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord meta status
  fjord meta status --meta a:7440,b:7440 --json | jq .store.lag_batches")]
pub(crate) struct Args {
    #[command(flatten)]
    meta: MetaArg,
    /// Print JSON; the names of its fields are stable
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let meta = locate::cluster(&args.meta, None)?;
    let (before, after) = daemon::control_runtime()?.block_on(async {
        let before = rpc::meta_status(&meta).await?;
        tokio::time::sleep(LOOK).await;
        anyhow::Ok((before, rpc::meta_status(&meta).await?))
    })?;
    let status = Status::new(&before, after);
    if args.json {
        report::print_json(&status)?;
    } else {
        report::print(&status.text())?;
    }
    Ok(if status.answering && status.trouble.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Everything that is shown; serialised, it is the output of `--json`.
#[derive(Serialize, Debug, PartialEq)]
struct Status {
    version: String,
    engine: String,
    place: String,
    /// The store confirms the ownership, so clients are answered.
    answering: bool,
    owner_for_s: u64,
    fence: u64,
    inodes: u64,
    sessions: u64,
    operations_per_s: f64,
    /// Why it refuses changes; empty: it does not.
    trouble: String,
    /// Absent for the embedded engine.
    store: Option<Store>,
}

#[derive(Serialize, Debug, PartialEq)]
struct Store {
    /// Committed, and not in the store yet.
    lag_batches: u64,
    batches_per_s: f64,
    transactions_per_s: f64,
    cached_bytes: u64,
    trouble: Option<String>,
    servers: Vec<String>,
    standbys: Vec<String>,
}

impl Status {
    fn new(before: &MetaStatusReply, after: MetaStatusReply) -> Status {
        let seconds = after.uptime_ms.saturating_sub(before.uptime_ms).max(1) as f64 / 1000.0;
        let same = before.fence == after.fence && before.uptime_ms <= after.uptime_ms;
        // Another owner counts from its own beginning.
        let rate =
            |before: u64, after: u64| if same { after.saturating_sub(before) as f64 / seconds } else { 0.0 };
        let earlier = before.shared.clone().unwrap_or_default();
        Status {
            answering: after.shared.as_ref().is_none_or(|store| store.answering),
            operations_per_s: rate(before.operations, after.operations),
            store: after.shared.map(|store| Store {
                lag_batches: store.committed.saturating_sub(store.safe),
                batches_per_s: rate(earlier.safe, store.safe),
                transactions_per_s: rate(earlier.transactions, store.transactions),
                cached_bytes: store.cached_bytes,
                trouble: Some(store.trouble).filter(|why| !why.is_empty()),
                servers: store.servers,
                standbys: store.standbys,
            }),
            trouble: after.trouble,
            version: after.version,
            engine: after.engine,
            place: after.store,
            owner_for_s: after.uptime_ms / 1000,
            fence: after.fence,
            inodes: after.inodes,
            sessions: after.sessions,
        }
    }

    fn text(&self) -> String {
        let mut out = String::new();
        let answers =
            if self.answering { "serving" } else { "NOT ANSWERING: the store does not confirm its owner" };
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "metaserver {} on {} ({}): {answers}, owner for {} s (fence {})\n{}, {}, {:.0} operations/s",
            self.version,
            self.place,
            self.engine,
            self.owner_for_s,
            self.fence,
            units::count(self.inodes, "inode"),
            units::count(self.sessions, "session"),
            self.operations_per_s
        );
        if !self.trouble.is_empty() {
            let _ = writeln!(out, "TROUBLE: {}", self.trouble);
        }
        let Some(store) = &self.store else { return out };
        let _ = writeln!(
            out,
            "{} batches behind, {:.0} batches/s in {:.0} transactions/s, {} cached",
            store.lag_batches,
            store.batches_per_s,
            store.transactions_per_s,
            ByteSize(store.cached_bytes)
        );
        if let Some(trouble) = &store.trouble {
            let _ = writeln!(out, "trouble: {trouble}");
        }
        for server in &store.servers {
            let _ = writeln!(out, "store    {server}");
        }
        for standby in &store.standbys {
            let _ = writeln!(out, "standby  {standby}");
        }
        if store.standbys.is_empty() {
            let _ = writeln!(out, "no standby: start another metaserver with the same --store");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fjordfs_proto::pb::meta::StoreReport;

    #[test]
    fn rates_come_from_two_looks_at_one_owner() {
        let look = |uptime_ms, operations, safe| MetaStatusReply {
            uptime_ms,
            operations,
            fence: 3,
            shared: Some(StoreReport { answering: true, committed: 50, safe, ..StoreReport::default() }),
            ..MetaStatusReply::default()
        };
        let status = Status::new(&look(1000, 10, 5), look(3000, 50, 45));
        assert_eq!((status.operations_per_s, status.owner_for_s), (20.0, 3));
        let store = status.store.as_ref().unwrap();
        assert_eq!((store.batches_per_s, store.lag_batches), (20.0, 5));
        assert!(status.text().contains("no standby"));
        let other = Status::new(&look(9000, 900, 5), look(500, 50, 45));
        assert_eq!(other.operations_per_s, 0.0, "another owner");
    }
}
