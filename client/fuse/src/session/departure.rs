//! Leaving a mount to another process: no request is taken any more, and those that were are answered.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

/// Tells the workers of a mount to leave. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Departure {
    leave: Arc<watch::Sender<bool>>,
    done: Arc<Mutex<Receiver<()>>>,
}

/// A worker's end.
#[derive(Clone, Debug)]
pub(super) struct Departing {
    pub(super) told: watch::Receiver<bool>,
    /// Dropped when a worker has left.
    pub(super) done: Sender<()>,
}

pub(super) fn departure() -> (Departure, Departing) {
    let (leave, told) = watch::channel(false);
    let (done, receiver) = channel();
    (Departure { leave: Arc::new(leave), done: Arc::new(Mutex::new(receiver)) }, Departing { told, done })
}

impl Departure {
    /// Takes no more requests, and waits for those under way, but for waits for locks. Whether they are all done: what is not, the
    /// kernel sends again to whoever takes over. There is no way back; the process is to end.
    pub fn leave(&self, patience: Duration) -> bool {
        self.leave.send_replace(true);
        // Nothing is ever sent.
        self.done.lock().recv_timeout(patience) == Err(RecvTimeoutError::Disconnected)
    }
}
