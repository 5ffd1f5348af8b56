//! Sleeping and time-outs on a core: a sorted list that the thread looks at before it sleeps.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    future::{Future, poll_fn},
    pin::pin,
    task::{Poll, Waker},
    time::{Duration, Instant},
};

type Key = (Instant, u64);

#[derive(Default)]
pub(super) struct Timers {
    waiting: RefCell<BTreeMap<Key, Waker>>,
    next: Cell<u64>,
}

impl Timers {
    /// Wakes those whose time has come; how long until the next one's.
    pub(super) fn fire(&self, now: Instant) -> Option<Duration> {
        loop {
            let waker = {
                let mut waiting = self.waiting.borrow_mut();
                let first = waiting.first_entry()?;
                let at = first.key().0;
                if at > now {
                    return Some(at - now);
                }
                first.remove()
            };
            waker.wake();
        }
    }
}

/// A place in the list, given up when dropped.
struct Waiting {
    at: Instant,
    key: Option<Key>,
}

impl Waiting {
    fn new(time: Duration) -> Waiting {
        Waiting { at: Instant::now() + time, key: None }
    }

    /// Whether the time has come; if not, `waker` is woken then.
    fn is_over(&mut self, waker: &Waker) -> bool {
        let Some(core) = super::current() else { return true };
        let mut waiting = core.timers.waiting.borrow_mut();
        if let Some(known) = self.key.and_then(|key| waiting.get_mut(&key)) {
            known.clone_from(waker);
            return false;
        }
        if self.at <= Instant::now() {
            return true;
        }
        let key = (self.at, core.timers.next.get());
        core.timers.next.set(key.1 + 1);
        waiting.insert(key, waker.clone());
        self.key = Some(key);
        false
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let (Some(key), Some(core)) = (self.key, super::current()) {
            core.timers.waiting.borrow_mut().remove(&key);
        }
    }
}

/// Waits. To be used on a core.
pub(crate) async fn sleep(time: Duration) {
    let mut waiting = Waiting::new(time);
    poll_fn(|context| if waiting.is_over(context.waker()) { Poll::Ready(()) } else { Poll::Pending }).await;
}

/// The time was over.
#[derive(Debug)]
pub(crate) struct Elapsed;

/// Runs `work`, at most for `time`. To be used on a core.
pub(crate) async fn timeout<T>(time: Duration, work: impl Future<Output = T>) -> Result<T, Elapsed> {
    let mut work = pin!(work);
    let mut waiting = None;
    poll_fn(|context| {
        if let Poll::Ready(result) = work.as_mut().poll(context) {
            return Poll::Ready(Ok(result));
        }
        let waiting = waiting.get_or_insert_with(|| Waiting::new(time));
        if waiting.is_over(context.waker()) { Poll::Ready(Err(Elapsed)) } else { Poll::Pending }
    })
    .await
}
