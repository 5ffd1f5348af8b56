//! The network: hosts, links between them, and connections, which are two streams of bytes.
//!
//! A connection loses nothing and keeps its order, or breaks, as TCP does; what is under way then is lost, and neither end
//! knows how much arrived. Across connections everything overtakes everything else. A lost packet is a delay until it is
//! sent again, for all that is behind it. A link that is held delivers nothing in its direction until it is released;
//! senders do not notice.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use fjordfs_client::{Network, Wire};
use fjordfs_tests::rng::{self, TestRng};
use futures_util::future::BoxFuture;
use rand::Rng;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
    time::{Instant, Sleep},
};

use crate::run::trace;

/// A process somewhere, from its start to its end.
pub(crate) type Host = u32;

/// Where a host listens.
pub(crate) fn address(host: Host) -> String {
    format!("h{host}:1")
}

fn host_at(address: &str) -> Option<Host> {
    address.strip_prefix('h')?.split(':').next()?.parse().ok()
}

/// How bad the network is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weather {
    /// Usual delay of a piece, at most, milliseconds.
    pub(crate) delay_ms: u64,
    /// One piece in so many is lost and sent again.
    pub(crate) lost_in: u32,
}

struct State {
    random: TestRng,
    weather: Weather,
    listeners: BTreeMap<Host, mpsc::UnboundedSender<SimWire>>,
    held: BTreeSet<(Host, Host)>,
    /// Hosts that will never come back.
    gone: BTreeSet<Host>,
    connections: Vec<Weak<Mutex<Pair>>>,
}

/// A connection: what goes from the one that connected to the other, and back.
struct Pair {
    ends: [Host; 2],
    streams: [Stream; 2],
    /// Neither end can go on.
    broken: bool,
    /// An end is gone, and the other was not told.
    silent: bool,
}

#[derive(Default)]
struct Stream {
    pieces: VecDeque<(Instant, VecDeque<u8>)>,
    last: Option<Instant>,
    /// Nothing more will be written.
    ended: bool,
    reader: Option<Waker>,
}

/// All of it.
#[derive(Clone)]
pub(crate) struct Net(Arc<Mutex<State>>);

/// The network as seen by a host.
#[derive(Clone)]
pub(crate) struct Nic {
    net: Net,
    host: Host,
}

impl std::fmt::Debug for Nic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the simulated network of h{}", self.host)
    }
}

impl Net {
    pub(crate) fn new(seed: u64, weather: Weather) -> Net {
        let random = rng::stream(seed, 1);
        Net(Arc::new(Mutex::new(State {
            random,
            weather,
            listeners: BTreeMap::new(),
            held: BTreeSet::new(),
            gone: BTreeSet::new(),
            connections: Vec::new(),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(crate) fn of(&self, host: Host) -> Nic {
        Nic { net: self.clone(), host }
    }

    /// Whoever connects to the host from now on.
    pub(crate) fn listen(&self, host: Host) -> mpsc::UnboundedReceiver<SimWire> {
        let (sender, connections) = mpsc::unbounded_channel();
        self.state().listeners.insert(host, sender);
        connections
    }

    pub(crate) fn set_weather(&self, weather: Weather) {
        self.state().weather = weather;
    }

    /// Nothing goes from one host to another.
    pub(crate) fn hold(&self, from: Host, to: Host) {
        self.state().held.insert((from, to));
    }

    /// All links deliver again.
    pub(crate) fn release_all(&self) {
        let mut state = self.state();
        state.held.clear();
        for pair in state.live() {
            let mut pair = pair.lock().unwrap();
            if pair.silent {
                // The packets of the one that is there are answered with a reset now.
                pair.break_off();
            }
            pair.wake();
        }
    }

    /// Breaks a connection, any one; false when there is none.
    pub(crate) fn cut_any(&self) -> bool {
        let mut state = self.state();
        let live = state.live();
        if live.is_empty() {
            return false;
        }
        let at = state.random.random_range(0..live.len());
        live[at].lock().unwrap().break_off();
        true
    }

    /// The host is gone for good; what still runs in its name reaches nobody.
    pub(crate) fn kill_for_good(&self, host: Host) {
        self.state().gone.insert(host);
        self.kill(host);
    }

    /// The host's process is gone.
    pub(crate) fn kill(&self, host: Host) {
        let mut state = self.state();
        state.listeners.remove(&host);
        for pair in state.live() {
            let mut pair = pair.lock().unwrap();
            let Some(at) = pair.ends.iter().position(|end| *end == host) else { continue };
            if state.held.contains(&(host, pair.ends[1 - at])) {
                pair.silent = true;
            } else {
                pair.break_off();
            }
        }
    }
}

impl State {
    fn live(&mut self) -> Vec<Arc<Mutex<Pair>>> {
        self.connections.retain(|pair| pair.strong_count() > 0);
        let pairs = self.connections.iter().filter_map(Weak::upgrade);
        pairs.filter(|pair| !pair.lock().unwrap().broken).collect()
    }

    fn delay(&mut self) -> Duration {
        let Weather { delay_ms, lost_in } = self.weather;
        let again =
            if self.random.random_ratio(1, lost_in) { self.random.random_range(200..1500) } else { 0 };
        Duration::from_millis(self.random.random_range(0..=delay_ms) + again)
    }
}

impl Pair {
    fn break_off(&mut self) {
        self.broken = true;
        self.streams.iter_mut().for_each(|stream| stream.pieces.clear());
        self.wake();
    }

    fn wake(&mut self) {
        self.streams.iter_mut().filter_map(|stream| stream.reader.take()).for_each(Waker::wake);
    }
}

impl Nic {
    /// Connects to where somebody listens.
    pub(crate) async fn connect_to(self, address: String) -> io::Result<SimWire> {
        let to = host_at(&address).ok_or(io::ErrorKind::InvalidInput)?;
        loop {
            let round_trip = {
                let mut state = self.net.state();
                state.delay() + state.delay()
            };
            tokio::time::sleep(round_trip.max(Duration::from_millis(1))).await;
            let listener = {
                let state = self.net.state();
                if state.gone.contains(&self.host) {
                    return Err(io::ErrorKind::NetworkUnreachable.into());
                }
                let held = [(self.host, to), (to, self.host)].iter().any(|link| state.held.contains(link));
                if held { None } else { Some(state.listeners.get(&to).cloned()) }
            };
            let listener = match listener {
                None => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
                Some(listener) => listener.ok_or(io::ErrorKind::ConnectionRefused)?,
            };
            let pair = Arc::new(Mutex::new(Pair {
                ends: [self.host, to],
                streams: Default::default(),
                broken: false,
                silent: false,
            }));
            self.net.state().connections.push(Arc::downgrade(&pair));
            let end = |at| SimWire { net: self.net.clone(), pair: pair.clone(), at, sleep: None };
            trace(format_args!("h{} connects to h{to}", self.host));
            return match listener.send(end(1)) {
                Ok(()) => Ok(end(0)),
                Err(_) => Err(io::ErrorKind::ConnectionRefused.into()),
            };
        }
    }
}

impl Network for Nic {
    fn connect(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Wire>>> {
        let connecting = self.clone().connect_to(address.to_owned());
        Box::pin(async move { Ok(Box::new(connecting.await?) as Box<dyn Wire>) })
    }
}

/// One end of a connection.
pub(crate) struct SimWire {
    net: Net,
    pair: Arc<Mutex<Pair>>,
    at: usize,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Drop for SimWire {
    fn drop(&mut self) {
        let mut pair = self.pair.lock().unwrap();
        pair.streams[self.at].ended = true;
        pair.wake();
    }
}

impl tonic::transport::server::Connected for SimWire {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

impl AsyncRead for SimWire {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let held = {
            let ends = this.pair.lock().unwrap().ends;
            this.net.state().held.contains(&(ends[1 - this.at], ends[this.at]))
        };
        loop {
            let mut pair = this.pair.lock().unwrap();
            if pair.broken {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            let (ends, silent) = (pair.ends, pair.silent);
            let stream = &mut pair.streams[1 - this.at];
            stream.reader = Some(context.waker().clone());
            if held || silent {
                return Poll::Pending;
            }
            let due = match stream.pieces.front_mut() {
                None if stream.ended => return Poll::Ready(Ok(())),
                None => return Poll::Pending,
                Some((due, _)) if *due > Instant::now() => *due,
                Some((_, bytes)) => {
                    let (front, _) = bytes.as_slices();
                    let taken = front.len().min(into.remaining());
                    into.put_slice(&front[..taken]);
                    bytes.drain(..taken);
                    if bytes.is_empty() {
                        stream.pieces.pop_front();
                    }
                    trace(format_args!("h{} to h{}: {taken} bytes", ends[1 - this.at], ends[this.at]));
                    return Poll::Ready(Ok(()));
                }
            };
            drop(pair);
            let sleep = this.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
            sleep.as_mut().reset(due);
            std::task::ready!(sleep.as_mut().poll(context));
        }
    }
}

impl AsyncWrite for SimWire {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(from)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let delay = this.net.state().delay();
        let mut pair = this.pair.lock().unwrap();
        if pair.broken {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let stream = &mut pair.streams[this.at];
        let due = (Instant::now() + delay).max(stream.last.unwrap_or_else(Instant::now));
        stream.last = Some(due);
        let bytes: VecDeque<u8> = from.iter().flat_map(|slice| slice.iter().copied()).collect();
        let count = bytes.len();
        if count > 0 {
            stream.pieces.push_back((due, bytes));
        }
        if let Some(reader) = stream.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut pair = self.pair.lock().unwrap();
        pair.streams[self.at].ended = true;
        pair.wake();
        Poll::Ready(Ok(()))
    }
}
