//! The thread that talks to the store: transactions in order, reads beside them.

use std::{
    collections::{BTreeMap, VecDeque},
    future::Future,
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::SyncSender,
    },
    time::{Duration, Instant},
};

use super::{
    Fault, HEARTBEAT, Link, Shared, TAKE_OVER_SILENCE,
    owner::{self, INTENTS, OWNER, Owner, Write},
};
use crate::store::{Fence, Order, Pair, StoreError, StoreResult};

/// A call that is not answered for so long is made again.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Wait between attempts: from, to.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// Reads and take-overs that fail for so long are given up.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a standby looks at the owner's record.
const LOOK: Duration = Duration::from_millis(200);
/// Parts of a batch that are read at a time: each is up to half of what one transaction takes.
const PAGE: usize = 8;

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
        reply: SyncSender<StoreResult<bool>>,
    },
    Release {
        reply: SyncSender<StoreResult<()>>,
    },
}

pub(super) struct Worker {
    pub(super) link: Arc<dyn Link>,
    pub(super) shared: Arc<Shared>,
    pub(super) requests: tokio::sync::mpsc::UnboundedReceiver<Request>,
    /// The record this process wrote last, while it owns the store.
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
            if let Some(request) = self.postponed.pop_front() {
                self.serve(request).await;
                continue;
            }
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
    }

    async fn serve(&mut self, request: Request) {
        match request {
            Request::Scan { range, order, limit, reply } => self.read(range, order, limit, reply),
            Request::Wake => {
                let flushed = self.flush().await;
                self.end_on(flushed);
            }
            Request::TakeOver { reply } => {
                let flushed = self.flush().await;
                self.end_on(flushed);
                let taken = self.take_over().await;
                if let Err(StoreError::Fenced { ours, current }) = taken {
                    self.end_on(Err(StoreError::Fenced { ours, current }));
                }
                let _ = reply.send(taken);
            }
            Request::AwaitSilence { stop, reply } => {
                let (link, shared) = (self.link.clone(), self.shared.clone());
                tokio::spawn(async move {
                    let silent = await_silence(&*link, &stop).await.map(|found| {
                        *shared.silent.lock() = found;
                        found.is_some()
                    });
                    let _ = reply.send(silent);
                });
            }
            Request::Release { reply } => {
                let released = match self.flush().await {
                    Ok(()) if self.owner.is_some() => self.step(Vec::new(), |o| o.released = true).await,
                    other => other,
                };
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
        let link = self.link.clone();
        tokio::spawn(async move {
            let found = patiently(&*link, || link.scan(range.clone(), order, limit)).await;
            let _ = reply.send(found);
        });
    }

    fn end_on(&mut self, result: StoreResult<()>) {
        if let Err(e) = result {
            self.owner = None;
            self.shared.fail(e);
        }
    }

    /// Sends what is queued, as many batches in one transaction as its limits allow. While one is under way, reads go on.
    async fn flush(&mut self) -> StoreResult<()> {
        while let Some((ticket, writes)) = self.next_group() {
            if self.owner.is_none() {
                return Ok(());
            }
            let keys: Vec<Vec<u8>> = writes.iter().map(|(key, _)| key.clone()).collect();
            if self.fits(&writes) {
                self.step(writes, |_| {}).await?;
            } else {
                self.step_in_parts(writes).await?;
            }
            self.shared.acknowledge(keys, ticket);
        }
        Ok(())
    }

    fn fits(&self, writes: &[Write]) -> bool {
        let limits = self.link.limits();
        writes.len() <= limits.writes && writes.iter().map(owner::cost).sum::<usize>() <= limits.bytes
    }

    /// Batches from the front of the queue, merged; of a key, the last write counts.
    fn next_group(&self) -> Option<(u64, Vec<Write>)> {
        let limits = self.link.limits();
        let mut state = self.shared.state.lock();
        let mut merged = BTreeMap::new();
        let mut bytes = 0;
        let mut last = None;
        while let Some((ticket, batch)) = state.queue.front() {
            let more: usize = batch.iter().map(owner::cost).sum();
            let full = merged.len() + batch.len() > limits.writes || bytes + more > limits.bytes;
            if last.is_some() && full {
                break;
            }
            bytes += more;
            last = Some(*ticket);
            if let Some((_, batch)) = state.queue.pop_front() {
                merged.extend(batch);
            }
        }
        Some((last?, merged.into_iter().collect()))
    }

    /// Waits for a call of a transaction. Reads go on meanwhile: the executor may be waiting for one.
    async fn beside<T>(&mut self, call: impl Future<Output = T>) -> T {
        let mut call = std::pin::pin!(call);
        loop {
            tokio::select! {
                done = &mut call => return done,
                Some(request) = self.requests.recv() => match request {
                    Request::Scan { range, order, limit, reply } => self.read(range, order, limit, reply),
                    other => self.postponed.push_back(other),
                },
            }
        }
    }

    /// One transaction, repeated until it is known to have happened or to be impossible.
    async fn step(&mut self, writes: Vec<Write>, change: impl FnOnce(&mut Owner)) -> StoreResult<()> {
        let Some(current) = self.owner else { return Ok(()) };
        let mut next = current.next();
        change(&mut next);
        let (expected, value) = (current.encode(), next.encode());
        let link = self.link.clone();
        let mut pause = BACKOFF.0;
        loop {
            let sent = Instant::now();
            let outcome = self.beside(timed(link.apply(&expected, &value, &writes))).await;
            let fault = match outcome {
                Ok(true) => {
                    self.owner = Some(next);
                    self.shared.confirm(sent);
                    return Ok(());
                }
                // Either somebody else owns the store, or an attempt of which nothing was heard had succeeded.
                Ok(false) => match self.beside(timed(link.read_owner())).await {
                    Ok(found) if found == Some(next) => {
                        self.owner = Some(next);
                        return Ok(());
                    }
                    Ok(found) if found == Some(current) => {
                        Fault::Unavailable("the owner's record changed back".into())
                    }
                    Ok(found) => {
                        return Err(StoreError::Fenced {
                            ours: current.fence(),
                            current: found.map_or(Fence(0), |o| o.fence()),
                        });
                    }
                    Err(fault) => fault,
                },
                Err(fault) => fault,
            };
            match fault {
                Fault::Fatal(e) => return Err(e),
                // Whether it happened shows when it is tried again: it expects a record that it replaces.
                Fault::Unavailable(why) => {
                    if self.shared.is_closing() {
                        return Err(link.error(why));
                    }
                    tracing::warn!(store = %link.place(), why, "trying the transaction again");
                    self.beside(tokio::time::sleep(pause)).await;
                    pause = (pause * 2).min(BACKOFF.1);
                }
            }
        }
    }

    /// A batch that is too large for one transaction. Its parts are written as intents first; the transaction that
    /// counts them in the owner's record decides the batch. From then on it is rolled forward, by the next owner if need
    /// be: before that one reads anything. Each write sets a key to a value, so applying some of them twice changes nothing.
    async fn step_in_parts(&mut self, writes: Vec<Write>) -> StoreResult<()> {
        let bytes_max = self.link.limits().bytes / 2;
        let parts = owner::encode_parts(&writes, bytes_max);
        let count = parts.len() as u32;
        for (index, part) in (0u32..).zip(parts) {
            self.step(vec![(owner::intent(index), Some(part))], |_| {}).await?;
        }
        self.step(Vec::new(), |o| o.parts = count).await?;
        self.roll_forward(writes, count).await
    }

    async fn roll_forward(&mut self, writes: Vec<Write>, parts: u32) -> StoreResult<()> {
        self.step_many(writes).await?;
        // First the decision, then the intents: those without a decision are litter, a decision without them is damage.
        self.step(Vec::new(), |o| o.parts = 0).await?;
        self.step_many((0..parts).map(|index| (owner::intent(index), None)).collect()).await
    }

    async fn step_many(&mut self, writes: Vec<Write>) -> StoreResult<()> {
        let limits = self.link.limits();
        let (mut some, mut bytes) = (Vec::new(), 0);
        for write in writes {
            let cost = owner::cost(&write);
            if !some.is_empty() && (some.len() >= limits.writes || bytes + cost > limits.bytes) {
                self.step(std::mem::take(&mut some), |_| {}).await?;
                bytes = 0;
            }
            bytes += cost;
            some.push(write);
        }
        if some.is_empty() { Ok(()) } else { self.step(some, |_| {}).await }
    }

    async fn take_over(&mut self) -> StoreResult<Fence> {
        let link = self.link.clone();
        let silent = self.shared.silent.lock().take();
        loop {
            let found = patiently(&*link, || link.read_owner()).await?;
            if silent.is_some_and(|silent| silent != found) {
                return Err(StoreError::Fenced {
                    ours: Fence(0),
                    current: found.map_or(Fence(0), |o| o.fence()),
                });
            }
            let before = found.unwrap_or_default();
            let next =
                Owner { fence: before.fence + 1, holder: self.holder, released: false, ..before.next() };
            let expected = found.map(|o| o.encode()).unwrap_or_default();
            let sent = Instant::now();
            let taken = match timed(link.apply(&expected, &next.encode(), &[])).await {
                Ok(taken) => taken,
                Err(Fault::Fatal(e)) => return Err(e),
                // It happened if the record is there; nobody else writes this one.
                Err(Fault::Unavailable(_)) => patiently(&*link, || link.read_owner()).await? == Some(next),
            };
            if !taken {
                continue;
            }
            self.owner = Some(next);
            self.shared.begin(next, sent);
            self.finish_the_last_batch(next.parts).await?;
            return Ok(next.fence());
        }
    }

    async fn finish_the_last_batch(&mut self, parts: u32) -> StoreResult<()> {
        let link = self.link.clone();
        let mut intents: Vec<Pair> = Vec::new();
        let mut from = INTENTS.0.to_vec();
        loop {
            let range = from.clone()..INTENTS.1.to_vec();
            let page = patiently(&*link, || link.scan(range.clone(), Order::Ascending, PAGE)).await?;
            let more = page.len() == PAGE;
            intents.extend(page);
            match intents.last() {
                Some((last, _)) if more => from = [last.as_slice(), &[0]].concat(),
                _ => break,
            }
        }
        if parts > 0 {
            let damaged = |what| StoreError::Damaged { folder: link.place().into(), what };
            if intents.len() < parts as usize {
                return Err(damaged(format!("a batch has {} of {parts} parts", intents.len())));
            }
            let writes = owner::decode_parts(&intents[..parts as usize])
                .ok_or_else(|| damaged("the parts of a batch make no sense".into()))?;
            return self.roll_forward(writes, intents.len() as u32).await;
        }
        self.step_many(intents.into_iter().map(|(key, _)| (key, None)).collect()).await
    }
}

/// Waits until the record has not changed for [`TAKE_OVER_SILENCE`], or was released. By this host's clock only: nobody
/// need agree on the time. The record found; none when it was stopped.
async fn await_silence(link: &dyn Link, stop: &AtomicBool) -> StoreResult<Option<Option<Owner>>> {
    let mut seen = None;
    let mut since = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        match timed(link.read_owner()).await {
            Ok(found @ (None | Some(Owner { released: true, .. }))) => return Ok(Some(found)),
            Ok(found) if found != seen => (seen, since) = (found, Instant::now()),
            Ok(found) if since.elapsed() >= TAKE_OVER_SILENCE => return Ok(Some(found)),
            Ok(_) => {}
            Err(Fault::Fatal(e)) => return Err(e),
            // The owner's silence is not to be told from the store's.
            Err(Fault::Unavailable(why)) => {
                tracing::warn!(store = %link.place(), why, "cannot see who owns the store");
                since = Instant::now();
            }
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(None)
}

async fn timed<T>(call: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
    let late = || Fault::Unavailable(format!("no answer within {} s", CALL_TIMEOUT.as_secs()));
    tokio::time::timeout(CALL_TIMEOUT, call).await.unwrap_or_else(|_| Err(late()))
}

/// Repeats a call without effect for up to [`PATIENCE`].
async fn patiently<T, F: Future<Output = Result<T, Fault>>>(
    link: &dyn Link,
    mut call: impl FnMut() -> F,
) -> StoreResult<T> {
    let begun = Instant::now();
    let mut pause = BACKOFF.0;
    loop {
        match timed(call()).await {
            Ok(found) => return Ok(found),
            Err(Fault::Fatal(e)) => return Err(e),
            Err(Fault::Unavailable(why)) if begun.elapsed() > PATIENCE => {
                return Err(link.error(why));
            }
            Err(Fault::Unavailable(why)) => {
                tracing::warn!(store = %link.place(), why, "reading again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(BACKOFF.1);
            }
        }
    }
}

impl dyn Link + '_ {
    /// The owner's record.
    async fn read_owner(&self) -> Result<Option<Owner>, Fault> {
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

    fn error(&self, why: String) -> StoreError {
        StoreError::Io { folder: self.place().into(), source: io::Error::new(io::ErrorKind::TimedOut, why) }
    }
}
