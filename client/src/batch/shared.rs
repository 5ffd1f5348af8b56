//! What a batch's lanes and its consumer share, and the work of one lane. Hot path: one lock, held for a few
//! instructions per read.
//!
//! # Invariants
//! - Requests start in their order, so the read that an ordered consumer waits for is never behind one that holds
//!   the memory it needs.
//! - Every request gets exactly one result, also when a lane ends early.
//! - A result holds its [`Charge`] until it is the caller's.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{AcqRel, Acquire, Release},
        },
    },
};

use crossbeam::queue::SegQueue;
use fjordfs_proto::{FsError, FsResult, error::Errno};
use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered, task::AtomicWaker};
use parking_lot::Mutex;

use super::{
    Finished, ReadRequest,
    room::{Account, Charge, Room},
};

/// When results are the consumer's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Delivery {
    /// One by one: their memory counts until each is taken.
    Each,
    /// All at the end, as the caller asked: their memory is the caller's when they are read, who is woken once.
    Together,
}

/// See the module.
pub(super) struct Shared {
    requests: Vec<ReadRequest>,
    delivery: Delivery,
    account: Arc<Account>,
    /// The next request to start.
    next: Mutex<usize>,
    /// Requests with a result.
    ended: AtomicUsize,
    /// Lanes that work on it or will.
    lanes: AtomicUsize,
    results: SegQueue<(Finished, Option<Charge>)>,
    pub(super) consumer: AtomicWaker,
    cancelled: AtomicBool,
}

impl Shared {
    pub(super) fn new(requests: Vec<ReadRequest>, room: Arc<Room>, delivery: Delivery) -> Shared {
        Shared {
            requests,
            delivery,
            account: Arc::new(Account::new(room)),
            next: Mutex::new(0),
            ended: AtomicUsize::new(0),
            lanes: AtomicUsize::new(0),
            results: SegQueue::new(),
            consumer: AtomicWaker::new(),
            cancelled: AtomicBool::new(false),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.requests.len()
    }

    /// A result that is there.
    pub(super) fn result(&self) -> Option<(Finished, Option<Charge>)> {
        self.results.pop()
    }

    /// Nobody will take results any more.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Release);
        self.account.room().wake();
    }

    /// Ends the requests that have not been started.
    pub(super) fn fail_rest(&self, e: &FsError) {
        let first = std::mem::replace(&mut *self.next.lock(), self.requests.len());
        for index in first..self.requests.len() {
            self.end(index, Err(e.clone()), None);
        }
    }

    /// The next request, if there is one and memory for its result.
    fn start(self: &Arc<Self>) -> Option<Started> {
        let mut next = self.next.lock();
        let index = *next;
        let ReadRequest { file, offset, len } = self.requests.get(index)?;
        if self.cancelled.load(Acquire) {
            return None;
        }
        let bytes = file.size().saturating_sub(*offset).min(*len as u64);
        // With nothing of this batch to be taken, nobody would ever make room for it.
        let charge = self.account.charge(bytes, index)?;
        *next += 1;
        Some(Started { shared: self.clone(), index, charge: Some(charge), ended: false })
    }

    fn all_started(&self) -> bool {
        self.cancelled.load(Acquire) || *self.next.lock() == self.requests.len()
    }

    fn end(&self, index: usize, result: FsResult<Vec<bytes::Bytes>>, charge: Option<Charge>) {
        let charge = charge.filter(|_| self.delivery == Delivery::Each);
        self.results.push((Finished { index, result }, charge));
        let ended = 1 + self.ended.fetch_add(1, AcqRel);
        if ended == self.requests.len() {
            self.consumer.wake();
        }
    }

    /// Wakes who waits for single results.
    fn tell(&self) {
        if self.delivery == Delivery::Each {
            self.consumer.wake();
        }
    }
}

/// A read under way.
struct Started {
    shared: Arc<Shared>,
    index: usize,
    charge: Option<Charge>,
    ended: bool,
}

impl Started {
    async fn read(mut self) {
        let ReadRequest { file, offset, len } = &self.shared.requests[self.index];
        let result = file.read_at(*offset, *len).await;
        self.end(result);
    }

    fn end(&mut self, result: FsResult<Vec<bytes::Bytes>>) {
        self.ended = true;
        self.shared.end(self.index, result, self.charge.take());
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if !self.ended {
            self.end(Err(interrupted()));
        }
    }
}

/// One lane's part in a batch.
pub(super) struct Share {
    shared: Arc<Shared>,
    in_flight: usize,
}

impl Share {
    /// All shares of a batch are made before the first one works: the last one to end looks after what is left.
    pub(super) fn new(shared: &Arc<Shared>, in_flight: usize) -> Share {
        shared.lanes.fetch_add(1, AcqRel);
        Share { shared: shared.clone(), in_flight }
    }

    /// Reads until all of the batch is started and what was started here has ended.
    pub(super) async fn work(self) {
        let shared = &self.shared;
        let mut running = FuturesUnordered::new();
        loop {
            // Before looking for room: what is freed in between must not be missed.
            let mut freed = pin!(shared.account.room().freed());
            freed.as_mut().enable();
            while running.len() < self.in_flight
                && let Some(started) = shared.start()
            {
                running.push(started.read());
            }
            if running.is_empty() && shared.all_started() {
                return;
            }
            tokio::select! {
                Some(()) = running.next() => {
                    while let Some(Some(())) = running.next().now_or_never() {}
                    shared.tell();
                }
                () = freed => {}
            }
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if self.shared.lanes.fetch_sub(1, AcqRel) == 1 && !self.shared.all_started() {
            self.shared.fail_rest(&interrupted());
        }
    }
}

fn interrupted() -> FsError {
    FsError::new(Errno::EIO, "the client ended while a batch was read")
}
