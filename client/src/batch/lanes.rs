//! The threads that batches are read on, each with a runtime and, as a lane, with data connections of its own. They
//! start with the first batch: a mount never has one.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use fjordfs_proto::{FsError, FsResult, error::Errno};
use tokio::{runtime::Handle, sync::oneshot};

use super::shared::{Share, Shared};
use crate::engine::enter_lane;

/// Lanes of batches are numbered from here on, FUSE workers' from 0.
const FIRST: usize = 1 << 20;

/// A lane is woken for this many reads: fewer are quicker read without waking another core.
const READS_MIN: usize = 8;

/// See the module.
pub(crate) struct Lanes {
    count: usize,
    started: OnceLock<FsResult<Vec<Lane>>>,
    next: AtomicUsize,
}

struct Lane {
    handle: Handle,
    /// Dropped, it ends the thread.
    _alive: oneshot::Sender<()>,
}

impl Lanes {
    pub(crate) fn new(count: usize) -> Lanes {
        Lanes { count: count.max(1), started: OnceLock::new(), next: AtomicUsize::new(0) }
    }

    /// Gives a batch to as many lanes as it is worth: one message to each.
    pub(super) fn submit(&self, batch: &Arc<Shared>, in_flight: usize) {
        let lanes = match self.started.get_or_init(|| (0..self.count).map(Lane::start).collect()) {
            Ok(lanes) => lanes,
            Err(e) => return batch.fail_rest(e),
        };
        let used = lanes.len().min(batch.len().div_ceil(READS_MIN)).min(in_flight);
        let first = self.next.fetch_add(used, Relaxed);
        let shares: Vec<Share> = (0..used)
            .map(|i| Share::new(batch, in_flight / used + usize::from(i < in_flight % used)))
            .collect();
        for (i, share) in shares.into_iter().enumerate() {
            lanes[(first + i) % lanes.len()].handle.spawn(share.work());
        }
    }
}

impl Lane {
    fn start(index: usize) -> FsResult<Lane> {
        let failed = |e| FsError::new(Errno::EAGAIN, format!("cannot start a thread for batches: {e}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let handle = runtime.handle().clone();
        let (alive, ended) = oneshot::channel::<()>();
        std::thread::Builder::new()
            .name(format!("fjord-batch-{index}"))
            .spawn(move || {
                enter_lane(FIRST + index);
                // Nothing is ever sent: the error says that the client is gone.
                let _ = runtime.block_on(ended);
            })
            .map_err(failed)?;
        Ok(Lane { handle, _alive: alive })
    }
}
