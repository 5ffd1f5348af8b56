//! Sending what is committed: several transactions are under way at a time, in order.
//!
//! Each expects the record that the one before it writes. If one is lost, or the engine takes them in another order, those
//! that come too early are refused and have no effect. So what has happened is always the first few, each once.
//!
//! # Failures
//! At the first answer that is not a success nothing more is sent. All answers are awaited; the last success among them
//! tells of everything before it. What is left is sent again one by one, unchanged: an attempt of before that is still on
//! its way is then the same transaction, and happens instead of the new one or not at all. Only when each has happened
//! are several sent again.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesOrdered};

use super::{
    Fault,
    owner::{self, Write},
    worker::{Safe, Step, Worker, send},
};
use crate::store::StoreResult;

/// Transactions under way: beyond a few the engine only queues them.
const DEPTH: usize = 4;
/// Beside others only such goes that has half of what the engine takes, or so many writes. Small ones beside each other
/// cost the engine more than they gain: waiting for the one under way, they become one.
const WORTHWHILE: usize = 256;

/// A transaction under way.
struct Sent {
    step: Step,
    /// Of its last batch.
    ticket: u64,
    at: Instant,
}

type Outcome = Result<bool, Fault>;
type UnderWay = FuturesOrdered<BoxFuture<'static, (Sent, Outcome)>>;

/// Batches merged.
struct Group {
    ticket: u64,
    writes: Vec<Write>,
    /// One transaction takes it.
    fits: bool,
}

impl Worker {
    /// Sends what is queued, as many batches in one transaction as its limits allow. Reads go on.
    pub(super) async fn flush(&mut self) -> StoreResult<()> {
        let mut under_way = UnderWay::new();
        loop {
            self.fill(&mut under_way).await?;
            if under_way.is_empty() {
                return Ok(());
            }
            tokio::select! {
                biased;
                Some((sent, outcome)) = under_way.next() => match outcome {
                    Ok(true) => self.succeeded(sent),
                    outcome => {
                        let mut open = vec![(sent, outcome)];
                        while let Some(more) = self.beside(under_way.next()).await {
                            open.push(more);
                        }
                        self.settle(open).await?;
                    }
                },
                Some(request) = self.requests.recv() => self.aside(request),
            }
        }
    }

    async fn fill(&mut self, under_way: &mut UnderWay) -> StoreResult<()> {
        while under_way.len() < DEPTH && self.owner.is_some() {
            let Some(Group { ticket, writes, fits }) = self.next_group(under_way.is_empty()) else { break };
            if !fits {
                self.step_in_parts(writes, ticket).await?;
            } else if let Some(step) = self.prepare(writes, |_| {}) {
                let call = send(&self.link, &step);
                let sent = Sent { step, ticket, at: Instant::now() };
                under_way.push_back(call.map(|outcome| (sent, outcome)).boxed());
            }
        }
        Ok(())
    }

    fn succeeded(&self, Sent { step, ticket, at }: Sent) {
        self.shared.succeeded(Some(at));
        self.shared.land(step.writes, ticket);
        self.shared.acknowledge(ticket);
    }

    /// What became of transactions of which not all are known to have succeeded. None is under way.
    async fn settle(&mut self, open: Vec<(Sent, Outcome)>) -> StoreResult<()> {
        let known =
            open.iter().rposition(|(_, outcome)| matches!(outcome, Ok(true))).map_or(0, |last| last + 1);
        let mut unsafe_yet = Vec::new();
        for (n, (sent, outcome)) in open.into_iter().enumerate() {
            if n < known {
                self.succeeded(sent);
                continue;
            }
            if let Err(Fault::Fatal(e)) = outcome {
                return Err(e);
            }
            match self.insist(sent.step.clone()).await? {
                Safe::Yes => {
                    unsafe_yet.drain(..).for_each(|before| self.succeeded(before));
                    self.succeeded(sent);
                }
                Safe::Perhaps => unsafe_yet.push(sent),
            }
        }
        if !unsafe_yet.is_empty() {
            self.secure().await?;
            for Sent { step, ticket, .. } in unsafe_yet {
                self.shared.land(step.writes, ticket);
                self.shared.acknowledge(ticket);
            }
        }
        Ok(())
    }

    /// Batches from the front of the queue; of a key, the last write counts. A few writes, or one batch that needs more than
    /// a transaction, only when they would be `alone`.
    fn next_group(&self, alone: bool) -> Option<Group> {
        let limits = self.link.limits();
        let mut state = self.shared.state.lock();
        let queued: usize = state.queue.iter().map(|(_, batch)| batch.len()).sum();
        if !alone && queued < WORTHWHILE.min(limits.writes / 2) {
            return None;
        }
        let mut merged: BTreeMap<Vec<u8>, Option<bytes::Bytes>> = BTreeMap::new();
        let mut bytes = 0;
        let mut ticket = None;
        while let Some((_, batch)) = state.queue.front() {
            let more: usize = batch.iter().map(owner::cost).sum();
            let fits = |writes: usize, bytes: usize| writes <= limits.writes && bytes <= limits.bytes;
            if !fits(batch.len(), more) {
                if ticket.is_some() || !alone {
                    break;
                }
                let (ticket, writes) = state.queue.pop_front()?;
                return Some(Group { ticket, writes, fits: false });
            }
            // Most keys of neighbouring batches are the same few; their bytes are counted twice.
            let fresh = batch.iter().filter(|(key, _)| !merged.contains_key(key)).count();
            if !fits(merged.len() + fresh, bytes + more) {
                break;
            }
            bytes += more;
            let (last, batch) = state.queue.pop_front()?;
            ticket = Some(last);
            merged.extend(batch);
        }
        Some(Group { ticket: ticket?, writes: merged.into_iter().collect(), fits: true })
    }
}

/// Splits writes into such as one transaction takes.
pub(super) fn split(writes: Vec<Write>, limits: super::Limits) -> Vec<Arc<[Write]>> {
    let (mut out, mut some, mut bytes) = (Vec::new(), Vec::new(), 0);
    for write in writes {
        let cost = owner::cost(&write);
        if !some.is_empty() && (some.len() >= limits.writes || bytes + cost > limits.bytes) {
            out.push(std::mem::take(&mut some).into());
            bytes = 0;
        }
        bytes += cost;
        some.push(write);
    }
    if !some.is_empty() {
        out.push(some.into());
    }
    out
}
