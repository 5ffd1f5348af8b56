//! The task that owns the namespace.
//!
//! It runs on the thread of the sockets, so that a request is read, executed and answered without waking anybody else: a
//! wake-up of another core costs more than most operations do. It takes whatever has arrived from all clients and data servers as one burst, executes each request in order on
//! the [`Core`], commits the burst as one batch, and only then answers. Under load a batch carries
//! many operations; idle, a single one waits for nobody. Answers that need the log on stable storage go through the
//! [`Syncer`], so this thread never waits for the device to be flushed.
//!
//! Over an engine across a network a commit only begins, and this thread goes on with the next burst. What a burst tells
//! anybody (answers, recalls, maps, ends of sessions, signs of life) is kept, in order, until the engine has the burst and
//! this process is known to own the store at that moment. So nobody hears of what may be lost, or of what another
//! owner may have changed. When the ownership is lost nothing more is said: clients ask the new owner again.
//!
//! | module | what it has |
//! |---|---|
//! | `jobs` | what can be asked |
//! | `execute` | jobs on the core |
//! | `tell` | the burst is committed, and says so |
//! | `held` | what waits for recalls |
//! | `line` | requests that wait for delegations, and in which order they go on |

mod execute;
mod held;
mod jobs;
mod line;
mod tell;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, VecDeque},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use fjordfs_proto::{Epoch, FsError, FsResult, SessionId, pb::meta::Time};
use tokio::sync::mpsc;

use crate::{
    core::{Core, Moment},
    refusal::Refusal,
    service::outbox::Outbox,
    store::{MetaStore, Ticket},
    syncer::Syncer,
};
use held::Held;
pub(crate) use jobs::{Caller, Job, Jobs};
use line::{Line, Postponed};
use tell::{Call, Pending, Told};

/// Requests of one burst: bounds how long the first of them waits for the last.
const BURST_REQUESTS_MAX: usize = 4096;
/// Keys written by one burst, after which it is committed; less when the engine wants smaller batches.
const BURST_WRITES_MAX: usize = 16384;
/// Bursts that wait for an engine across a network, beyond which no background work is begun.
const BURSTS_UNTOLD_MAX: usize = 64;
/// What is committed last gets this long to arrive at an engine across a network when the server stops.
const STOP_PATIENCE: Duration = Duration::from_secs(10);
/// A store that has not acknowledged a burst for so long is away.
const STORE_AWAY: Duration = Duration::from_millis(500);
/// How often timeouts are looked at.
const TICK: Duration = Duration::from_millis(250);
/// The metadata disk counts as full below this share of it, within these bounds: room for tables being merged.
const SPACE_SHARE: u64 = 20;
const SPACE_MIN: u64 = 16 << 20;
const SPACE_MAX: u64 = 256 << 20;

/// See the module.
pub(crate) struct Executor {
    core: Core,
    store: Arc<dyn MetaStore>,
    syncer: Syncer,
    jobs: mpsc::UnboundedReceiver<Job>,
    /// The stream of each attached session.
    streams: HashMap<SessionId, Arc<Outbox>>,
    /// Where the store's disk is watched, if it is here.
    folder: Option<PathBuf>,
    answers: Vec<Pending>,
    calls: Vec<Call>,
    beats: Vec<(Arc<Outbox>, u64)>,
    /// Bursts that the store has yet to acknowledge.
    untold: VecDeque<Told>,
    /// Why this process must not say anything more.
    lost: Option<FsError>,
    /// Answers of earlier bursts that wait for recalls.
    held: Held<(Pending, Ticket)>,
    /// Requests that wait for delegations.
    postponed: Line,
    /// Epoch of the map that streams were sent.
    epoch: Epoch,
    next_tick: Instant,
    /// Keys written by one burst, after which it is committed.
    burst_writes: usize,
    /// The store, as the administrator named it.
    place: String,
    since: Instant,
    /// Requests of clients so far.
    operations: u64,
}

impl Executor {
    /// `folder` is where the store's disk is watched, if it is here; `place` names the store for people.
    pub(crate) fn new(
        core: Core,
        store: Arc<dyn MetaStore>,
        syncer: Syncer,
        folder: Option<PathBuf>,
        place: String,
    ) -> (Jobs, Executor) {
        let (submit, jobs) = Jobs::channel(store.sync_waiting().is_none());
        if let Some(late) = store.late() {
            let jobs = submit.clone();
            late.watch(Box::new(move || jobs.submit(Job::Progress)));
        }
        // With room for the records that an operation and the end of the burst add.
        let batch_writes = store.late().map_or(usize::MAX, |late| late.batch_writes() / 4 * 3);
        let burst_writes = BURST_WRITES_MAX.min(batch_writes.max(1));
        let executor = Executor {
            epoch: core.members().map().epoch,
            core,
            store,
            syncer,
            jobs,
            streams: HashMap::new(),
            folder,
            answers: Vec::new(),
            calls: Vec::new(),
            beats: Vec::new(),
            untold: VecDeque::new(),
            lost: None,
            held: Held::default(),
            postponed: Line::default(),
            next_tick: Instant::now(),
            burst_writes,
            place,
            since: Instant::now(),
            operations: 0,
        };
        (submit, executor)
    }

    /// Serves until it is told to stop; then finishes what has arrived and syncs the log.
    pub(crate) async fn run(mut self) -> FsResult<()> {
        let mut more = true;
        let mut running = true;
        while running && self.lost.is_none() {
            let first = self.next(more).await;
            let now = moment();
            running = self.burst(first, now);
            if let Some(e) = self.syncer.failure() {
                self.core.fail(e);
            }
            if now.mono >= self.next_tick {
                self.next_tick = now.mono + TICK;
                self.core.set_low_space(self.folder.as_deref().and_then(low_space));
                // What clients and servers are to do may wait for answers that wait for the store: no time runs for them
                // meanwhile. Afterwards it shows as a standstill of ours.
                if !self.is_store_away(now.mono) {
                    self.core.tick(now);
                }
            }
            // What clients ask is bounded by what they have under way; this is not.
            more = self.untold.len() < BURSTS_UNTOLD_MAX && self.core.background(now);
            self.finish();
            more |= self.postponed.is_any_ready();
        }
        let stopped = self.stop_store();
        for outbox in self.streams.values() {
            outbox.close(Some(Refusal::Unavailable(
                "the metaserver is stopping; it can be tried again".into(),
            )));
        }
        let synced = self.syncer.stop();
        stopped.and(synced)
    }

    /// Whether something committed has not been acknowledged for long.
    fn is_store_away(&self, now: Instant) -> bool {
        self.untold.front().is_some_and(|told| now.saturating_duration_since(told.since) > STORE_AWAY)
    }

    /// Tells what is still to be told, and lets go of the store.
    fn stop_store(&mut self) -> FsResult<()> {
        if let Some(e) = self.lost.take() {
            return Err(e);
        }
        let store = self.store.clone();
        let Some(late) = store.late() else { return Ok(()) };
        late.settle(STOP_PATIENCE).map_err(|e| FsError::from(&e))?;
        self.tell();
        late.release().map_err(|e| FsError::from(&e))
    }

    /// The next job; none when it is time for other work.
    async fn next(&mut self, more: bool) -> Option<Job> {
        let first = if more {
            None
        } else {
            let tick = tokio::time::Instant::from_std(self.next_tick);
            match tokio::time::timeout_at(tick, self.jobs.recv()).await {
                Ok(job) => Some(job.unwrap_or(Job::Stop)),
                Err(_) => None,
            }
        };
        // Whatever the sockets have got by now becomes one burst.
        tokio::task::yield_now().await;
        first.or_else(|| self.jobs.try_recv().ok())
    }

    /// Executes what has arrived. False when it is time to stop.
    fn burst(&mut self, first: Option<Job>, now: Moment) -> bool {
        let mut next = first;
        let mut requests = 0;
        // Before anything new: whoever waited for a delegation shall not lose it again to who asks later.
        for Postponed { session, outbox, request } in self.postponed.take_ready() {
            if self.is_current(session, &outbox) {
                self.request(session, &outbox, request, None, now);
            }
        }
        while let Some(job) = next {
            requests += match &job {
                Job::Stop => return false,
                Job::HandOver(_) if self.store.late().is_some() => {
                    self.execute(job, now);
                    return false;
                }
                Job::Requests { requests, .. } => requests.len().max(1),
                _ => 1,
            };
            self.execute(job, now);
            if requests >= BURST_REQUESTS_MAX
                || self.core.writes() >= self.burst_writes
                || self.lost.is_some()
            {
                break;
            }
            next = self.jobs.try_recv().ok();
        }
        true
    }
}

/// Both clocks, now.
pub(crate) fn moment() -> Moment {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let wall = Time { sec: since.as_secs() as i64, nsec: since.subsec_nanos() };
    Moment { wall, mono: Instant::now() }
}

/// Why operations that need space are refused, when the disk is nearly full: the engine cannot recover from a
/// write that fails, so it must not come to that.
fn low_space(folder: &std::path::Path) -> Option<String> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    let (total, free) =
        (stat.f_blocks.saturating_mul(stat.f_frsize), stat.f_bavail.saturating_mul(stat.f_frsize));
    let reserve = (total / SPACE_SHARE).clamp(SPACE_MIN, SPACE_MAX);
    (free < reserve).then(|| {
        format!(
            "the metadata disk at {} has {} MiB left and keeps {} MiB in reserve: free some space there",
            folder.display(),
            free >> 20,
            reserve >> 20
        )
    })
}
