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

#[derive(Default)]
pub(super) struct Sender {
    queue: Mutex<VecDeque<Bytes>>,
    /// What is being written, its first part as far as it is not.
    writing: Mutex<VecDeque<Bytes>>,
}

impl Sender {
    /// Adds a frame. Its parts stay together.
    pub(super) fn push(&self, head: Bytes, payload: Vec<Bytes>) {
        let mut queue = self.queue.lock();
        queue.push_back(head);
        queue.extend(payload.into_iter().filter(|part| !part.is_empty()));
    }

    /// Writes what there is. False when the kernel takes no more now.
    pub(super) fn flush(&self, socket: &Socket) -> io::Result<bool> {
        loop {
            // Whoever writes now looks at the queue again afterwards.
            let Some(mut writing) = self.writing.try_lock() else { return Ok(true) };
            loop {
                writing.extend(self.queue.lock().drain(..));
                if writing.is_empty() {
                    break;
                }
                let slices: Vec<IoSlice<'_>> =
                    writing.iter().take(SLICES_MAX).map(|p| IoSlice::new(p)).collect();
                match socket.send(&slices) {
                    Ok(sent) => advance(&mut writing, sent),
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
}

fn advance(parts: &mut VecDeque<Bytes>, mut sent: usize) {
    while let Some(part) = parts.front_mut() {
        let step = sent.min(part.len());
        part.advance(step);
        sent -= step;
        if part.has_remaining() {
            return;
        }
        parts.pop_front();
    }
}
