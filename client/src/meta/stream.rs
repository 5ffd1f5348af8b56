//! The driver of the session's stream: sends in order, matches answers, reattaches, resends.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use fjordfs_proto::{
    ClusterMap, FsError, HandleId, InodeId, SessionId,
    error::Errno,
    pb::meta::{
        ClientMessage, Entry, Response, ServerMessage, Welcome, request::Op, response::Result as Reply,
    },
};
use futures_util::future::BoxFuture;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tonic::Streaming;
use tracing::{info, warn};

use super::{
    Answer, BACKOFF, Call,
    attach::{AttachError, Attached, Peer},
    letting_go::LettingGo,
    queue::{Queue, Unanswered},
    result_of,
};
use crate::{
    engine::Alive,
    handover::Handover,
    leases::{Answered, Leases, Patience},
    locks::Locks,
};

/// Calls taken in at a time.
const CALLS_MAX: usize = 256;

/// A request that is not answered for so long is mentioned in the log, and again each time as much later.
const LATE: Duration = Duration::from_secs(20);

/// How long the metaserver may take to end the session, over as many streams as it takes. When it is told, nothing is left to be sent;
/// a session whose end it does not hear of ends by its silence.
const GOODBYE_PATIENCE: Duration = Duration::from_secs(10);

/// Characters of an operation in the log: it may carry bytes of files.
const OPERATION_SHOWN: usize = 160;

/// What the rest of the client may want to know of the session.
#[derive(Clone, Debug)]
pub(crate) struct SessionState {
    pub(crate) session: SessionId,
    pub(crate) ended: bool,
}

/// Starts the driver on the current runtime. `alive` is dropped when nothing is left to be sent.
pub(super) fn spawn(
    attached: Attached,
    calls: mpsc::UnboundedReceiver<Call>,
    leases: Arc<Leases>,
    locks: Arc<Locks>,
    handover: Option<Arc<Handover>>,
    alive: Alive,
) -> (watch::Receiver<Arc<ClusterMap>>, watch::Receiver<SessionState>) {
    let (map_tx, map) = watch::channel(attached.map.clone());
    let (state_tx, state) = watch::channel(SessionState { session: attached.session(), ended: false });
    let is_successor = handover.as_ref().is_some_and(|handover| handover.legacy().is_some());
    let driver = Driver {
        queue: Queue::new(attached.welcome.slots, handover.clone()),
        cluster_id: attached.welcome.cluster_id.clone(),
        session: attached.welcome.session,
        beats: Beats::of(&attached.welcome),
        leases,
        locks,
        letting_go: LettingGo::default(),
        peer: attached.peer.clone(),
        calls,
        map: map_tx,
        state: state_tx,
        ending: false,
        goodbye_until: None,
        handover,
        _alive: alive,
    };
    driver.leave_session();
    tokio::spawn(driver.run(attached, is_successor));
    (map, state)
}

/// Signs of life, and which of them the server has repeated.
struct Beats {
    interval: Duration,
    lease: Duration,
    /// What was closed here is to be seen by others, however slow the data servers are, as long as the metaserver does not give up
    /// this session.
    patience: Patience,
    last: u64,
    /// Not repeated yet, with the time when they were sent.
    sent: VecDeque<(u64, Instant)>,
}

impl Beats {
    fn of(welcome: &Welcome) -> Beats {
        let lease = Duration::from_millis(welcome.lease_ms);
        let shortest = Duration::from_millis(welcome.session_timeout_ms).min(lease);
        let interval = (shortest / 3).clamp(Duration::from_millis(50), Duration::from_secs(10));
        let session = Duration::from_millis(welcome.session_timeout_ms);
        let patience = Patience { caches: lease, written: session.saturating_sub(lease).max(lease) };
        Beats { interval, lease, patience, last: 0, sent: VecDeque::new() }
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

struct Driver {
    peer: Arc<Peer>,
    cluster_id: String,
    session: u64,
    beats: Beats,
    leases: Arc<Leases>,
    locks: Arc<Locks>,
    letting_go: LettingGo,
    calls: mpsc::UnboundedReceiver<Call>,
    map: watch::Sender<Arc<ClusterMap>>,
    state: watch::Sender<SessionState>,
    queue: Queue,
    /// Nothing more will be asked: by a goodbye, or because the client was dropped. What is under way comes to its end.
    ending: bool,
    /// Until when a goodbye is said again on the next stream.
    goodbye_until: Option<Instant>,
    handover: Option<Arc<Handover>>,
    _alive: Alive,
}

/// Why one attachment ended.
enum End {
    Broken(String),
    Finished,
}

impl Driver {
    /// Which session a successor is to go on with.
    fn leave_session(&self) {
        if let Some(handover) = &self.handover {
            handover.set_session(SessionId(self.session), &self.cluster_id);
        }
    }

    async fn run(mut self, mut attached: Attached, is_successor: bool) {
        // A new session has nothing to send first. What the process before this one gave to the caches below cannot be taken
        // back; it runs out.
        let settled_at = attached.greeted + self.beats.lease;
        let mut settling =
            is_successor.then(|| Box::pin(tokio::time::sleep_until(settled_at)) as BoxFuture<'static, ()>);
        loop {
            self.leases.renew(attached.greeted.into(), self.beats.lease);
            match self.serve(attached, settling).await {
                End::Finished => break,
                End::Broken(why) => {
                    warn!(metaserver = self.peer.address, why, "session stream broke, reattaching")
                }
            }
            // Nothing that the server took back on the old stream is used any more.
            self.letting_go = LettingGo::default();
            self.queue.forget_notices();
            self.leases.end().within(self.beats.patience).await;
            match self.reattach().await {
                Some(stream) => attached = stream,
                None => break,
            }
            let (written, patience) = (self.leases.flush_all(), self.beats.patience);
            settling =
                Some(Box::pin(async move { drop(written.within(patience).await) }) as BoxFuture<'static, ()>);
        }
        self.leases.end();
        self.state.send_modify(|s| s.ended = true);
    }

    /// Carries calls and answers until the stream breaks or the session ends. `settling` ends when what was written
    /// before is committed; until then, and until all that was decided before has been sent, no beat is, which would tell the server
    /// that nothing from before is to come.
    async fn serve(&mut self, attached: Attached, mut settling: Option<BoxFuture<'static, ()>>) -> End {
        let Attached { outgoing, mut incoming, .. } = attached;
        for message in self.queue.resend() {
            if outgoing.send(message).await.is_err() {
                return End::Broken("closed while resending".into());
            }
        }
        let interval = self.beats.interval;
        let mut beat = tokio::time::interval_at(Instant::now() + interval, interval);
        let mut batch = Vec::with_capacity(CALLS_MAX);
        let mut late = LATE;
        loop {
            let due = self.leases.deferred_due();
            let is_due = due.is_some_and(|due| due <= Instant::now().into_std());
            if is_due || self.ending || self.queue.has_waiting() {
                self.queue.defer(self.leases.take_deferred());
            }
            for message in self.queue.admit() {
                if outgoing.send(message).await.is_err() {
                    return End::Broken("closed while sending".into());
                }
            }
            if self.ending && self.queue.is_idle() {
                return self.say_goodbye(&outgoing, &mut incoming).await;
            }
            tokio::select! {
                n = self.calls.recv_many(&mut batch, CALLS_MAX), if !self.ending => {
                    self.ending = n == 0;
                    self.take_calls(&mut batch);
                }
                message = incoming.message() => match message {
                    Ok(Some(message)) => self.receive(message),
                    Ok(None) => return End::Broken("closed by the metaserver".into()),
                    Err(status) => return End::Broken(status.message().to_owned()),
                },
                message = self.letting_go.next() => self.tell(message),
                () = async { if let Some(settling) = &mut settling { settling.await } }, if settling.is_some() => {
                    settling = None;
                    let beat = self.beats.next();
                    self.tell(beat);
                }
                () = self.leases.deferred_changed() => {}
                () = sleep_until(due), if due.is_some() && !is_due => {}
                _ = beat.tick() => {
                    late = self.complain(late);
                    // Not in line: to be heard must not wait for anything.
                    let is_settled = settling.is_none() && !self.queue.holds_beat();
                    let message = if is_settled { self.beats.next() } else { ClientMessage::default() };
                    if outgoing.send(message).await.is_err() {
                        return End::Broken("closed".into());
                    }
                }
            }
        }
    }

    /// Mentions what is not answered after `late`; when to do so again.
    fn complain(&self, late: Duration) -> Duration {
        match self.queue.oldest() {
            Some((request, age)) if age >= late => {
                let (seconds, text) = (age.as_secs(), format!("{:?}", request.op));
                let operation: String = text.chars().take(OPERATION_SHOWN).collect();
                warn!(metaserver = self.peer.address, seconds, operation, "no answer yet");
                age + LATE
            }
            Some((_, age)) if age >= LATE => late,
            _ => LATE,
        }
    }

    fn take_calls(&mut self, batch: &mut Vec<Call>) {
        for call in batch.drain(..) {
            self.take_call(call);
        }
    }

    fn take_call(&mut self, call: Call) {
        match call {
            Call::Operation(op, sent, reply, request) => {
                self.queue.submit(op, sent, Answer::Caller(reply), request);
            }
            Call::Goodbye => self.ending = true,
        }
    }

    /// Tells the server something that is true once everything deferred so far has arrived.
    fn tell(&mut self, message: ClientMessage) {
        self.queue.defer(self.leases.take_deferred());
        self.queue.tell(message);
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
        for response in message.responses {
            self.answered(response);
        }
        if !message.recalls.is_empty() {
            let recalling = self.leases.recall(&message.recalls);
            self.letting_go.recalled(message.recalls, recalling, self.beats.patience);
        }
        if let Some(sent) = self.beats.repeated(message.beat) {
            self.leases.renew(sent.into(), self.beats.lease);
        }
    }

    fn answered(&mut self, response: Response) {
        let Response { id, result, serial, changed, delegated } = response;
        let done = !matches!(result, None | Some(Reply::Error(_)));
        let Some(Unanswered { request, sent, answer, .. }) = self.queue.answered(id, done) else { return };
        let (Some(op), result) = (request.op, result_of(result)) else { return };
        match answer {
            Answer::Caller(reply) => {
                let told = Answered { result: &result, serial, changed: &changed, delegated: &delegated };
                let dropped = self.leases.learn(&op, &sent, &told);
                self.letting_go.dropped(dropped, self.beats.patience);
                self.locks.answered(&op, &result);
                if let Err(Ok(unwanted)) = reply.send(result) {
                    self.close_unwanted(&op, &unwanted);
                }
            }
            Answer::Decided => self.leases.deferred_answered(&op, &result),
            Answer::Nobody => {}
        }
    }

    /// The caller has given up waiting: nobody else closes what was opened for it.
    fn close_unwanted(&self, op: &Op, answer: &Reply) {
        let (ino, handle) = match (op, answer) {
            (Op::Open(open), _) => (open.ino, open.handle),
            (Op::Make(make), Reply::Entry(Entry { attr: Some(attr), .. })) if make.handle != 0 => {
                (attr.ino, make.handle)
            }
            _ => return,
        };
        self.peer.forget_handle(HandleId(handle));
        self.leases.closed(InodeId(ino), HandleId(handle));
    }

    /// The server ends the stream when it has closed the session. A stream that breaks instead may be that of an owner that has been
    /// overtaken: the next would wait for this session until it times out, and so would all who use the namespace.
    async fn say_goodbye(
        &mut self,
        outgoing: &mpsc::Sender<ClientMessage>,
        incoming: &mut Streaming<ServerMessage>,
    ) -> End {
        let until = *self.goodbye_until.get_or_insert_with(|| Instant::now() + GOODBYE_PATIENCE);
        let message = ClientMessage { goodbye: true, ..ClientMessage::default() };
        if outgoing.send(message).await.is_err() {
            return End::Broken("closed before the goodbye".into());
        }
        loop {
            match tokio::time::timeout_at(until, incoming.message()).await {
                Ok(Ok(Some(_))) => {}
                Ok(Ok(None)) => return End::Finished,
                Ok(Err(status)) => return End::Broken(status.message().to_owned()),
                Err(_) => {
                    self.leave_unheard();
                    return End::Finished;
                }
            }
        }
    }

    fn leave_unheard(&self) {
        warn!(
            metaserver = self.peer.address,
            session = self.session,
            "the end of the session was not acknowledged; everything is committed, and the session will time out"
        );
    }

    /// Tries until the server is back; `None` when there is no use in it any more, or will never be.
    async fn reattach(&mut self) -> Option<Attached> {
        let mut pause = BACKOFF.0;
        loop {
            if self.goodbye_until.is_some_and(|until| until <= Instant::now()) {
                self.leave_unheard();
                return None;
            }
            if self.calls.is_closed() && self.queue.is_idle() && self.leases.deferred_due().is_none() {
                return None;
            }
            match self.peer.attach(self.session, &self.cluster_id, &self.queue.done()).await {
                Ok(attached) => {
                    let welcome = &attached.welcome;
                    if self.session == 0 {
                        self.queue.start_over(welcome.slots);
                    }
                    if welcome.lost {
                        self.queue.forget_done();
                        self.leases.lost();
                    }
                    self.session = welcome.session;
                    self.leave_session();
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
                // It has heard the goodbye.
                Err(AttachError::SessionLost(_)) if self.goodbye_until.is_some() => return None,
                Err(AttachError::SessionLost(why)) if self.session != 0 => {
                    warn!(
                        metaserver = self.peer.address,
                        why, "the session is lost; uncommitted writes fail with EIO"
                    );
                    self.fail_all(&FsError::new(
                        Errno::EIO,
                        format!("the metaserver gave up on this client: {why}"),
                    ));
                    self.lose_locks().await;
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

    /// Others may take the locks of programs here, or have done so, and written.
    async fn lose_locks(&mut self) {
        let inodes = self.locks.lost();
        if inodes.is_empty() {
            return;
        }
        warn!(
            files = inodes.len(),
            "locks of programs on this client are lost: others may take them. What was written under them and not committed is \
             void, and who has such a file open is told"
        );
        let error = FsError::new(
            Errno::EIO,
            "locks on it were lost with the client's session; what was written last is void",
        );
        self.leases.locks_lost(inodes.clone(), error.clone()).within(self.beats.patience).await;
        // What was submitted before that waits here.
        while let Ok(call) = self.calls.try_recv() {
            match call {
                Call::Operation(Op::Commit(commit), _, reply, _)
                    if commit.files.iter().any(|file| inodes.contains(&InodeId(file.ino))) =>
                {
                    // Nobody waits when the client is gone.
                    let _ = reply.send(Err(error.clone()));
                }
                call => self.take_call(call),
            }
        }
    }

    fn fail_all(&mut self, error: &FsError) {
        self.queue.defer(self.leases.take_deferred());
        for (op, sent, answer) in self.queue.take_all() {
            match answer {
                Answer::Caller(reply) => {
                    self.leases.failed(&op, &sent);
                    let result = Err(error.clone());
                    self.locks.answered(&op, &result);
                    let _ = reply.send(result);
                }
                Answer::Decided => self.leases.deferred_answered(&op, &Err(error.clone())),
                Answer::Nobody => {}
            }
        }
    }
}

async fn sleep_until(due: Option<std::time::Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
