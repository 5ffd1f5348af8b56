//! Operations on a core's io_uring.
//!
//! # Invariants
//! - What the kernel may touch is owned by this module until the operation's completion has been seen: also when the task
//!   that waits for it is dropped, and when the thread ends.
//! - One completion for each operation, found by the operation's place in `operations`.

use std::{
    any::Any,
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    io,
    os::fd::AsRawFd,
    rc::Rc,
    sync::Arc,
    task::{Poll, Waker},
    time::Duration,
};

use io_uring_06::{IoUring, cqueue, opcode, squeue, types};
use slab::Slab;

use super::{Core, tasks::Wakeup};

/// Submission entries of a ring. What does not fit is submitted in several calls.
const ENTRIES: u32 = 1024;

/// `user_data` of the operation that reports wake-ups.
const WAKEUP: u64 = u64::MAX;

/// `user_data` of what nobody waits for.
const NOBODY: u64 = u64::MAX - 1;

/// Something that the kernel may be using.
enum Operation {
    Running(Option<Waker>),
    Done(i32),
    /// Nobody waits for it, but the kernel may still use this.
    Abandoned {
        _keep: Box<dyn Any>,
    },
}

pub(super) struct Ring {
    uring: RefCell<IoUring>,
    operations: RefCell<Slab<Operation>>,
    wakeup: Arc<Wakeup>,
    /// Where wake-ups are counted, for the kernel to write to.
    wakeups: Box<Cell<u64>>,
    /// The operation that reports wake-ups is in flight.
    listening: Cell<bool>,
    finishing: Cell<bool>,
}

impl Ring {
    /// For the calling thread.
    pub(super) fn new(wakeup: Arc<Wakeup>) -> io::Result<Ring> {
        let ring = Ring {
            uring: RefCell::new(build()?),
            operations: RefCell::default(),
            wakeup,
            wakeups: Box::default(),
            listening: Cell::default(),
            finishing: Cell::default(),
        };
        ring.listen()?;
        Ok(ring)
    }

    /// Lets a wake-up from elsewhere complete.
    fn listen(&self) -> io::Result<()> {
        let event = types::Fd(self.wakeup.event().as_raw_fd());
        let entry = opcode::Read::new(event, self.wakeups.as_ptr().cast(), 8).build().user_data(WAKEUP);
        self.push(&entry)?;
        self.listening.set(true);
        Ok(())
    }

    fn push(&self, entry: &squeue::Entry) -> io::Result<()> {
        let mut uring = self.uring.borrow_mut();
        for _ in 0..2 {
            // SAFETY: what the entry refers to is kept in `operations`, or by this ring, until its completion.
            if unsafe { uring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            match uring.submit() {
                Err(e) if !passes(&e) => return Err(e),
                _ => {}
            }
        }
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    /// Hands over what was pushed, without waiting; only when there is something to do.
    pub(super) fn flush(&self) -> io::Result<()> {
        let mut uring = self.uring.borrow_mut();
        let submission = uring.submission();
        if submission.is_empty() && !submission.taskrun() && !submission.cq_overflow() {
            drop(submission);
            std::hint::spin_loop();
            return Ok(());
        }
        drop(submission);
        enter_now(&mut uring)
    }

    /// Hands over what was pushed and waits for a completion, at most for `limit`.
    pub(super) fn wait(&self, limit: Option<Duration>) -> io::Result<()> {
        match limit {
            Some(Duration::ZERO) => enter_now(&mut self.uring.borrow_mut()),
            limit => enter(&self.uring.borrow(), limit),
        }
    }

    /// Wakes those whose operations are complete.
    pub(super) fn take_completions(&self) {
        loop {
            let completed = self.uring.borrow_mut().completion().next();
            let Some(completed) = completed else { return };
            match completed.user_data() {
                NOBODY => {}
                WAKEUP => {
                    // The flag is what counts; this only ended the sleep.
                    self.listening.set(false);
                    if !self.finishing.get()
                        && let Err(e) = self.listen()
                    {
                        tracing::error!("a core cannot be woken any more: {e}");
                    }
                }
                place => self.complete(place as usize, &completed),
            }
        }
    }

    fn complete(&self, place: usize, completed: &cqueue::Entry) {
        let mut operations = self.operations.borrow_mut();
        let Some(operation) = operations.get_mut(place) else {
            tracing::error!("a completion of nothing; this is a bug, report it");
            return;
        };
        match std::mem::replace(operation, Operation::Done(completed.result())) {
            Operation::Running(waker) => {
                drop(operations);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Operation::Done(_) => {}
            abandoned @ Operation::Abandoned { .. } => {
                operations.remove(place);
                drop(operations);
                drop(abandoned);
            }
        }
    }

    /// Ends what is in flight and waits for it: the kernel may be writing to memory that is about to be freed.
    pub(super) fn finish(&self) {
        self.finishing.set(true);
        let places: Vec<u64> = self.operations.borrow().iter().map(|(place, _)| place as u64).collect();
        for operation in places.into_iter().chain([WAKEUP]) {
            let cancel = opcode::AsyncCancel::new(operation).build().user_data(NOBODY);
            // What cannot be cancelled ends by itself.
            let _ = self.push(&cancel);
        }
        while self.listening.get() || !self.operations.borrow().is_empty() {
            if let Err(e) = self.wait(None) {
                // Freeing what the kernel may still write to is worse than ending here.
                tracing::error!("waiting for the last operations: {e}");
                std::process::abort();
            }
            self.take_completions();
        }
    }
}

/// The newest kind of ring that this kernel has.
fn build() -> io::Result<IoUring> {
    // The kernel works only when asked to, instead of interrupting the thread: Linux 6.1.
    let deferred = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .build(ENTRIES);
    match deferred {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => IoUring::new(ENTRIES),
        made => made,
    }
}

/// What going on is the answer to: a signal, the time being over, completions that have to be taken first.
fn passes(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN))
}

/// Submits, and lets the kernel complete what it can, without waiting.
fn enter_now(uring: &mut IoUring) -> io::Result<()> {
    const GETEVENTS: u32 = 1;
    let count = uring.submission().len() as u32;
    // SAFETY: what the entries refer to is kept until their completions; there is no signal mask.
    match unsafe { uring.submitter().enter::<libc::sigset_t>(count, 0, GETEVENTS, None) } {
        Err(e) if !passes(&e) => Err(e),
        _ => Ok(()),
    }
}

/// Submits, and waits for a completion.
fn enter(uring: &IoUring, limit: Option<Duration>) -> io::Result<()> {
    let submitter = uring.submitter();
    let entered = match limit {
        None => submitter.submit_and_wait(1),
        Some(limit) => {
            let time = types::Timespec::new().sec(limit.as_secs()).nsec(limit.subsec_nanos());
            submitter.submit_with_args(1, &types::SubmitArgs::new().timespec(&time))
        }
    };
    match entered {
        Err(e) if !passes(&e) => Err(e),
        _ => Ok(()),
    }
}

/// An operation in flight; `keep` is what the kernel may touch.
struct InFlight<T: 'static> {
    core: Rc<Core>,
    place: usize,
    keep: Option<T>,
}

impl<T: 'static> Drop for InFlight<T> {
    fn drop(&mut self) {
        let mut operations = self.core.ring.operations.borrow_mut();
        match (operations.get_mut(self.place), self.keep.take()) {
            (Some(operation @ Operation::Running(_)), Some(keep)) => {
                *operation = Operation::Abandoned { _keep: Box::new(keep) };
            }
            (Some(_), _) => drop(operations.remove(self.place)),
            (None, _) => {}
        }
    }
}

/// Runs one operation of the calling thread's core: its result, and `keep` back.
///
/// `entry` must refer only to memory and descriptors that `keep` owns at stable addresses.
pub(crate) fn submit<T: Unpin + 'static>(
    keep: T,
    entry: squeue::Entry,
) -> impl Future<Output = (io::Result<usize>, T)> {
    let mut keep = Some(keep);
    let mut in_flight: Option<InFlight<T>> = None;
    poll_fn(move |context| {
        let flight = match &mut in_flight {
            Some(flight) => flight,
            None => {
                // Polled again after its end, which no caller does.
                let Some(kept) = keep.take() else { return Poll::Pending };
                let Some(core) = super::current() else {
                    return Poll::Ready((Err(io::Error::other("not on a data server's core")), kept));
                };
                let place = core.ring.operations.borrow_mut().insert(Operation::Running(None));
                if let Err(e) = core.ring.push(&entry.clone().user_data(place as u64)) {
                    core.ring.operations.borrow_mut().remove(place);
                    return Poll::Ready((Err(e), kept));
                }
                in_flight.insert(InFlight { core, place, keep: Some(kept) })
            }
        };
        let mut operations = flight.core.ring.operations.borrow_mut();
        match operations.get_mut(flight.place) {
            Some(Operation::Running(waker)) => {
                match waker {
                    Some(waker) => waker.clone_from(context.waker()),
                    None => *waker = Some(context.waker().clone()),
                }
                Poll::Pending
            }
            Some(Operation::Done(result)) => {
                let result = *result;
                drop(operations);
                let Some(kept) = flight.keep.take() else { return Poll::Pending };
                in_flight = None;
                let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
                Poll::Ready((result, kept))
            }
            _ => Poll::Pending,
        }
    })
}
