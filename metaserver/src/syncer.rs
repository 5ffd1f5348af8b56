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
