//! Puts requests on the wire. Hot path: who has a request writes it, header, body and payload, with one system call,
//! unless somebody else is writing or the kernel's buffer is full; then the connection's task does.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
};

use bytes::{Buf, Bytes};
use parking_lot::Mutex;

use crate::data::socket::Socket;

/// Slices of one vectored write.
const SLICES_MAX: usize = 64;

/// Part of a frame.
struct Part {
    request: u64,
    bytes: Bytes,
}

#[cfg(test)]
#[path = "sender_tests.rs"]
mod tests;

#[derive(Default)]
pub(super) struct Sender {
    queue: Mutex<VecDeque<Part>>,
    writing: Mutex<Writing>,
}

/// What is being written.
#[derive(Default)]
struct Writing {
    /// The first one as far as it is not written.
    parts: VecDeque<Part>,
    /// The request whose frame is written in part.
    begun: Option<u64>,
}

impl Sender {
    /// Adds a request's frame. Its parts stay together.
    pub(super) fn push(&self, request: u64, head: Bytes, payload: Vec<Bytes>) {
        let mut queue = self.queue.lock();
        queue.push_back(Part { request, bytes: head });
        let payload = payload.into_iter().filter(|part| !part.is_empty());
        queue.extend(payload.map(|bytes| Part { request, bytes }));
    }

    /// Writes what there is. False when the kernel takes no more now.
    pub(super) fn flush(&self, socket: &Socket) -> io::Result<bool> {
        loop {
            // Whoever writes now looks at the queue again afterwards.
            let Some(mut writing) = self.writing.try_lock() else { return Ok(true) };
            loop {
                writing.parts.extend(self.queue.lock().drain(..));
                if writing.parts.is_empty() {
                    break;
                }
                let slices: Vec<IoSlice<'_>> =
                    writing.parts.iter().take(SLICES_MAX).map(|p| IoSlice::new(&p.bytes)).collect();
                match socket.send(&slices) {
                    Ok(sent) => writing.advance(sent),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                    Err(e) => return Err(e),
                }
            }
            drop(writing);
            if self.queue.lock().is_empty() {
                return Ok(true);
            }
        }
    }

    /// Takes back what has not been written of a request that nobody waits for any more, so that a peer that takes nothing in
    /// keeps no memory. False when its frame has been begun: without the rest of it the stream has no meaning. To be
    /// flushed afterwards.
    pub(super) fn take_back(&self, request: u64) -> bool {
        self.queue.lock().retain(|part| part.request != request);
        let mut writing = self.writing.lock();
        if writing.begun == Some(request) {
            return false;
        }
        writing.parts.retain(|part| part.request != request);
        true
    }

    /// Drops everything: nothing will be written any more.
    pub(super) fn clear(&self) {
        self.queue.lock().clear();
        *self.writing.lock() = Writing::default();
    }
}

impl Writing {
    fn advance(&mut self, mut sent: usize) {
        while let Some(part) = self.parts.front_mut() {
            let (step, request) = (sent.min(part.bytes.len()), part.request);
            if step == 0 {
                return;
            }
            part.bytes.advance(step);
            sent -= step;
            if !part.bytes.has_remaining() {
                self.parts.pop_front();
            }
            self.begun = self.parts.front().map(|part| part.request).filter(|next| *next == request);
        }
    }
}
