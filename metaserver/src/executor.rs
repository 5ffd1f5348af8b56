//! The task that owns the namespace.
//!
//! It runs on the thread of the sockets, so that a request is read, executed and answered without waking anybody else: a
//! wake-up of another core costs more than most operations do. It takes whatever has arrived from all clients and data servers as one burst, executes each request in order on
//! the [`Core`], commits the burst as one batch, and only then answers. Under load a batch carries
//! many operations; idle, a single one waits for nobody. Answers that need the log on stable storage go through the
//! [`Syncer`], so this thread never waits for the device to be flushed.

mod held;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use fjordfs_proto::{
    Epoch, FsError, FsResult, SessionId,
    pb::meta::{
        ChangeTargetReply, ChangeTargetRequest, GivenBack, HeartbeatReply, HeartbeatRequest, Hello,
        RebalanceReply, RebalanceRequest, Recall, RegisterReply, RegisterRequest, Request, Response,
        ScrubReply, StatusReply, Time, WantedReply, WantedRequest, Welcome, response::Result as Reply,
    },
};
use tokio::sync::{mpsc, oneshot};

use crate::{
    core::{Answer, Core, Event, Moment, Outcome},
    leases::{Order, RecallId},
    refusal::Refusal,
    service::outbox::{Outbox, Permit, Ready},
    store::Ticket,
    syncer::Syncer,
};
use held::Held;

/// Requests of one burst: bounds how long the first of them waits for the last.
const BURST_REQUESTS_MAX: usize = 4096;
/// Keys written by one burst, after which it is committed.
const BURST_WRITES_MAX: usize = 16384;
/// How often timeouts are looked at.
const TICK: Duration = Duration::from_millis(250);
/// The metadata disk counts as full below this share of it, within these bounds: room for tables being merged.
const SPACE_SHARE: u64 = 20;
const SPACE_MIN: u64 = 16 << 20;
const SPACE_MAX: u64 = 256 << 20;

/// Where the answer to a unary call goes.
pub(crate) type Caller<T> = oneshot::Sender<Result<T, Refusal>>;

/// What can be asked of the executor.
pub(crate) enum Job {
    Attach {
        hello: Box<Hello>,
        outbox: Arc<Outbox>,
        caller: Caller<Welcome>,
    },
    /// The client is alive, and lets go of leases.
    Sign {
        session: SessionId,
        outbox: Arc<Outbox>,
        beat: u64,
        recalled: Vec<u64>,
        given_back: Option<GivenBack>,
        demoted: Option<GivenBack>,
    },
    /// Requests of one stream, in its order.
    Requests {
        session: SessionId,
        outbox: Arc<Outbox>,
        requests: Vec<(Request, Permit)>,
    },
    Goodbye {
        session: SessionId,
        outbox: Arc<Outbox>,
    },
    Detached {
        session: SessionId,
        outbox: Arc<Outbox>,
    },
    Register(Box<RegisterRequest>, Caller<RegisterReply>),
    Heartbeat(Box<HeartbeatRequest>, Caller<HeartbeatReply>),
    Wanted(Box<WantedRequest>, Caller<WantedReply>),
    ChangeTarget(Box<ChangeTargetRequest>, Caller<ChangeTargetReply>),
    Scrub(Caller<ScrubReply>),
    Rebalance(RebalanceRequest, Caller<RebalanceReply>),
    Status(Caller<StatusReply>),
    Stop,
}

/// Handle for those who have jobs.
#[derive(Clone)]
pub(crate) struct Jobs(mpsc::UnboundedSender<Job>);

impl Jobs {
    /// Unbounded here: each stream bounds what it has under way.
    pub(crate) fn channel() -> (Jobs, mpsc::UnboundedReceiver<Job>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Jobs(sender), receiver)
    }

    /// A job for a stopped executor is dropped, and with it the way to its caller.
    pub(crate) fn submit(&self, job: Job) {
        let _ = self.0.send(job);
    }
}

/// An answer of the burst, to be sent once it is committed.
struct Pending {
    outbox: Arc<Outbox>,
    response: Response,
    permit: Permit,
    sync: bool,
    recalls: Vec<RecallId>,
}

/// A request that could not be executed yet.
struct Postponed {
    session: SessionId,
    outbox: Arc<Outbox>,
    request: Request,
}

/// A call's answer: told whether the burst was committed.
struct Call {
    sync: bool,
    answer: Box<dyn FnOnce(FsResult<()>) + Send>,
}

/// See the module.
pub(crate) struct Executor {
    core: Core,
    syncer: Syncer,
    jobs: mpsc::UnboundedReceiver<Job>,
    /// The stream of each attached session.
    streams: HashMap<SessionId, Arc<Outbox>>,
    folder: PathBuf,
    answers: Vec<Pending>,
    calls: Vec<Call>,
    /// Answers of earlier bursts that wait for recalls.
    held: Held<(Pending, Ticket)>,
    /// Requests that wait for delegations.
    postponed: Held<Postponed>,
    /// Those that wait no longer.
    ready: Vec<Postponed>,
    /// Epoch of the map that streams were sent.
    epoch: Epoch,
    next_tick: Instant,
}

impl Executor {
    /// `folder` is where the store's disk is watched.
    pub(crate) fn new(core: Core, syncer: Syncer, folder: PathBuf) -> (Jobs, Executor) {
        let (submit, jobs) = Jobs::channel();
        let executor = Executor {
            epoch: core.members().map().epoch,
            core,
            syncer,
            jobs,
            streams: HashMap::new(),
            folder,
            answers: Vec::new(),
            calls: Vec::new(),
            held: Held::default(),
            postponed: Held::default(),
            ready: Vec::new(),
            next_tick: Instant::now(),
        };
        (submit, executor)
    }

    /// Serves until it is told to stop; then finishes what has arrived and syncs the log.
    pub(crate) async fn run(mut self) -> FsResult<()> {
        let mut more = true;
        let mut running = true;
        while running {
            let first = self.next(more).await;
            let now = moment();
            running = self.burst(first, now);
            if let Some(e) = self.syncer.failure() {
                self.core.fail(e);
            }
            if now.mono >= self.next_tick {
                self.next_tick = now.mono + TICK;
                self.core.set_low_space(low_space(&self.folder));
                self.core.tick(now);
            }
            more = self.core.background(now);
            self.finish();
            more |= !self.ready.is_empty();
        }
        for outbox in self.streams.values() {
            outbox.close(Some(Refusal::Unavailable(
                "the metaserver is stopping; it can be tried again".into(),
            )));
        }
        self.syncer.stop()
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
        for Postponed { session, outbox, request } in std::mem::take(&mut self.ready) {
            if self.is_current(session, &outbox) {
                self.request(session, &outbox, request, None, now);
            }
        }
        while let Some(job) = next {
            requests += match &job {
                Job::Stop => return false,
                Job::Requests { requests, .. } => requests.len().max(1),
                _ => 1,
            };
            self.execute(job, now);
            if requests >= BURST_REQUESTS_MAX || self.core.writes() >= BURST_WRITES_MAX {
                break;
            }
            next = self.jobs.try_recv().ok();
        }
        true
    }

    fn execute(&mut self, job: Job, now: Moment) {
        match job {
            Job::Attach { hello, outbox, caller } => self.attach(&hello, outbox, caller, now),
            Job::Sign { session, outbox, beat, recalled, given_back, demoted } => {
                if self.is_current(session, &outbox) && self.core.hear(session, now) {
                    self.core.let_go(session, &recalled, given_back.as_ref(), demoted.as_ref());
                    if beat != 0 {
                        self.core.settled(session);
                        outbox.push_beat(beat);
                    }
                }
            }
            Job::Requests { session, outbox, requests } => {
                // A stream that was replaced may have left requests behind; the client sends them again on the new one.
                if self.is_current(session, &outbox) && self.core.hear(session, now) {
                    for (request, permit) in requests {
                        self.request(session, &outbox, request, permit, now);
                    }
                }
            }
            Job::Goodbye { session, outbox } => {
                if self.is_current(session, &outbox) {
                    self.core.goodbye(session, now);
                    self.streams.remove(&session);
                    // Behind the answers that still wait for the log.
                    self.call(true, move |_| outbox.close(None));
                }
            }
            Job::Detached { session, outbox } => {
                if self.is_current(session, &outbox) {
                    self.streams.remove(&session);
                    self.core.detach(session);
                }
            }
            Job::Register(request, caller) => {
                let result = self.core.register(&request, now);
                self.reply(true, caller, result);
            }
            Job::Heartbeat(request, caller) => {
                let result = self.core.heartbeat(&request, now);
                // Deletions must not run ahead of the log: a power failure here could bring their blocks back to life.
                let sync = result.as_ref().is_ok_and(|r| r.map.is_some() || !r.deletes.is_empty());
                self.reply(sync, caller, result);
            }
            Job::Wanted(request, caller) => {
                let result = self.core.wanted(&request);
                self.reply(false, caller, result);
            }
            Job::ChangeTarget(request, caller) => {
                let result = self.core.change_target(&request, now);
                self.reply(true, caller, result);
            }
            Job::Scrub(caller) => {
                let result = self.core.scrub();
                self.reply(true, caller, result);
            }
            Job::Rebalance(request, caller) => {
                let result = self.core.rebalance(&request);
                self.reply(true, caller, result);
            }
            Job::Status(caller) => {
                let status = self.core.status(now);
                self.reply(false, caller, Ok(status));
            }
            Job::Stop => {}
        }
    }

    fn request(
        &mut self,
        session: SessionId,
        outbox: &Arc<Outbox>,
        request: Request,
        permit: Permit,
        now: Moment,
    ) {
        match self.core.request(session, request, now) {
            Outcome::Answered(Answer { response, sync, recalls }) => {
                self.answers.push(Pending { outbox: outbox.clone(), response, permit, sync, recalls });
            }
            // Its share of memory is given back, as with answers that are held.
            Outcome::Postponed(request, recalls) => {
                self.postponed.hold(Postponed { session, outbox: outbox.clone(), request }, recalls);
            }
            Outcome::Waiting => {}
        }
        self.answer_locks();
    }

    /// Requests for locks that have waited. At once, so that a stream's answers are in the order of what they tell.
    fn answer_locks(&mut self) {
        for (session, response) in self.core.take_lock_answers() {
            // Without a stream nobody is told, and the client will ask again.
            if let Some(outbox) = self.streams.get(&session) {
                let outbox = outbox.clone();
                self.answers.push(Pending {
                    outbox,
                    response,
                    permit: None,
                    sync: false,
                    recalls: Vec::new(),
                });
            }
        }
    }

    fn is_current(&self, session: SessionId, outbox: &Arc<Outbox>) -> bool {
        self.streams.get(&session).is_some_and(|current| Arc::ptr_eq(current, outbox))
    }

    fn attach(&mut self, hello: &Hello, outbox: Arc<Outbox>, caller: Caller<Welcome>, now: Moment) {
        let result = self.core.attach(hello, now);
        if let Ok(welcome) = &result {
            tracing::info!(session = welcome.session, client = hello.client, "client attached");
            if let Some(old) = self.streams.insert(SessionId(welcome.session), outbox) {
                old.close(Some(Refusal::Aborted("the session attached again on another stream".into())));
            }
        }
        self.reply(true, caller, result);
    }

    fn call(&mut self, sync: bool, answer: impl FnOnce(FsResult<()>) + Send + 'static) {
        self.calls.push(Call { sync, answer: Box::new(answer) });
    }

    fn reply<T: Send + 'static>(&mut self, sync: bool, caller: Caller<T>, result: Result<T, Refusal>) {
        let sync = sync && result.is_ok();
        self.call(sync, move |committed| {
            // A caller that went away needs no answer.
            let _ = caller.send(match committed {
                Ok(()) => result,
                Err(e) => Err(e.into()),
            });
        });
    }

    /// Commits the burst and answers it.
    fn finish(&mut self) {
        self.answer_locks();
        let wrote = self.core.writes() > 0;
        let committed = self.core.commit();
        if wrote && committed.is_ok() {
            self.syncer.note();
        }
        let committed = match committed {
            Ok(ticket) => ticket,
            Err(e) => return self.refuse_burst(&e),
        };
        self.push_map(committed);
        self.answer(committed);
        for call in std::mem::take(&mut self.calls) {
            if call.sync { self.syncer.after(committed, call.answer) } else { (call.answer)(Ok(())) }
        }
        self.recall();
        for Event::SessionEnded(session, why) in self.core.take_events() {
            if let Some(outbox) = self.streams.remove(&session) {
                outbox.close(Some(why));
            }
        }
    }

    /// Nothing of the burst happened: everybody in it is told.
    fn refuse_burst(&mut self, e: &FsError) {
        for Pending { outbox, mut response, permit, .. } in std::mem::take(&mut self.answers) {
            // Locks are not in the store.
            if !matches!(response.result, Some(Reply::Lock(_))) {
                let result = Some(Reply::Error(e.clone().into()));
                response = Response { id: response.id, result, ..Response::default() };
            }
            outbox.push([Ready { response, permit }]);
        }
        for call in std::mem::take(&mut self.calls) {
            (call.answer)(Err(e.clone()));
        }
    }

    fn answer(&mut self, committed: Ticket) {
        let mut free = Vec::with_capacity(self.answers.len());
        for mut pending in std::mem::take(&mut self.answers) {
            match std::mem::take(&mut pending.recalls) {
                recalls if recalls.is_empty() => free.push((pending, committed)),
                recalls => {
                    // Given back at once: the message with which its client obeys a recall must not wait for the room that its
                    // own answers take.
                    pending.permit = None;
                    self.held.hold((pending, committed), recalls);
                }
            }
        }
        // Behind the answers of the burst that ended the recalls: nothing waits for them any more.
        let ended = self.core.take_ended_recalls();
        free.extend(self.held.release(&ended));
        self.ready = self.postponed.release(&ended);
        // Answers of one stream stand together mostly: each run of them is one push, so one message and one wake-up.
        let mut run: Vec<Ready> = Vec::new();
        let mut owner: Option<Arc<Outbox>> = None;
        for (Pending { outbox, response, permit, sync, .. }, committed) in free {
            let ready = Ready { response, permit };
            if sync {
                self.syncer.after(committed, move |synced| outbox.push([ready.unless(synced)]));
                continue;
            }
            if let Some(before) = owner.take_if(|owner| !Arc::ptr_eq(owner, &outbox)) {
                before.push(std::mem::take(&mut run));
            }
            run.push(ready);
            owner.get_or_insert(outbox);
        }
        if let Some(owner) = owner {
            owner.push(run);
        }
    }

    /// Sends recalls, behind the answers that granted what they take back.
    fn recall(&mut self) {
        for Order { session, id, ino, delegated } in self.core.take_recalls() {
            // Without a stream the holder cannot be told; its silence ends the recall.
            if let Some(outbox) = self.streams.get(&session) {
                outbox.push_recall(Recall { id: id.0, ino: ino.0, delegated });
            }
        }
    }

    /// A new map goes to every stream, once a power failure cannot take it back: clients place blocks by it.
    fn push_map(&mut self, committed: Ticket) {
        let map = self.core.members().map();
        if map.epoch == self.epoch {
            return;
        }
        self.epoch = map.epoch;
        let map = Arc::new(map.to_pb());
        let streams: Vec<Arc<Outbox>> = self.streams.values().cloned().collect();
        self.syncer.after(committed, move |synced| {
            if synced.is_ok() {
                streams.iter().for_each(|outbox| outbox.push_map(map.clone()));
            }
        });
    }
}

fn moment() -> Moment {
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
