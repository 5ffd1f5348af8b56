//! Fetching what a program says that it will read: a trainer knows the order of its samples long before it reads them.
//!
//! # How it works
//! One task for each plan walks the list, opens what is named by a path, and asks for chunks of blocks in that order, a
//! few at a time. Readers find them in memory. The plan stays ahead of them by at most a share of
//! [`Options::memory_max`](crate::Options) for all plans together: a chunk counts from when it is asked for until its
//! first reader comes ([`window`]), so a plan may be as long as an epoch.
//!
//! # Granularity
//! Chunks have 1 MiB: many small files that share one are fetched together, and so is what surrounds a small range of a
//! large file. For many such ranges [`Client::batch`] is the better way.

pub(crate) mod window;

use std::{ops::Range, sync::Arc};

use fjordfs_proto::{FsError, FsResult};
use futures_util::stream::{self, StreamExt};
use tokio::task::JoinHandle;

use crate::{
    client::{Client, Inner},
    file::{BlockChunk, File},
};
use window::Plan;

/// Paths that are opened ahead.
const OPENS: usize = 16;

/// Chunks under way at a time.
const IN_FLIGHT: usize = 16;

/// A large file is looked at in steps of this, so that the list of its chunks stays short.
const STEP: u64 = 256 << 20;

/// Something that will be read.
#[derive(Clone)]
pub enum Planned {
    /// The whole file.
    Path(String),
    /// The whole file.
    File(File),
    /// Part of a file.
    Range(File, Range<u64>),
}

/// A plan under way. Dropping it ends it; what it has fetched stays in memory like everything that was read.
pub struct Prefetch {
    task: JoinHandle<Vec<(usize, FsError)>>,
    plan: Arc<Plan>,
}

impl Prefetch {
    /// Bytes of memory for what was asked for and has not been read yet.
    pub fn ahead(&self) -> u64 {
        self.plan.ahead()
    }

    /// Waits until everything is fetched, which needs readers when it is more than the memory for it. Returns what
    /// could not be, by position in the plan: whoever reads it gets the same error, or succeeds if it has passed.
    pub async fn done(mut self) -> Vec<(usize, FsError)> {
        // The task is aborted by nobody but the drop of this, and does not panic.
        (&mut self.task).await.unwrap_or_default()
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Client {
    /// Fetches in the background, in this order, what will be read in about this order.
    pub fn prefetch(&self, plan: Vec<Planned>) -> Prefetch {
        let window = self.inner.cache.window().plan();
        let task = self.inner.engine.spawn(run(self.clone(), plan, window.clone()));
        Prefetch { task, plan: window }
    }
}

async fn run(client: Client, items: Vec<Planned>, plan: Arc<Plan>) -> Vec<(usize, FsError)> {
    let (client, plan) = (&client, &plan);
    // Errors are part of the stream, so that the order of the plan stays.
    let chunks = stream::iter(items.into_iter().enumerate())
        .map(|(i, item)| async move { (i, open(client, item).await) })
        .buffered(OPENS)
        .flat_map(|(i, opened)| {
            let chunks = match opened {
                Ok((file, range)) => chunks(file, range).left_stream(),
                Err(e) => stream::iter([Err(e)]).right_stream(),
            };
            chunks.map(move |chunk| (i, chunk))
        });
    let mut errors: Vec<(usize, FsError)> = chunks
        .map(|(i, chunk)| async move {
            let fetched = match chunk {
                Ok(chunk) => fetch(&client.inner, plan, chunk).await,
                Err(e) => Err(e),
            };
            fetched.err().map(|e| (i, e))
        })
        .buffered(IN_FLIGHT)
        .filter_map(|failed| async { failed })
        .collect()
        .await;
    // One error says enough about an item.
    errors.dedup_by_key(|(i, _)| *i);
    errors
}

async fn open(client: &Client, item: Planned) -> FsResult<(File, Range<u64>)> {
    let (file, range) = match item {
        Planned::Path(path) => (client.open_path(&path).await?, 0..u64::MAX),
        Planned::File(file) => (file, 0..u64::MAX),
        Planned::Range(file, range) => (file, range),
    };
    let end = range.end.min(file.size());
    Ok((file, range.start.min(end)..end))
}

/// The chunks of a range, looked up step by step.
fn chunks(file: File, range: Range<u64>) -> impl stream::Stream<Item = FsResult<BlockChunk>> {
    let Range { start, end } = range;
    stream::unfold((file, start), move |(file, at)| async move {
        if at >= end {
            return None;
        }
        let stop = end.min(at.saturating_add(STEP));
        match file.chunks(at..stop).await {
            Ok(chunks) => Some((stream::iter(chunks.into_iter().map(Ok).collect::<Vec<_>>()), (file, stop))),
            Err(e) => Some((stream::iter(vec![Err(e)]), (file, end))),
        }
    })
    .flatten()
}

async fn fetch(inner: &Inner, plan: &Arc<Plan>, chunk: BlockChunk) -> FsResult<()> {
    if inner.cache.has(chunk.block, chunk.index) || !plan.enter((chunk.block, chunk.index)).await {
        return Ok(());
    }
    let fetched = inner.cache.fetch(chunk.block, chunk.layout, chunk.index).await;
    if fetched.is_err() {
        plan.leave(&(chunk.block, chunk.index));
    }
    fetched
}
