//! Cuts the byte stream into headers, bodies and payloads.
//!
//! PERFORMANCE-CRITICAL. Headers and bodies come through a small buffer, so that many small requests cost one receive;
//! of a payload only what that buffer caught already is copied, the rest is received in place with one operation.

use std::{io, net::Shutdown, sync::Arc, time::Duration};

use fjordfs_proto::{
    FsError,
    frame::{FrameError, HEADER_LEN, Header},
};

use crate::{
    buffer::PageBuf,
    listen::Socket,
    runtime::timeout,
    uring::{Stable, recv},
};

/// Bytes of the small buffer: a few dozen read requests, or the body of a large put.
const BUFFER_LEN: usize = 16 << 10;

/// Why a connection cannot go on.
pub(super) enum Broken {
    /// The socket.
    Socket(io::Error),
    /// The peer stopped in the middle of a frame.
    Stalled,
    /// A header that cannot be believed.
    Frame([u8; HEADER_LEN], FrameError),
    /// A good header at the wrong time, or a bad body.
    Protocol(Header, FsError),
}

pub(super) struct FrameReader {
    socket: Arc<Socket>,
    /// Filled from `start` to `end`. Empty while the ring has it.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    stall_max: Duration,
}

impl FrameReader {
    pub(super) fn new(socket: Arc<Socket>, stall_max: Duration) -> FrameReader {
        FrameReader { socket, buffer: vec![0; BUFFER_LEN].into(), start: 0, end: 0, stall_max }
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// The next header; `None` when the peer has closed the connection between frames.
    pub(super) async fn header(&mut self) -> Result<Option<Header>, Broken> {
        while self.end - self.start < HEADER_LEN {
            let between_frames = self.start == self.end;
            if between_frames {
                (self.start, self.end) = (0, 0);
            } else if self.buffer.len() - self.start < HEADER_LEN {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            let buffer = std::mem::take(&mut self.buffer);
            let receiving = recv(&self.socket, buffer, self.end..BUFFER_LEN, false);
            let (result, buffer) = if between_frames {
                receiving.await
            } else {
                timeout(self.stall_max, receiving).await.map_err(|_| Broken::Stalled)?
            };
            self.buffer = buffer;
            match result.map_err(Broken::Socket)? {
                0 if between_frames => return Ok(None),
                0 => return Err(cut()),
                n => self.end += n,
            }
        }
        let mut raw = [0; HEADER_LEN];
        raw.copy_from_slice(&self.buffer[self.start..self.start + HEADER_LEN]);
        self.start += HEADER_LEN;
        Header::decode(&raw).map(Some).map_err(|e| Broken::Frame(raw, e))
    }

    /// The next `len` bytes.
    pub(super) async fn bytes(&mut self, len: usize) -> Result<Box<[u8]>, Broken> {
        self.read_into(vec![0; len].into(), 0, len).await
    }

    /// The next `len` bytes, into `into` from byte `at` on.
    pub(super) async fn read_into<B>(&mut self, mut into: B, at: usize, len: usize) -> Result<B, Broken>
    where
        B: Stable + std::ops::DerefMut<Target = [u8]>,
    {
        let mut done = len.min(self.end - self.start);
        into[at..at + done].copy_from_slice(&self.buffer[self.start..self.start + done]);
        self.start += done;
        while done < len {
            let receiving = recv(&self.socket, into, at + done..at + len, true);
            let stalled = |_| Broken::Stalled;
            let (result, back) = timeout(self.stall_max, receiving).await.map_err(stalled)?;
            into = back;
            match result.map_err(Broken::Socket)? {
                0 => return Err(cut()),
                n => done += n,
            }
        }
        Ok(into)
    }

    /// Throws away the next `len` bytes.
    pub(super) async fn skip(&mut self, len: usize) -> Result<(), Broken> {
        let mut rest = len;
        let mut scratch = PageBuf::unpooled(16);
        while rest > 0 {
            let n = rest.min(scratch.len());
            scratch = self.read_into(scratch, 0, n).await?;
            rest -= n;
        }
        Ok(())
    }

    /// After a refusal: closing at once, with bytes unread, would reset the connection and take the refusal with it. So
    /// what the peer still sends is read and thrown away, for a moment.
    pub(super) async fn linger(&mut self, time: Duration) {
        // The peer may be gone already.
        let _ = self.socket.shutdown(Shutdown::Write);
        let drain = async {
            let mut scratch: Box<[u8]> = vec![0; BUFFER_LEN].into();
            loop {
                let (result, back) = recv(&self.socket, scratch, 0..BUFFER_LEN, false).await;
                scratch = back;
                if !matches!(result, Ok(n) if n > 0) {
                    return;
                }
            }
        };
        // Whichever ends it, the connection is closed next.
        let _ = timeout(time, drain).await;
    }
}

fn cut() -> Broken {
    Broken::Socket(io::Error::new(io::ErrorKind::UnexpectedEof, "closed in the middle of a frame"))
}
