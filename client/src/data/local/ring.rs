//! Reads from files on an io_uring of a lane.
//!
//! A task of the lane waits for the ring as for any descriptor and wakes those whose reads are done; reads are submitted by
//! whoever wants them, at once.
//!
//! # Invariants
//! - Memory and file of a read belong to [`Operations`] until its completion has been seen: also when nobody waits any more. The
//!   ring's end waits for what is still under way.
//! - One completion for each read, found by its place in [`Operations`].

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use io_uring_06::{IoUring, opcode, types};
use parking_lot::Mutex;
use slab::Slab;
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
};

use crate::data::memory::{Arena, Pages};

/// Submission entries. What does not fit is submitted in several calls.
const ENTRIES: u32 = 256;

/// After the kernel had no memory for a read, how long until it is asked again.
const RETRY: Duration = Duration::from_millis(5);

/// What the kernel works on.
struct Read {
    _file: Arc<File>,
    pages: Pages,
}

enum State {
    Running(Option<Waker>),
    Done(i32),
    /// Nobody waits.
    Abandoned,
}

type Operations = Slab<(State, Read)>;

/// See the module.
pub(super) struct Ring {
    /// Before the arena: the kernel lets go of it first.
    uring: Mutex<IoUring>,
    /// Memory that is registered as buffer 0.
    arena: Option<Arc<Arena>>,
    operations: Mutex<Operations>,
    /// Nobody looks for completions any more.
    ended: AtomicBool,
    /// For the driver: there is something to submit again, or the end has come.
    attention: Notify,
    closing: AtomicBool,
}

/// The ring's descriptor, open as long as anybody uses the ring.
struct RingFd(Arc<Ring>);

impl AsRawFd for RingFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.uring.lock().as_raw_fd()
    }
}

impl Ring {
    /// A ring, for memory of `arena` above all. `one_thread`: all that use it run on one thread, which then is not interrupted by
    /// completions while it computes.
    pub(super) fn new(one_thread: bool, arena: Option<&Arc<Arena>>) -> io::Result<Arc<Ring>> {
        let mut builder = IoUring::builder();
        builder.setup_submit_all();
        if one_thread {
            builder.setup_coop_taskrun();
        }
        let uring = builder.build(ENTRIES)?;
        let arena = arena.filter(|arena| {
            // SAFETY: the arena lives as long as the ring, which has a share of it, and its memory is used as its slots allow.
            let registered = unsafe { uring.submitter().register_buffers(&[arena.iovec()]) };
            registered.inspect_err(|e| tracing::info!("memory for reads is not registered: {e}")).is_ok()
        });
        Ok(Arc::new(Ring {
            uring: Mutex::new(uring),
            arena: arena.cloned(),
            operations: Mutex::default(),
            ended: AtomicBool::new(false),
            attention: Notify::new(),
            closing: AtomicBool::new(false),
        }))
    }

    /// Reads from `offset` on into all of `pages`, which are of the pool that has the arena: the result is how many bytes came, or the errno, negative.
    pub(super) fn read(self: &Arc<Self>, file: Arc<File>, offset: u64, mut pages: Pages) -> Reading {
        let fd = types::Fd(file.as_raw_fd());
        let (memory, len) = (pages.as_mut_ptr(), pages.len() as u32);
        let is_registered = self.arena.is_some() && pages.is_registered();
        let place = self.operations.lock().insert((State::Running(None), Read { _file: file, pages }));
        let entry = match is_registered {
            true => opcode::ReadFixed::new(fd, memory, len, 0).offset(offset).build(),
            false => opcode::Read::new(fd, memory, len).offset(offset).build(),
        };
        let entry = entry.user_data(place as u64);
        let mut uring = self.uring.lock();
        let submitted = loop {
            // SAFETY: file and memory are kept in `operations` until the completion.
            match unsafe { uring.submission().push(&entry) } {
                Ok(()) => break uring.submit(),
                Err(_full) => {
                    if let Err(e) = uring.submit() {
                        break Err(e);
                    }
                }
            }
        };
        drop(uring);
        if let Err(e) = submitted {
            tracing::debug!("a read is submitted later: {e}");
            self.attention.notify_one();
        }
        Reading { ring: Arc::clone(self), place: Some(place) }
    }

    /// Wakes those whose reads are done.
    fn take_completions(&self) {
        let mut uring = self.uring.lock();
        let mut operations = self.operations.lock();
        for completion in uring.completion() {
            let place = completion.user_data() as usize;
            let Some((state, _)) = operations.get_mut(place) else {
                tracing::error!("a completion of nothing; this is a bug, report it");
                continue;
            };
            match std::mem::replace(state, State::Done(completion.result())) {
                State::Running(waker) => waker.into_iter().for_each(Waker::wake),
                State::Abandoned => drop(operations.remove(place)),
                State::Done(_) => {
                    tracing::error!("a second completion of one read; this is a bug, report it")
                }
            }
        }
    }

    /// Submits what was not, and fetches completions that the ring had no room for.
    fn catch_up(&self) -> io::Result<()> {
        let mut uring = self.uring.lock();
        let submission = uring.submission();
        let behind = !submission.is_empty() || submission.cq_overflow();
        drop(submission);
        if behind { uring.submit().map(drop) } else { Ok(()) }
    }

    /// The task that reports completions, until [`Ring::close`]. To be run in the runtime of the lane.
    pub(super) async fn drive(self: Arc<Self>) {
        let ending = Ending(&self);
        // SAFETY: the descriptor is open as long as the ring, of which the `AsyncFd` has a share.
        let fd = unsafe { AsyncFd::register_with_interest(RingFd(Arc::clone(&self)), Interest::READABLE) };
        let fd = match fd {
            Ok(fd) => fd,
            Err(e) => {
                return tracing::error!("reads of local files cannot be waited for: {}", io::Error::from(e));
            }
        };
        while !self.closing.load(Ordering::Acquire) {
            // Edge-triggered: what comes after the readiness is cleared makes it ready again.
            tokio::select! {
                ready = fd.readable() => match ready {
                    Ok(mut ready) => ready.clear_ready(),
                    Err(e) => return tracing::error!("reads of local files cannot be waited for: {e}"),
                },
                () = self.attention.notified() => {}
            }
            self.take_completions();
            while self.catch_up().is_err() && !self.closing.load(Ordering::Acquire) {
                tokio::time::sleep(RETRY).await;
                self.take_completions();
            }
        }
        drop(ending);
    }

    /// Nobody reads any more.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.attention.notify_one();
    }
}

/// Tells readers when the driver is gone, with its runtime at the latest.
struct Ending<'a>(&'a Ring);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Release);
        for (_, (state, _)) in self.0.operations.lock().iter_mut() {
            if let State::Running(waker) = state {
                waker.take().into_iter().for_each(Waker::wake);
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        loop {
            self.take_completions();
            // Those that are done stay until their readers are gone, but the last of them was.
            let is_under_way = |(_, (state, _)): (usize, &(State, Read))| !matches!(state, State::Done(_));
            if !self.operations.lock().iter().any(is_under_way) {
                return;
            }
            match self.uring.lock().submit_and_wait(1) {
                Err(e) if !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {
                    // The kernel may still write to this memory: better lost than used again.
                    tracing::error!("reads of local files do not end: {e}");
                    std::mem::forget(std::mem::take(&mut *self.operations.lock()));
                    return;
                }
                _ => {}
            }
        }
    }
}

/// A read under way. Dropping it forgets the result.
pub(super) struct Reading {
    ring: Arc<Ring>,
    place: Option<usize>,
}

impl Future for Reading {
    type Output = io::Result<Pages>;

    /// The memory with what was read, cut to that.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(place) = self.place else { return Poll::Pending };
        let ring = Arc::clone(&self.ring);
        let mut operations = ring.operations.lock();
        let Some((state, _)) = operations.get_mut(place) else {
            return Poll::Ready(Err(io::Error::other("a read that is not there; this is a bug, report it")));
        };
        match state {
            State::Done(result) => {
                let result = *result;
                let (_, Read { mut pages, .. }) = operations.remove(place);
                self.place = None;
                Poll::Ready(match usize::try_from(result) {
                    Ok(len) => {
                        pages.cut(len);
                        Ok(pages)
                    }
                    Err(_) => Err(io::Error::from_raw_os_error(-result)),
                })
            }
            _ if ring.ended.load(Ordering::Acquire) => {
                Poll::Ready(Err(io::Error::other("the client was shut down")))
            }
            State::Running(waker) => {
                match waker {
                    Some(waker) => waker.clone_from(context.waker()),
                    None => *waker = Some(context.waker().clone()),
                }
                Poll::Pending
            }
            State::Abandoned => Poll::Pending,
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let Some(place) = self.place else { return };
        let mut operations = self.ring.operations.lock();
        match operations.get_mut(place) {
            Some((State::Done(_), _)) => drop(operations.remove(place)),
            Some((state, _)) => {
                let before = std::mem::replace(state, State::Abandoned);
                // A waker may be the last to know its task, which must not end under this lock.
                drop(operations);
                drop(before);
            }
            None => {}
        }
    }
}

#[cfg(test)]
#[path = "ring_tests.rs"]
mod tests;
