//! Attaching to the metaserver: connecting, greeting, and what a refusal means.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fjordfs_proto::{
    ClusterMap, FsError, FsResult, HandleId, InodeId, META_MESSAGE_MAX, PROTOCOL_VERSION, SessionId,
    error::Errno,
    pb::meta::{ClientMessage, Hello, OpenHandle, ServerMessage, SlotAnswered, Welcome, meta_client},
};
use parking_lot::Mutex;
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::{
    BACKOFF,
    owner::{ConnectError, Patience, connect},
};
use crate::{Network, Options, handover::Legacy, locks::Locks};

/// How to reach the server, and who we are.
pub(super) struct Peer {
    /// As the user wrote them: one address, or several with commas between.
    pub(super) address: String,
    /// Position of the address that answered last.
    at: AtomicUsize,
    description: String,
    network: Option<Arc<dyn Network>>,
    delegations: bool,
    handles: Arc<Mutex<HashMap<HandleId, InodeId>>>,
    locks: Arc<Locks>,
}

/// A stream that has been welcomed.
pub(super) struct Attached {
    pub(super) peer: Arc<Peer>,
    pub(super) outgoing: mpsc::Sender<ClientMessage>,
    pub(super) incoming: Streaming<ServerMessage>,
    pub(super) welcome: Welcome,
    pub(super) map: Arc<ClusterMap>,
    /// When the hello was sent.
    pub(super) greeted: Instant,
}

impl Attached {
    pub(super) fn session(&self) -> SessionId {
        SessionId(self.welcome.session)
    }
}

/// Why attaching failed.
pub(super) enum AttachError {
    /// Try again: the server is not there, or not yet.
    Unreachable(String),
    /// The server does not know the session any more.
    SessionLost(String),
    /// It will never work.
    Refused(String),
}

impl From<Status> for AttachError {
    fn from(status: Status) -> Self {
        let message = status.message().to_owned();
        match status.code() {
            Code::NotFound => AttachError::SessionLost(message),
            Code::FailedPrecondition
            | Code::InvalidArgument
            | Code::Unimplemented
            | Code::PermissionDenied => AttachError::Refused(message),
            _ => AttachError::Unreachable(message),
        }
    }
}

impl From<ConnectError> for AttachError {
    fn from(e: ConnectError) -> Self {
        match e {
            ConnectError::NoAddress(why) => AttachError::Refused(why),
            ConnectError::Unreachable(why) => AttachError::Unreachable(why),
        }
    }
}

/// How long an address may stay silent altogether, and how long it may take to greet.
struct SessionPatience {
    silence: Patience,
    greeting: Duration,
}

impl SessionPatience {
    fn with(addresses: usize) -> SessionPatience {
        let secs = Duration::from_secs;
        let silence = |connect, ping| Patience { connect: secs(connect), ping: secs(ping) };
        match addresses {
            1 => SessionPatience { silence: silence(5, 10), greeting: secs(10) },
            _ => SessionPatience { silence: silence(1, 1), greeting: secs(5) },
        }
    }
}

impl Peer {
    /// The handle is not to be declared any more.
    pub(super) fn forget_handle(&self, handle: HandleId) {
        self.handles.lock().remove(&handle);
    }

    /// Tries the address that answered last, then the others, once each: only the owner among the metaservers listens.
    pub(super) async fn attach(
        self: &Arc<Self>,
        session: u64,
        cluster_id: &str,
        answered: &[SlotAnswered],
    ) -> Result<Attached, AttachError> {
        let addresses: Vec<&str> = self.address.split(',').collect();
        let mut why = String::new();
        let first = self.at.load(Ordering::Relaxed);
        for at in first..first + addresses.len() {
            let address = addresses[at % addresses.len()];
            match self
                .attach_at(address, &SessionPatience::with(addresses.len()), session, cluster_id, answered)
                .await
            {
                Err(AttachError::Unreachable(e)) if why.is_empty() => why = e,
                Err(AttachError::Unreachable(e)) => why = format!("{why}; {address}: {e}"),
                other => {
                    self.at.store(at % addresses.len(), Ordering::Relaxed);
                    return other;
                }
            }
        }
        Err(AttachError::Unreachable(why))
    }

    async fn attach_at(
        self: &Arc<Self>,
        address: &str,
        patience: &SessionPatience,
        session: u64,
        cluster_id: &str,
        answered: &[SlotAnswered],
    ) -> Result<Attached, AttachError> {
        let channel = connect(address, self.network.as_ref(), &patience.silence).await?;
        let mut client = meta_client::MetaClient::new(channel)
            .max_decoding_message_size(META_MESSAGE_MAX)
            .max_encoding_message_size(META_MESSAGE_MAX);
        let (outgoing, stream) = mpsc::channel(64);
        let handles =
            (self.handles.lock().iter()).map(|(h, i)| OpenHandle { handle: h.0, ino: i.0 }).collect();
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            session,
            cluster_id: cluster_id.to_owned(),
            client: self.description.clone(),
            handles,
            delegations: self.delegations,
            locks: self.locks.declared(),
            answered: answered.to_vec(),
        };
        let first = ClientMessage { hello: Some(hello), ..Default::default() };
        let greeted = Instant::now();
        outgoing.send(first).await.map_err(|_| AttachError::Unreachable("stream closed".into()))?;
        let greeting = async {
            let mut incoming = client.attach(ReceiverStream::new(stream)).await?.into_inner();
            let message = incoming.message().await?;
            Ok::<_, Status>((incoming, message.and_then(|m| m.welcome)))
        };
        let (incoming, welcome) =
            tokio::time::timeout(patience.greeting, greeting).await.map_err(|_| {
                let seconds = patience.greeting.as_secs();
                AttachError::Unreachable(format!("no answer to the greeting within {seconds} s"))
            })??;
        let welcome = welcome.ok_or_else(|| AttachError::Unreachable("closed without a welcome".into()))?;
        let map = welcome
            .map
            .clone()
            .ok_or_else(|| AttachError::Refused("welcome without a cluster map".into()))?;
        let map = ClusterMap::from_pb(map).map_err(|e| AttachError::Refused(e.to_string()))?;
        if welcome.slots == 0 {
            return Err(AttachError::Refused("the metaserver grants no slots".into()));
        }
        Ok(Attached { peer: self.clone(), outgoing, incoming, welcome, map: Arc::new(map), greeted })
    }
}

/// How long a new session waits for one of several metaservers to serve: several times as long as one takes to take over from another, for
/// the store may be out of reach meanwhile.
const TAKE_OVER_PATIENCE: Duration = Duration::from_secs(30);

/// Attaches a new session; fails at once when the only server is not there, so that a wrong address is told at once. Of several,
/// one may be about to take over. With the session of a former process, whose address was right, it goes on trying: the mount stands still without it, and nobody is helped by
/// its end.
pub(super) async fn attach_first(
    address: &str,
    options: &Options,
    handles: Arc<Mutex<HashMap<HandleId, InodeId>>>,
    locks: Arc<Locks>,
) -> FsResult<Attached> {
    let peer = Arc::new(Peer {
        address: address.to_owned(),
        at: AtomicUsize::new(0),
        description: options.description.clone(),
        network: options.network.clone(),
        delegations: options.defer,
        handles,
        locks,
    });
    let legacy = options.handover.as_ref().and_then(|handover| handover.legacy());
    if let Some(legacy) = legacy {
        return resume(&peer, legacy).await;
    }
    match attach_new(&peer).await {
        Ok(attached) => Ok(attached),
        Err(AttachError::Unreachable(why)) => Err(FsError::new(
            Errno::ETIMEDOUT,
            format!(
                "cannot reach a metaserver at {address}: {why}; check the address and that `fjord meta` runs there"
            ),
        )),
        Err(AttachError::Refused(why) | AttachError::SessionLost(why)) => {
            Err(FsError::new(Errno::EPROTO, format!("metaserver {address} refused this client: {why}")))
        }
    }
}

async fn attach_new(peer: &Arc<Peer>) -> Result<Attached, AttachError> {
    let begun = Instant::now();
    let is_alone = !peer.address.contains(',');
    let mut pause = BACKOFF.0;
    loop {
        match peer.attach(0, "", &[]).await {
            Err(AttachError::Unreachable(_)) if !is_alone && begun.elapsed() < TAKE_OVER_PATIENCE => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(BACKOFF.1);
            }
            ended => return ended,
        }
    }
}

/// Attaches the session of the process before this one, or a new one in its place when it is lost.
async fn resume(peer: &Arc<Peer>, legacy: &Legacy) -> FsResult<Attached> {
    let mut session = legacy.session.0;
    let mut pause = BACKOFF.0;
    loop {
        match peer.attach(session, &legacy.cluster_id, &[]).await {
            Ok(attached) => return Ok(attached),
            Err(AttachError::Unreachable(why)) => {
                tracing::debug!(metaserver = peer.address, why, "waiting for the metaserver");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(BACKOFF.1);
            }
            Err(AttachError::SessionLost(why)) if session != 0 => {
                let locked_files = peer.locks.lost().len();
                tracing::warn!(
                    metaserver = peer.address,
                    why,
                    locked_files,
                    "the session of the process before is lost, with its locks and unlinked open files"
                );
                session = 0;
            }
            Err(AttachError::Refused(why) | AttachError::SessionLost(why)) => {
                return Err(FsError::new(
                    Errno::EPROTO,
                    format!("metaserver {} refused this client: {why}", peer.address),
                ));
            }
        }
    }
}
