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
pub(super) struct Socket {
    fd: AsyncFd<OwnedFd>,
}

impl Socket {
    /// Connects to `server`, by `address` unless it can be done locally.
    pub(super) async fn connect(
        cluster_id: &str,
        server: ServerId,
        address: &str,
        local: bool,
    ) -> io::Result<(Socket, Way)> {
        let (fd, way) = match connect_local(cluster_id, server, local) {
            Ok(fd) => (fd, Way::Local),
            Err(why) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                (OwnedFd::from(stream.into_std()?), Way::Tcp(why))
            }
        };
        let interest = Interest::READABLE | Interest::WRITABLE;
        // SAFETY: the descriptor is open as long as the `OwnedFd`, which the `AsyncFd` owns.
        let fd = unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)?;
        Ok((Socket { fd }, way))
    }

    /// Receives what is there, at most what fits; 0 is the end of the stream. When nothing is there, the waker of
    /// `context` is woken once something is.
    pub(super) fn poll_receive(
        &self,
        context: &mut Context<'_>,
        into: &mut [MaybeUninit<u8>],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.fd.poll_read_ready(context))?;
            let room = into.len();
            match rustix::net::recv(&self.fd, &mut *into, RecvFlags::DONTWAIT) {
                Ok((_, n)) => {
                    // All that was there. What comes later makes it ready again, so there is no need to ask.
                    if n < room {
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(n));
                }
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(e) => return Poll::Ready(Err(e.into())),
            }
        }
    }

    /// Sends as much as the kernel takes.
    ///
    /// # Errors
    /// `WouldBlock` when it takes nothing: see [`Socket::poll_writable`].
    pub(super) fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let total = parts.iter().map(|part| part.len()).sum();
        let mut sent = 0;
        let result = self.fd.try_io(Interest::WRITABLE, |fd| {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            sent = rustix::net::sendmsg(fd, parts, &mut SendAncillaryBuffer::default(), flags)?;
            // The buffer is full now: `WouldBlock` notes it without asking the kernel again.
            if sent < total { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
        });
        match result {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(sent),
            Err(_) if sent > 0 => Ok(sent),
            result => result.map(|()| sent),
        }
    }

    /// Ready when the kernel may take more; else the waker of `context` is woken then.
    pub(super) fn poll_writable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.fd.poll_write_ready(context).map_ok(drop)
    }
}

/// The Unix socket of a server on this host, or why it is not used.
fn connect_local(cluster_id: &str, server: ServerId, wanted: bool) -> Result<OwnedFd, String> {
    if !wanted {
        return Err("asked for".to_owned());
    }
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
