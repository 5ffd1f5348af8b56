//! Makes commits survive power failure: within a bounded time in the background, and at once for those who wait.
//!
//! One thread. All who wait when a sync begins are served by it; who comes during it is served by the next. So a hundred
//! clients that fsync together cost one or two syncs of the log, and the executor never waits.

use std::{
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use fjordfs_proto::{FsError, FsResult};
use parking_lot::{Condvar, Mutex};

use crate::store::{MetaStore, Ticket};

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

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

/// Handle of the thread.
pub(crate) struct Syncer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Syncer {
    /// Starts the thread. A commit is synced at most `interval` after it was noted.
    pub(crate) fn start(store: Arc<dyn MetaStore>, interval: Duration) -> std::io::Result<Syncer> {
        let shared = Arc::new(Shared { state: Mutex::default(), wake: Condvar::new() });
        let thread = {
            let shared = shared.clone();
            let name = std::thread::Builder::new().name("meta-syncer".into());
            name.spawn(move || run(&shared, &*store, interval))?
        };
        Ok(Syncer { shared, thread: Some(thread) })
    }

    /// A batch was committed.
    pub(crate) fn note(&self) {
        let mut state = self.shared.state.lock();
        if state.dirty.is_none() {
            state.dirty = Some(Instant::now());
            self.shared.wake.notify_one();
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
        self.shared.wake.notify_one();
    }

    /// The error that ended all syncing.
    pub(crate) fn failure(&self) -> Option<FsError> {
        self.shared.state.lock().failed.clone()
    }

    /// Syncs what is left and ends the thread.
    pub(crate) fn stop(mut self) -> FsResult<()> {
        self.end();
        self.failure().map_or(Ok(()), Err)
    }

    fn end(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.wake.notify_one();
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

fn run(shared: &Shared, store: &dyn MetaStore, interval: Duration) {
    loop {
        let (waiters, stop) = {
            let mut state = shared.state.lock();
            loop {
                let due = state.dirty.map(|since| since + interval);
                if state.stop || !state.waiters.is_empty() || due.is_some_and(|due| due <= Instant::now()) {
                    break;
                }
                match due {
                    Some(due) => drop(shared.wake.wait_until(&mut state, due)),
                    None => shared.wake.wait(&mut state),
                }
            }
            state.dirty = None;
            (std::mem::take(&mut state.waiters), state.stop)
        };
        let result = store.sync().map_err(|e| FsError::from(&e));
        {
            let mut state = shared.state.lock();
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
        if stop {
            return;
        }
    }
}
