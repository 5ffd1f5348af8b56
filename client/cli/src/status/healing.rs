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
    /// Of data servers that copy.
    pub(crate) rates: Vec<Rate>,
}

/// How fast a data server copies from others now.
#[derive(Serialize, Debug)]
pub(crate) struct Rate {
    pub(crate) server: u64,
    /// Bytes per second, at most.
    pub(crate) rate: u64,
    /// The administrator's; 0: none.
    pub(crate) limit: u64,
    /// It is low for the sake of users.
    pub(crate) gives_way: bool,
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
            rates: (h.paces.iter())
                .map(|p| Rate { server: p.server, rate: p.rate, limit: p.limit, gives_way: p.gives_way })
                .collect(),
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
        if !self.rates.is_empty() {
            let _ = writeln!(out, "{}", self.rates_text());
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

    /// What the servers that copy may read per second.
    fn rates_text(&self) -> String {
        let second = Duration::from_secs(1);
        let (least, most) = self.rates.iter().fold((u64::MAX, 0), |(a, b), r| (a.min(r.rate), b.max(r.rate)));
        let rate = match least == most {
            true => units::rate(most, second),
            false => format!("{} to {}", units::rate(least, second), units::rate(most, second)),
        };
        let mut text =
            format!("rebuild rate now: {rate} on {}", units::count(self.rates.len() as u64, "server"));
        match self.rates.iter().filter(|r| r.gives_way).count() {
            0 => {}
            giving => text += &format!(", {giving} giving way to users"),
        }
        text
    }
}
