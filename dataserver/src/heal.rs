//! Completing this server's targets: comparing placement groups with their other members, and copying what is missing.
//!
//! ```text
//!   metaserver ──heartbeat answers──► Checks ──► one task each (check.rs) ──► listing.rs   what the others have
//!              ◄─heartbeats────────── reports                              ├─► metaserver  which of it is wanted
//!                                                                          ├─► restore.rs  a shard from other shards
//!                                                                          └─► store       as any put
//! ```
//!
//! What a target lacks is fetched by its own server, so a lost target is rebuilt by all servers that take over a part of it.
//! Nothing is remembered: a check that is given up or lost in a crash is ordered again and finds what is there by then.
//!
//! **Deletions against copies.** A copy must not bring back a block that is deleted meanwhile. Before a block is copied it is
//! entered in [`Copying`], then the metaserver is asked whether it is wanted; a deletion that comes for it as long as it is entered
//! is not carried out and not confirmed, so that it comes again. A deletion queued before the question is in the answer.
//!
//! **Damage** is found by reading everything every now and then, and by who reads anyway; see `scrub.rs`.
//!
//! **Foreground load.** All copies of a server together keep to a rate ([`RebuildRate`]) that falls while users wait; see `pace.rs`.

mod check;
mod listing;
mod pace;
mod rebuild_rate;
mod restore;
mod scrub;
#[cfg(test)]
mod tests;
mod throttle;
mod tidy;

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

use fjordfs_proto::{
    BlockId, TargetId,
    pb::meta::{Check, CheckReport, WantedReply, WantedRequest},
};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    task::AbortHandle,
};

pub(crate) use self::{rebuild_rate::RebuildRate, scrub::Scrubs, tidy::Tidied};
use crate::{Config, cores::Jobs, error::StartError, membership, node::Node};

/// What the metaserver wants checked, and what it is told.
#[derive(Default)]
pub(crate) struct Checks {
    state: Mutex<State>,
    changed: Notify,
    ended: Notify,
}

#[derive(Default)]
struct State {
    ordered: BTreeMap<u64, Check>,
    reports: BTreeMap<u64, CheckReport>,
}

impl Checks {
    /// For a heartbeat.
    pub(crate) fn reports(&self) -> Vec<CheckReport> {
        self.state.lock().reports.values().cloned().collect()
    }

    /// From a heartbeat's answer: all that shall be checked. What is not ordered any more needs no report.
    pub(crate) fn order(&self, checks: Vec<Check>) {
        let mut state = self.state.lock();
        state.ordered = checks.into_iter().map(|check| (check.ticket, check)).collect();
        let State { ordered, reports } = &mut *state;
        reports.retain(|ticket, _| ordered.contains_key(ticket));
        self.changed.notify_one();
    }

    /// Waits until a check has ended that was not told of: the next one need not wait for the time of a heartbeat.
    pub(crate) async fn ended(&self) {
        self.ended.notified().await;
    }

    fn report(&self, report: CheckReport) {
        let mut state = self.state.lock();
        if state.ordered.contains_key(&report.ticket) {
            if report.done {
                self.ended.notify_one();
            }
            state.reports.insert(report.ticket, report);
        }
    }
}

/// Blocks that are being copied to targets of this server.
#[derive(Default)]
pub(crate) struct Copying(Mutex<HashSet<(TargetId, BlockId)>>);

impl Copying {
    fn enter(&self, target: TargetId, blocks: impl IntoIterator<Item = BlockId>) -> Entered<'_> {
        let mut copying = self.0.lock();
        let blocks: Vec<BlockId> =
            blocks.into_iter().filter(|block| copying.insert((target, *block))).collect();
        Entered { copying: self, target, blocks }
    }

    /// Whether a deletion has to wait.
    pub(crate) fn contains(&self, target: TargetId, block: BlockId) -> bool {
        self.0.lock().contains(&(target, block))
    }
}

/// Leaves when it is dropped.
struct Entered<'a> {
    copying: &'a Copying,
    target: TargetId,
    blocks: Vec<BlockId>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut copying = self.copying.0.lock();
        for block in &self.blocks {
            copying.remove(&(self.target, *block));
        }
    }
}

/// The thread that runs checks.
pub(crate) struct Healer {
    thread: JoinHandle<()>,
    stop: watch::Sender<bool>,
}

impl Healer {
    pub(crate) fn start(node: Arc<Node>, jobs: Jobs, config: &Config) -> Result<Healer, StartError> {
        let (stop, mut stopping) = watch::channel(false);
        let Config { meta, scrub_interval, scrub_rate, .. } = config.clone();
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(StartError::Thread)?;
        let thread = std::thread::Builder::new()
            .name("fjord-heal".to_owned())
            .spawn(move || {
                runtime.block_on(async move {
                    let clients = match membership::connect_each(&meta) {
                        Ok(clients) => clients,
                        Err(what) => return tracing::error!("{what}"),
                    };
                    let at = AtomicUsize::new(0);
                    let healing = Arc::new(Healing { node, jobs, clients, at });
                    for target in healing.node.targets.keys() {
                        tokio::spawn(tidy::run(healing.clone(), *target));
                        tokio::spawn(scrub::run(healing.clone(), *target, scrub_interval, scrub_rate));
                    }
                    tokio::spawn(scrub::follow_reports(healing.clone()));
                    tokio::select! {
                        () = healing.run() => {}
                        _ = stopping.wait_for(|stop| *stop) => {}
                    }
                });
                // Tasks end here, and with them the last hold on the cores.
                drop(runtime);
            })
            .map_err(StartError::Thread)?;
        Ok(Healer { thread, stop })
    }

    pub(crate) fn stop(self) {
        self.stop.send_replace(true);
        if self.thread.join().is_err() {
            tracing::error!("the healing thread has panicked");
        }
    }
}

/// What all checks share.
struct Healing {
    node: Arc<Node>,
    jobs: Jobs,
    /// One for each address of a metaserver.
    clients: Vec<membership::Client>,
    /// The one that answered last.
    at: AtomicUsize,
}

impl Healing {
    /// Asks the metaserver that owns the metadata, whichever it is now, which blocks are wanted.
    async fn ask(&self, request: WantedRequest) -> Result<WantedReply, tonic::Status> {
        let mut last = tonic::Status::unavailable("no metaserver has an address");
        for _ in &self.clients {
            let at = self.at.load(Ordering::Relaxed) % self.clients.len();
            let Some(client) = self.clients.get(at) else { break };
            match client.clone().wanted(request.clone()).await {
                Ok(reply) => return Ok(reply.into_inner()),
                Err(e) => last = e,
            }
            self.at.store(at + 1, Ordering::Relaxed);
        }
        Err(last)
    }

    async fn run(self: &Arc<Self>) {
        let mut tasks: BTreeMap<u64, AbortHandle> = BTreeMap::new();
        loop {
            self.node.checks.changed.notified().await;
            let ordered = self.node.checks.state.lock().ordered.clone();
            tasks.retain(|ticket, task| {
                let wanted = ordered.contains_key(ticket);
                if !wanted {
                    task.abort();
                }
                wanted
            });
            for (ticket, order) in ordered {
                tasks.entry(ticket).or_insert_with(|| {
                    let healing = self.clone();
                    tokio::spawn(async move { healing.check(order).await }).abort_handle()
                });
            }
        }
    }

    async fn check(&self, order: Check) {
        let mut report = CheckReport { ticket: order.ticket, ..CheckReport::default() };
        if let Err(problem) = check::run(self, &order, &mut report).await {
            report.problem = problem;
        }
        report.done = true;
        self.node.checks.report(report);
    }
}
