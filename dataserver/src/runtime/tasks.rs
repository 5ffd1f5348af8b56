//! The tasks of a core, and waking it.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    panic::AssertUnwindSafe,
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use rustix::event::EventfdFlags;

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// What wakes a core's thread. Tasks are woken by the thread itself mostly, and then it only notes that there is work; from
/// another thread it also ends the sleep.
pub(super) struct Wakeup {
    /// Some task can run.
    woken: AtomicBool,
    sleeping: AtomicBool,
    event: OwnedFd,
}

/// The thread is about to sleep; dropped, it no longer is.
pub(super) struct Sleeping<'a>(&'a Wakeup);

impl Wakeup {
    pub(super) fn new() -> io::Result<Wakeup> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Wakeup { woken: AtomicBool::new(false), sleeping: AtomicBool::new(false), event })
    }

    /// Readable after a wake-up from elsewhere.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// `None` when there is work after all.
    pub(super) fn sleep(&self) -> Option<Sleeping<'_>> {
        self.sleeping.store(true, Ordering::SeqCst);
        let sleeping = Sleeping(self);
        // After the store: who wakes from now on sees it.
        (!self.woken.load(Ordering::SeqCst)).then_some(sleeping)
    }
}

impl Drop for Sleeping<'_> {
    fn drop(&mut self) {
        self.0.sleeping.store(false, Ordering::SeqCst);
    }
}

impl Wake for Wakeup {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.woken.swap(true, Ordering::SeqCst) && self.sleeping.load(Ordering::SeqCst) {
            // Fails only when it has been woken four billion times already.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }
}

pub(super) struct Tasks {
    wakeup: Arc<Wakeup>,
    waker: Waker,
    running: RefCell<FuturesUnordered<Task>>,
    started: RefCell<Vec<Task>>,
}

impl Tasks {
    pub(super) fn new(wakeup: Arc<Wakeup>) -> Tasks {
        let waker = Waker::from(wakeup.clone());
        Tasks { wakeup, waker, running: RefCell::default(), started: RefCell::default() }
    }

    pub(super) fn wakeup(&self) -> &Wakeup {
        &self.wakeup
    }

    pub(super) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let guarded = AssertUnwindSafe(task).catch_unwind().map(|result| {
            if result.is_err() {
                tracing::error!("a task has panicked; the message is on standard error");
            }
        });
        self.started.borrow_mut().push(Box::pin(guarded));
        self.wakeup.woken.store(true, Ordering::SeqCst);
    }

    /// As `spawn`; says when it has ended.
    pub(super) fn spawn_main(&self, main: impl Future<Output = ()> + 'static) -> Rc<Cell<bool>> {
        /// Also when it panics.
        struct Ended(Rc<Cell<bool>>);
        impl Drop for Ended {
            fn drop(&mut self) {
                self.0.set(true);
            }
        }
        let ended = Rc::new(Cell::new(false));
        let ending = Ended(ended.clone());
        self.spawn(async move {
            let _ending = ending;
            main.await;
        });
        ended
    }

    pub(super) fn can_run(&self) -> bool {
        self.wakeup.woken.load(Ordering::SeqCst)
    }

    /// Runs what can run, each task once or so: then completions are due to be looked at.
    pub(super) fn run(&self) {
        self.wakeup.woken.store(false, Ordering::SeqCst);
        let mut running = self.running.borrow_mut();
        let mut context = Context::from_waker(&self.waker);
        loop {
            running.extend(self.started.borrow_mut().drain(..));
            if !matches!(running.poll_next_unpin(&mut context), Poll::Ready(Some(()))) {
                return;
            }
        }
    }

    pub(super) fn drop_all(&self) {
        self.started.borrow_mut().clear();
        self.running.borrow_mut().clear();
        // What they started while they were dropped.
        self.started.borrow_mut().clear();
    }
}
