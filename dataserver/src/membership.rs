//! This data server in its cluster: registration and heartbeats, on a thread of its own.
//!
//! ```text
//!   start ──► register ──► beat ──► beat ──► ...
//!               ▲  │ unreachable: again, ever slower     │ "unknown": the metaserver has restarted
//!               └──┴─────────────────────────────────────┘
//! ```
//!
//! **Deletions** come with heartbeat answers, because data servers connect to the metaserver and never the reverse. They
//! are carried out beside the heartbeats, some at a time, made power-safe, and acknowledged with the next one. An acknowledgement
//! is repeated until a heartbeat has been answered; a block that could not be deleted is not acknowledged, so that it comes again.
//!
//! **Checks** of placement groups come the same way and are reported the same way; `heal.rs` carries them out.
//!
//! **A metaserver that is away** stops nobody from reading and writing: ids of a target that was registered once are in
//! its label. Only a target that never was has to wait.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{Arc, mpsc::SyncSender},
    thread,
    time::Duration,
};

use fjordfs_proto::{
    BlockId, META_MESSAGE_MAX, PROTOCOL_VERSION, TargetId,
    pb::meta::{
        DeletedBlocks, HeartbeatReply, HeartbeatRequest, RegisterReply, RegisterRequest, TargetReport,
        cluster_client::ClusterClient,
    },
};
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use crate::{
    cores::Jobs,
    error::StartError,
    node::{Node, report},
    store::{Deletion, Store, files::Files},
};

/// Longest wait for an answer.
const CALL_MAX: Duration = Duration::from_secs(10);

/// First and longest pause between attempts.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Heartbeats that tell of checks which have ended come at most so many times as often.
const EARLY: u32 = 10;

/// A target on its way into service.
pub(crate) struct Candidate {
    /// 0 when never registered.
    pub(crate) target: TargetId,
    pub(crate) uuid: String,
    pub(crate) domain: String,
    pub(crate) store: Arc<Store<Files>>,
}

/// What the metaserver is told.
pub(crate) struct Identity {
    /// `host:port` of the metaserver.
    pub(crate) meta: String,
    /// Empty when no target was ever registered.
    pub(crate) cluster_id: String,
    /// 0 when no target was ever registered.
    pub(crate) server: u64,
    pub(crate) name: String,
    pub(crate) advertise: Option<String>,
    pub(crate) listen: SocketAddr,
    pub(crate) candidates: Vec<Candidate>,
}

/// How the first registration went.
pub(crate) enum First {
    Registered(RegisterReply),
    /// All targets have been registered before; it goes on in the background.
    Later,
    Refused(StartError),
}

/// The membership thread.
pub(crate) struct Membership {
    thread: thread::JoinHandle<()>,
    stop: watch::Sender<bool>,
    ready: oneshot::Sender<(Arc<Node>, Jobs)>,
}

/// A membership thread that beats.
pub(crate) struct Beating {
    thread: thread::JoinHandle<()>,
    stop: watch::Sender<bool>,
}

impl Membership {
    /// Starts the thread and waits for the first registration, or until it is clear that it must not be waited for.
    pub(crate) fn start(identity: Identity) -> Result<(Membership, First), StartError> {
        let (first, outcome) = std::sync::mpsc::sync_channel(1);
        let (stop, stopping) = watch::channel(false);
        let (ready, node) = oneshot::channel();
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(StartError::Thread)?;
        let thread = std::thread::Builder::new()
            .name("fjord-member".to_owned())
            .spawn(move || {
                runtime.block_on(async move {
                    let mut stopping2 = stopping.clone();
                    tokio::select! {
                        () = run(identity, first, node, stopping) => {}
                        _ = stopping2.wait_for(|stop| *stop) => {}
                    }
                });
            })
            .map_err(StartError::Thread)?;
        let first = outcome.recv().map_err(|e| StartError::Thread(std::io::Error::other(e)))?;
        Ok((Membership { thread, stop, ready }, first))
    }

    /// Lets the heartbeats begin.
    pub(crate) fn serve(self, node: Arc<Node>, jobs: Jobs) -> Beating {
        // Fails only when the thread has died, and then joining it says so.
        drop(self.ready.send((node, jobs)));
        Beating { thread: self.thread, stop: self.stop }
    }
}

impl Beating {
    pub(crate) fn stop(self) {
        self.stop.send_replace(true);
        if self.thread.join().is_err() {
            tracing::error!("the membership thread has panicked");
        }
    }
}

enum Failure {
    /// Try again.
    Unreachable(String),
    /// Trying again will not help.
    Refused(String),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        let message = status.message().to_owned();
        match status.code() {
            Code::FailedPrecondition
            | Code::InvalidArgument
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::AlreadyExists
            | Code::NotFound
            | Code::OutOfRange => Failure::Refused(message),
            Code::Unimplemented => {
                Failure::Refused(format!("that is no metaserver, or one of another release ({message})"))
            }
            code => Failure::Unreachable(if message.is_empty() { code.to_string() } else { message }),
        }
    }
}

async fn run(
    identity: Identity,
    first: SyncSender<First>,
    node: oneshot::Receiver<(Arc<Node>, Jobs)>,
    stopping: watch::Receiver<bool>,
) {
    let meta = identity.meta.clone();
    let clients = match connect_each(&meta) {
        Ok(clients) => clients,
        Err(what) => {
            // The starter is waiting for exactly this.
            let _ = first.send(First::Refused(StartError::Config(what)));
            return;
        }
    };
    let mut member = Member { identity, clients, at: 0 };
    let known = member.identity.server != 0 && member.identity.candidates.iter().all(|c| c.target.0 != 0);
    let (mut first, mut pause) = (Some(first), Pause::default());
    let mut beat_ms = None;
    while beat_ms.is_none() {
        match member.register().await {
            Ok(reply) => {
                beat_ms = Some(reply.heartbeat_ms);
                if let Some(first) = first.take() {
                    let _ = first.send(First::Registered(reply));
                }
            }
            Err(Failure::Refused(message)) => {
                let refused = StartError::Refused { meta: meta.clone(), message };
                let Some(first) = first.take() else {
                    tracing::error!("{refused}; it goes on serving what it has");
                    pause.wait().await;
                    continue;
                };
                let _ = first.send(First::Refused(refused));
                return;
            }
            Err(Failure::Unreachable(e)) => {
                pause.complain(&format!("metaserver {meta} cannot be reached: {e}; trying again"));
                member.try_another();
                if known && let Some(first) = first.take() {
                    let _ = first.send(First::Later);
                }
                pause.wait().await;
            }
        }
    }
    let Ok((node, jobs)) = node.await else { return };
    drop(stopping);
    member.beat(&node, &jobs, Duration::from_millis(beat_ms.unwrap_or_default().max(10))).await;
}

/// The metaserver's admin service.
pub(crate) type Client = ClusterClient<Channel>;

/// A client for each of the metaservers' addresses, of which the owner's answers.
///
/// # Errors
/// Says which address is none.
pub(crate) fn connect_each(meta: &str) -> Result<Vec<Client>, String> {
    let each = |address: &str| connect(address).map_err(|e| format!("metaserver address '{address}': {e}"));
    meta.split(',').map(each).collect()
}

/// Connects when it is first used, and again whenever that is needed.
fn connect(meta: &str) -> Result<Client, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(format!("http://{meta}"))?
        .tcp_nodelay(true)
        .connect_timeout(CALL_MAX)
        .timeout(CALL_MAX)
        .http2_keep_alive_interval(CALL_MAX);
    Ok(ClusterClient::new(endpoint.connect_lazy()).max_decoding_message_size(META_MESSAGE_MAX))
}

/// Waits between attempts, ever longer; says the same thing once.
#[derive(Default)]
struct Pause {
    next: Option<Duration>,
    said: String,
}

impl Pause {
    fn complain(&mut self, what: &str) {
        if self.said != what {
            tracing::warn!("{what}");
            self.said = what.to_owned();
        }
    }

    async fn wait(&mut self) {
        let now = self.next.unwrap_or(RETRY.0);
        tokio::time::sleep(now).await;
        self.next = Some((2 * now).min(RETRY.1));
    }
}

struct Member {
    identity: Identity,
    /// One for each address of a metaserver. Only the owner of the metadata listens.
    clients: Vec<Client>,
    /// The one in use.
    at: usize,
}

impl Member {
    fn client(&mut self) -> &mut ClusterClient<Channel> {
        &mut self.clients[self.at]
    }

    /// The metaserver of this address is gone, or only stands by.
    fn try_another(&mut self) {
        self.at = (self.at + 1) % self.clients.len();
    }

    async fn register(&mut self) -> Result<RegisterReply, Failure> {
        let id = &self.identity;
        let targets: Vec<TargetReport> =
            id.candidates.iter().map(|c| report(c.target, &c.uuid, &c.domain, &c.store)).collect();
        let request = RegisterRequest {
            protocol_version: PROTOCOL_VERSION,
            cluster_id: id.cluster_id.clone(),
            server: id.server,
            address: id.address()?,
            name: id.name.clone(),
            targets,
        };
        let reply = self.client().register(request).await?.into_inner();
        self.adopt(&reply)?;
        Ok(reply)
    }

    /// Checks that the answer is about us, and notes what is new.
    fn adopt(&mut self, reply: &RegisterReply) -> Result<(), Failure> {
        let id = &mut self.identity;
        let odd = |what: &str| Err(Failure::Refused(format!("it answered a registration with {what}")));
        if reply.cluster_id.is_empty() || reply.server == 0 || reply.targets.contains(&0) {
            return odd("ids missing");
        }
        if reply.targets.len() != id.candidates.len() {
            return odd("another number of targets");
        }
        if !id.cluster_id.is_empty() && id.cluster_id != reply.cluster_id {
            let (ours, theirs) = (&id.cluster_id, &reply.cluster_id);
            return odd(&format!("cluster {theirs}, but these targets belong to cluster {ours}"));
        }
        if id.server != 0 && id.server != reply.server {
            return odd("another server id");
        }
        if id.candidates.iter().zip(&reply.targets).any(|(c, t)| c.target.0 != 0 && c.target.0 != *t) {
            return odd("other target ids");
        }
        id.cluster_id.clone_from(&reply.cluster_id);
        id.server = reply.server;
        for (candidate, target) in id.candidates.iter_mut().zip(&reply.targets) {
            candidate.target = TargetId(*target);
        }
        Ok(())
    }

    async fn beat(&mut self, node: &Arc<Node>, jobs: &Jobs, mut interval: Duration) {
        let meta = self.identity.meta.clone();
        let (mut deleted, mut epoch, mut pause, mut wait) = (Vec::new(), 0, Pause::default(), interval);
        // What is being deleted, and whether there is more of it.
        let (mut deleting, mut more) = (None::<Deleting>, false);
        loop {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = early(node, wait) => {}
                () = ended(&mut deleting, &mut deleted), if more && deleting.is_some() => {}
            }
            wait = interval;
            if deleting.as_ref().is_some_and(JoinHandle::is_finished) {
                ended(&mut deleting, &mut deleted).await;
            }
            let request = HeartbeatRequest {
                cluster_id: node.cluster_id.clone(),
                server: node.server.0,
                targets: node.reports(),
                epoch,
                deleted: deleted.clone(),
                checks: node.checks.reports(),
                placed_epoch: node.placing.placed_epoch().0,
                rebuild: node.rebuild_rate.report(),
                strays: node.tidied.take_strays(),
            };
            let strays = request.strays.clone();
            let heard = self.client().heartbeat(request).await.map_err(Failure::from);
            if !heard.as_ref().is_ok_and(|reply| !reply.get_ref().unknown) {
                node.tidied.give_back(strays);
            }
            let failure = match heard {
                Ok(reply) => {
                    let reply: HeartbeatReply = reply.into_inner();
                    if !reply.unknown {
                        if !pause.said.is_empty() {
                            tracing::info!("metaserver {meta} answers again");
                            pause = Pause::default();
                        }
                        // First, since the checks go by it.
                        if let Some(map) = reply.map {
                            epoch = map.epoch;
                            node.adopt(map);
                        }
                        node.checks.order(reply.checks);
                        node.scrubs.asked(reply.scrubs);
                        deleted.clear();
                        // While some are being deleted they are ordered again, and so are those that came after them.
                        if deleting.is_none() && !reply.deletes.is_empty() {
                            more = reply.more;
                            let (node, jobs) = (node.clone(), jobs.clone());
                            deleting = Some(tokio::spawn(delete(node, jobs, reply.deletes)));
                        } else if deleting.is_none() && reply.more {
                            wait = Duration::ZERO;
                        }
                        continue;
                    }
                    match self.register().await {
                        Ok(reply) => {
                            tracing::info!("registered with metaserver {meta} again");
                            interval = Duration::from_millis(reply.heartbeat_ms.max(10));
                            (epoch, wait) = (0, Duration::ZERO);
                            continue;
                        }
                        Err(failure) => failure,
                    }
                }
                Err(failure) => failure,
            };
            match failure {
                Failure::Unreachable(e) => {
                    pause.complain(&format!("metaserver {meta} cannot be reached: {e}"));
                    self.try_another();
                }
                Failure::Refused(e) => {
                    pause.complain(&format!("metaserver {meta} refuses this data server: {e}"))
                }
            }
            pause.wait().await;
        }
    }
}

/// Deletions that are being carried out: those that are power-safe.
type Deleting = JoinHandle<Vec<DeletedBlocks>>;

/// Until all of them are over; they are to be acknowledged then.
async fn ended(deleting: &mut Option<Deleting>, deleted: &mut Vec<DeletedBlocks>) {
    if let Some(running) = deleting {
        match running.await {
            Ok(done) => deleted.extend(done),
            Err(e) => tracing::error!("deleting blocks: {e}; the metaserver will ask again"),
        }
        *deleting = None;
    }
}

/// Until a check has ended, but no sooner than a part of the time between heartbeats: all that ends meanwhile is told together.
async fn early(node: &Node, wait: Duration) {
    node.checks.ended().await;
    tokio::time::sleep(wait / EARLY).await;
}

impl Identity {
    /// What clients are told to connect to.
    fn address(&self) -> Result<String, Failure> {
        if let Some(advertise) = &self.advertise {
            return Ok(advertise.clone());
        }
        if !self.listen.ip().is_unspecified() {
            return Ok(self.listen.to_string());
        }
        // Listening everywhere: the address that this host uses towards the metaserver. Nothing is sent.
        let any = if self.listen.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let local = UdpSocket::bind(any)
            .and_then(|socket| {
                socket.connect(self.meta.split(',').next().unwrap_or_default())?;
                socket.local_addr()
            })
            .map_err(|e| {
                Failure::Unreachable(format!(
                    "{e}; this host's address towards it is not known either (set one to advertise)"
                ))
            })?;
        Ok(SocketAddr::new(local.ip(), self.listen.port()).to_string())
    }
}

/// Carries out deletions; returns those that are power-safe.
async fn delete(node: Arc<Node>, jobs: Jobs, deletes: Vec<DeletedBlocks>) -> Vec<DeletedBlocks> {
    let mut done = Vec::new();
    for mut order in deletes {
        let target = TargetId(order.target);
        order.blocks.retain(|block| !node.copying.contains(target, BlockId(*block)));
        if order.blocks.is_empty() {
            continue;
        }
        let store = match node.store(order.target) {
            Ok(store) => store.clone(),
            Err(e) => {
                tracing::warn!("the metaserver wants something deleted: {e}");
                continue;
            }
        };
        let blocks: Vec<BlockId> = order.blocks.iter().copied().map(BlockId).collect();
        let result = jobs.run(move || async move {
            let deletion = store.delete_each(&blocks).await?;
            store.sync().await?;
            Ok::<Deletion, crate::store::error::StoreError>(deletion)
        });
        match result.await {
            Some(Ok(Deletion { shards, kept })) => {
                if let Some(e) = kept.values().next() {
                    tracing::warn!(
                        "{} blocks could not be deleted, the metaserver will ask again: {e}",
                        kept.len()
                    );
                }
                order.blocks.retain(|block| !kept.contains_key(&BlockId(*block)));
                tracing::debug!(
                    "deleted {shards} shards of {} blocks from t{}",
                    order.blocks.len(),
                    order.target
                );
                done.push(order);
            }
            Some(Err(e)) => tracing::warn!("deleting blocks: {e}; the metaserver will ask again"),
            None => {}
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeMeta, start};

    #[test]
    fn heartbeats_go_on_while_deletions_take_their_time() {
        let (fake, folder) = (FakeMeta::start("c1"), tempfile::tempdir().unwrap());
        let server = start(&fake, folder.path());
        let store = server.node().store(1).unwrap();
        let held = store.hold_deletions();
        let order = DeletedBlocks { target: 1, blocks: vec![5, 6] };
        fake.state.lock().unwrap().deletes = vec![order.clone()];
        fake.wait("the order to be fetched", |s| s.deletes.is_empty());
        let before = fake.state.lock().unwrap().heartbeats.len();
        fake.wait("heartbeats", |s| s.heartbeats.len() > before + 5);
        assert!(fake.state.lock().unwrap().deleted.is_empty(), "it is not over");
        drop(held);
        fake.wait("the deletion", |s| s.deleted == [order.clone()]);
    }

    #[tokio::test]
    async fn every_metaserver_has_a_client() {
        assert_eq!(connect_each("a:1,b:2,[::1]:3").unwrap().len(), 3);
        let error = connect_each("a:1,b c:2").unwrap_err();
        assert!(error.contains("'b c:2'"), "{error}");
    }
}
