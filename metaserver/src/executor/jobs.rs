//! What can be asked of the executor, and by whom.

use std::sync::Arc;

use fjordfs_proto::{
    SessionId,
    pb::meta::{
        ChangeTargetReply, ChangeTargetRequest, GivenBack, HeartbeatReply, HeartbeatRequest, Hello,
        MendReply, MendRequest, MetaStatusReply, RebalanceReply, RebalanceRequest, RegisterReply,
        RegisterRequest, Request, ScrubReply, StatusReply, WantedReply, WantedRequest, Welcome,
    },
};
use tokio::sync::{mpsc, oneshot};

use crate::{
    fsck::repair::Fix,
    refusal::Refusal,
    service::outbox::{Outbox, Permit},
    store::Snapshot,
    upkeep::Upkeep,
};

/// Where the answer to a unary call goes.
pub(crate) type Caller<T> = oneshot::Sender<Result<T, Refusal>>;

/// What can be asked of the executor.
pub(crate) enum Job {
    Attach {
        hello: Box<Hello>,
        outbox: Arc<Outbox>,
        caller: Caller<Welcome>,
    },
    /// The client is alive, and lets go of leases.
    Sign {
        session: SessionId,
        outbox: Arc<Outbox>,
        beat: u64,
        recalled: Vec<u64>,
        given_back: Option<GivenBack>,
        demoted: Option<GivenBack>,
    },
    /// Requests of one stream, in its order.
    Requests {
        session: SessionId,
        outbox: Arc<Outbox>,
        requests: Vec<(Request, Permit)>,
    },
    Goodbye {
        session: SessionId,
        outbox: Arc<Outbox>,
    },
    Detached {
        session: SessionId,
        outbox: Arc<Outbox>,
    },
    Register(Box<RegisterRequest>, Caller<RegisterReply>),
    Heartbeat(Box<HeartbeatRequest>, Caller<HeartbeatReply>),
    Wanted(Box<WantedRequest>, Caller<WantedReply>),
    ChangeTarget(Box<ChangeTargetRequest>, Caller<ChangeTargetReply>),
    Scrub(Caller<ScrubReply>),
    Rebalance(RebalanceRequest, Caller<RebalanceReply>),
    Status(Caller<StatusReply>),
    /// The store as it is, for those who read all of it.
    Snapshot(Caller<Snapshot>),
    /// Mend what a check has found.
    Repair(Vec<Fix>, Caller<u64>),
    Mend(Box<MendRequest>, Caller<MendReply>),
    MetaStatus(Caller<MetaStatusReply>),
    /// Let go of the store and stop; a standby goes on.
    HandOver(Caller<()>),
    /// The store got further, or lost its owner.
    Progress,
    Stop,
}

/// Handle for those who have jobs.
#[derive(Clone)]
pub(crate) struct Jobs {
    sender: mpsc::UnboundedSender<Job>,
    upkeep: Arc<Upkeep>,
    threads: bool,
}

impl Jobs {
    /// Unbounded here: each stream bounds what it has under way. `threads`: see [`Jobs::threads`].
    pub(crate) fn channel(threads: bool) -> (Jobs, mpsc::UnboundedReceiver<Job>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Jobs { sender, upkeep: Arc::default(), threads }, receiver)
    }

    /// A job for a stopped executor is dropped, and with it the way to its caller.
    pub(crate) fn submit(&self, job: Job) {
        let _ = self.sender.send(job);
    }

    /// Whether what takes long may have a thread. An engine that waits in the runtime is of a program in which all happens there.
    pub(crate) fn threads(&self) -> bool {
        self.threads
    }

    /// What is neither a job nor takes one.
    pub(crate) fn upkeep(&self) -> &Arc<Upkeep> {
        &self.upkeep
    }
}
