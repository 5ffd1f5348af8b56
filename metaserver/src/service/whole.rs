//! Calls that read the whole store: checks, backups, the list of all blocks, where they are used. Each has a snapshot and a thread, so that operations go on.

use std::time::SystemTime;

use fjordfs_proto::pb::meta::{
    BackupReply, BlocksReply, FsckReply, FsckReport, StatusReply, UsesReply, UsesRequest,
};
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use super::stopped;
use crate::{
    backup,
    executor::{Caller, Job, Jobs},
    fsck::{self, Report, runs, uses},
    store::{Snapshot, StoreError},
};

/// Messages that may wait for a slow reader.
const AHEAD: usize = 4;

/// Runs of blocks in a message.
const RUNS: usize = 16_384;

/// Blocks in a question for their uses.
const USES_BLOCKS_MAX: usize = 65_536;

/// Records between two reports of progress.
const TELL: u64 = 100_000;

/// An answer in pieces.
pub(super) type Pieces<T> = BoxStream<'static, Result<T, Status>>;

/// Where pieces go; may wait while the reader is behind.
pub(super) struct Out<T>(Box<dyn Fn(Result<T, Status>) -> bool + Send>);

impl<T> Out<T> {
    /// An error when the caller has gone.
    fn send(&self, piece: T) -> Result<(), Status> {
        match self.0(Ok(piece)) {
            true => Ok(()),
            false => Err(Status::cancelled("nobody waits for it any more")),
        }
    }
}

/// A snapshot, and the way back to the executor.
pub(super) struct Whole {
    jobs: Jobs,
    snapshot: Snapshot,
    status: StatusReply,
}

async fn ask<T>(jobs: &Jobs, job: impl FnOnce(Caller<T>) -> Job) -> Result<T, Status> {
    let (caller, answer) = oneshot::channel();
    jobs.submit(job(caller));
    Ok(answer.await.map_err(|_| stopped())??)
}

fn ask_now<T>(jobs: &Jobs, job: impl FnOnce(Caller<T>) -> Job) -> Result<T, Status> {
    let (caller, answer) = oneshot::channel();
    jobs.submit(job(caller));
    Ok(answer.blocking_recv().map_err(|_| stopped())??)
}

fn failed(e: StoreError) -> Status {
    Status::internal(e.to_string())
}

impl Whole {
    pub(super) async fn begin(jobs: Jobs) -> Result<Whole, Status> {
        let snapshot = ask(&jobs, Job::Snapshot).await?;
        let status = ask(&jobs, Job::Status).await?;
        Ok(Whole { jobs, snapshot, status })
    }

    /// Runs `work`, on a thread where that may be; the answer is what it sends.
    pub(super) fn run<T: Send + 'static>(
        self,
        work: impl FnOnce(Whole, &Out<T>) -> Result<(), Status> + Send + 'static,
    ) -> Result<Pieces<T>, Status> {
        if !self.jobs.threads() {
            let (sender, mut receiver) = mpsc::unbounded_channel();
            self.deliver(work, &Out(Box::new(move |piece| sender.send(piece).is_ok())));
            return Ok(stream::poll_fn(move |context| receiver.poll_recv(context)).boxed());
        }
        let (sender, mut receiver) = mpsc::channel(AHEAD);
        let out = Out(Box::new(move |piece| sender.blocking_send(piece).is_ok()));
        std::thread::Builder::new()
            .name("meta-whole".into())
            .spawn(move || self.deliver(work, &out))
            .map_err(|e| Status::internal(format!("cannot start a thread: {e}")))?;
        Ok(stream::poll_fn(move |context| receiver.poll_recv(context)).boxed())
    }

    fn deliver<T>(self, work: impl FnOnce(Whole, &Out<T>) -> Result<(), Status>, out: &Out<T>) {
        if let Err(e) = work(self, out) {
            // When the caller has gone there is nobody to tell.
            out.0(Err(e));
        }
    }

    /// The records against each other.
    pub(super) fn fsck(self, repair: bool, out: &Out<FsckReply>) -> Result<(), Status> {
        if repair && !self.jobs.threads() {
            return Err(Status::failed_precondition(
                "a repair waits for others: this metaserver has no thread for it",
            ));
        }
        let found = check(&self.snapshot, out)?;
        let mut report = FsckReport {
            repairable: found.repairable(),
            problem_count: found.problem_count,
            inodes: found.inodes,
            entries: found.entries,
            extents: found.extents,
            orphans: found.orphans,
            blocks_live: found.blocks_live,
            blocks_leased: found.blocks_leased,
            blocks_dead: found.blocks_dead,
            problems: found.problems,
            ..FsckReport::default()
        };
        if repair && !found.fixes.is_empty() {
            drop(self.snapshot);
            report.repaired = ask_now(&self.jobs, |caller| Job::Repair(found.fixes, caller))?;
            let left = check(&ask_now(&self.jobs, Job::Snapshot)?, out)?;
            (report.left, report.problems_left) = (left.problem_count, left.problems);
        } else {
            report.left = found.problem_count;
        }
        out.send(FsckReply { records: 0, report: Some(report) })
    }

    /// All blocks.
    pub(super) fn blocks(self, out: &Out<BlocksReply>) -> Result<(), Status> {
        let runs::Runs { live, reserved, next_block, counted, unreadable } =
            runs::read(&*self.snapshot).map_err(failed)?;
        for live in live.chunks(RUNS) {
            out.send(BlocksReply { live: live.to_vec(), ..BlocksReply::default() })?;
        }
        for reserved in reserved.chunks(RUNS) {
            out.send(BlocksReply { reserved: reserved.to_vec(), ..BlocksReply::default() })?;
        }
        for counted in counted.chunks(RUNS) {
            out.send(BlocksReply { counted: counted.to_vec(), ..BlocksReply::default() })?;
        }
        // Newer than the snapshot, perhaps: blocks that have moved since are looked for where they are now.
        let map = self.status.map;
        // Who does not know the field takes all blocks for newer then.
        let next_block = if unreadable.is_some() { 0 } else { next_block };
        let unreadable = unreadable.unwrap_or_default();
        out.send(BlocksReply { next_block, map, unreadable, ..BlocksReply::default() })
    }

    /// Where blocks are used.
    pub(super) fn uses(self, asked: &UsesRequest, out: &Out<UsesReply>) -> Result<(), Status> {
        if asked.blocks.len() > USES_BLOCKS_MAX {
            return Err(Status::invalid_argument(format!(
                "a question is about {USES_BLOCKS_MAX} blocks at most: split it"
            )));
        }
        let (mut reply, mut sent) = (UsesReply::default(), Ok(()));
        uses::read(&*self.snapshot, asked, |found| {
            match found {
                uses::Found::Use(found) => reply.uses.push(found),
                uses::Found::Scattered(ino) => reply.scattered.push(ino.0),
            }
            if reply.uses.len() + reply.scattered.len() == RUNS && sent.is_ok() {
                sent = out.send(std::mem::take(&mut reply));
            }
        })
        .map_err(failed)?;
        sent?;
        out.send(UsesReply { end: true, ..reply })
    }

    /// All records.
    pub(super) fn backup(self, out: &Out<BackupReply>) -> Result<(), Status> {
        let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let cluster_id = self.status.map.unwrap_or_default().cluster_id;
        let written = backup::write(&*self.snapshot, &cluster_id, created, |data| {
            out.send(BackupReply { data: data.into() }).map_err(Failed::Status)
        });
        written.map(drop).map_err(|failure| match failure {
            Failed::Status(status) => status,
            Failed::Store(e) => failed(e),
        })
    }
}

/// Why a backup ended early.
enum Failed {
    Status(Status),
    Store(StoreError),
}

impl From<StoreError> for Failed {
    fn from(e: StoreError) -> Failed {
        Failed::Store(e)
    }
}

fn check(snapshot: &Snapshot, out: &Out<FsckReply>) -> Result<Report, Status> {
    let told = std::cell::Cell::new(0);
    fsck::check_telling(&**snapshot, &|records| {
        if records >= told.get() + TELL {
            told.set(records);
            // Whoever has gone is noticed with the report.
            let _ = out.send(FsckReply { records, report: None });
        }
    })
    .map_err(failed)
}
