//! Packs the small and scattered dirty bytes of many files into shared blocks.
//!
//! Flushes are queued; whatever has gathered while the last units were on their way goes into the next ones. So one
//! closing file is on the wire at once, and a thousand closing together share blocks and commits.

use std::sync::Arc;

use fjordfs_proto::{FsError, FsResult, Policy, error::Errno};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use super::Unit;
use crate::{
    client::Inner,
    file::{FileInner, FileState},
};

/// Batches on their way at a time: one is being stored while the next gathers.
const BATCHES_MAX: usize = 4;

/// Files in one commit.
const FILES_MAX: usize = 512;

/// A file to be flushed, and who waits for its units to be started.
pub(crate) struct Request {
    state: Arc<FileState>,
    started: oneshot::Sender<FsResult<()>>,
}

/// Takes all dirty bytes of a file into units; returns when those are on their way.
pub(crate) async fn pack(client: &Inner, state: &Arc<FileState>) -> FsResult<()> {
    let (started, wait) = oneshot::channel();
    let shut = || FsError::new(Errno::EIO, "the client was shut down");
    client.packer.send(Request { state: state.clone(), started }).map_err(|_| shut())?;
    wait.await.map_err(|_| shut())?
}

/// Serves the queue until the client is gone.
pub(crate) async fn run(client: std::sync::Weak<Inner>, mut queue: mpsc::UnboundedReceiver<Request>) {
    let batches = Arc::new(Semaphore::new(BATCHES_MAX));
    let mut requests = Vec::new();
    loop {
        if queue.recv_many(&mut requests, FILES_MAX).await == 0 {
            return;
        }
        let Ok(permit) = batches.clone().acquire_owned().await else { return };
        while requests.len() < FILES_MAX
            && let Ok(more) = queue.try_recv()
        {
            requests.push(more);
        }
        let Some(client) = client.upgrade() else { return };
        start_batch(&client, requests.drain(..), permit);
    }
}

fn start_batch(client: &Arc<Inner>, requests: impl Iterator<Item = Request>, permit: OwnedSemaphorePermit) {
    let mut batch = Batch { client, block: None, full: Vec::new() };
    let mut files = Vec::new();
    for request in requests {
        let outcome = batch.add(&request.state);
        files.push(request.state);
        // The flush waits for its units itself.
        let _ = request.started.send(outcome);
    }
    batch.start();
    client.engine.spawn(async move {
        for file in files {
            file.settle().await;
        }
        drop(permit);
    });
}

struct Batch<'a> {
    client: &'a Arc<Inner>,
    block: Option<Unit>,
    full: Vec<Unit>,
}

impl Batch<'_> {
    /// Takes all dirty bytes of a file.
    fn add(&mut self, state: &Arc<FileState>) -> FsResult<()> {
        let mut inner = state.lock();
        let policy = inner.view.policy()?;
        while inner.view.dirty_bytes() > 0 {
            self.unit_for(policy, &inner).take(state, &mut inner);
        }
        Ok(())
    }

    /// The block being filled, or a new one when it is full, of another policy, or not for this file.
    fn unit_for(&mut self, policy: Policy, file: &FileInner) -> &mut Unit {
        let fits = |unit: &Unit| {
            let has_room = unit.room() > 0 && unit.file_count() < FILES_MAX;
            unit.policy() == policy && has_room && unit.may_take(file)
        };
        if let Some(full) = self.block.take_if(|unit| !fits(unit)) {
            self.full.push(full);
        }
        self.block.get_or_insert_with(|| Unit::new(policy))
    }

    fn start(self) {
        for unit in self.full.into_iter().chain(self.block).filter(|unit| !unit.is_empty()) {
            unit.start(self.client);
        }
    }
}
