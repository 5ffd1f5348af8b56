//! The thread that talks to the store: transactions in order, reads beside them.

use std::{
    collections::VecDeque,
    future::Future,
    io,
    ops::Range,
    sync::{Arc, atomic::AtomicBool, mpsc::SyncSender},
    time::{Duration, Instant},
};

use fjordfs_proto::pb::meta::StoreReport;

use super::{
    Fault, HEARTBEAT, Link, Shared,
    owner::{OWNER, Owner, Write},
    standby::{self, Sign},
};
use crate::store::{Fence, Order, Pair, StoreError, StoreResult};

/// A read that is not answered for so long is made again.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Wait between attempts: from, to.
pub(super) const BACKOFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));
/// Take-overs that fail for so long are given up, and reads, and with one of an owner its ownership: it could go on with nothing that
/// needs what it has not read, and whoever takes over, itself first of all, begins when the store is back.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Letting go of a store that does not answer is given up after so long.
const RELEASE_PATIENCE: Duration = Duration::from_secs(5);
/// Trouble that lasts is mentioned so often.
const COMPLAIN: Duration = Duration::from_secs(10);

/// What is asked of the thread. Commits come by way of the queue in [`Shared`].
pub(super) enum Request {
    Scan {
        range: Range<Vec<u8>>,
        order: Order,
        limit: usize,
        reply: SyncSender<StoreResult<Vec<Pair>>>,
    },
    /// There is something in the queue.
    Wake,
    TakeOver {
        reply: SyncSender<StoreResult<Fence>>,
    },
    /// Answers once the owner, if there is one, has been silent for long enough; false when `stop` came first.
    AwaitSilence {
        stop: Arc<AtomicBool>,
        /// For others who ask which standbys there are.
        name: Option<String>,
        reply: SyncSender<StoreResult<bool>>,
    },
    Release {
        reply: SyncSender<StoreResult<()>>,
    },
    /// Completes a report.
    Report {
        report: StoreReport,
        then: Box<dyn FnOnce(StoreReport) + Send>,
    },
}

/// A transaction.
#[derive(Clone)]
pub(super) struct Step {
    /// None: nobody has ever owned the store.
    pub(super) expected: Option<Owner>,
    pub(super) next: Owner,
    pub(super) writes: Arc<[Write]>,
}

pub(super) struct Worker {
    pub(super) link: Arc<dyn Link>,
    pub(super) shared: Arc<Shared>,
    pub(super) requests: tokio::sync::mpsc::UnboundedReceiver<Request>,
    /// The record that the last transaction sent writes, while this process owns the store.
    pub(super) owner: Option<Owner>,
    pub(super) holder: u64,
    /// Came during a transaction.
    pub(super) postponed: VecDeque<Request>,
}

impl Worker {
    /// Runs until the store is dropped.
    pub(super) async fn run(mut self) {
        let mut beat = tokio::time::interval(HEARTBEAT);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if self.shared.has_failed() {
                self.owner = None;
            }
            if let Some(request) = self.postponed.pop_front() {
                self.serve(request).await;
            } else {
                tokio::select! {
                    biased;
                    request = self.requests.recv() => match request {
                        None => return,
                        Some(request) => self.serve(request).await,
                    },
                    _ = beat.tick() => if self.owner.is_some() && self.shared.is_stale() {
                        let beaten = self.step(Vec::new(), |_| {}).await;
                        self.end_on(beaten);
                    },
                }
            }
            // What was committed meanwhile has been announced already.
            let flushed = self.flush().await;
            self.end_on(flushed);
        }
    }

    async fn serve(&mut self, request: Request) {
        match request {
            Request::Scan { range, order, limit, reply } => self.read(range, order, limit, reply),
            Request::Wake => {}
            Request::TakeOver { reply } => {
                let flushed = self.flush().await;
                self.end_on(flushed);
                let taken = self.take_over().await;
                if let Err(e) = &taken {
                    self.owner = None;
                    // Whoever opens the store asks here why: another was faster, or it is of no use.
                    self.shared.give_up(e);
                }
                let _ = reply.send(taken);
            }
            Request::AwaitSilence { stop, name, reply } => {
                let (link, shared) = (self.link.clone(), self.shared.clone());
                let sign = name.map(|name| Sign::new(self.holder, &name));
                tokio::spawn(async move {
                    let silent = standby::await_silence(&link, &stop, sign).await.map(|found| {
                        *shared.silent.lock() = found;
                        found.is_some()
                    });
                    let _ = reply.send(silent);
                });
            }
            Request::Report { report, then } => self.report(report, then),
            Request::Release { reply } => {
                let late =
                    Err(self.link.error("it does not answer: the next owner waits for silence".into()));
                let release = async {
                    self.flush().await?;
                    self.step(Vec::new(), |o| o.released = true).await
                };
                let released = tokio::time::timeout(RELEASE_PATIENCE, release).await.unwrap_or(late);
                if let Err(e) = &released {
                    // What is still queued may not arrive, and nobody shall wait for it.
                    self.shared.fail(&self.link.error(e.to_string()));
                }
                self.owner = None;
                let _ = reply.send(released);
            }
        }
    }

    /// Reads run beside transactions, of which the owner's overlay knows.
    fn read(
        &self,
        range: Range<Vec<u8>>,
        order: Order,
        limit: usize,
        reply: SyncSender<StoreResult<Vec<Pair>>>,
    ) {
        let (link, shared) = (self.link.clone(), self.shared.clone());
        let is_owner = self.owner.is_some();
        tokio::spawn(async move {
            let found = patiently(&link, || link.scan(range.clone(), order, limit)).await;
            if let Err(e) = &found
                && is_owner
            {
                shared.fail(e);
            }
            let _ = reply.send(found);
        });
    }

    fn report(&self, report: StoreReport, then: Box<dyn FnOnce(StoreReport) + Send>) {
        let link = self.link.clone();
        tokio::spawn(async move {
            let (servers, standbys) = tokio::join!(link.health(), standby::alive(&link));
            then(StoreReport { servers, standbys, ..report });
        });
    }

    pub(super) fn end_on(&mut self, result: StoreResult<()>) {
        if let Err(e) = result {
            self.owner = None;
            self.shared.fail(&e);
        }
    }

    /// Something is asked during a transaction. Reads go on: the executor may be waiting for one.
    pub(super) fn aside(&mut self, request: Request) {
        match request {
            Request::Scan { range, order, limit, reply } => self.read(range, order, limit, reply),
            Request::Report { report, then } => self.report(report, then),
            // The queue is looked at again in any case.
            Request::Wake => {}
            other => self.postponed.push_back(other),
        }
    }

    /// Waits for something of a transaction.
    pub(super) async fn beside<T>(&mut self, call: impl Future<Output = T>) -> T {
        let mut call = std::pin::pin!(call);
        loop {
            tokio::select! {
                biased;
                done = &mut call => return done,
                Some(request) = self.requests.recv() => self.aside(request),
            }
        }
    }

    /// The next transaction; `None` when this process owns nothing.
    pub(super) fn prepare(&mut self, writes: Vec<Write>, change: impl FnOnce(&mut Owner)) -> Option<Step> {
        let expected = self.owner?;
        let mut next = expected.next();
        change(&mut next);
        self.owner = Some(next);
        Some(Step { expected: Some(expected), next, writes: writes.into() })
    }

    /// One transaction, while no other is under way. When this returns it is as safe as the engine can make it.
    pub(super) async fn step(
        &mut self,
        writes: Vec<Write>,
        change: impl FnOnce(&mut Owner),
    ) -> StoreResult<()> {
        let Some(step) = self.prepare(writes, change) else { return Ok(()) };
        match self.insist(step).await? {
            Safe::Yes => Ok(()),
            Safe::Perhaps => self.secure().await,
        }
    }

    /// Makes everything that was found in the store safe there, by a transaction after it that succeeds.
    pub(super) async fn secure(&mut self) -> StoreResult<()> {
        while let Some(step) = self.prepare(Vec::new(), |_| {}) {
            if self.insist(step).await? == Safe::Yes {
                break;
            }
        }
        Ok(())
    }

    pub(super) async fn insist(&mut self, step: Step) -> StoreResult<Safe> {
        let insisting = insist(self.link.clone(), self.shared.clone(), step);
        self.beside(insisting).await
    }
}

/// What is known of a transaction that has happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Safe {
    /// The engine said that it succeeded.
    Yes,
    /// It was found in the store. An engine that came back after a crash can show what its standby does not have yet;
    /// it is safe when a later transaction has succeeded.
    Perhaps,
}

/// Sends a transaction until it has happened or is known to be impossible. No other that expects the same record, or a
/// later one, may be sent meanwhile; those that were sent before may arrive at any time.
pub(super) async fn insist(link: Arc<dyn Link>, shared: Arc<Shared>, step: Step) -> StoreResult<Safe> {
    let mut complaints = Complaints::default();
    let mut pause = BACKOFF.0;
    loop {
        let sent = Instant::now();
        let fault = match send(&link, &step).await {
            Ok(true) => {
                // Of one that leaves the record as it was, standbys see nothing.
                let changed = step.expected != Some(step.next);
                shared.succeeded(changed.then_some(sent));
                return Ok(Safe::Yes);
            }
            // Either somebody else owns the store, or an attempt of which nothing was heard had succeeded.
            Ok(false) => match timed(link.read_owner()).await {
                Ok(found) if found == step.expected => {
                    Fault::Unavailable("the owner's record changed back".into())
                }
                Ok(found) => {
                    judge(&*link, step.next, found)?;
                    return Ok(Safe::Perhaps);
                }
                Err(fault) => fault,
            },
            Err(fault) => fault,
        };
        match fault {
            Fault::Fatal(e) => return Err(e),
            // Whether it happened shows when it is tried again: it expects a record that it replaces.
            Fault::Unavailable(why) => {
                if shared.is_closing() {
                    return Err(link.error(why));
                }
                complaints.hear(&*link, &why, "trying the transaction again");
                shared.set_trouble(why);
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(BACKOFF.1);
            }
        }
    }
}

/// One attempt. The link sees to it that it ends.
pub(super) fn send(
    link: &Arc<dyn Link>,
    step: &Step,
) -> impl Future<Output = Result<bool, Fault>> + Send + use<> {
    let expected = step.expected.map(|owner| owner.encode()).unwrap_or_default();
    link.clone().apply(expected, step.next.encode(), step.writes.clone())
}

/// What a record says about a transaction of ours that writes `next`: it happened, or it never will.
fn judge(link: &dyn Link, next: Owner, found: Option<Owner>) -> StoreResult<()> {
    let found = found.unwrap_or_default();
    if (found.fence, found.holder) != (next.fence, next.holder) {
        return Err(StoreError::Fenced { ours: next.fence(), current: found.fence() });
    }
    if found.sequence < next.sequence {
        let what = "it has lost what it had acknowledged: was a standby promoted that was behind?".into();
        return Err(StoreError::Damaged { folder: link.place().into(), what });
    }
    Ok(())
}

/// Mentions lasting trouble now and then.
#[derive(Default)]
pub(super) struct Complaints {
    last: Option<Instant>,
}

impl Complaints {
    pub(super) fn hear(&mut self, link: &dyn Link, why: &str, what: &'static str) {
        if self.last.is_none_or(|at| at.elapsed() >= COMPLAIN) {
            self.last = Some(Instant::now());
            tracing::warn!(store = %link.place(), why, "{what}");
        }
    }
}

pub(super) async fn timed<T>(call: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
    let late = || Fault::Unavailable(format!("no answer within {} s", CALL_TIMEOUT.as_secs()));
    tokio::time::timeout(CALL_TIMEOUT, call).await.unwrap_or_else(|_| Err(late()))
}

/// Repeats a call without effect for as long as the link is worth it.
pub(super) async fn patiently<T, F: Future<Output = Result<T, Fault>>>(
    link: &Arc<dyn Link>,
    mut call: impl FnMut() -> F,
) -> StoreResult<T> {
    let begun = Instant::now();
    let mut complaints = Complaints::default();
    let mut pause = BACKOFF.0;
    loop {
        match timed(call()).await {
            Ok(found) => return Ok(found),
            Err(Fault::Fatal(e)) => return Err(e),
            Err(Fault::Unavailable(why)) if begun.elapsed() > link.patience() => {
                return Err(link.error(why));
            }
            Err(Fault::Unavailable(why)) => {
                complaints.hear(&**link, &why, "reading again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(BACKOFF.1);
            }
        }
    }
}

impl dyn Link + '_ {
    /// The owner's record.
    pub(super) async fn read_owner(&self) -> Result<Option<Owner>, Fault> {
        let end = [OWNER, &[0]].concat();
        let found = self.scan(OWNER.to_vec()..end, Order::Ascending, 1).await?;
        let Some((_, value)) = found.first().filter(|(_, v)| !v.is_empty()) else { return Ok(None) };
        Owner::decode(value).map(Some).ok_or_else(|| {
            Fault::Fatal(StoreError::Damaged {
                folder: self.place().into(),
                what: "its owner's record is of a newer release, or another program's: name an empty prefix or database".into(),
            })
        })
    }

    pub(super) fn error(&self, why: String) -> StoreError {
        StoreError::Io { folder: self.place().into(), source: io::Error::new(io::ErrorKind::TimedOut, why) }
    }
}
