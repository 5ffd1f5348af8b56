//! The session with the metaserver.
//!
//! # How it works
//! Callers submit operations to an unbounded queue; one driver task ([`stream`]) owns the stream and everything
//! unanswered. Submitting is synchronous, so operations reach the server in the order in which they were submitted:
//! callers that need an order (a commit before a truncate) submit under their own lock.
//!
//! # Retries and exactly once
//! After a broken stream the driver reattaches and resends whatever is unanswered, in order. Mutations carry a slot
//! and a sequence, so the server repeats its answer instead of executing twice.
//!
//! # Time limits
//! A caller waits at most the operation timeout and then gets `ETIMEDOUT`; the operation itself stays queued, since
//! the server may have executed it already and its slot is in use.

mod attach;
mod letting_go;
pub(crate) mod owner;
mod queue;
mod slots;
mod stream;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fjordfs_proto::{
    ClusterMap, FsError, FsResult, HandleId, InodeId, SessionId,
    error::Errno,
    pb::meta::{request::Op, response},
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};

pub(crate) use stream::SessionState;

use crate::{
    engine::Alive,
    leases::{Leases, Sent},
    locks::Locks,
    successor,
};

/// Wait between attempts to reach the metaserver: from, to.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// What callers ask of the driver.
#[allow(clippy::large_enum_variant, reason = "the small one is sent once")]
enum Call {
    /// An operation on its way, and the request of the kernel that it is for, or 0.
    Operation(Op, Sent, Reply, u64),
    /// End the session when everything before is answered.
    Goodbye,
}

/// Where a caller waits.
type Reply = oneshot::Sender<FsResult<response::Result>>;

/// Who wants the answer of an operation.
enum Answer {
    Caller(Reply),
    /// It was decided here: a refusal is news.
    Decided,
    Nobody,
}

/// The client's end of the session.
pub(crate) struct MetaClient {
    calls: mpsc::UnboundedSender<Call>,
    handles: Arc<Mutex<HashMap<HandleId, InodeId>>>,
    handle_next: AtomicU64,
    map: watch::Receiver<Arc<ClusterMap>>,
    state: watch::Receiver<SessionState>,
    leases: Arc<Leases>,
    locks: Arc<Locks>,
    timeout: Duration,
    address: String,
}

/// The answer to a submitted operation.
pub(crate) struct Pending {
    reply: oneshot::Receiver<FsResult<response::Result>>,
    timeout: Duration,
    address: String,
}

impl Pending {
    /// Waits for the answer.
    pub(crate) async fn wait(self) -> FsResult<response::Result> {
        match tokio::time::timeout(self.timeout, self.reply).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(FsError::new(Errno::EIO, "the client was shut down")),
            Err(_) => Err(FsError::new(
                Errno::ETIMEDOUT,
                format!("metaserver {} did not answer within {:?}", self.address, self.timeout),
            )),
        }
    }

    /// Waits for an answer that others decide when to give.
    pub(crate) async fn wait_long(self) -> FsResult<response::Result> {
        self.reply.await.unwrap_or_else(|_| Err(FsError::new(Errno::EIO, "the client was shut down")))
    }
}

impl MetaClient {
    /// Attaches a new session, or the one that a former process has left; returns when the server has welcomed it.
    pub(crate) async fn connect(
        address: &str,
        options: &crate::Options,
        alive: Alive,
    ) -> FsResult<(MetaClient, SessionId)> {
        let handover = &options.handover;
        let legacy = handover.as_ref().and_then(|handover| handover.legacy());
        let opens = legacy.into_iter().flat_map(|legacy| &legacy.opens);
        let handles = Arc::new(Mutex::new(opens.map(|open| (open.handle, open.ino)).collect()));
        let (calls, queue) = mpsc::unbounded_channel();
        let leases = Arc::new(Leases::new(options.defer, handover.clone()));
        let locks = Arc::new(Locks::new(handover.clone()));
        let attached = attach::attach_first(address, options, handles.clone(), locks.clone()).await?;
        if legacy.is_some_and(|legacy| legacy.decided) {
            leases.predecessor_lost();
        }
        let session = attached.session();
        let (map, state) =
            stream::spawn(attached, queue, leases.clone(), locks.clone(), handover.clone(), alive);
        let client = MetaClient {
            calls,
            handles,
            handle_next: AtomicU64::new(handover.as_ref().map_or(1, |handover| handover.first_number())),
            map,
            state,
            leases,
            locks,
            timeout: options.operation_timeout,
            address: address.to_owned(),
        };
        Ok((client, session))
    }

    /// The newest cluster map.
    pub(crate) fn map(&self) -> Arc<ClusterMap> {
        self.map.borrow().clone()
    }

    /// Changes of the cluster map.
    pub(crate) fn map_changes(&self) -> watch::Receiver<Arc<ClusterMap>> {
        self.map.clone()
    }

    /// What may be used without asking.
    pub(crate) fn leases(&self) -> &Leases {
        &self.leases
    }

    /// What this client's programs have locked.
    pub(crate) fn locks(&self) -> &Locks {
        &self.locks
    }

    /// Number of the session; changes when the server gave up on the former one.
    pub(crate) fn session(&self) -> SessionId {
        self.state.borrow().session
    }

    /// A handle number that was never used in this session.
    pub(crate) fn new_handle(&self) -> HandleId {
        HandleId(self.handle_next.fetch_add(1, Ordering::Relaxed))
    }

    /// Declares a handle again after every reconnect, from now on.
    pub(crate) fn remember_handle(&self, handle: HandleId, ino: InodeId) {
        self.handles.lock().insert(handle, ino);
    }

    /// The handle is closed, or was never opened.
    pub(crate) fn forget_handle(&self, handle: HandleId) {
        self.handles.lock().remove(&handle);
    }

    /// Queues an operation; it is sent in the order of submission.
    pub(crate) fn submit(&self, op: Op) -> Pending {
        let (reply, answer) = oneshot::channel();
        let sent = self.leases.sent(&op);
        self.locks.sent(&op);
        // A closed queue drops the sender, which the waiter sees as a shut-down client.
        let _ = self.calls.send(Call::Operation(op, sent, reply, successor::request()));
        Pending { reply: answer, timeout: self.timeout, address: self.address.clone() }
    }

    /// Submits and waits.
    pub(crate) async fn call(&self, op: Op) -> FsResult<response::Result> {
        self.submit(op).wait().await
    }

    /// Ends the session cleanly once everything submitted before is answered.
    pub(crate) async fn goodbye(&self, patience: Duration) -> FsResult<()> {
        let mut state = self.state.clone();
        let _ = self.calls.send(Call::Goodbye);
        let ended = state.wait_for(|s| s.ended);
        match tokio::time::timeout(patience, ended).await {
            Ok(_) => Ok(()),
            Err(_) => Err(FsError::new(
                Errno::ETIMEDOUT,
                format!("metaserver {} did not acknowledge the end of the session", self.address),
            )),
        }
    }
}

/// The server answered with another kind of result than the operation has.
pub(crate) fn unexpected(what: &str) -> FsError {
    FsError::new(Errno::EPROTO, format!("the metaserver answered {what} with a result of another kind"))
}

/// Result of a response; a response without one is a protocol error.
fn result_of(result: Option<response::Result>) -> FsResult<response::Result> {
    match result {
        Some(response::Result::Error(e)) => Err(e.into()),
        Some(result) => Ok(result),
        None => Err(unexpected("a request")),
    }
}
