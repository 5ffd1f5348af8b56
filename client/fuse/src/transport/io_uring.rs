//! The transport over io_uring: a queue for each CPU, and one system call that answers a request and fetches the next.
//!
//! Performance critical. A thread has one ring, which carries the queues of its CPUs. The thread's tokio loop waits for the ring
//! as for any descriptor (measured: that costs nothing against waiting in io_uring itself), so a filesystem's own sockets and timers
//! live on the same thread, and a request that can be answered at once is answered without another thread. Answers
//! are collected until every task that could run has run; one system call then hands over all of them. Nothing
//! here may block: the kernel copies requests and answers in this thread's context.
//!
//! Only requests come this way. FORGET and INTERRUPT are read from /dev/fuse, and notifications are written there.
//!
//! # Copies
//! The kernel copies between the caller's pages and an entry's payload buffer. A filesystem can read into that buffer
//! ([`crate::Filesystem::read_into`]). The data of a WRITE is copied out of it, since the filesystem may keep the data longer than the
//! answer may wait, and the kernel takes no other buffer for an entry once it is registered.
//!
//! # Life of an entry
//! ```text
//!          REGISTER            completion            answer
//! (ours) ───────────▶ kernel ─────────────▶ slot ─────────────▶ kernel …   until a completion says that the mount has ended
//! ```
//! A slot that is dropped unanswered answers EIO, so no entry is lost.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Message, Slot, Transport};
use crate::abi::{self, OutHeader, UringInOut, opcode};
use crate::buffer::BufferPool;
use crate::ends::ShortAnswer;
use crate::options::Busy;
use crate::reply::Reply;

pub(crate) mod cpus;
pub(crate) mod memory;
mod ring;
mod spares;

use memory::EntryBuffers;
pub(crate) use ring::RegisterError;
use ring::{Completion, Ring};

/// Whether rings of our kind can be made here.
pub(crate) fn probe() -> io::Result<()> {
    ring::build(1).map(drop)
}

/// A ring, and who waits for something to come or to submit.
struct Shared {
    ring: Ring,
    waiting: Cell<Option<Waker>>,
    /// Among the answers that are not submitted.
    short: RefCell<Vec<ShortAnswer>>,
}

/// The ring's descriptor, open as long as anybody uses the ring.
struct RingFd(Rc<Shared>);

impl AsRawFd for RingFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.ring.as_raw_fd()
    }
}

/// One thread's transport.
pub(crate) struct IoUring {
    shared: Rc<Shared>,
    fd: AsyncFd<RingFd>,
    pool: Arc<BufferPool>,
    poll: Duration,
}

impl IoUring {
    /// For the calling thread, which must be inside its runtime; serves nothing until [`IoUring::register`].
    pub(crate) fn new(
        queues: &[u16],
        depth: usize,
        size_max: usize,
        pool: Arc<BufferPool>,
        poll: Duration,
    ) -> io::Result<IoUring> {
        let ring = Ring::new(queues, depth, size_max)?;
        let shared = Rc::new(Shared { ring, waiting: Cell::default(), short: RefCell::default() });
        // SAFETY: the descriptor is open as long as the ring, of which the `AsyncFd` has a share.
        let fd = unsafe { AsyncFd::register_with_interest(RingFd(Rc::clone(&shared)), Interest::READABLE)? };
        Ok(IoUring { shared, fd, pool, poll })
    }

    /// Gives the entries to the kernel, once INIT is answered. `bad_queue` is for tests.
    pub(crate) fn register(
        &self,
        device: BorrowedFd<'_>,
        bad_queue: Option<u16>,
    ) -> Result<(), RegisterError> {
        self.shared.ring.register(device, bad_queue)
    }

    /// For tests.
    pub(crate) fn set_busy(&self, busy: Busy) {
        self.shared.ring.set_busy(busy);
    }

    fn receive(&self, index: usize) -> Option<(Message, UringSlot)> {
        let buffers = self.shared.ring.buffers(index)?;
        let (header, in_out) = (buffers.in_header(), buffers.ring_in_out());
        let slot = UringSlot {
            shared: Rc::clone(&self.shared),
            index,
            buffers,
            unique: header.unique,
            commit_id: in_out.commit_id,
            is_answered: false,
            is_kept: false,
        };
        let fixed = Bytes::copy_from_slice(buffers.op_in(abi::fixed_size(header.opcode)));
        // Extensions stand at the end and were not asked for.
        let len = (in_out.payload_sz as usize).saturating_sub(usize::from(header.total_extlen) * 8);
        let payload = buffers.payload();
        let payload = &payload[..len.min(payload.len())];
        let rest = match header.opcode {
            opcode::WRITE => self.pool.copy_data(payload),
            _ => Bytes::copy_from_slice(payload),
        };
        Some((Message { header, fixed, rest }, slot))
    }

    /// Waits until something may have come, or an answer was made.
    async fn wait(&self) -> io::Result<()> {
        poll_fn(|context| {
            if self.shared.ring.has_unsubmitted() {
                return Poll::Ready(Ok(()));
            }
            // Edge-triggered: what comes after the readiness is cleared makes it ready again.
            match self.fd.poll_read_ready(context) {
                Poll::Ready(Ok(mut ready)) => {
                    ready.clear_ready();
                    Poll::Ready(Ok(()))
                }
                Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
                Poll::Pending => {
                    self.shared.waiting.set(Some(context.waker().clone()));
                    Poll::Pending
                }
            }
        })
        .await
    }
}

impl Transport for IoUring {
    type Slot = UringSlot;

    async fn next(&mut self) -> io::Result<Option<(Message, UringSlot)>> {
        let ring = &self.shared.ring;
        let mut idle_since = None;
        // Requests can follow each other without a pause; the thread's other tasks have a right to run.
        tokio::task::consume_budget().await;
        loop {
            match ring.completion() {
                Some(Completion::Request(index)) => match self.receive(index) {
                    Some(request) => return Ok(Some(request)),
                    None => tracing::error!(index, "a completion of an entry that does not exist; ignored"),
                },
                Some(Completion::Ended) => return Ok(None),
                Some(Completion::CommitRefused(index, e)) => {
                    tracing::error!("the kernel refused an answer: {e}");
                    ring.register_again(index)?;
                }
                Some(Completion::RegisterRefused(_, e)) => {
                    tracing::error!(
                        "one request fewer can be in flight on a CPU, its ring entry was refused: {e}"
                    );
                }
                None if ring.has_unsubmitted() => {
                    ring.submit()?;
                    if !ring.has_unsubmitted() {
                        self.shared.short.take();
                    }
                }
                None if idle_since.get_or_insert_with(Instant::now).elapsed() < self.poll => {
                    // Sockets are looked at too.
                    tokio::task::yield_now().await;
                }
                None => {
                    self.wait().await?;
                    idle_since = None;
                }
            }
        }
    }
}

/// An entry with a request.
pub(crate) struct UringSlot {
    shared: Rc<Shared>,
    index: usize,
    buffers: EntryBuffers,
    unique: u64,
    commit_id: u64,
    is_answered: bool,
    is_kept: bool,
}

impl UringSlot {
    /// Puts `parts` into the payload buffer; answers with their length.
    fn fill<'a>(&mut self, parts: impl IntoIterator<Item = &'a [u8]>) -> io::Result<usize> {
        let payload = self.buffers.payload_mut();
        let mut filled = 0;
        for part in parts {
            let room = payload.get_mut(filled..filled + part.len()).ok_or(io::ErrorKind::FileTooLarge)?;
            room.copy_from_slice(part);
            filled += part.len();
        }
        Ok(filled)
    }

    fn commit(&mut self, error: i32, payload_len: usize) -> io::Result<()> {
        let len = (size_of::<OutHeader>() + payload_len) as u32;
        let in_out = UringInOut { payload_sz: payload_len as u32, ..UringInOut::default() };
        self.buffers.set_answer(&OutHeader { len, error, unique: self.unique }, in_out);
        self.shared.ring.commit(self.index, self.commit_id)?;
        self.is_answered = true;
        if std::mem::take(&mut self.is_kept) {
            self.shared.ring.back(self.index);
        }
        if let Some(waiting) = self.shared.waiting.take() {
            waiting.wake();
        }
        Ok(())
    }
}

impl Slot for UringSlot {
    fn payload(&mut self) -> &mut [u8] {
        self.buffers.payload_mut()
    }

    fn may_be_kept_long(&mut self) -> bool {
        self.is_kept = true;
        self.shared.ring.keep(self.index).unwrap_or_else(|e| {
            tracing::warn!(
                "one request fewer can be in flight on a CPU while this one waits for others: {e}"
            );
            false
        })
    }

    fn drop_when_taken_in(&mut self, short: ShortAnswer) {
        self.shared.short.borrow_mut().push(short);
    }

    fn answer(&mut self, reply: &Reply) -> io::Result<()> {
        if self.is_answered {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let (error, len) = match reply {
            // Requests that have no answer do not come this way; the entry has to go back all the same.
            Reply::None | Reply::Empty => (0, 0),
            Reply::Error(errno) => (-*errno, 0),
            Reply::Fixed(body) => (0, self.fill([body.as_slice()])?),
            Reply::Bytes(bytes) => (0, self.fill([&bytes[..]])?),
            Reply::Parts(parts) => (0, self.fill(parts.iter().map(|part| &part[..]))?),
            Reply::InPayload(len) => (0, *len),
        };
        self.commit(error, len)
    }
}

impl Drop for UringSlot {
    fn drop(&mut self) {
        if !self.is_answered
            && let Err(e) = self.commit(-libc::EIO, 0)
        {
            tracing::error!("a request stays without an answer: {e}");
        }
    }
}
