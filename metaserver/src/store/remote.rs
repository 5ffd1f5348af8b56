//! The store on an engine across a network.
//!
//! Everything that the engines have in common: ownership, the order of transactions, group commit, what a time-out
//! means, and what the owner remembers. An engine adds a [`Link`]: one atomic compare-and-write and one ordered read.
//!
//! # Crash consistency
//! [`MetaStore::commit`] only queues: the batch is the engine's, and so survives anything, once [`Late::acknowledged`] or
//! [`MetaStore::sync`] say so. Until then nobody may be told of it. Whoever asks this process sees it at once.
//!
//! Every transaction expects the owner's record as the last one left it and writes the next one (fence, sequence). So
//! the engine applies transactions of one owner only, in order and each once, and a time-out is harmless: the owner's
//! record tells what became of the transaction, and repeating it cannot apply it twice, even when the first attempt
//! is still on its way. A batch above the engine's limits is decided by one transaction and rolled forward
//! ([`parts`]).
//!
//! # Ownership
//! A standby watches the owner's record and takes over when it has not changed for [`TAKE_OVER_SILENCE`]. The owner changes it
//! at least every [`HEARTBEAT`], and must not answer anybody when its last change was begun longer than [`OWNERSHIP`] ago:
//! somebody else may answer by then. All by each host's own clock. A clock that stands still with its host, as that of a
//! virtual machine that is moved or kept as a snapshot, deceives its owner: writes of it are refused as always, but for the
//! rest of its time it can answer reads of what the next owner has changed.
//!
//! # Group commit
//! A few transactions are under way; what is committed meanwhile shares the next ([`window`]).

mod cache;
mod etcd;
mod owner;
mod parts;
mod postgres;
mod standby;
mod takeover;
mod window;
mod worker;

#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::{Batch, Fence, Late, MetaStore, Order, Pair, StoreError, StoreResult, Ticket, url::Place};
use cache::Cache;
use fjordfs_proto::pb::meta::StoreReport;
use owner::{Owner, Write};
use worker::{Request, Worker};

/// The owner changes its record at least so often.
const HEARTBEAT: Duration = Duration::from_millis(400);
/// A standby takes over when the record has not changed for so long.
pub(crate) const TAKE_OVER_SILENCE: Duration = Duration::from_millis(3000);
/// How long the owner may answer after the start of a transaction that succeeded. The difference to the above covers
/// clocks that run apart.
const OWNERSHIP: Duration = Duration::from_millis(2500);
const _: () = assert!(OWNERSHIP.as_millis() < TAKE_OVER_SILENCE.as_millis());

/// Why a call of an engine failed.
#[derive(Debug)]
enum Fault {
    /// It may work when tried again, and may have worked this time.
    Unavailable(String),
    /// It will not.
    Fatal(StoreError),
}

/// What a transaction may hold besides the owner's record.
#[derive(Clone, Copy)]
struct Limits {
    writes: usize,
    /// Keys and values, with some room.
    bytes: usize,
}

/// One engine.
trait Link: Send + Sync {
    /// Applies all writes and makes `next` the owner's record, if that is `expected` (empty: there is none). False, and
    /// without effect, if it is not. Ends after some seconds at most, with [`Fault::Unavailable`] when nothing is known.
    ///
    /// True means that nothing which the engine is meant to survive undoes it.
    fn apply(
        self: Arc<Self>,
        expected: Bytes,
        next: Bytes,
        writes: Arc<[Write]>,
    ) -> BoxFuture<'static, Result<bool, Fault>>;

    /// The first pairs of a range, as of a moment after the call.
    fn scan(
        &self,
        range: Range<Vec<u8>>,
        order: Order,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Pair>, Fault>>;

    fn limits(&self) -> Limits;

    /// What is read is tried again for so long.
    fn patience(&self) -> Duration {
        worker::PATIENCE
    }

    /// Sets or removes a key, whoever owns the store: one of [`owner::STANDBYS`].
    fn note(&self, key: Vec<u8>, value: Option<Bytes>) -> BoxFuture<'_, Result<(), Fault>>;

    /// What its servers say of themselves, a line each, for people. Ends after some seconds at most.
    fn health(&self) -> BoxFuture<'_, Vec<String>>;

    /// The store as the user named it, without a password.
    fn place(&self) -> &str;
}

type Notify = Box<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct State {
    /// Batches that are in no transaction yet.
    queue: VecDeque<(u64, Vec<Write>)>,
    fence: Option<Fence>,
    issued: u64,
    acknowledged: u64,
    /// Start of the last transaction that is known to have succeeded and changed the owner's record.
    confirmed: Option<Instant>,
    failed: Option<Failure>,
    /// What the store said when it was last of no use; none once it is again.
    trouble: Option<String>,
    /// Transactions that are known to have succeeded.
    transactions: u64,
}

/// What ended this process's ownership.
#[derive(Clone)]
enum Failure {
    Fenced { current: Fence },
    Other(String),
}

struct Shared {
    cache: Mutex<Cache>,
    /// Keys that the store has as of a ticket, and of which the cache does not know yet.
    landed: Mutex<Vec<(u64, Arc<[Write]>)>>,
    state: Mutex<State>,
    progress: Condvar,
    notify: Mutex<Option<Notify>>,
    /// The record of the owner that was found silent: only from that one may the store be taken. Of several standbys
    /// one succeeds, and the others do not take it from the new owner.
    silent: Mutex<Option<Option<Owner>>>,
    closing: AtomicBool,
}

impl Shared {
    fn begin(&self, owner: Owner, sent: Instant) {
        let mut state = self.state.lock();
        state.fence = Some(owner.fence());
        state.confirmed = Some(sent);
    }

    /// A transaction has succeeded; when it was sent, if it has changed the owner's record.
    fn succeeded(&self, sent: Option<Instant>) {
        let mut state = self.state.lock();
        let lapsed = sent.is_some() && state.confirmed.is_none_or(|at| at.elapsed() > OWNERSHIP);
        state.confirmed = state.confirmed.max(sent);
        state.trouble = None;
        state.transactions += 1;
        drop(state);
        if lapsed {
            self.tell();
        }
    }

    fn is_stale(&self) -> bool {
        self.state.lock().confirmed.is_none_or(|at| at.elapsed() >= HEARTBEAT)
    }

    /// The cache, up to date with what the store has acknowledged.
    fn cache(&self) -> MutexGuard<'_, Cache> {
        let mut cache = self.cache.lock();
        for (ticket, writes) in std::mem::take(&mut *self.landed.lock()) {
            cache.acknowledged(writes.iter().map(|(key, _)| key), ticket);
        }
        cache
    }

    /// The store has these writes, and reads of it show them. Does not wait for the cache: whoever reads holds it, and
    /// waits for this thread.
    fn land(&self, writes: Arc<[Write]>, ticket: u64) {
        self.landed.lock().push((ticket, writes));
    }

    /// What was committed up to `ticket` is safe.
    fn acknowledge(&self, ticket: u64) {
        self.state.lock().acknowledged = ticket;
        self.tell();
    }

    fn fail(&self, e: &StoreError) {
        tracing::error!(error = %e, "this metaserver no longer owns the store");
        self.give_up(e);
    }

    /// Everything from here on fails for the reason `e`.
    fn give_up(&self, e: &StoreError) {
        let mut state = self.state.lock();
        state.queue.clear();
        state.failed = Some(match e {
            StoreError::Fenced { current, .. } => Failure::Fenced { current: *current },
            other => Failure::Other(other.to_string()),
        });
        drop(state);
        self.tell();
    }

    fn tell(&self) {
        self.progress.notify_all();
        if let Some(notify) = &*self.notify.lock() {
            notify();
        }
    }

    fn has_failed(&self) -> bool {
        self.state.lock().failed.is_some()
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    fn set_trouble(&self, why: String) {
        self.state.lock().trouble = Some(why);
    }
}

/// See the module.
pub struct RemoteStore {
    shared: Arc<Shared>,
    requests: Option<tokio::sync::mpsc::UnboundedSender<Request>>,
    thread: Option<JoinHandle<()>>,
    place: String,
    engine: &'static str,
    batch_writes: usize,
}

impl RemoteStore {
    /// Connects to the engine at `place`; it is not owned yet. `cache_bytes` bounds what is remembered of it.
    ///
    /// # Errors
    /// When it is of no use: wrong credentials, an unknown database, too old a version. One that cannot be reached is waited for later.
    pub fn open(place: &Place, cache_bytes: u64) -> StoreResult<RemoteStore> {
        let engine = match place {
            Place::Postgres { .. } => "postgres",
            _ => "etcd",
        };
        let to = place.clone();
        RemoteStore::start(place.to_string(), engine, cache_bytes, move || Box::pin(connect(to)))
    }

    /// Whether nobody owns the store, so far as that shows within the time in which an owner gives signs.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn is_free(&self) -> StoreResult<bool> {
        let stop = Arc::new(AtomicBool::new(false));
        let (done, waiting) = mpsc::channel::<()>();
        let waker = stop.clone();
        let timer = std::thread::Builder::new().name("meta-wait".into()).spawn(move || {
            // Longer than an owner's silence; ended early by the answer.
            let _ = waiting.recv_timeout(TAKE_OVER_SILENCE + TAKE_OVER_SILENCE / 2);
            waker.store(true, Ordering::Relaxed);
        });
        let timer = timer.map_err(|e| self.error(e))?;
        let free = self.await_silence(stop, None);
        drop(done);
        if timer.join().is_err() {
            return Err(self.error(io::Error::other("a thread panicked")));
        }
        free
    }

    fn start(
        place: String,
        engine: &'static str,
        cache_bytes: u64,
        connect: impl FnOnce() -> BoxFuture<'static, StoreResult<Arc<dyn Link>>> + Send + 'static,
    ) -> StoreResult<RemoteStore> {
        let shared = Arc::new(Shared {
            cache: Mutex::new(Cache::new(usize::try_from(cache_bytes).unwrap_or(usize::MAX))),
            landed: Mutex::default(),
            state: Mutex::default(),
            progress: Condvar::new(),
            notify: Mutex::default(),
            silent: Mutex::default(),
            closing: AtomicBool::new(false),
        });
        let (requests, receiver) = tokio::sync::mpsc::unbounded_channel();
        let (ready, opened) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new().name("meta-store".into()).spawn({
            let shared = shared.clone();
            let place = place.clone();
            move || match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => {
                    runtime.block_on(serve(connect(), shared, receiver, &ready));
                    runtime.shutdown_background();
                }
                Err(e) => drop(ready.send(Err(io_error(&place, e)))),
            }
        });
        let thread = thread.map_err(|e| io_error(&place, e))?;
        let gone = || Err(io_error(&place, io::Error::other("its thread ended at once")));
        let limits = opened.recv().unwrap_or_else(|_| gone())?;
        let (requests, thread) = (Some(requests), Some(thread));
        Ok(RemoteStore { shared, requests, thread, place, engine, batch_writes: limits.writes })
    }

    fn ask<T>(&self, request: impl FnOnce(mpsc::SyncSender<StoreResult<T>>) -> Request) -> StoreResult<T> {
        let gone = || self.error(io::Error::other("its thread has ended"));
        let (reply, answer) = mpsc::sync_channel(1);
        let requests = self.requests.as_ref().ok_or_else(gone)?;
        requests.send(request(reply)).map_err(|_| gone())?;
        answer.recv().unwrap_or_else(|_| Err(gone()))
    }

    fn error(&self, source: io::Error) -> StoreError {
        io_error(&self.place, source)
    }

    fn failure(&self, state: &State) -> StoreResult<()> {
        match &state.failed {
            None => Ok(()),
            Some(Failure::Fenced { current }) => {
                Err(StoreError::Fenced { ours: state.fence.unwrap_or(Fence(0)), current: *current })
            }
            Some(Failure::Other(why)) => Err(self.error(io::Error::other(why.clone()))),
        }
    }

    /// Waits until everything committed so far is safe. When that has not come by the `deadline`, nothing is
    /// committed any more.
    fn wait(&self, deadline: Option<Instant>) -> StoreResult<Ticket> {
        let mut state = self.shared.state.lock();
        let upto = state.issued;
        while state.acknowledged < upto {
            self.failure(&state)?;
            match deadline {
                None => self.shared.progress.wait(&mut state),
                Some(at) => {
                    if self.shared.progress.wait_until(&mut state, at).timed_out()
                        && state.acknowledged < upto
                    {
                        let why = state.trouble.clone().unwrap_or_else(|| "it is too slow".into());
                        let source = io::Error::new(io::ErrorKind::TimedOut, why.clone());
                        state.failed.get_or_insert(Failure::Other(why));
                        return Err(self.error(source));
                    }
                }
            }
        }
        self.failure(&state)?;
        Ok(Ticket(state.acknowledged))
    }

    fn fetch(&self, range: Range<Vec<u8>>, order: Order, limit: usize) -> StoreResult<Vec<Pair>> {
        self.ask(|reply| Request::Scan { range, order, limit, reply })
    }
}

impl Drop for RemoteStore {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        self.requests = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the metadata store panicked");
        }
    }
}

async fn serve(
    connecting: BoxFuture<'static, StoreResult<Arc<dyn Link>>>,
    shared: Arc<Shared>,
    requests: tokio::sync::mpsc::UnboundedReceiver<Request>,
    ready: &mpsc::SyncSender<StoreResult<Limits>>,
) {
    match connecting.await {
        Ok(link) => {
            // The opener waits for this.
            let _ = ready.send(Ok(link.limits()));
            let holder = uuid::Uuid::new_v4().as_u64_pair().0;
            Worker { link, shared, requests, owner: None, holder, postponed: VecDeque::new() }.run().await;
        }
        Err(e) => drop(ready.send(Err(e))),
    }
}

async fn connect(place: Place) -> StoreResult<Arc<dyn Link>> {
    Ok(match &place {
        Place::Etcd { .. } => Arc::new(etcd::Etcd::open(&place).await?),
        Place::Postgres { .. } => Arc::new(postgres::Postgres::open(&place).await?),
        Place::Fjall(_) => {
            return Err(io_error(&place.to_string(), io::Error::other("it is a folder of this host")));
        }
    })
}

fn io_error(place: &str, source: io::Error) -> StoreError {
    StoreError::Io { folder: place.into(), source }
}

impl MetaStore for RemoteStore {
    fn get(&self, key: &[u8]) -> StoreResult<Option<Bytes>> {
        self.shared.cache().get(key, |range, order, limit| self.fetch(range, order, limit))
    }

    fn scan(&self, range: Range<&[u8]>, order: Order, limit: usize) -> StoreResult<Vec<Pair>> {
        self.shared.cache().scan(range, order, limit, |range, order, limit| self.fetch(range, order, limit))
    }

    fn commit(&self, batch: Batch, fence: Fence) -> StoreResult<Ticket> {
        // The cache first, as readers do; so tickets are given out in the order of what the cache shows.
        let mut cache = self.shared.cache();
        let mut state = self.shared.state.lock();
        self.failure(&state)?;
        let current = state.fence.unwrap_or(Fence(0));
        if current != fence {
            return Err(StoreError::Fenced { ours: fence, current });
        }
        state.issued += 1;
        let ticket = state.issued;
        for (key, value) in &batch.writes {
            cache.write(key.clone(), value.clone(), ticket);
        }
        state.queue.push_back((ticket, batch.writes));
        drop((state, cache));
        if let Some(requests) = &self.requests {
            // A thread that has ended has left a failure.
            let _ = requests.send(Request::Wake);
        }
        Ok(Ticket(ticket))
    }

    fn sync(&self) -> StoreResult<Ticket> {
        self.wait(None)
    }

    fn take_over(&self) -> StoreResult<Fence> {
        // What was lost with an ownership is still in memory here.
        self.failure(&self.shared.state.lock())?;
        let fence = self.ask(|reply| Request::TakeOver { reply })?;
        // Others may have written since.
        self.shared.cache().clear();
        Ok(fence)
    }

    fn name(&self) -> &'static str {
        self.engine
    }

    fn late(&self) -> Option<&dyn Late> {
        Some(self)
    }
}

impl Late for RemoteStore {
    fn watch(&self, notify: Notify) {
        *self.shared.notify.lock() = Some(notify);
    }

    fn acknowledged(&self) -> StoreResult<Ticket> {
        let state = self.shared.state.lock();
        self.failure(&state)?;
        Ok(Ticket(state.acknowledged))
    }

    fn is_owner(&self) -> bool {
        let state = self.shared.state.lock();
        state.failed.is_none() && state.confirmed.is_some_and(|at| at.elapsed() < OWNERSHIP)
    }

    fn settle(&self, patience: Duration) -> StoreResult<Ticket> {
        self.wait(Some(Instant::now() + patience))
    }

    fn batch_writes(&self) -> usize {
        self.batch_writes
    }

    fn await_silence(&self, stop: Arc<AtomicBool>, name: Option<&str>) -> StoreResult<bool> {
        let name = name.map(str::to_owned);
        self.ask(|reply| Request::AwaitSilence { stop, name, reply })
    }

    fn report(&self, then: Box<dyn FnOnce(StoreReport) + Send>) {
        let report = {
            let state = self.shared.state.lock();
            StoreReport {
                committed: state.issued,
                safe: state.acknowledged,
                transactions: state.transactions,
                trouble: state.trouble.clone().unwrap_or_default(),
                ..StoreReport::default()
            }
        };
        let cached_bytes = self.shared.cache().bytes() as u64;
        let report = StoreReport { answering: self.is_owner(), cached_bytes, ..report };
        if let Some(requests) = &self.requests {
            // A thread that has ended answers nobody.
            let _ = requests.send(Request::Report { report, then });
        }
    }

    fn release(&self) -> StoreResult<()> {
        self.ask(|reply| Request::Release { reply })
    }
}
