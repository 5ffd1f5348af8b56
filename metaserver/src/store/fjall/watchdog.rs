//! Against a batch that never returns.
//!
//! The engine lets a batch wait while its threads are behind with writing tables, and does not look whether there are any left: when they
//! have failed meanwhile, because the disk is full or broken, it waits forever, and with it the whole metaserver. Nothing that has been
//! promised is lost then, and nothing short of a new process helps.

use std::{
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// A batch that takes longer is asked after.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_secs(1);

pub(super) struct Watchdog {
    /// When the batch under way was begun.
    begun: Arc<Mutex<Option<Instant>>>,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// A batch under way.
pub(super) struct Watched<'a>(&'a Watchdog);

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        *self.0.begun.lock() = None;
    }
}

impl Watchdog {
    /// `is_dead`: nobody of the engine will do anything any more; then `end` is called.
    pub(super) fn start(
        is_dead: impl Fn() -> bool + Send + 'static,
        end: impl Fn() + Send + 'static,
    ) -> std::io::Result<Watchdog> {
        Watchdog::with(PATIENCE, LOOK, is_dead, end)
    }

    fn with(
        patience: Duration,
        look: Duration,
        is_dead: impl Fn() -> bool + Send + 'static,
        end: impl Fn() + Send + 'static,
    ) -> std::io::Result<Watchdog> {
        let begun: Arc<Mutex<Option<Instant>>> = Arc::default();
        let (stop, stopped) = mpsc::channel();
        let watched = begun.clone();
        let thread = std::thread::Builder::new().name("meta-watchdog".into()).spawn(move || {
            while stopped.recv_timeout(look) == Err(mpsc::RecvTimeoutError::Timeout) {
                let late = watched.lock().is_some_and(|begun| begun.elapsed() > patience);
                if late && is_dead() {
                    end();
                }
            }
        })?;
        Ok(Watchdog { begun, stop: Some(stop), thread: Some(thread) })
    }

    /// Until what is returned is dropped.
    pub(super) fn watch(&self) -> Watched<'_> {
        *self.begun.lock() = Some(Instant::now());
        Watched(self)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the watchdog of the metadata store panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

    use super::*;

    #[test]
    fn only_a_batch_that_hangs_on_a_dead_engine_ends_the_process() {
        const BRIEF: Duration = Duration::from_millis(20);
        let (dead, ends) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (is_dead, ended) = (dead.clone(), ends.clone());
        let watchdog = Watchdog::with(
            10 * BRIEF,
            BRIEF,
            move || is_dead.load(SeqCst),
            move || {
                ended.fetch_add(1, SeqCst);
            },
        )
        .unwrap();
        let slow = watchdog.watch();
        std::thread::sleep(20 * BRIEF);
        assert_eq!(ends.load(SeqCst), 0, "it is slow, and the engine works on it");
        drop(slow);
        dead.store(true, SeqCst);
        std::thread::sleep(20 * BRIEF);
        assert_eq!(ends.load(SeqCst), 0, "nobody waits, and the next batch is refused");
        let hangs = watchdog.watch();
        while ends.load(SeqCst) == 0 {
            std::thread::sleep(BRIEF);
        }
        drop(hangs);
    }
}
