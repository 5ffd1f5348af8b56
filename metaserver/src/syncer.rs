//! Makes commits survive power failure: within a bounded time in the background, and at once for those who wait.
//!
//! One thread, or a task when the engine's syncs hold up no thread. All who wait when a sync begins are served by it; who
//! comes during it is served by the next. So a hundred clients that fsync together cost one or two syncs of the log, and the
//! executor never waits.

use std::{
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use fjordfs_proto::{FsError, FsResult};
use parking_lot::{Condvar, Mutex};
use tokio::sync::Notify;

use crate::store::{MetaStore, StoreResult, Ticket};

type Waiter = Box<dyn FnOnce(FsResult<()>) + Send>;

#[derive(Default)]
struct State {
    waiters: Vec<(Ticket, Waiter)>,
    /// When the oldest unsynced commit was noted.
    dirty: Option<Instant>,
    durable: Ticket,
    failed: Option<FsError>,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// For the thread.
    wake: Condvar,
    /// For the task.
    notify: Notify,
}

/// Handle of the thread or task.
pub(crate) struct Syncer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Syncer {
    /// Starts it. A commit is synced at most `interval` after it was noted.
    pub(crate) fn start(store: Arc<dyn MetaStore>, interval: Duration) -> std::io::Result<Syncer> {
        let shared = Arc::new(Shared::default());
        let own = shared.clone();
        // Nothing has begun while it is not waited for.
        if store.sync_waiting().is_some() {
            tokio::spawn(async move { run_waiting(&own, &*store, interval).await });
            return Ok(Syncer { shared, thread: None });
        }
        let name = std::thread::Builder::new().name("meta-syncer".into());
        let thread = name.spawn(move || run(&own, &*store, interval))?;
        Ok(Syncer { shared, thread: Some(thread) })
    }

    /// A batch was committed.
    pub(crate) fn note(&self) {
        let mut state = self.shared.state.lock();
        if state.dirty.is_none() {
            state.dirty = Some(Instant::now());
            self.shared.wake();
        }
    }

    /// Calls `then` once everything up to `ticket` survives power failure, or is known not to.
    pub(crate) fn after(&self, ticket: Ticket, then: impl FnOnce(FsResult<()>) + Send + 'static) {
        let mut state = self.shared.state.lock();
        if let Some(e) = state.failed.clone() {
            drop(state);
            return then(Err(e));
        }
        if state.durable >= ticket {
            drop(state);
            return then(Ok(()));
        }
        state.waiters.push((ticket, Box::new(then)));
        self.shared.wake();
    }

    /// The error that ended all syncing.
    pub(crate) fn failure(&self) -> Option<FsError> {
        self.shared.state.lock().failed.clone()
    }

    /// Syncs what is left and ends the thread; a task ends by itself.
    pub(crate) fn stop(mut self) -> FsResult<()> {
        self.end();
        self.failure().map_or(Ok(()), Err)
    }

    fn end(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the syncer thread panicked");
        }
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        self.end();
    }
}

/// What is to be done next.
enum Turn {
    /// Nothing before then, or before somebody comes.
    Wait(Option<Instant>),
    Sync {
        waiters: Vec<(Ticket, Waiter)>,
        stop: bool,
    },
}

impl State {
    fn turn(&mut self, interval: Duration) -> Turn {
        let due = self.dirty.map(|since| since + interval);
        if !self.stop && self.waiters.is_empty() && due.is_none_or(|due| due > Instant::now()) {
            return Turn::Wait(due);
        }
        self.dirty = None;
        Turn::Sync { waiters: std::mem::take(&mut self.waiters), stop: self.stop }
    }
}

impl Shared {
    fn wake(&self) {
        self.wake.notify_one();
        self.notify.notify_one();
    }

    fn synced(&self, result: StoreResult<Ticket>, waiters: Vec<(Ticket, Waiter)>) {
        let result = result.map_err(|e| FsError::from(&e));
        {
            let mut state = self.state.lock();
            match &result {
                Ok(upto) => state.durable = *upto,
                Err(e) => {
                    if state.failed.is_none() {
                        tracing::error!(error = %e, "the metadata log could not be synced");
                    }
                    state.failed = Some(e.clone());
                }
            }
        }
        for (_, then) in waiters {
            then(result.as_ref().map(drop).map_err(Clone::clone));
        }
    }
}

fn run(shared: &Shared, store: &dyn MetaStore, interval: Duration) {
    let mut state = shared.state.lock();
    loop {
        match state.turn(interval) {
            Turn::Wait(Some(due)) => drop(shared.wake.wait_until(&mut state, due)),
            Turn::Wait(None) => shared.wake.wait(&mut state),
            Turn::Sync { waiters, stop } => {
                drop(state);
                shared.synced(store.sync(), waiters);
                if stop {
                    return;
                }
                state = shared.state.lock();
            }
        }
    }
}

async fn run_waiting(shared: &Shared, store: &dyn MetaStore, interval: Duration) {
    loop {
        let turn = shared.state.lock().turn(interval);
        match turn {
            Turn::Wait(Some(due)) => {
                drop(tokio::time::timeout_at(due.into(), shared.notify.notified()).await);
            }
            Turn::Wait(None) => shared.notify.notified().await,
            Turn::Sync { waiters, stop } => {
                let result = match store.sync_waiting() {
                    Some(sync) => sync.await,
                    None => store.sync(),
                };
                shared.synced(result, waiters);
                if stop {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        ops::Range,
        sync::{
            atomic::{AtomicBool, AtomicU64, Ordering},
            mpsc,
        },
    };

    use bytes::Bytes;

    use super::*;
    use crate::store::{Batch, Fence, Order, Pair, StoreError, StoreResult};

    /// Syncs slowly, counts, and fails when told to.
    #[derive(Default)]
    struct Slow {
        syncs: AtomicU64,
        fail: AtomicBool,
    }

    impl MetaStore for Slow {
        fn get(&self, _: &[u8]) -> StoreResult<Option<Bytes>> {
            Ok(None)
        }
        fn scan(&self, _: Range<&[u8]>, _: Order, _: usize) -> StoreResult<Vec<Pair>> {
            Ok(Vec::new())
        }
        fn commit(&self, _: Batch, _: Fence) -> StoreResult<Ticket> {
            Ok(Ticket(1))
        }
        fn sync(&self) -> StoreResult<Ticket> {
            std::thread::sleep(Duration::from_millis(50));
            self.syncs.fetch_add(1, Ordering::Relaxed);
            match self.fail.load(Ordering::Relaxed) {
                true => Err(StoreError::NoSpace { folder: "/disk".into() }),
                false => Ok(Ticket(7)),
            }
        }
        fn take_over(&self) -> StoreResult<Fence> {
            Ok(Fence(1))
        }
        fn name(&self) -> &'static str {
            "slow"
        }
    }

    #[test]
    fn one_sync_serves_all_who_wait() {
        let store = Arc::new(Slow::default());
        let syncer = Syncer::start(store.clone(), Duration::from_secs(60)).unwrap();
        let (done, results) = mpsc::channel();
        for i in 0..100 {
            let done = done.clone();
            syncer.after(Ticket(7), move |result| done.send((i, result.is_ok())).unwrap());
        }
        let order: Vec<(i32, bool)> = results.iter().take(100).collect();
        assert_eq!(order, (0..100).map(|i| (i, true)).collect::<Vec<_>>(), "in their order");
        assert!(store.syncs.load(Ordering::Relaxed) <= 2);
        let syncs = store.syncs.load(Ordering::Relaxed);
        syncer.after(Ticket(6), move |result| done.send((0, result.is_ok())).unwrap());
        assert!(results.recv().unwrap().1);
        assert_eq!(store.syncs.load(Ordering::Relaxed), syncs, "durable already");
    }

    #[test]
    fn commits_are_synced_without_anybody_waiting() {
        let store = Arc::new(Slow::default());
        let syncer = Syncer::start(store.clone(), Duration::from_millis(20)).unwrap();
        syncer.note();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(store.syncs.load(Ordering::Relaxed), 1);
        syncer.stop().unwrap();
    }

    #[test]
    fn a_failure_is_told_to_everybody_from_then_on() {
        let store = Arc::new(Slow::default());
        store.fail.store(true, Ordering::Relaxed);
        let syncer = Syncer::start(store, Duration::from_secs(60)).unwrap();
        let (done, results) = mpsc::channel();
        for _ in 0..2 {
            let done = done.clone();
            syncer.after(Ticket(1), move |result| done.send(result.unwrap_err().errno).unwrap());
            assert_eq!(results.recv().unwrap(), fjordfs_proto::error::Errno::ENOSPC);
        }
        assert!(syncer.failure().is_some());
        assert!(syncer.stop().is_err());
    }
}
