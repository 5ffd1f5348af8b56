//! The transport that every kernel has: read and write on /dev/fuse.
//!
//! Performance critical. Each worker has its own descriptor, cloned from the session's (`FUSE_DEV_IOC_CLONE`): requests come from
//! one queue to whichever worker reads first, and answers to the descriptor that read the request, without a common lock.
//!
//! Known cost: every arriving request wakes every idle worker, since epoll's exclusive wakeups do not reach through
//! tokio's loop. The io_uring transport has a queue for each CPU instead.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Message, Slot, Transport};
use crate::abi::{self, InHeader, OutHeader, Pod, opcode};
use crate::buffer::{BufferPool, RequestBuffer};
use crate::reply::Reply;

/// One writev takes this many pieces (`UIO_MAXIOV`).
const IO_SLICES_MAX: usize = 1024;

/// Opens the device.
pub(crate) fn open_device() -> io::Result<OwnedFd> {
    // SAFETY: a constant NUL-terminated path.
    let fd = unsafe { libc::open(c"/dev/fuse".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Another channel of the session behind `session`.
pub(crate) fn clone_device(session: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let fd = open_device()?;
    let source = session.as_raw_fd().cast_unsigned();
    // SAFETY: the ioctl reads one u32 through the pointer.
    if unsafe { libc::ioctl(fd.as_raw_fd(), abi::DEV_IOC_CLONE as _, &raw const source) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// Reads one request without waiting.
pub(crate) fn read_request(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and length are the buffer's.
    let n = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Writes one answer or notification; the kernel takes all of it or nothing, and never waits for room.
pub(crate) fn write_all(fd: BorrowedFd<'_>, slices: &[IoSlice<'_>]) -> io::Result<()> {
    // SAFETY: `IoSlice` is an iovec; the count is the slice's.
    let n = unsafe { libc::writev(fd.as_raw_fd(), slices.as_ptr().cast(), slices.len() as libc::c_int) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether reading failed for want of memory in the kernel: it is to be tried again rather than lose the mount.
pub(crate) fn is_passing(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENOMEM | libc::EIO | libc::EAGAIN | libc::EBUSY))
}

/// Whether reading failed because the mount was undone, or aborted by force.
pub(crate) fn has_ended(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ENODEV | libc::ECONNABORTED))
}

/// Reads requests, each into the same buffer.
pub(crate) struct Reader {
    pool: Arc<BufferPool>,
    buffer: RequestBuffer,
}

impl Reader {
    pub(crate) fn new(pool: Arc<BufferPool>) -> Reader {
        let buffer = pool.take();
        Reader { pool, buffer }
    }

    /// The next request, without waiting. `None` when it was given up by its caller meanwhile.
    pub(crate) fn read(&mut self, fd: BorrowedFd<'_>) -> io::Result<Option<Message>> {
        match read_request(fd, self.buffer.request_mut()) {
            Ok(len) => {
                let message = self.message(len);
                if message.is_none() {
                    tracing::error!(len, "the kernel sent less than a request header; ignored");
                }
                Ok(message)
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The message in the buffer. A write that fills most of the buffer takes it along.
    fn message(&mut self, len: usize) -> Option<Message> {
        let header = InHeader::from_bytes(&self.buffer.request_mut()[..len])?;
        let bytes = if header.opcode == opcode::WRITE && self.buffer.is_mostly(len) {
            std::mem::replace(&mut self.buffer, self.pool.take()).into_request(len)
        } else {
            self.buffer.copy_request(len)
        };
        Message::from_bytes(bytes)
    }
}

/// One worker's descriptor.
pub(crate) struct DevFuse {
    fd: Rc<AsyncFd<OwnedFd>>,
    reader: Reader,
    /// Read already, from this descriptor.
    early: VecDeque<Message>,
}

impl DevFuse {
    /// Takes a non-blocking descriptor, and what was read from it already; call it inside the worker's runtime.
    pub(crate) fn new(fd: OwnedFd, pool: Arc<BufferPool>, early: Vec<Message>) -> io::Result<DevFuse> {
        // After an unmount the kernel reports an error condition and nothing else.
        // SAFETY: an `OwnedFd` names one open file for as long as it lives, and the `AsyncFd` owns it.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE | Interest::ERROR)? };
        Ok(DevFuse { fd: Rc::new(fd), reader: Reader::new(pool), early: early.into() })
    }

    fn slot(&self, message: &Message) -> DevFuseSlot {
        DevFuseSlot { fd: Rc::clone(&self.fd), unique: message.header.unique }
    }
}

impl Transport for DevFuse {
    type Slot = DevFuseSlot;

    async fn next(&mut self) -> io::Result<Option<(Message, DevFuseSlot)>> {
        if let Some(message) = self.early.pop_front() {
            let slot = self.slot(&message);
            return Ok(Some((message, slot)));
        }
        let fd = Rc::clone(&self.fd);
        loop {
            // Stays ready, without asking epoll, until a read says that the queue is empty.
            let mut guard = fd.ready(Interest::READABLE | Interest::ERROR).await?;
            match guard.try_io(|fd| self.reader.read(fd.get_ref().as_fd())) {
                Ok(Ok(Some(message))) => {
                    let slot = self.slot(&message);
                    return Ok(Some((message, slot)));
                }
                Ok(Ok(None)) | Err(_) => {}
                Ok(Err(e)) if has_ended(&e) => return Ok(None),
                Ok(Err(e)) => return Err(e),
            }
        }
    }
}

/// Where the answer to a request goes: the descriptor it was read from.
pub(crate) struct DevFuseSlot {
    fd: Rc<AsyncFd<OwnedFd>>,
    unique: u64,
}

impl Slot for DevFuseSlot {
    fn payload(&mut self) -> &mut [u8] {
        &mut []
    }

    fn answer(&mut self, reply: &Reply) -> io::Result<()> {
        send(self.fd.get_ref().as_fd(), self.unique, reply)
    }
}

/// Writes the answer to request `unique`.
pub(crate) fn send(fd: BorrowedFd<'_>, unique: u64, reply: &Reply) -> io::Result<()> {
    let (error, body): (i32, &[u8]) = match reply {
        Reply::None => return Ok(()),
        Reply::Error(errno) => (-*errno, &[]),
        Reply::Empty => (0, &[]),
        Reply::Fixed(body) => (0, body.as_slice()),
        Reply::Bytes(bytes) => (0, bytes),
        Reply::Parts(parts) => return send_parts(fd, unique, parts),
        // This transport has no payload buffer, so nothing can be in it.
        Reply::InPayload(_) => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let len = (size_of::<OutHeader>() + body.len()) as u32;
    let header = OutHeader { len, error, unique };
    write_all(fd, &[IoSlice::new(header.as_bytes()), IoSlice::new(body)])
}

fn send_parts(fd: BorrowedFd<'_>, unique: u64, parts: &[bytes::Bytes]) -> io::Result<()> {
    let total: usize = parts.iter().map(bytes::Bytes::len).sum();
    let header = OutHeader { len: (size_of::<OutHeader>() + total) as u32, error: 0, unique };
    if parts.len() < IO_SLICES_MAX {
        let mut slices = Vec::with_capacity(parts.len() + 1);
        slices.push(IoSlice::new(header.as_bytes()));
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        write_all(fd, &slices)
    } else {
        // Very fragmented data: more pieces than one call takes.
        let joined = parts.concat();
        write_all(fd, &[IoSlice::new(header.as_bytes()), IoSlice::new(&joined)])
    }
}
