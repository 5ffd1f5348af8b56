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

mod held;

use std::{
    collections::{HashMap, VecDeque},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use fjordfs_proto::{
    Epoch, FsError, FsResult, SessionId,
    pb::common::ClusterMap,
    pb::meta::{
        ChangeTargetReply, ChangeTargetRequest, GivenBack, HeartbeatReply, HeartbeatRequest, Hello,
        MendReply, MendRequest, MetaStatusReply, RebalanceReply, RebalanceRequest, Recall, RegisterReply,
        RegisterRequest, Request, Response, ScrubReply, StatusReply, Time, WantedReply, WantedRequest,
        Welcome, response::Result as Reply,
    },
};
use tokio::sync::{mpsc, oneshot};

use crate::{
    core::{Answer, Core, Event, Moment, Outcome},
    fsck::repair::Fix,
    leases::{Order, RecallId},
    refusal::Refusal,
    service::outbox::{Outbox, Permit, Ready},
    store::{Late, MetaStore, Snapshot, Ticket},
    syncer::Syncer,
    upkeep::Upkeep,
};
use held::Held;

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
    /// The store as it is, for those who read all of it.
    Snapshot(Caller<Snapshot>),
    /// Mend what a check has found.
    Repair(Vec<Fix>, Caller<u64>),
    Mend(Box<MendRequest>, Caller<MendReply>),
    MetaStatus(Caller<MetaStatusReply>),
    /// Let go of the store and stop; a standby goes on.
    HandOver(Caller<()>),
    /// The store got further, or lost its owner.
    Progress,
    Stop,
}

/// Handle for those who have jobs.
#[derive(Clone)]
pub(crate) struct Jobs {
    sender: mpsc::UnboundedSender<Job>,
    upkeep: Arc<Upkeep>,
    threads: bool,
}

impl Jobs {
    /// Unbounded here: each stream bounds what it has under way. `threads`: see [`Jobs::threads`].
    pub(crate) fn channel(threads: bool) -> (Jobs, mpsc::UnboundedReceiver<Job>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Jobs { sender, upkeep: Arc::default(), threads }, receiver)
    }

    /// A job for a stopped executor is dropped, and with it the way to its caller.
    pub(crate) fn submit(&self, job: Job) {
        let _ = self.sender.send(job);
    }

    /// Whether what takes long may have a thread. An engine that waits in the runtime is of a program in which all happens there.
    pub(crate) fn threads(&self) -> bool {
        self.threads
    }

    /// What is neither a job nor takes one.
    pub(crate) fn upkeep(&self) -> &Arc<Upkeep> {
        &self.upkeep
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

/// What a committed burst tells, in this order.
struct Told {
    committed: Ticket,
    /// When it was committed.
    since: Instant,
    map: Option<Arc<ClusterMap>>,
    answers: Vec<(Pending, Ticket)>,
    calls: Vec<Call>,
    recalls: Vec<Order>,
    ended: Vec<Event>,
    beats: Vec<(Arc<Outbox>, u64)>,
}

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
    postponed: Held<Postponed>,
    /// Those that wait no longer.
    ready: Vec<Postponed>,
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
            postponed: Held::default(),
            ready: Vec::new(),
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
            more |= !self.ready.is_empty();
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
        for Postponed { session, outbox, request } in std::mem::take(&mut self.ready) {
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

    fn execute(&mut self, job: Job, now: Moment) {
        match job {
            Job::Attach { hello, outbox, caller } => self.attach(&hello, outbox, caller, now),
            Job::Sign { session, outbox, beat, recalled, given_back, demoted } => {
                if self.is_current(session, &outbox) && self.core.hear(session, now) {
                    self.core.let_go(session, &recalled, given_back.as_ref(), demoted.as_ref());
                    if beat != 0 {
                        self.core.settled(session);
                        self.beats.push((outbox, beat));
                    }
                }
            }
            Job::Requests { session, outbox, requests } => {
                // A stream that was replaced may have left requests behind; the client sends them again on the new one.
                if self.is_current(session, &outbox) && self.core.hear(session, now) {
                    for (request, permit) in requests {
                        self.request(session, &outbox, request, permit, now);
                        // Each is whole by itself: a client's message may become several batches.
                        if self.core.writes() >= self.burst_writes {
                            self.finish();
                            if self.lost.is_some() {
                                return;
                            }
                        }
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
            Job::Snapshot(caller) => {
                let snapshot = self.core.snapshot().map_err(Refusal::from);
                self.reply(false, caller, snapshot);
            }
            Job::Repair(fixes, caller) => {
                let result = self.core.repair(&fixes, now);
                self.reply(true, caller, result);
            }
            Job::Mend(request, caller) => {
                let result = self.core.mend(&request, now);
                self.reply(true, caller, result.map(|deletions| MendReply { deletions }));
            }
            Job::MetaStatus(caller) => self.meta_status(caller, now),
            Job::HandOver(caller) => match self.store.late() {
                Some(_) => self.reply(false, caller, Ok(())),
                None => {
                    let alone = Refusal::Precondition(
                        "the metadata is in a folder of this host: nobody else can take it over".into(),
                    );
                    self.reply(false, caller, Err(alone));
                }
            },
            Job::Progress | Job::Stop => {}
        }
    }

    /// Answered at once, also while the store is away: it is asked then, too.
    fn meta_status(&mut self, caller: Caller<MetaStatusReply>, now: Moment) {
        let mut reply = self.core.meta_status();
        reply.store.clone_from(&self.place);
        reply.uptime_ms = now.mono.duration_since(self.since).as_millis() as u64;
        reply.operations = self.operations;
        // A caller that went away needs no answer.
        match self.store.late() {
            None => drop(caller.send(Ok(reply))),
            Some(late) => late.report(Box::new(move |report| {
                drop(caller.send(Ok(MetaStatusReply { shared: Some(report), ..reply })));
            })),
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
        self.operations += 1;
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
        if wrote && committed.is_ok() && self.store.late().is_none() {
            self.syncer.note();
        }
        let committed = match committed {
            Ok(ticket) => ticket,
            Err(e) if self.store.late().is_some() => {
                self.lost = Some(e);
                return;
            }
            Err(e) => return self.refuse_burst(&e),
        };
        let told = Told {
            committed,
            since: Instant::now(),
            map: self.new_map(),
            answers: self.free_answers(committed),
            calls: std::mem::take(&mut self.calls),
            recalls: self.core.take_recalls(),
            ended: self.core.take_events(),
            beats: std::mem::take(&mut self.beats),
        };
        self.untold.push_back(told);
        self.tell();
    }

    /// Says what may be said by now.
    fn tell(&mut self) {
        let store = self.store.clone();
        let upto = match store.late().map(Late::acknowledged) {
            None => Ticket(u64::MAX),
            Some(Ok(upto)) => upto,
            Some(Err(e)) => {
                self.lost = Some(FsError::from(&e));
                return;
            }
        };
        if self.untold.front().is_none_or(|told| told.committed > upto)
            || store.late().is_some_and(|l| !l.is_owner())
        {
            return;
        }
        while let Some(told) = self.untold.pop_front_if(|told| told.committed <= upto) {
            self.tell_one(told);
        }
    }

    fn tell_one(&mut self, told: Told) {
        let Told { committed, since: _, map, answers, calls, recalls, ended, beats } = told;
        if let Some(map) = map {
            self.push_map(&map, committed);
        }
        for (outbox, beat) in beats {
            outbox.push_beat(beat);
        }
        self.answer(answers);
        for call in calls {
            if call.sync { self.after(committed, call.answer) } else { (call.answer)(Ok(())) }
        }
        self.recall(recalls);
        for Event::SessionEnded(session, why) in ended {
            if let Some(outbox) = self.streams.remove(&session) {
                outbox.close(Some(why));
            }
        }
    }

    /// Calls `then` when a committed burst survives power failure. An engine across a network has told so already.
    fn after(&self, committed: Ticket, then: impl FnOnce(FsResult<()>) + Send + 'static) {
        match self.store.late() {
            Some(_) => then(Ok(())),
            None => self.syncer.after(committed, then),
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

    /// Answers of this burst that wait for no recall, and earlier ones that do not any more.
    fn free_answers(&mut self, committed: Ticket) -> Vec<(Pending, Ticket)> {
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
        self.ready.extend(self.postponed.release(&ended));
        free
    }

    fn answer(&self, free: Vec<(Pending, Ticket)>) {
        // Answers of one stream stand together mostly: each run of them is one push, so one message and one wake-up.
        let mut run: Vec<Ready> = Vec::new();
        let mut owner: Option<Arc<Outbox>> = None;
        for (Pending { outbox, response, permit, sync, .. }, committed) in free {
            let ready = Ready { response, permit };
            if sync {
                self.after(committed, move |synced| outbox.push([ready.unless(synced)]));
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
    fn recall(&self, recalls: Vec<Order>) {
        for Order { session, id, ino, delegated } in recalls {
            // Without a stream the holder cannot be told; its silence ends the recall.
            if let Some(outbox) = self.streams.get(&session) {
                outbox.push_recall(Recall { id: id.0, ino: ino.0, delegated });
            }
        }
    }

    /// The map, when the burst changed it.
    fn new_map(&mut self) -> Option<Arc<ClusterMap>> {
        let map = self.core.members().map();
        if map.epoch == self.epoch {
            return None;
        }
        self.epoch = map.epoch;
        Some(Arc::new(map.to_pb()))
    }

    /// A new map goes to every stream, once a power failure cannot take it back: clients place blocks by it.
    fn push_map(&self, map: &Arc<ClusterMap>, committed: Ticket) {
        let map = map.clone();
        let streams: Vec<Arc<Outbox>> = self.streams.values().cloned().collect();
        self.after(committed, move |synced| {
            if synced.is_ok() {
                streams.iter().for_each(|outbox| outbox.push_map(map.clone()));
            }
        });
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
