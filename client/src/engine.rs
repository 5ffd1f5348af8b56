//! Where the client's work runs.
//!
//! Background work (uploads, read-ahead) and the data connections of callers without a lane run on a small runtime of
//! the client's own, so that the library works from any runtime and outlives it. The session stream has a thread to
//! itself: its tasks hand each message from one to the next, which on several threads would be as many wake-ups of
//! other cores. A thread that
//! enters a **lane** ([`enter_lane`]: the FUSE workers do) gets data connections of its own, driven by its own
//! runtime: its requests go to the wire and come back without changing threads.

use std::{cell::Cell, time::Duration};

use fjordfs_proto::{FsError, FsResult, error::Errno};
use tokio::{
    runtime::{Handle, Runtime},
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

/// How long the session's thread stays for what a dropped client has yet to send.
const LINGER: Duration = Duration::from_secs(5);

/// Keeps the session's thread while it has something to send after the client was dropped.
pub(crate) type Alive = mpsc::Sender<()>;

/// Number of a lane; 0 is the engine's own runtime.
pub(crate) type LaneId = usize;

thread_local! {
    static LANE: Cell<LaneId> = const { Cell::new(0) };
}

/// Declares that this thread drives a current-thread tokio runtime, and that connections used from it shall live
/// there. `index` counts from 0 and is used by one thread at a time.
pub fn enter_lane(index: usize) {
    LANE.set(index + 1);
}

/// The calling thread's lane.
pub(crate) fn lane() -> LaneId {
    LANE.get()
}

/// The client's own runtime.
pub(crate) struct Engine {
    runtime: Option<Runtime>,
    handle: Handle,
    session: Handle,
    alive: Alive,
    /// Dropped, it ends the session's thread.
    _session_alive: Option<oneshot::Sender<()>>,
}

impl Engine {
    /// Leaves all work to the runtime of the caller.
    pub(crate) fn of_caller() -> FsResult<Engine> {
        let handle = Handle::try_current()
            .map_err(|e| FsError::new(Errno::EINVAL, format!("a client over its own network: {e}")))?;
        // Nobody lingers: the runtime ends when its owner wants.
        let (alive, _) = mpsc::channel(1);
        Ok(Engine { runtime: None, session: handle.clone(), handle, alive, _session_alive: None })
    }

    pub(crate) fn start(threads: usize) -> FsResult<Engine> {
        let failed = |e| FsError::new(Errno::EAGAIN, format!("cannot start the client's threads: {e}"));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads.max(1))
            .thread_name("fjord-engine")
            .enable_all()
            .build()
            .map_err(failed)?;
        let handle = runtime.handle().clone();
        let session_runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let session = session_runtime.handle().clone();
        let (session_alive, ended) = oneshot::channel::<()>();
        let (alive, mut lingering) = mpsc::channel(1);
        let thread = std::thread::Builder::new().name("fjord-session".into());
        thread
            .spawn(move || {
                // Nothing is ever sent: the error says that the engine is gone.
                let _ = session_runtime.block_on(ended);
                let sent = async { tokio::time::timeout(LINGER, lingering.recv()).await };
                if session_runtime.block_on(sent).is_err() {
                    tracing::warn!("the metaserver did not take everything within {LINGER:?}");
                }
            })
            .map_err(failed)?;
        Ok(Engine { runtime: Some(runtime), handle, session, alive, _session_alive: Some(session_alive) })
    }

    /// For the session's driver.
    pub(crate) fn alive(&self) -> Alive {
        self.alive.clone()
    }

    /// Runs a task on the session's thread.
    pub(crate) fn spawn_session<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.session.spawn(task)
    }

    /// Runs a task on the engine.
    pub(crate) fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.handle.spawn(task)
    }

    /// Runs a task on the calling thread's lane, so that what it does belongs to this thread.
    pub(crate) fn spawn_here<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        match lane() {
            0 => self.handle.spawn(task),
            _ => tokio::spawn(task),
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // May run inside another runtime, where waiting for threads is not allowed.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
