//! Collecting garbage and compacting on a schedule, in the process of the metaserver that owns the metadata: so one does it at a time.
//!
//! It goes by the clock and remembers nothing: a run begins when the time since 1970, in UTC, passes a multiple of the interval,
//! whatever was restarted meanwhile. Shortly after a start none begins by itself, so that who has restored an old backup can still
//! notice before the files that it knows nothing of are deleted.

use std::{
    net::SocketAddr,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use fjordfs_client::{
    Client, FsResult, Options,
    upkeep::{self, Compaction},
};
use fjordfs_metaserver::Upkeep;

use crate::{data, gc::BELOW_DEFAULT};

/// A metaserver that has just started runs none for this part of the interval.
const QUIET_PART: u32 = 4;

/// When, and how fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Schedule {
    /// Zero: only when asked.
    pub(super) interval: Duration,
    /// Bytes per second.
    pub(super) rate: u64,
}

impl Default for Schedule {
    /// Listing and moving at the rate of a scrub: hardly noticed.
    fn default() -> Schedule {
        Schedule { interval: Duration::from_secs(7 * 24 * 3600), rate: 16 << 20 }
    }
}

impl Schedule {
    /// How long until a run begins by itself, for one who has been there for `there`.
    fn next(&self, now: Duration, there: Duration) -> Option<Duration> {
        let interval = self.interval.as_millis();
        let elapsed = now.as_millis().checked_rem(interval)?;
        let mut wait = interval - elapsed;
        if there.as_millis() + wait < interval / u128::from(QUIET_PART) {
            wait += interval;
        }
        Some(Duration::from_millis(wait as u64))
    }
}

/// Runs until it is dropped.
pub(super) async fn run(address: SocketAddr, upkeep: std::sync::Arc<Upkeep>, schedule: Schedule) {
    let start = Instant::now();
    upkeep.note(|report| report.interval_ms = schedule.interval.as_millis() as u64);
    loop {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let due = async {
            match schedule.next(now, start.elapsed()) {
                Some(wait) => tokio::time::sleep(wait).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            () = upkeep.asked() => {}
        }
        upkeep.note(|report| (report.running, report.doing) = (true, "connecting".to_owned()));
        let done = turn(&address.to_string(), &upkeep, schedule.rate).await;
        let ended = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        upkeep.note(|report| {
            (report.running, report.doing) = (false, String::new());
            (report.runs, report.ended_ms) = (report.runs + 1, ended.as_millis() as u64);
            report.problem = done.unwrap_or_else(|e| e.message);
            if !report.problem.is_empty() {
                tracing::warn!("collecting garbage: {}", report.problem);
            }
        });
    }
}

/// Collects and compacts once; what is left for the next time, if anything.
async fn turn(meta: &str, upkeep: &Upkeep, rate: u64) -> FsResult<String> {
    let options = Options {
        description: format!("{} {} gc of the metaserver", data::hostname(), std::process::id()),
        memory_max: Options::MEMORY_MIN,
        threads: 1,
        access_times: false,
        ..Options::default()
    };
    let client = Client::connect(meta, options).await?;
    let done = work(&client, upkeep, rate).await;
    // What has been moved stays moved.
    let ended = client.shutdown().await;
    let problem = done?;
    ended?;
    Ok(problem)
}

async fn work(client: &Client, upkeep: &Upkeep, rate: u64) -> FsResult<String> {
    let tell = |what: String| upkeep.note(|report| report.doing = what);
    let collected = upkeep::collect(client, false, rate, &tell).await?;
    upkeep.note(|report| {
        (report.garbage_shards, report.garbage_bytes) = (collected.garbage_shards, collected.garbage_bytes);
        report.deletions = collected.deletions;
    });
    let wanted = Compaction { below: BELOW_DEFAULT, rate, dry_run: false };
    let compacted = upkeep::compact(client, wanted, &tell).await?;
    upkeep.note(|report| {
        (report.sparse_blocks, report.dead_bytes) = (compacted.sparse_blocks, compacted.dead_bytes);
        report.moved_bytes = compacted.moved_bytes;
    });
    tracing::info!(
        garbage_shards = collected.garbage_shards,
        deletions = collected.deletions,
        sparse_blocks = compacted.sparse_blocks,
        moved_bytes = compacted.moved_bytes,
        "garbage collected"
    );
    let unseen: Vec<String> = collected.unseen.iter().map(ToString::to_string).collect();
    Ok(match (unseen.is_empty(), compacted.unreadable_pieces) {
        (true, 0) => String::new(),
        (false, _) => format!("{} could not be listed", unseen.join(", ")),
        (true, pieces) => format!("{pieces} pieces of files could not be read: see `fjord fsck`"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_come_at_multiples_of_the_interval() {
        let hours = |h: u64| Duration::from_secs(3600 * h);
        let daily = Schedule { interval: hours(24), rate: 0 };
        let days = |d: u64, h: u64| hours(24 * d + h);
        assert_eq!(daily.next(days(20_000, 5), hours(100)), Some(hours(19)));
        assert_eq!(daily.next(days(20_000, 0), hours(100)), Some(hours(24)), "one has just begun");
        assert_eq!(daily.next(days(20_000, 20), hours(1)), Some(hours(28)), "it has just started");
        assert_eq!(daily.next(days(20_000, 20), hours(2)), Some(hours(4)));
        assert_eq!(Schedule { interval: Duration::ZERO, ..daily }.next(days(20_000, 5), hours(100)), None);
    }
}
