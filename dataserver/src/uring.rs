//! Reads, writes and socket transfers on the core's io_uring.
//!
//! PERFORMANCE-CRITICAL: all data goes through here.
//!
//! An operation owns what the kernel touches until its completion is there, also when the future is dropped.

use std::{
    fs::File,
    io,
    ops::Range,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};

use io_uring_06::{opcode, types};

use crate::{buffer::PageBuf, listen::Socket, runtime::submit};

/// Most pieces in one vectored send (the kernel's UIO_MAXIOV).
const IOV_MAX: usize = 1024;

/// Memory that stays where it is while its owner moves.
///
/// # Safety
/// `span` returns the same valid, writable, initialised memory until the value is dropped.
pub(crate) unsafe trait Stable: Unpin + 'static {
    /// Start and length.
    fn span(&mut self) -> (*mut u8, usize);
}

// SAFETY: the heap allocation does not move with its owner.
unsafe impl Stable for PageBuf {
    fn span(&mut self) -> (*mut u8, usize) {
        (self.as_mut_ptr(), self.len())
    }
}

// SAFETY: the heap allocation does not move with its owner.
unsafe impl Stable for Box<[u8]> {
    fn span(&mut self) -> (*mut u8, usize) {
        (self.as_mut_ptr(), self.len())
    }
}

fn fd(raw: RawFd) -> types::Fd {
    types::Fd(raw)
}

fn again(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

fn out_of_bounds() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "range outside the buffer")
}

/// Fills `range` of the buffer from `offset` of the file on. Meeting the end of the file is an error.
pub(crate) async fn read(
    file: &Arc<File>,
    offset: u64,
    mut buf: PageBuf,
    range: Range<usize>,
) -> (io::Result<()>, PageBuf) {
    let mut done = 0;
    while done < range.len() {
        let (start, len) = buf.span();
        if range.end > len {
            return (Err(out_of_bounds()), buf);
        }
        // SAFETY: `range` lies in the buffer, as just checked.
        let at = unsafe { start.add(range.start + done) };
        let entry = opcode::Read::new(fd(file.as_raw_fd()), at, (range.len() - done) as u32)
            .offset(offset + done as u64)
            .build();
        let (result, (_, back)) = submit((file.clone(), buf), entry).await;
        buf = back;
        match result {
            Ok(0) => {
                let end = format!("file ends at byte {}", offset + done as u64);
                return (Err(io::Error::new(io::ErrorKind::UnexpectedEof, end)), buf);
            }
            Ok(n) => done += n,
            Err(e) if again(&e) => {}
            Err(e) => return (Err(e), buf),
        }
    }
    (Ok(()), buf)
}

/// Writes `range` of the buffer at `offset` of the file.
pub(crate) async fn write(
    file: &Arc<File>,
    offset: u64,
    mut buf: PageBuf,
    range: Range<usize>,
) -> (io::Result<()>, PageBuf) {
    let mut done = 0;
    while done < range.len() {
        let (start, len) = buf.span();
        if range.end > len {
            return (Err(out_of_bounds()), buf);
        }
        // SAFETY: `range` lies in the buffer, as just checked.
        let at = unsafe { start.add(range.start + done) };
        let entry = opcode::Write::new(fd(file.as_raw_fd()), at, (range.len() - done) as u32)
            .offset(offset + done as u64)
            .build();
        let (result, (_, back)) = submit((file.clone(), buf), entry).await;
        buf = back;
        match result {
            Ok(0) => return (Err(io::Error::from(io::ErrorKind::WriteZero)), buf),
            Ok(n) => done += n,
            Err(e) if again(&e) => {}
            Err(e) => return (Err(e), buf),
        }
    }
    (Ok(()), buf)
}

/// fdatasync. Not repeated on any error: after one, the kernel may have dropped what it could not write.
pub(crate) async fn datasync(file: &Arc<File>) -> io::Result<()> {
    let entry = opcode::Fsync::new(fd(file.as_raw_fd())).flags(types::FsyncFlags::DATASYNC).build();
    submit(file.clone(), entry).await.0.map(drop)
}

/// Gives `range` of the file back to the filesystem; it reads as zeros from then on.
pub(crate) async fn punch(file: &Arc<File>, range: Range<u64>) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    loop {
        let entry = opcode::Fallocate::new(fd(file.as_raw_fd()), range.end - range.start)
            .offset(range.start)
            .mode(mode)
            .build();
        match submit(file.clone(), entry).await.0 {
            Err(e) if again(&e) => {}
            result => return result.map(drop),
        }
    }
}

/// Receives into `range` of the buffer: all of it when `all`, else what comes first. 0 is the end of the stream.
pub(crate) async fn recv<B: Stable>(
    socket: &Arc<Socket>,
    mut buf: B,
    range: Range<usize>,
    all: bool,
) -> (io::Result<usize>, B) {
    loop {
        let (start, len) = buf.span();
        if range.end > len {
            return (Err(out_of_bounds()), buf);
        }
        // SAFETY: `range` lies in the buffer, as just checked.
        let at = unsafe { start.add(range.start) };
        let flags = if all { libc::MSG_WAITALL } else { 0 };
        let entry = opcode::Recv::new(fd(socket.as_raw_fd()), at, range.len() as u32).flags(flags).build();
        let (result, (_, back)) = submit((socket.clone(), buf), entry).await;
        buf = back;
        match result {
            Err(e) if again(&e) => {}
            result => return (result, buf),
        }
    }
}

/// A part of what is sent.
pub(crate) enum Piece {
    /// Header and body of a frame.
    Head(Vec<u8>),
    /// Part of a buffer.
    Pages(PageBuf, Range<usize>),
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Piece::Head(bytes) => bytes,
            Piece::Pages(buf, range) => buf.get(range.clone()).unwrap_or_default(),
        }
    }
}

/// What the kernel reads during a vectored send.
struct Sending {
    _socket: Arc<Socket>,
    pieces: Vec<Piece>,
    iovecs: Vec<libc::iovec>,
    header: Box<libc::msghdr>,
}

/// Sends all pieces, one after the other, without copying them together.
pub(crate) async fn send(socket: &Arc<Socket>, pieces: Vec<Piece>) -> io::Result<()> {
    let total: usize = pieces.iter().map(|p| p.bytes().len()).sum();
    let mut pieces = pieces;
    let mut done = 0;
    while done < total {
        let mut skip = done;
        let mut iovecs = Vec::with_capacity(pieces.len().min(IOV_MAX));
        for piece in &pieces {
            let bytes = piece.bytes();
            let rest = &bytes[skip.min(bytes.len())..];
            skip -= bytes.len() - rest.len();
            if !rest.is_empty() && iovecs.len() < IOV_MAX {
                iovecs.push(libc::iovec { iov_base: rest.as_ptr() as *mut _, iov_len: rest.len() });
            }
        }
        // SAFETY: all-zero is a valid msghdr (no name, no control data).
        let mut header: Box<libc::msghdr> = Box::new(unsafe { std::mem::zeroed() });
        header.msg_iov = iovecs.as_mut_ptr();
        header.msg_iovlen = iovecs.len();
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
        let entry = opcode::SendMsg::new(fd(socket.as_raw_fd()), &*header).flags(flags).build();
        let sending = Sending { _socket: socket.clone(), pieces, iovecs, header };
        let (result, back) = submit(sending, entry).await;
        pieces = back.pieces;
        drop((back.iovecs, back.header));
        match result {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::WriteZero)),
            Ok(n) => done += n,
            Err(e) if again(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
