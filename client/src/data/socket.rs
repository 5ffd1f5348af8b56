//! The socket below a connection: a Unix socket where the data server runs on this host, else TCP.
//!
//! Moving the same bytes through a Unix socket takes about half the CPU time. Nothing says whether a server is on this
//! host, but its name in the abstract namespace does: when nobody listens there, or somebody who should not, it is TCP.

use std::{
    fmt,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use fjordfs_proto::{ServerId, frame::local_name};
use parking_lot::Mutex;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
        sockopt,
    },
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd},
    net::TcpStream,
};

use crate::Wire;

/// Asked for as the buffer of a Unix socket, bytes: a whole answer of a sequential read fits, so the server sends it
/// with one system call. The kernel takes the memory only while bytes wait.
const LOCAL_BUFFER: usize = 4 << 20;

/// With at least this much of a payload missing, a receiver that has caught up with a sender on this host waits for it a
/// moment without sleeping, bytes: the kernel hands over some 36 KiB at a time, and each sleep and wake-up in between would
/// cost as much as the copying.
const CLOSE_BEHIND: usize = 64 << 10;

/// How often such a receiver looks. Each time it lets others use the CPU first, the sender above all.
const LOOKS_MAX: usize = 16;

/// How long nothing need be heard of a server's host, nor a full server take in a byte, before a TCP connection ends.
const UNHEARD_MAX: Duration = Duration::from_secs(15);

/// How a server is reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// Through its Unix socket.
    Local,
    /// Through its address; why not the other way.
    Tcp(String),
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Way::Local => f.write_str("its Unix socket"),
            Way::Tcp(why) => write!(f, "TCP ({why})"),
        }
    }
}

/// A connected socket, used without blocking. Belongs to the runtime that it was made in.
#[derive(Debug)]
pub(super) struct Socket(Kind);

enum Kind {
    Kernel(Descriptor),
    /// Of a network that the program has put in the place of the kernel's.
    Other(Arc<Mutex<Box<dyn Wire>>>),
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Kernel(descriptor) => descriptor.fmt(f),
            Kind::Other(_) => f.write_str("Other"),
        }
    }
}

/// Its runtime watches for bytes to receive. It watches for room to send only while that is waited for, through a second
/// descriptor: a Unix socket has room again each time that its peer has read, and would wake the thread for every request.
#[derive(Debug)]
struct Descriptor {
    fd: AsyncFd<OwnedFd>,
    local: bool,
}

/// A wait for room to send.
pub(super) enum Room {
    Kernel(AsyncFd<OwnedFd>),
    Other(Arc<Mutex<Box<dyn Wire>>>),
}

impl Socket {
    /// Connects to a server on this host.
    ///
    /// # Errors
    /// Why its Unix socket is not used.
    pub(super) fn local(cluster_id: &str, server: ServerId) -> Result<Socket, String> {
        let fd = connect_local(cluster_id, server)?;
        let fd = watch(fd, Interest::READABLE).map_err(|e| e.to_string())?;
        Ok(Socket(Kind::Kernel(Descriptor { fd, local: true })))
    }

    /// Connects to `HOST:PORT`.
    pub(super) async fn tcp(address: &str) -> io::Result<Socket> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        end_when_unheard(&stream)?;
        let fd = watch(stream.into_std()?.into(), Interest::READABLE)?;
        Ok(Socket(Kind::Kernel(Descriptor { fd, local: false })))
    }

    /// A connection that was made otherwise.
    pub(super) fn over(wire: Box<dyn Wire>) -> Socket {
        Socket(Kind::Other(Arc::new(Mutex::new(wire))))
    }

    /// Receives what is there, at most what fits; 0 is the end of the stream. When nothing is there, the waker of
    /// `context` is woken once something is.
    pub(super) fn poll_receive(
        &self,
        context: &mut Context<'_>,
        into: &mut [MaybeUninit<u8>],
    ) -> Poll<io::Result<usize>> {
        match &self.0 {
            Kind::Kernel(descriptor) => descriptor.poll_receive(context, into),
            Kind::Other(wire) => {
                let mut buffer = ReadBuf::uninit(into);
                ready!(Pin::new(&mut *wire.lock()).poll_read(context, &mut buffer))?;
                Poll::Ready(Ok(buffer.filled().len()))
            }
        }
    }

    /// Sends as much as is taken now.
    ///
    /// # Errors
    /// `WouldBlock` when that is nothing: see [`Socket::room`].
    pub(super) fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match &self.0 {
            Kind::Kernel(descriptor) => descriptor.send(parts),
            Kind::Other(wire) => {
                let mut context = Context::from_waker(Waker::noop());
                match Pin::new(&mut *wire.lock()).poll_write_vectored(&mut context, parts) {
                    Poll::Ready(result) => result,
                    Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
                }
            }
        }
    }

    /// To wait for room to send. To be made and used in the socket's runtime.
    pub(super) fn room(&self) -> io::Result<Room> {
        match &self.0 {
            Kind::Kernel(Descriptor { fd, .. }) => {
                watch(fd.get_ref().try_clone()?, Interest::WRITABLE).map(Room::Kernel)
            }
            Kind::Other(wire) => Ok(Room::Other(wire.clone())),
        }
    }
}

impl Descriptor {
    fn poll_receive(
        &self,
        context: &mut Context<'_>,
        into: &mut [MaybeUninit<u8>],
    ) -> Poll<io::Result<usize>> {
        let room = into.len();
        let mut looks = 0;
        loop {
            let mut ready = ready!(self.fd.poll_read_ready(context))?;
            match rustix::net::recv(&self.fd, &mut *into, RecvFlags::DONTWAIT) {
                Ok((_, n)) => {
                    // All that was there. What comes later makes it ready again, so there is no need to ask.
                    if n < room && (n == 0 || !self.follows_closely(room - n)) {
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(n));
                }
                Err(Errno::AGAIN) if looks < LOOKS_MAX && self.follows_closely(room) => {
                    looks += 1;
                    std::thread::yield_now();
                }
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(e) => return Poll::Ready(Err(e.into())),
            }
        }
    }

    fn follows_closely(&self, missing: usize) -> bool {
        self.local && missing >= CLOSE_BEHIND
    }

    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            match rustix::net::sendmsg(&self.fd, parts, &mut SendAncillaryBuffer::default(), flags) {
                Err(Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }
}

impl Room {
    /// Ready when more may be taken than when this was made.
    pub(super) fn poll(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Room::Kernel(fd) => fd.poll_write_ready(context).map_ok(drop),
            Room::Other(wire) => Pin::new(&mut *wire.lock()).poll_flush(context),
        }
    }
}

fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is open as long as the `OwnedFd`, which the `AsyncFd` owns.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// Has the kernel end a connection whose peer's host is not heard of any more. By itself it sends the same bytes again for a
/// quarter of an hour, ever more seldom: for a minute after the network is back, too.
fn end_when_unheard(stream: impl AsFd) -> rustix::io::Result<()> {
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, UNHEARD_MAX / 3)?;
    sockopt::set_tcp_keepintvl(&stream, UNHEARD_MAX / 3)?;
    sockopt::set_tcp_user_timeout(&stream, UNHEARD_MAX.as_millis() as u32)
}

/// The Unix socket of a server on this host, or why it is not used.
fn connect_local(cluster_id: &str, server: ServerId) -> Result<OwnedFd, String> {
    let connect = || -> rustix::io::Result<OwnedFd> {
        let address = SocketAddrUnix::new_abstract_name(local_name(cluster_id, server).as_bytes())?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&fd, &address)?;
        Ok(fd)
    };
    let fd = connect().map_err(|e| match e {
        Errno::CONNREFUSED => "no such server in this network namespace".to_owned(),
        e => format!("its Unix socket: {}", io::Error::from(e)),
    })?;
    let peer = sockopt::socket_peercred(&fd)
        .map_err(|e| format!("whose its Unix socket is: {}", io::Error::from(e)))?;
    if !peer.uid.is_root() && peer.uid != rustix::process::geteuid() {
        return Err(format!("its Unix socket belongs to user {}", peer.uid.as_raw()));
    }
    enlarge(&fd);
    Ok(fd)
}

/// Makes room for large frames: as much as the administrator lets root have, or everyone.
fn enlarge(fd: impl AsFd) {
    if sockopt::set_socket_send_buffer_size_force(&fd, LOCAL_BUFFER).is_err() {
        // A smaller buffer works too.
        let _ = sockopt::set_socket_send_buffer_size(&fd, LOCAL_BUFFER);
    }
}
