//! The driver of the session's stream: sends in order, matches answers, reattaches, resends.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use fjordfs_proto::{
    ClusterMap, FsError, FsResult, HandleId, InodeId, META_MESSAGE_MAX, PROTOCOL_VERSION, SessionId,
    error::Errno,
    pb::meta::{
        ClientMessage, Hello, OpenHandle, Request, Response, ServerMessage, Welcome, meta_client, request::Op,
    },
};
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Endpoint};
use tracing::{info, warn};

use super::{
    Answer, Call, is_mutation,
    letting_go::{self, LettingGo},
    request, result_of,
    slots::Slot,
    slots::Slots,
};
use crate::{Options, leases::Leases};

/// Requests in one message; more go into the next one.
const REQUESTS_PER_MESSAGE: usize = 256;

/// Nobody waits for the answer to a close, so one that is alone travels with the next request, or after this time.
const CLOSES_WAIT: Duration = Duration::from_millis(20);

/// Wait between attempts to reach the metaserver: from, to.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// What the rest of the client may want to know of the session.
#[derive(Clone, Debug)]
pub(crate) struct SessionState {
    pub(crate) session: SessionId,
    pub(crate) ended: bool,
}

/// How to reach the server, and who we are.
struct Peer {
    address: String,
    description: String,
    handles: Arc<Mutex<HashMap<HandleId, InodeId>>>,
}

/// A stream that has been welcomed.
pub(super) struct Attached {
    peer: Arc<Peer>,
    outgoing: mpsc::Sender<ClientMessage>,
    incoming: Streaming<ServerMessage>,
    welcome: Welcome,
    map: Arc<ClusterMap>,
    /// When the hello was sent.
    greeted: Instant,
}

impl Attached {
    pub(super) fn session(&self) -> SessionId {
        SessionId(self.welcome.session)
    }
}

/// Why attaching failed.
enum AttachError {
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

impl Peer {
    async fn attach(self: &Arc<Self>, session: u64, cluster_id: &str) -> Result<Attached, AttachError> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address))
            .map_err(|e| {
                AttachError::Refused(format!("'{}' is not an address: {e}; write HOST:PORT", self.address))
            })?
            .tcp_nodelay(true)
            .connect_timeout(Duration::from_secs(5))
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(8 << 20)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10));
        let channel = endpoint.connect().await.map_err(|e| AttachError::Unreachable(root_cause(&e)))?;
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
        };
        let first = ClientMessage { hello: Some(hello), ..Default::default() };
        let greeted = Instant::now();
        outgoing.send(first).await.map_err(|_| AttachError::Unreachable("stream closed".into()))?;
        let greeting = async {
            let mut incoming = client.attach(ReceiverStream::new(stream)).await?.into_inner();
            let message = incoming.message().await?;
            Ok::<_, Status>((incoming, message.and_then(|m| m.welcome)))
        };
        let (incoming, welcome) = tokio::time::timeout(Duration::from_secs(10), greeting)
            .await
            .map_err(|_| AttachError::Unreachable("no answer to the greeting within 10 s".into()))??;
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

/// Innermost error of a chain: the one that says "Connection refused".
fn root_cause(e: &dyn std::error::Error) -> String {
    let mut cause = e;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// Attaches a new session; fails at once when the server is not there, so that a wrong address is told at once.
pub(super) async fn attach_first(
    address: &str,
    options: &Options,
    handles: Arc<Mutex<HashMap<HandleId, InodeId>>>,
) -> FsResult<Attached> {
    let peer =
        Arc::new(Peer { address: address.to_owned(), description: options.description.clone(), handles });
    match peer.attach(0, "").await {
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

/// Starts the driver on the current runtime.
pub(super) fn spawn(
    attached: Attached,
    calls: mpsc::UnboundedReceiver<Call>,
    leases: Arc<Leases>,
) -> (watch::Receiver<Arc<ClusterMap>>, watch::Receiver<SessionState>) {
    let (map_tx, map) = watch::channel(attached.map.clone());
    let (state_tx, state) = watch::channel(SessionState { session: attached.session(), ended: false });
    let driver = Driver {
        slots: Slots::new(attached.welcome.slots),
        cluster_id: attached.welcome.cluster_id.clone(),
        session: attached.welcome.session,
        beats: Beats::of(&attached.welcome),
        leases,
        letting_go: LettingGo::default(),
        peer: attached.peer.clone(),
        calls,
        map: map_tx,
        state: state_tx,
        unanswered: BTreeMap::new(),
        waiting: VecDeque::new(),
        id_next: 1,
        goodbye: false,
    };
    tokio::spawn(driver.run(attached));
    (map, state)
}

/// Signs of life, and which of them the server has repeated.
struct Beats {
    interval: Duration,
    lease: Duration,
    last: u64,
    /// Not repeated yet, with the time when they were sent.
    sent: VecDeque<(u64, Instant)>,
}

impl Beats {
    fn of(welcome: &Welcome) -> Beats {
        let lease = Duration::from_millis(welcome.lease_ms);
        let shortest = Duration::from_millis(welcome.session_timeout_ms).min(lease);
        let interval = (shortest / 3).clamp(Duration::from_millis(50), Duration::from_secs(10));
        Beats { interval, lease, last: 0, sent: VecDeque::new() }
    }

    fn next(&mut self) -> ClientMessage {
        self.last += 1;
        self.sent.push_back((self.last, Instant::now()));
        ClientMessage { beat: self.last, ..ClientMessage::default() }
    }

    /// When the beat that came back was sent; the ones before it are as good as repeated.
    fn repeated(&mut self, beat: u64) -> Option<Instant> {
        let mut found = None;
        while let Some((_, at)) = self.sent.pop_front_if(|(sent, _)| *sent <= beat) {
            found = Some(at);
        }
        found
    }
}

struct Unanswered {
    request: Request,
    slot: Option<Slot>,
    reply: Answer,
}

struct Driver {
    peer: Arc<Peer>,
    cluster_id: String,
    session: u64,
    beats: Beats,
    leases: Arc<Leases>,
    letting_go: LettingGo,
    calls: mpsc::UnboundedReceiver<Call>,
    map: watch::Sender<Arc<ClusterMap>>,
    state: watch::Sender<SessionState>,
    slots: Slots,
    /// Sent, or to be sent again, by id: the order of submission.
    unanswered: BTreeMap<u64, Unanswered>,
    /// Submitted, but behind a mutation that waits for a slot.
    waiting: VecDeque<(Op, Answer)>,
    id_next: u64,
    goodbye: bool,
}

/// Why one attachment ended.
enum End {
    Broken(String),
    Finished,
}

impl Driver {
    async fn run(mut self, mut attached: Attached) {
        loop {
            self.leases.renew(attached.greeted.into(), self.beats.lease);
            match self.serve(&attached.outgoing, &mut attached.incoming).await {
                End::Finished => break,
                End::Broken(why) => {
                    warn!(metaserver = self.peer.address, why, "session stream broke, reattaching")
                }
            }
            // The server takes the next hello for a promise that nothing is cached any more.
            self.letting_go = LettingGo::default();
            letting_go::wait(self.leases.end(), self.beats.lease).await;
            match self.reattach().await {
                Some(stream) => attached = stream,
                None => break,
            }
        }
        self.leases.end();
        self.state.send_modify(|s| s.ended = true);
    }

    /// Carries calls and answers until the stream breaks or the session ends.
    async fn serve(
        &mut self,
        outgoing: &mpsc::Sender<ClientMessage>,
        incoming: &mut Streaming<ServerMessage>,
    ) -> End {
        let resend: Vec<Request> = self.unanswered.values().map(|u| u.request.clone()).collect();
        for part in resend.chunks(REQUESTS_PER_MESSAGE) {
            let message = ClientMessage { requests: part.to_vec(), ..Default::default() };
            if outgoing.send(message).await.is_err() {
                return End::Broken("closed while resending".into());
            }
        }
        let interval = self.beats.interval;
        let mut beat = tokio::time::interval_at(Instant::now() + interval, interval);
        let mut batch = Vec::with_capacity(REQUESTS_PER_MESSAGE);
        let mut closes_due: Option<Instant> = None;
        loop {
            if self.goodbye && self.unanswered.is_empty() && self.waiting.is_empty() {
                let message = ClientMessage { goodbye: true, ..Default::default() };
                if outgoing.send(message).await.is_err() {
                    return End::Broken("closed before the goodbye".into());
                }
                // The server ends the stream when it has closed the session.
                while let Ok(Some(_)) = incoming.message().await {}
                return End::Finished;
            }
            tokio::select! {
                n = self.calls.recv_many(&mut batch, REQUESTS_PER_MESSAGE) => {
                    if n == 0 {
                        return End::Finished;
                    }
                    for call in batch.drain(..) {
                        match call {
                            Call::Operation(op, reply) => self.waiting.push_back((op, reply)),
                            Call::Goodbye => self.goodbye = true,
                        }
                    }
                }
                message = incoming.message() => match message {
                    Ok(Some(message)) => self.receive(message),
                    Ok(None) => return End::Broken("closed by the metaserver".into()),
                    Err(status) => return End::Broken(status.message().to_owned()),
                },
                message = self.letting_go.next() => {
                    if outgoing.send(message).await.is_err() {
                        return End::Broken("closed".into());
                    }
                }
                () = tokio::time::sleep_until(closes_due.unwrap_or_else(Instant::now)), if closes_due.is_some() => {}
                _ = beat.tick() => {
                    if outgoing.send(self.beats.next()).await.is_err() {
                        return End::Broken("closed".into());
                    }
                }
            }
            let overdue = closes_due.is_some_and(|due| due <= Instant::now());
            if !self.goodbye && !overdue && self.only_closes_wait() {
                closes_due.get_or_insert_with(|| Instant::now() + CLOSES_WAIT);
                continue;
            }
            closes_due = None;
            let requests = self.admit();
            if !requests.is_empty() {
                let message = ClientMessage { requests, ..Default::default() };
                if outgoing.send(message).await.is_err() {
                    return End::Broken("closed while sending".into());
                }
            }
        }
    }

    fn only_closes_wait(&self) -> bool {
        !self.waiting.is_empty() && self.waiting.iter().all(|(op, _)| matches!(op, Op::Close(_)))
    }

    /// Gives ids and slots to waiting calls, in order, as far as slots go.
    fn admit(&mut self) -> Vec<Request> {
        let mut requests = Vec::new();
        while let Some((op, _)) = self.waiting.front() {
            let slot = if is_mutation(op) {
                match self.slots.take() {
                    Some(slot) => Some(slot),
                    None => break,
                }
            } else {
                None
            };
            let Some((op, reply)) = self.waiting.pop_front() else { break };
            let id = self.id_next;
            self.id_next += 1;
            let request = request(id, op, slot);
            requests.push(request.clone());
            self.unanswered.insert(id, Unanswered { request, slot, reply });
        }
        requests
    }

    fn receive(&mut self, message: ServerMessage) {
        if let Some(map) = message.map {
            match ClusterMap::from_pb(map) {
                Ok(map) => {
                    self.map.send_if_modified(|current| {
                        let newer = map.epoch > current.epoch;
                        if newer {
                            *current = Arc::new(map);
                        }
                        newer
                    });
                }
                Err(e) => warn!(metaserver = self.peer.address, "ignoring a cluster map: {e}"),
            }
        }
        for Response { id, result, serial, changed } in message.responses {
            let Some(Unanswered { request, slot, reply }) = self.unanswered.remove(&id) else { continue };
            if let Some(slot) = slot {
                self.slots.give_back(slot);
            }
            let result = result_of(result);
            if let Some(op) = &request.op {
                let dropped = self.leases.learn(op, &result, serial, &changed);
                self.letting_go.dropped(dropped, self.beats.lease);
            }
            // The caller may have given up waiting.
            let _ = reply.send(result);
        }
        if !message.recalls.is_empty() {
            let let_go = self.leases.recall(&message.recalls);
            self.letting_go.recalled(message.recalls, let_go, self.beats.lease);
        }
        if let Some(sent) = self.beats.repeated(message.beat) {
            self.leases.renew(sent.into(), self.beats.lease);
        }
    }

    /// Tries until the server is back; `None` when it will never take this session's client again.
    async fn reattach(&mut self) -> Option<Attached> {
        let mut pause = BACKOFF.0;
        loop {
            if self.calls.is_closed() && self.unanswered.is_empty() {
                return None;
            }
            match self.peer.attach(self.session, &self.cluster_id).await {
                Ok(attached) => {
                    let welcome = &attached.welcome;
                    if self.session == 0 {
                        self.slots = Slots::new(welcome.slots);
                    }
                    self.session = welcome.session;
                    self.beats = Beats::of(welcome);
                    self.map.send_replace(attached.map.clone());
                    self.state.send_modify(|s| s.session = SessionId(welcome.session));
                    info!(metaserver = self.peer.address, session = welcome.session, "attached again");
                    return Some(attached);
                }
                Err(AttachError::Unreachable(_)) => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(BACKOFF.1);
                }
                Err(AttachError::SessionLost(why)) if self.session != 0 => {
                    warn!(
                        metaserver = self.peer.address,
                        why, "the session is lost; uncommitted writes fail with EIO"
                    );
                    self.fail_all(&FsError::new(
                        Errno::EIO,
                        format!("the metaserver gave up on this client: {why}"),
                    ));
                    self.session = 0;
                }
                Err(AttachError::SessionLost(why) | AttachError::Refused(why)) => {
                    warn!(metaserver = self.peer.address, why, "the metaserver refuses this client");
                    self.fail_all(&FsError::new(Errno::EIO, format!("refused by the metaserver: {why}")));
                    return None;
                }
            }
        }
    }

    fn fail_all(&mut self, error: &FsError) {
        for unanswered in std::mem::take(&mut self.unanswered).into_values() {
            unanswered.request.op.iter().for_each(|op| self.leases.failed(op));
            let _ = unanswered.reply.send(Err(error.clone()));
        }
        for (op, reply) in self.waiting.drain(..) {
            self.leases.failed(&op);
            let _ = reply.send(Err(error.clone()));
        }
    }
}
