//! One pipelined connection to a data server. Hot path: a request is written and its answer read by the task that waits
//! for it; nothing is handed from thread to thread, payloads are copied by the kernel only.
//!
//! **Who receives.** Whoever waits for an answer and is polled drives the [`Receiver`]: it takes in whatever has come,
//! its own answer into its own memory, and wakes those whose answers came too. When bytes come, the request that is
//! their most likely owner is woken, and behind it the connection's own task (the *pump*), which drives when that caller
//! does not: nobody depends on a future that happens not to be polled. So no reference to a caller's memory ever outlives
//! a poll of that caller, and dropping a request at any time leaves the stream in order: the rest of its answer is skipped.
//!
//! **Failure.** When the socket or what comes from it fails, everyone who waits gets `EHOSTUNREACH`, and the connection is
//! replaced by its next user.

mod receiver;
mod sender;
#[cfg(test)]
mod tests;
mod waiters;

use std::{
    future::poll_fn,
    io,
    mem::MaybeUninit,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use bytes::Bytes;
use fjordfs_proto::{
    FsError, FsResult, PROTOCOL_VERSION, ServerId,
    error::Errno,
    frame::{self, Opcode},
    pb::data::{HelloReply, HelloRequest, MemoryProbe},
};
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use prost::Message;
use tracing::debug;

pub(super) use waiters::Answer;

use self::{
    receiver::{Caller, Event, Receiver, Source},
    sender::Sender,
    waiters::Waiters,
};
use super::{
    memory::Pool,
    socket::{Room, Socket, Way},
};
use crate::{Network, engine::Engine};

/// How long a server may take to accept and greet.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Whom a connection is made to, and by whom.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    pub(super) server: ServerId,
    pub(super) address: String,
    pub(super) cluster_id: String,
    /// Who asks, for people.
    pub(super) client: String,
    /// Whether a Unix socket may be used.
    pub(super) local: bool,
    /// Whether it may read this process's memory then.
    pub(super) lends: bool,
    /// In place of TCP.
    pub(super) network: Option<Arc<dyn Network>>,
}

/// An open connection.
pub(super) struct Connection {
    shared: Arc<Shared>,
    way: Way,
    incarnation: u64,
    /// The server reads what is put from this process's memory.
    reads_memory: AtomicBool,
}

struct Shared {
    address: String,
    socket: Socket,
    sender: Sender,
    receiver: Mutex<Receiver>,
    /// Whoever drives the receiver must look again.
    again: AtomicBool,
    /// The request whose payload is being received into its caller's memory; 0 is none.
    turn: AtomicU64,
    waiters: Waiters,
    /// Woken when something comes.
    arrival: Waker,
    pump: AtomicWaker,
    broken: AtomicBool,
}

/// Wakes those who may receive.
struct Arrival(Weak<Shared>);

impl Wake for Arrival {
    fn wake(self: Arc<Self>) {
        if let Some(shared) = self.0.upgrade() {
            let turn = shared.turn.load(Ordering::Acquire);
            shared.waiters.wake((turn != 0).then_some(turn));
            shared.pump.wake();
        }
    }
}

/// The socket, for one turn.
struct Arriving<'a>(&'a Socket, Context<'a>);

impl Source for Arriving<'_> {
    fn receive(&mut self, into: &mut [MaybeUninit<u8>]) -> Poll<io::Result<usize>> {
        self.0.poll_receive(&mut self.1, into)
    }
}

impl Connection {
    /// Connects and greets, over the Unix socket of a server on this host, else over TCP. The socket belongs to the calling
    /// thread's lane.
    pub(super) async fn open(engine: &Engine, peer: &Peer, memory: &Pool) -> FsResult<Arc<Connection>> {
        let why = if peer.local {
            let (cluster_id, server) = (peer.cluster_id.clone(), peer.server);
            let connecting = async move { Socket::local(&cluster_id, server) };
            match Connection::make(engine, peer, memory, Way::Local, connecting).await {
                Ok(connection) => return Ok(connection),
                Err(why) => why,
            }
        } else {
            "asked for".to_owned()
        };
        let address = peer.address.clone();
        let network = peer.network.clone();
        let connecting = async move {
            let socket = match network {
                None => Socket::tcp(&address).await,
                Some(network) => network.connect(&address).await.map(Socket::over),
            };
            socket.map_err(|e| e.to_string())
        };
        Connection::make(engine, peer, memory, Way::Tcp(why), connecting).await.map_err(|why| {
            let what = format!("data server {} at {}: {why}", peer.server, peer.address);
            FsError::new(Errno::EHOSTUNREACH, what)
        })
    }

    async fn make(
        engine: &Engine,
        peer: &Peer,
        memory: &Pool,
        way: Way,
        connecting: impl Future<Output = Result<Socket, String>> + Send + 'static,
    ) -> Result<Arc<Connection>, String> {
        let (address, memory) = (peer.address.clone(), memory.clone());
        let opening = engine.spawn_here(async move {
            let socket = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
                .await
                .map_err(|_| format!("no connection within {CONNECT_TIMEOUT:?}"))??;
            let shared = Shared::new(address, socket, memory);
            tokio::spawn(pump(Arc::downgrade(&shared)));
            Ok::<_, String>(Connection { shared, way, incarnation: 0, reads_memory: AtomicBool::new(false) })
        });
        let mut connection = opening.await.map_err(|e| e.to_string())??;
        // Lies where it is until the greeting has been answered.
        let probe = Bytes::copy_from_slice(uuid::Uuid::new_v4().as_bytes());
        let hello = HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            cluster_id: peer.cluster_id.clone(),
            client: peer.client.clone(),
            upkeep: false,
            probe: (peer.lends && connection.is_local())
                .then(|| MemoryProbe { address: address_of(&probe), content: probe.clone() }),
        };
        let greeting = connection.request(Opcode::Hello, &hello, Vec::new());
        let answer = tokio::time::timeout(CONNECT_TIMEOUT, greeting)
            .await
            .map_err(|_| format!("no greeting within {CONNECT_TIMEOUT:?}"))?
            .map_err(|e| e.message)?;
        let greeting: HelloReply =
            frame::decode_body(Opcode::Hello, &answer.body).map_err(|e| e.to_string())?;
        if greeting.server != peer.server.0 {
            return Err(format!("it is server s{}", greeting.server));
        }
        if greeting.cluster_id != peer.cluster_id {
            return Err(format!("it belongs to cluster {}", greeting.cluster_id));
        }
        connection.incarnation = greeting.incarnation;
        *connection.reads_memory.get_mut() = greeting.reads_memory;
        Ok(Arc::new(connection))
    }

    /// Which process of the server it leads to.
    pub(super) fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// How the server is reached.
    pub(super) fn way(&self) -> &Way {
        &self.way
    }

    /// Whether the server is on this host, and was reached as such.
    pub(super) fn is_local(&self) -> bool {
        self.way == Way::Local
    }

    /// Whether the server takes what is put from this process's memory.
    pub(super) fn reads_memory(&self) -> bool {
        self.reads_memory.load(Ordering::Relaxed)
    }

    /// It could not, once.
    pub(super) fn cannot_read_memory(&self) {
        self.reads_memory.store(false, Ordering::Relaxed);
    }

    /// False once it has failed: get another one.
    pub(super) fn usable(&self) -> bool {
        !self.shared.broken.load(Ordering::Acquire)
    }

    /// Sends a request and waits for its answer. Dropping the future forgets the answer.
    ///
    /// # Errors
    /// What the server answered, or `EHOSTUNREACH` when the connection fails.
    pub(super) async fn request(
        &self,
        opcode: Opcode,
        body: &impl Message,
        payload: Vec<Bytes>,
    ) -> FsResult<Answer> {
        self.shared.call(opcode, body, payload, None).await
    }

    /// As [`Connection::request`], with memory for the answer's payload. [`Answer::direct`] bytes of it are filled
    /// then; the rest of the payload is in the answer: all of it when it would not fit.
    pub(super) async fn request_into(
        &self,
        opcode: Opcode,
        body: &impl Message,
        memory: &mut [u8],
    ) -> FsResult<Answer> {
        self.shared.call(opcode, body, Vec::new(), Some(memory)).await
    }
}

/// Where bytes are, for a server that reads them.
pub(super) fn address_of(bytes: &Bytes) -> u64 {
    bytes.as_ptr().expose_provenance() as u64
}

impl Shared {
    fn new(address: String, socket: Socket, memory: Pool) -> Arc<Shared> {
        Arc::new_cyclic(|shared| Shared {
            address,
            socket,
            sender: Sender::default(),
            receiver: Mutex::new(Receiver::new(memory)),
            again: AtomicBool::new(false),
            turn: AtomicU64::new(0),
            waiters: Waiters::default(),
            arrival: Waker::from(Arc::new(Arrival(shared.clone()))),
            pump: AtomicWaker::new(),
            broken: AtomicBool::new(false),
        })
    }

    async fn call(
        &self,
        opcode: Opcode,
        body: &impl Message,
        payload: Vec<Bytes>,
        mut memory: Option<&mut [u8]>,
    ) -> FsResult<Answer> {
        let request = self.waiters.enter(memory.as_ref().map(|memory| memory.len()))?;
        let mut leaving = Leaving { shared: self, request, answered: false };
        let payload_len = payload.iter().map(Bytes::len).sum();
        let head = Bytes::from(frame::encode(opcode, false, request, body, payload_len));
        self.sender.push(request, head, payload);
        self.flush();
        let answer = poll_fn(|context| {
            if let Some(answer) = self.waiters.take(request, context.waker()) {
                return Poll::Ready(answer);
            }
            self.drive(Some(Caller { request, memory: memory.as_deref_mut().unwrap_or_default() }), false);
            match self.waiters.take(request, context.waker()) {
                Some(answer) => Poll::Ready(answer),
                None => Poll::Pending,
            }
        })
        .await;
        leaving.answered = true;
        answer
    }

    /// Writes what can be written now; the connection's task does the rest.
    fn flush(&self) {
        match self.sender.flush(&self.socket) {
            Ok(true) => {}
            Ok(false) => self.pump.wake(),
            Err(e) => self.fail(&e.to_string()),
        }
    }

    /// Writes what is left to write, as far as there is room; pending when there is nothing to do for now. Ready when it must
    /// be called again.
    fn write_rest(&self, room: &mut Option<Room>, context: &mut Context<'_>) -> io::Result<Poll<()>> {
        if let Some(waiting) = room {
            if waiting.poll(context)?.is_pending() {
                return Ok(Poll::Pending);
            }
            *room = None;
        }
        if self.sender.flush(&self.socket)? {
            return Ok(Poll::Pending);
        }
        *room = Some(self.socket.room()?);
        Ok(Poll::Ready(()))
    }

    /// Takes in what has come. The pump insists: it does not wait for a caller that was woken before and did not come.
    fn drive(&self, mut caller: Option<Caller<'_>>, insist: bool) {
        loop {
            self.again.store(true, Ordering::SeqCst);
            let Some(mut receiver) = self.receiver.try_lock() else { return };
            self.again.store(false, Ordering::SeqCst);
            self.receive(&mut receiver, caller.as_mut(), insist);
            drop(receiver);
            // Somebody came in vain, or bytes did, while the receiver was in use.
            if !self.again.swap(false, Ordering::SeqCst) {
                return;
            }
        }
    }

    fn receive(&self, receiver: &mut Receiver, mut caller: Option<&mut Caller<'_>>, insist: bool) {
        let mut source = Arriving(&self.socket, Context::from_waker(&self.arrival));
        loop {
            let caller = caller.as_mut().map(|c| Caller { request: c.request, memory: &mut *c.memory });
            let event = receiver.next(&mut source, caller, |request| self.waiters.room(request));
            let turn = receiver.turn();
            let before = self.turn.swap(turn.unwrap_or_default(), Ordering::AcqRel);
            match event {
                Ok(Event::Idle) => return,
                Ok(Event::Answer(request, answer)) => self.waiters.finish(request, answer),
                Ok(Event::Turn(request)) if insist && before == request => receiver.keep(),
                Ok(Event::Turn(request)) => {
                    self.waiters.wake(Some(request));
                    self.pump.wake();
                    return;
                }
                Ok(Event::Closed) => return self.fail("closed by the server"),
                Err(e) => return self.fail(&e),
            }
        }
    }

    /// Fails everyone who waits, once.
    fn fail(&self, why: &str) {
        self.broken.store(true, Ordering::Release);
        let error = FsError::new(Errno::EHOSTUNREACH, format!("data server {}: {why}", self.address));
        self.sender.clear();
        if self.waiters.fail(&error) {
            debug!(server = self.address, why, "data connection ended");
            self.pump.wake();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.pump.wake();
    }
}

/// Removes a request that nobody waits for any more.
struct Leaving<'a> {
    shared: &'a Shared,
    request: u64,
    answered: bool,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.shared.waiters.leave(self.request);
        if self.answered {
            return;
        }
        if self.shared.sender.take_back(self.request) {
            self.shared.flush();
        } else {
            self.shared.fail("it takes in no more of a request that is given up");
        }
    }
}

/// Fails the connection when the pump ends before it, with its runtime.
struct Pumping(Weak<Shared>);

impl Drop for Pumping {
    fn drop(&mut self) {
        if let Some(shared) = self.0.upgrade() {
            shared.fail("connection closed");
        }
    }
}

/// The connection's own task: writes what the kernel did not take at once, and receives what no caller comes for.
async fn pump(shared: Weak<Shared>) {
    let pumping = Pumping(shared);
    let mut room = None;
    poll_fn(|context| {
        let Some(shared) = pumping.0.upgrade() else { return Poll::Ready(()) };
        shared.pump.register(context.waker());
        shared.drive(None, true);
        while !shared.broken.load(Ordering::Acquire) {
            match shared.write_rest(&mut room, context) {
                Ok(Poll::Ready(())) => {}
                Ok(Poll::Pending) => return Poll::Pending,
                Err(e) => shared.fail(&e.to_string()),
            }
        }
        Poll::Ready(())
    })
    .await;
}
