//! Where clients connect: TCP, and for those on this host a Unix socket.
//!
//! The Unix socket's name follows from cluster and server ([`local_name`]) and lies in the abstract namespace, so there is no
//! file to find, to clean up or to give permissions to. It lets in whom the TCP port on this host lets in. When the name is
//! taken, clients come over TCP.

use std::{
    io,
    net::{Shutdown, SocketAddr, TcpListener},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        linux::net::SocketAddrExt,
        unix::net::UnixListener,
    },
};

use fjordfs_proto::{ServerId, frame::local_name};
use rustix::net::sockopt;

/// Asked for as the buffer of a Unix socket, bytes: a large answer goes out with one system call.
const LOCAL_BUFFER: usize = 4 << 20;

/// A socket that clients connect to.
pub(crate) enum Listener {
    Tcp(TcpListener),
    Local(UnixListener),
}

/// A client's socket.
pub(crate) struct Socket(OwnedFd);

impl Listener {
    pub(crate) fn tcp(address: SocketAddr) -> io::Result<(Listener, SocketAddr)> {
        let listener = TcpListener::bind(address)?;
        let address = listener.local_addr()?;
        Ok((Listener::Tcp(listener), address))
    }

    pub(crate) fn local(cluster_id: &str, server: ServerId) -> io::Result<Listener> {
        let name = local_name(cluster_id, server);
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
        UnixListener::bind_addr(&address).map(Listener::Local)
    }

    /// The next client, and what to call it.
    pub(crate) fn accept(&self) -> io::Result<(Socket, String)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                // Without it small answers wait for the peer's acknowledgement; keepalive finds peers that vanished.
                let options =
                    stream.set_nodelay(true).and_then(|()| Ok(sockopt::set_socket_keepalive(&stream, true)?));
                if let Err(e) = options {
                    tracing::debug!("connection of {peer}: {e}");
                }
                Ok((Socket(stream.into()), peer.to_string()))
            }
            Listener::Local(listener) => {
                let (stream, _) = listener.accept()?;
                if sockopt::set_socket_send_buffer_size_force(&stream, LOCAL_BUFFER).is_err() {
                    // Only the administrator may exceed the usual size; a smaller buffer works too.
                    let _ = sockopt::set_socket_send_buffer_size(&stream, LOCAL_BUFFER);
                }
                let pid = sockopt::socket_peercred(&stream).map(|peer| peer.pid.as_raw_nonzero());
                let peer = pid.map_or("a process here".to_owned(), |pid| format!("process {pid} here"));
                Ok((Socket(stream.into()), peer))
            }
        }
    }

    /// Wakes a blocked accept, which then fails, as does every later one.
    pub(crate) fn shut(&self) {
        let fd = match self {
            Listener::Tcp(listener) => listener.as_fd(),
            Listener::Local(listener) => listener.as_fd(),
        };
        // Shut before is as good.
        let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Both);
    }
}

impl Socket {
    pub(crate) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        let how = match how {
            Shutdown::Read => rustix::net::Shutdown::Read,
            Shutdown::Write => rustix::net::Shutdown::Write,
            Shutdown::Both => rustix::net::Shutdown::Both,
        };
        Ok(rustix::net::shutdown(&self.0, how)?)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
