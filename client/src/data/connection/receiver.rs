//! Cuts what a server sends into answers. Hot path: a small answer takes one system call; of a large payload all but
//! the first few KiB goes straight to where it stays.
//!
//! A payload goes into the memory of its caller (`Direct`) while that caller is the one who drives the receiver, because
//! only then is its memory at hand. Where it is another one's turn, or the caller does not come, it goes into a buffer
//! (`Kept`), from any byte on.

use std::{io, mem::MaybeUninit, task::Poll};

use bytes::Bytes;
use fjordfs_proto::{
    FsResult,
    frame::{self, HEADER_LEN, Header},
};

use super::waiters::Answer;
use crate::data::memory::{Filling, Pool};

/// Bytes of the buffer that answers come through: several answers to small reads.
const BUFFER_LEN: usize = 16 << 10;

#[cfg(test)]
#[path = "receiver_tests.rs"]
mod tests;

/// Where bytes come from.
pub(super) trait Source {
    /// What is there, at most what fits; 0 is the end.
    fn receive(&mut self, into: &mut [MaybeUninit<u8>]) -> Poll<io::Result<usize>>;
}

/// A caller that drives the receiver: its request, and its memory.
pub(super) struct Caller<'a> {
    pub(super) request: u64,
    pub(super) memory: &'a mut [u8],
}

/// What has come.
#[derive(Debug)]
pub(super) enum Event {
    /// Nothing more for now.
    Idle,
    /// The answer to a request.
    Answer(u64, FsResult<Answer>),
    /// The payload of this request has come, and its caller should take it.
    Turn(u64),
    /// The end, between two answers.
    Closed,
}

enum Stage {
    Head,
    Body { header: Header, body: Filling },
    Direct { header: Header, body: Bytes, done: usize },
    Kept { header: Header, body: Bytes, direct: usize, rest: Filling },
    Skip { left: usize },
}

pub(super) struct Receiver {
    memory: Pool,
    /// Filled from `start` to `end`.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    stage: Stage,
}

impl Receiver {
    pub(super) fn new(memory: Pool) -> Receiver {
        Receiver { memory, buffer: vec![0; BUFFER_LEN].into(), start: 0, end: 0, stage: Stage::Head }
    }

    /// Whose caller is to drive next, if that matters.
    pub(super) fn turn(&self) -> Option<u64> {
        match &self.stage {
            Stage::Direct { header, .. } => Some(header.request),
            _ => None,
        }
    }

    /// The caller whose turn it is does not come: its payload goes into a buffer.
    pub(super) fn keep(&mut self) {
        if let Stage::Direct { header, body, done } = &mut self.stage {
            let rest = Filling::new(&self.memory, header.payload_len as usize - *done);
            self.stage = Stage::Kept { header: *header, body: std::mem::take(body), direct: *done, rest };
        }
    }

    /// What comes next. `room` says whether somebody waits for a request, and how much memory it has.
    ///
    /// # Errors
    /// Why the stream has no meaning any more.
    pub(super) fn next(
        &mut self,
        source: &mut impl Source,
        mut caller: Option<Caller<'_>>,
        room: impl Fn(u64) -> Option<Option<usize>>,
    ) -> Result<Event, String> {
        loop {
            match &mut self.stage {
                Stage::Head => match self.head(source)? {
                    Some(event) => return Ok(event),
                    None => continue,
                },
                Stage::Body { body, .. } => {
                    if !fill(body, &self.buffer[..self.end], &mut self.start, source)? {
                        return Ok(Event::Idle);
                    }
                    let Stage::Body { header, body } = std::mem::replace(&mut self.stage, Stage::Head) else {
                        continue;
                    };
                    let body = body.freeze();
                    let len = header.payload_len as usize;
                    self.stage = match room(header.request) {
                        None => Stage::Skip { left: len },
                        Some(Some(room)) if header.status == 0 && len > 0 && len <= room => {
                            Stage::Direct { header, body, done: 0 }
                        }
                        Some(_) => {
                            Stage::Kept { header, body, direct: 0, rest: Filling::new(&self.memory, len) }
                        }
                    };
                }
                Stage::Direct { header, body, done } => {
                    let (request, len) = (header.request, header.payload_len as usize);
                    match caller.as_mut().filter(|caller| caller.request == request) {
                        Some(caller) => {
                            let memory =
                                caller.memory.get_mut(*done..len).ok_or("memory that became smaller")?;
                            *done += copy(memory, &self.buffer[..self.end], &mut self.start);
                            while *done < len {
                                match receive(source, as_uninit(&mut caller.memory[*done..len]))? {
                                    Some(n) => *done += n,
                                    None => return Ok(Event::Idle),
                                }
                            }
                            let answer =
                                Answer { body: std::mem::take(body), direct: len, payload: Bytes::new() };
                            self.stage = Stage::Head;
                            return Ok(Event::Answer(request, Ok(answer)));
                        }
                        None if room(request).is_none() => self.stage = Stage::Skip { left: len - *done },
                        // Waiting for its caller would take longer than copying.
                        None if len - *done <= self.end - self.start => self.keep(),
                        None => return Ok(Event::Turn(request)),
                    }
                }
                Stage::Kept { rest, .. } => {
                    if !fill(rest, &self.buffer[..self.end], &mut self.start, source)? {
                        return Ok(Event::Idle);
                    }
                    let Stage::Kept { header, body, direct, rest } =
                        std::mem::replace(&mut self.stage, Stage::Head)
                    else {
                        continue;
                    };
                    let answer = match header.status {
                        0 => Ok(Answer { body, direct, payload: rest.freeze() }),
                        status => Err(frame::decode_error(status, &body)),
                    };
                    return Ok(Event::Answer(header.request, answer));
                }
                Stage::Skip { left } => {
                    let step = (*left).min(self.end - self.start);
                    self.start += step;
                    *left -= step;
                    if *left == 0 {
                        self.stage = Stage::Head;
                        continue;
                    }
                    let most = (*left).min(BUFFER_LEN);
                    match receive(source, as_uninit(&mut self.buffer[..most]))? {
                        Some(n) => *left -= n,
                        None => return Ok(Event::Idle),
                    }
                }
            }
        }
    }

    /// Takes in a header; an event when there is none.
    fn head(&mut self, source: &mut impl Source) -> Result<Option<Event>, String> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        let Some(raw) = self.buffer[self.start..self.end].first_chunk::<HEADER_LEN>() else {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            return match source.receive(as_uninit(&mut self.buffer[self.end..])) {
                Poll::Pending => Ok(Some(Event::Idle)),
                Poll::Ready(Ok(0)) if self.end == 0 => Ok(Some(Event::Closed)),
                Poll::Ready(Ok(0)) => Err(CUT.to_owned()),
                Poll::Ready(Ok(n)) => {
                    self.end += n;
                    Ok(None)
                }
                Poll::Ready(Err(e)) => Err(e.to_string()),
            };
        };
        let header = Header::decode(raw).map_err(|e| e.to_string())?;
        if !header.reply {
            return Err("it sent a request".to_owned());
        }
        self.start += HEADER_LEN;
        self.stage = Stage::Body { header, body: Filling::new(&self.memory, header.body_len as usize) };
        Ok(None)
    }
}

const CUT: &str = "closed in the middle of a frame";

/// What is there; `None` when that is nothing.
fn receive(source: &mut impl Source, into: &mut [MaybeUninit<u8>]) -> Result<Option<usize>, String> {
    match source.receive(into) {
        Poll::Pending => Ok(None),
        Poll::Ready(Ok(0)) => Err(CUT.to_owned()),
        Poll::Ready(Ok(n)) => Ok(Some(n)),
        Poll::Ready(Err(e)) => Err(e.to_string()),
    }
}

/// As much as there is and fits.
fn copy(into: &mut [u8], from: &[u8], start: &mut usize) -> usize {
    let n = into.len().min(from.len() - *start);
    into[..n].copy_from_slice(&from[*start..*start + n]);
    *start += n;
    n
}

/// Fills the room, first with what is in the buffer. Whether it is full.
fn fill(
    filling: &mut Filling,
    buffer: &[u8],
    start: &mut usize,
    source: &mut impl Source,
) -> Result<bool, String> {
    let n = copy(filling.room(), buffer, start);
    filling.advance(n);
    while !filling.room().is_empty() {
        match receive(source, as_uninit(filling.room()))? {
            Some(n) => filling.advance(n),
            None => return Ok(false),
        }
    }
    Ok(true)
}

fn as_uninit(bytes: &mut [u8]) -> &mut [MaybeUninit<u8>] {
    // SAFETY: the same memory; a `Source` only ever writes initialised bytes.
    unsafe { &mut *(std::ptr::from_mut(bytes) as *mut [MaybeUninit<u8>]) }
}
