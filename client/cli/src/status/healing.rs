//! How far rebuild and reconciliation are.

use std::{fmt::Write, time::Duration};

use fjordfs_proto::pb::meta;
use serde::Serialize;

use crate::units::{self, ByteSize};

/// Rebuild and reconciliation of placement groups.
#[derive(Serialize, Debug, Default)]
pub(crate) struct Healing {
    /// Members of groups that are being replaced.
    pub(crate) moves_left: u64,
    /// Those replaced since `moves_left` was last 0.
    pub(crate) moves_done: u64,
    /// Members of groups that are still to be compared with the others.
    pub(crate) checks_left: u64,
    pub(crate) shards_copied: u64,
    pub(crate) bytes_copied: u64,
    pub(crate) elapsed_ms: u64,
    /// 0: not known.
    pub(crate) eta_ms: u64,
    /// Shards that no reachable targets can restore.
    pub(crate) shards_lost: u64,
    pub(crate) problems: Vec<String>,
    /// More moves may follow.
    pub(crate) rebalancing: bool,
}

impl From<meta::Healing> for Healing {
    fn from(h: meta::Healing) -> Healing {
        Healing {
            moves_left: h.moves_left,
            moves_done: h.moves_done,
            checks_left: h.checks_left,
            shards_copied: h.shards_copied,
            bytes_copied: h.bytes_copied,
            elapsed_ms: h.elapsed_ms,
            eta_ms: h.eta_ms,
            shards_lost: h.shards_lost,
            problems: h.problems,
            rebalancing: h.rebalancing,
        }
    }
}

impl Healing {
    /// Lines for people; none when there is nothing to tell.
    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String does not fail.
        if self.moves_left > 0 {
            let (time, all) = (Duration::from_millis(self.elapsed_ms), self.moves_done + self.moves_left);
            let _ = write!(
                out,
                "moving: {} of {} done, {} copied ({})",
                self.moves_done,
                units::count(all, "group member"),
                ByteSize(self.bytes_copied),
                units::rate(self.bytes_copied, time)
            );
            let _ = match self.eta_ms {
                0 => writeln!(out),
                ms => writeln!(out, ", about {} to go", units::seconds(Duration::from_millis(ms))),
            };
        }
        if self.rebalancing {
            let _ = writeln!(out, "rebalancing: some groups at a time (`fjord rebalance --stop` ends it)");
        }
        if self.checks_left > 0 {
            let _ = writeln!(
                out,
                "{} to compare with the others",
                units::count(self.checks_left, "group member")
            );
        }
        if self.shards_lost > 0 {
            let _ = writeln!(
                out,
                "{} CANNOT BE RESTORED from the targets that answer",
                units::count(self.shards_lost, "shard")
            );
        }
        for problem in &self.problems {
            let _ = writeln!(out, "  {problem}");
        }
        out
    }
}
