//! The socket below a connection: a Unix socket where the data server runs on this host, else TCP.
//!
//! Moving the same bytes through a Unix socket takes about half the CPU time. Nothing says whether a server is on this
//! host, but its name in the abstract namespace does: when nobody listens there, or somebody who should not, it is TCP.

use std::{
    fmt,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    task::{Context, Poll, ready},
};

use fjordfs_proto::{ServerId, frame::local_name};
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
        sockopt,
    },
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::TcpStream,
};

/// Asked for as the buffer of a Unix socket, bytes: a whole answer of a sequential read fits, so the server sends it
/// with one system call. The kernel takes the memory only while bytes wait.
const LOCAL_BUFFER: usize = 4 << 20;

/// With at least this much of a payload missing, a receiver that has caught up with a sender on this host waits for it a
/// moment without sleeping, bytes: the kernel hands over some 36 KiB at a time, and each sleep and wake-up in between would
/// cost as much as the copying.
const CLOSE_BEHIND: usize = 64 << 10;

/// How often such a receiver looks. Each time it lets others use the CPU first, the sender above all.
const LOOKS_MAX: usize = 16;

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
///
/// Its runtime watches for bytes to receive. It watches for room to send only while that is waited for, through a second
/// descriptor: a Unix socket has room again each time that its peer has read, and would wake the thread for every request.
#[derive(Debug)]
pub(super) struct Socket {
    fd: AsyncFd<OwnedFd>,
    local: bool,
}

/// A wait for room to send.
#[derive(Debug)]
pub(super) struct Room(AsyncFd<OwnedFd>);

impl Socket {
    /// Connects to a server on this host.
    ///
    /// # Errors
    /// Why its Unix socket is not used.
    pub(super) fn local(cluster_id: &str, server: ServerId) -> Result<Socket, String> {
        let fd = connect_local(cluster_id, server)?;
        let fd = watch(fd, Interest::READABLE).map_err(|e| e.to_string())?;
        Ok(Socket { fd, local: true })
    }

    /// Connects to `HOST:PORT`.
    pub(super) async fn tcp(address: &str) -> io::Result<Socket> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Socket { fd: watch(stream.into_std()?.into(), Interest::READABLE)?, local: false })
    }

    /// Receives what is there, at most what fits; 0 is the end of the stream. When nothing is there, the waker of
    /// `context` is woken once something is.
    pub(super) fn poll_receive(
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

    /// Sends as much as the kernel takes.
    ///
    /// # Errors
    /// `WouldBlock` when it takes nothing: see [`Socket::room`].
    pub(super) fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            match rustix::net::sendmsg(&self.fd, parts, &mut SendAncillaryBuffer::default(), flags) {
                Err(Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    /// To wait for room to send. To be made and used in the socket's runtime.
    pub(super) fn room(&self) -> io::Result<Room> {
        watch(self.fd.get_ref().try_clone()?, Interest::WRITABLE).map(Room)
    }
}

impl Room {
    /// Ready when the kernel may take more than it did when this was made.
    pub(super) fn poll(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_write_ready(context).map_ok(drop)
    }
}

fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is open as long as the `OwnedFd`, which the `AsyncFd` owns.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
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
