//! Many reads at once, over any number of files: what a data loader wants instead of a mount.
//!
//! # How it works
//! A batch travels to the batch lanes in one hop, whatever its length: each lane is a thread with a runtime and data
//! connections of its own ([`lanes`]), and takes reads from the batch while it has fewer than a bound under way. So no
//! read changes threads between its frame on the wire and its result, and the requests that are ready together leave
//! together. Results come back through a lock-free queue; who waits for them is woken once per burst.
//!
//! # Memory
//! Bytes that were asked for and not yet taken by the caller are bounded by a share of
//! [`Options::memory_max`](crate::Options) for all batches of a client together ([`room`]). A batch none of whose
//! results wait to be taken may always start one read, so batches cannot wait for each other.
//!
//! # Cancellation
//! Dropping a [`Batch`] starts no further read; those under way end unseen.

mod lanes;
mod room;
mod shared;
mod wait;

use std::{
    collections::HashMap,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use fjordfs_proto::{FsError, FsResult, error::Errno};

pub(crate) use lanes::Lanes;
use room::Charge;
pub(crate) use room::Room;

use crate::{client::Client, file::File};
use shared::{Delivery, Shared};

/// One read of a batch.
#[derive(Clone)]
pub struct ReadRequest {
    /// The file.
    pub file: File,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: usize,
}

/// One read of a batch into memory of the caller's.
pub struct ReadInto<'a> {
    /// The file.
    pub file: File,
    /// First byte.
    pub offset: u64,
    /// Where the bytes go; its length is what is asked for.
    pub buffer: &'a mut [u8],
}

/// In which order the results of a batch are handed out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Order {
    /// As they come: nothing waits for a slow server.
    #[default]
    Completion,
    /// As they were asked for.
    Request,
}

/// How a batch is worked through.
#[derive(Clone, Copy, Debug)]
pub struct BatchOptions {
    /// Order of the results.
    pub order: Order,
    /// Most reads under way at a time; at least one is.
    pub in_flight: usize,
}

impl Default for BatchOptions {
    fn default() -> Self {
        BatchOptions { order: Order::Completion, in_flight: 128 }
    }
}

/// The result of one read of a batch.
#[derive(Debug)]
pub struct Finished {
    /// Position of the request in the batch.
    pub index: usize,
    /// What [`File::read_at`] would have returned. An error concerns this read only.
    pub result: FsResult<Vec<Bytes>>,
}

/// A batch under way. As an iterator it blocks the thread until the next result is there, which suits a thread that
/// loads data; [`Batch::finished`] is the same for async code, on whatever runtime.
pub struct Batch {
    shared: Arc<Shared>,
    order: Order,
    /// Results that came before their turn.
    early: HashMap<usize, (Finished, Option<Charge>)>,
    handed_out: usize,
}

impl Batch {
    /// Results still to come.
    pub fn remaining(&self) -> usize {
        self.shared.len() - self.handed_out
    }

    /// The next result, or `None` after the last one.
    pub async fn finished(&mut self) -> Option<Finished> {
        std::future::poll_fn(|cx| self.poll_finished(cx)).await
    }

    /// See [`Batch::finished`].
    pub fn poll_finished(&mut self, cx: &mut Context<'_>) -> Poll<Option<Finished>> {
        if self.remaining() == 0 {
            return Poll::Ready(None);
        }
        if let Some(finished) = self.take() {
            return Poll::Ready(Some(finished));
        }
        self.shared.consumer.register(cx.waker());
        // A result that came before the waker was registered woke nobody.
        self.take().map_or(Poll::Pending, |finished| Poll::Ready(Some(finished)))
    }

    fn take(&mut self) -> Option<Finished> {
        let (finished, _charge) = match self.order {
            Order::Completion => self.shared.result()?,
            Order::Request => {
                while !self.early.contains_key(&self.handed_out) {
                    let result = self.shared.result()?;
                    self.early.insert(result.0.index, result);
                }
                self.early.remove(&self.handed_out)?
            }
        };
        self.handed_out += 1;
        Some(finished)
    }
}

impl Iterator for Batch {
    type Item = Finished;

    /// Blocks until a result is there.
    fn next(&mut self) -> Option<Finished> {
        wait::block_on(self.finished())
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.remaining(), Some(self.remaining()))
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.shared.cancel();
    }
}

impl Client {
    /// Starts many reads. Files may repeat, and be in any order.
    pub fn batch(&self, requests: Vec<ReadRequest>, options: BatchOptions) -> Batch {
        self.start(requests, options, Delivery::Each)
    }

    /// Many reads, all results together in the order of the requests. They are the caller's memory from the moment
    /// they are read: of a batch larger than memory use [`Client::batch`].
    pub async fn read_batch(&self, requests: Vec<ReadRequest>) -> Vec<FsResult<Vec<Bytes>>> {
        let mut results: Vec<_> = requests.iter().map(|_| Err(not_read())).collect();
        let mut batch = self.start(requests, BatchOptions::default(), Delivery::Together);
        while let Some(finished) = batch.finished().await {
            results[finished.index] = finished.result;
        }
        results
    }

    /// [`Client::read_batch`] for a thread without a runtime, which it blocks.
    pub fn read_batch_blocking(&self, requests: Vec<ReadRequest>) -> Vec<FsResult<Vec<Bytes>>> {
        wait::block_on(self.read_batch(requests))
    }

    /// Many reads into the caller's buffers: for each, how many bytes there are; fewer than its buffer has room for
    /// only at the end of the file. What lies behind them in the buffer is as it was.
    pub async fn read_into(&self, reads: &mut [ReadInto<'_>]) -> Vec<FsResult<usize>> {
        let requests = reads
            .iter()
            .map(|r| ReadRequest { file: r.file.clone(), offset: r.offset, len: r.buffer.len() })
            .collect();
        let mut results: Vec<_> = reads.iter().map(|_| Err(not_read())).collect();
        let mut batch = self.start(requests, BatchOptions::default(), Delivery::Each);
        while let Some(Finished { index, result }) = batch.finished().await {
            results[index] = result.map(|parts| copy_out(&parts, reads[index].buffer));
        }
        results
    }

    /// [`Client::read_into`] for a thread without a runtime, which it blocks.
    pub fn read_into_blocking(&self, reads: &mut [ReadInto<'_>]) -> Vec<FsResult<usize>> {
        wait::block_on(self.read_into(reads))
    }

    fn start(&self, requests: Vec<ReadRequest>, options: BatchOptions, delivery: Delivery) -> Batch {
        let shared = Arc::new(Shared::new(requests, self.inner.batch_room.clone(), delivery));
        self.inner.lanes.submit(&shared, options.in_flight.max(1));
        Batch { shared, order: options.order, early: HashMap::new(), handed_out: 0 }
    }
}

/// Stands where a result will be. Every read of a batch has one, so nobody sees this.
fn not_read() -> FsError {
    FsError::new(Errno::EIO, "not read")
}

/// Copies parts one after the other; returns the bytes.
fn copy_out(parts: &[Bytes], buffer: &mut [u8]) -> usize {
    let mut at = 0;
    for part in parts {
        let n = part.len().min(buffer.len() - at);
        buffer[at..at + n].copy_from_slice(&part[..n]);
        at += n;
    }
    at
}
