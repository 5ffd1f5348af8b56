//! Memory of a client on this host, read without a socket.
//!
//! PERFORMANCE-CRITICAL. What goes through a socket is copied twice, in portions of some 36 KiB with a wake-up for each;
//! process_vm_readv(2) copies once, whatever the size.
//!
//! Pages that are not there are brought in meanwhile, from wherever they are: a file that the client has mapped, say, on this very
//! filesystem. So this may take long, or depend on this server, and is done on a thread of its own.
//!
//! # Why it is safe
//! - Only the process that has connected is read, and only at addresses that it names. Its number is the kernel's (`SO_PEERCRED`), and a
//!   pidfd tells before and after each read whether it was still that process's.
//! - Only processes of the superuser or of this server's user are read, and only where the kernel lets us.
//! - What comes is a copy of our own, verified like what comes through a socket.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use fjordfs_proto::pb::data::{MemoryPiece, MemoryProbe};
use rustix::{
    net::sockopt,
    process::{Pid, PidfdFlags},
};

/// Bytes of a probe: more than anybody meets by chance.
const PROBE_LEN: usize = 16;

/// A process whose memory may be read.
pub(crate) struct Lender {
    pid: Pid,
    process: OwnedFd,
}

impl Lender {
    /// The process at the other end of a Unix socket, if this one may read its memory: it has said what is where.
    pub(crate) fn find(socket: impl AsFd, probe: &MemoryProbe) -> Option<Lender> {
        let peer = sockopt::socket_peercred(&socket).ok()?;
        if !peer.uid.is_root() && peer.uid != rustix::process::geteuid() {
            return None;
        }
        let process = rustix::process::pidfd_open(peer.pid, PidfdFlags::empty()).ok()?;
        let lender = Lender { pid: peer.pid, process };
        let mut found = [0; PROBE_LEN];
        let piece = MemoryPiece { address: probe.address, length: PROBE_LEN as u32 };
        lender.read(&[piece], &mut found).ok()?;
        (probe.content == found.as_slice()).then_some(lender)
    }

    /// Fills `into` from the pieces, which together are as long. Blocks.
    ///
    /// # Errors
    /// `EFAULT` when that is not all the process's memory, `ESRCH` when it has ended, and whatever else the kernel has against it.
    pub(crate) fn read(&self, pieces: &[MemoryPiece], into: &mut [u8]) -> io::Result<()> {
        let remote: Vec<libc::iovec> = pieces
            .iter()
            .map(|piece| libc::iovec {
                iov_base: std::ptr::without_provenance_mut(piece.address as usize),
                iov_len: piece.length as usize,
            })
            .collect();
        let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
        self.check_alive()?;
        // SAFETY: the kernel writes to `into` only, which is ours alone; what it reads belongs to whoever it belongs to.
        let read = unsafe {
            libc::process_vm_readv(
                self.pid.as_raw_nonzero().get(),
                &raw const local,
                1,
                remote.as_ptr(),
                remote.len() as libc::c_ulong,
                0,
            )
        };
        let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
        if read != into.len() {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        self.check_alive()
    }

    fn check_alive(&self) -> io::Result<()> {
        let process = rustix::event::PollFd::new(&self.process, rustix::event::PollFlags::IN);
        // A pidfd can be read from once its process has ended.
        match rustix::event::poll(&mut [process], Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }))? {
            0 => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn piece(of: &[u8]) -> MemoryPiece {
        MemoryPiece { address: of.as_ptr().expose_provenance() as u64, length: of.len() as u32 }
    }

    fn probe(content: &[u8]) -> MemoryProbe {
        MemoryProbe { address: piece(content).address, content: content.to_vec().into() }
    }

    #[test]
    fn what_is_lent_is_read_in_order() {
        let (_here, there) = UnixStream::pair().unwrap();
        let secret = *b"0123456789abcdef";
        let lender = Lender::find(&there, &probe(&secret)).unwrap();
        let bytes: Vec<u8> = (0..3_000_005).map(|i| (i / 7) as u8).collect();
        let cut = [0, 1, 99_999, 2_000_000, 2_000_000, bytes.len()];
        let pieces: Vec<_> = cut.windows(2).map(|cut| piece(&bytes[cut[0]..cut[1]])).collect();
        let mut into = vec![0; bytes.len()];
        lender.read(&pieces, &mut into).unwrap();
        assert!(into == bytes);
        let nowhere = [piece(&bytes[..10]), MemoryPiece { address: 8, length: 10 }];
        let error = lender.read(&nowhere, &mut [0; 20]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn who_does_not_know_what_is_where_is_not_read() {
        let (_here, there) = UnixStream::pair().unwrap();
        let other = MemoryProbe { content: vec![1; PROBE_LEN].into(), ..probe(&[0; PROBE_LEN]) };
        assert!(Lender::find(&there, &other).is_none());
        let short = MemoryProbe { content: vec![].into(), ..probe(&[0; PROBE_LEN]) };
        assert!(Lender::find(&there, &short).is_none());
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = std::net::TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
        assert!(Lender::find(&stream, &probe(&[3; PROBE_LEN])).is_none());
    }
}
