//! A worker: one thread, one runtime, many requests in flight.
//!
//! The thread takes requests from its transport and has all of them under way in one task, so a slow request never holds up another. A
//! request is polled once where it was received, since most that the client library can answer from memory are then done; the others
//! join those that wait.
//!
//! # Invariants
//! - Every request that has an answer gets exactly one: also when the filesystem panics, also when the answer cannot be encoded.
//! - A handle whose number the kernel did not take is closed again, and inodes it did not take are not counted.
//! - The worker ends when the mount has ended and all its requests are done.

use std::cell::Cell;
use std::future::poll_fn;
use std::io;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::watch;

use crate::abi::{UNIQUE_RESEND, changes_names, opcode};
use crate::dispatch::{Answer, Dispatcher};
use crate::filesystem::Filesystem;
use crate::reply::Reply;
use crate::request::Request;
use crate::transport::dev_fuse::is_passing;
use crate::transport::{Message, Slot, Transport};

/// Requests in flight per worker. Beyond, requests wait in the kernel. Each may hold a megabyte of a WRITE; but writers
/// that wait for memory must not keep readers out, so this is far above what the kernel sends in the background.
const IN_FLIGHT_MAX: usize = 1024;

/// How long an append may keep back commits of its file while others are waited for. If the process is killed after that and before it answers,
/// the append is there twice.
const UNANSWERED_MAX: Duration = Duration::from_millis(100);

/// Serves a transport until the mount ends, or requests are left to another process; those it has taken are done then.
pub(crate) async fn run<F: Filesystem, T: Transport>(
    mut transport: T,
    dispatcher: Arc<Dispatcher<F>>,
    mut leaving: watch::Receiver<bool>,
) -> io::Result<()> {
    let dispatcher = &*dispatcher;
    let in_flight = InFlight::default();
    let mut waiting = FuturesUnordered::new();
    let mut told = pin!(told(&mut leaving));
    // Who waits for a lock is given up when the mount has ended, and only then.
    let (result, is_over) = 'serving: loop {
        let received = {
            let mut receiving = pin!(receive(&mut transport));
            loop {
                // Biased: what can be answered is, before more is taken in and all answers are handed over together.
                tokio::select! {
                    biased;
                    Some(()) = waiting.next() => {}
                    () = &mut told => break 'serving (Ok(()), false),
                    received = &mut receiving, if in_flight.count() < IN_FLIGHT_MAX => break received,
                }
            }
        };
        match received {
            Ok(Some((message, slot))) => {
                // Whoever waits for a lock keeps nobody out: the others in the way may be those who give it up.
                let place = (message.header.opcode != opcode::SETLKW).then(|| in_flight.enter());
                let mut request = Box::pin(serve(dispatcher, message, slot, place));
                if poll_fn(|context| Poll::Ready(request.as_mut().poll(context))).await.is_pending() {
                    waiting.push(request);
                }
            }
            Ok(None) => {
                dispatcher.interrupts.end();
                break (Ok(()), true);
            }
            Err(e) => break (Err(e), false),
        }
    };
    while (is_over || in_flight.count() > 0) && waiting.next().await.is_some() {}
    result
}

/// The next request.
async fn receive<T: Transport>(transport: &mut T) -> io::Result<Option<(Message, T::Slot)>> {
    loop {
        match transport.next().await {
            Err(e) if is_passing(&e) => {
                tracing::warn!("reading a request failed, trying again: {e}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            received => return received,
        }
    }
}

async fn told(leaving: &mut watch::Receiver<bool>) {
    if leaving.wait_for(|leaving| *leaving).await.is_err() {
        // Nobody is left who could tell.
        std::future::pending().await
    }
}

async fn serve<F: Filesystem, S: Slot>(
    dispatcher: &Dispatcher<F>,
    message: Message,
    mut slot: S,
    mut place: Option<Place>,
) {
    let opcode = message.header.opcode;
    let request = message.header.unique & !UNIQUE_RESEND;
    if opcode == opcode::SETLKW && !slot.may_be_kept_long() {
        // Else those who wait would hold up the unlock that they wait for.
        if let Err(e) = slot.answer(&Reply::Error(libc::ENOLCK)) {
            tracing::debug!("a wait for a lock was not refused: {e}");
        }
        return;
    }
    // Pinned here, as is each request's work below: moved into what awaits it, it would have its place twice, and every level
    // of that doubles what is allocated and copied for each request.
    let caught = {
        let answer = pin!(answer(dispatcher, message, slot.payload()));
        AssertUnwindSafe(answer).catch_unwind().await
    };
    let mut answer = caught.unwrap_or_else(|panic| {
        tracing::error!(
            opcode,
            "a request panicked and was answered with EIO; this is a bug, report it: {}",
            text_of(&*panic)
        );
        Reply::Error(libc::EIO).into()
    });
    let early = dispatcher.early(&answer);
    if !early.is_empty() {
        // READs may be among the requests that this waits for, and must find room.
        slot.may_be_kept_long();
        if opcode != opcode::WRITE {
            place = None;
        }
        let mut unanswered = answer.unanswered.take();
        let mut dropped = pin!(dispatcher.drop_old_ends(early));
        if tokio::time::timeout(UNANSWERED_MAX, &mut dropped).await.is_err() {
            // Bytes of a mapping may be among what is waited for, and wait for a commit that waits for this answer.
            unanswered = None;
            dropped.await;
        }
        answer.unanswered = unanswered;
    }
    let answered = slot.answer(&answer.reply);
    drop(place);
    if changes_names(opcode) {
        dispatcher.filesystem().request_answered(request);
    }
    drop(answer.unanswered.take());
    if let Some((ino, bytes)) = answer.overtaken.take() {
        dispatcher.drop_overtaken(ino, bytes);
    }
    if let Some(short) = answer.ends.take() {
        slot.drop_when_taken_in(short);
    }
    let Err(e) = answered else { return };
    dispatcher.take_back(answer).await;
    match e.raw_os_error() {
        // The caller was killed meanwhile, or the mount ended.
        Some(libc::ENOENT | libc::ENODEV | libc::ECONNABORTED | libc::EPERM) => {}
        _ => {
            tracing::error!(opcode, "the kernel refused an answer, the request fails with EIO: {e}");
            if let Err(e) = slot.answer(&Reply::Error(libc::EIO)) {
                tracing::error!(opcode, "the kernel refused EIO too: {e}");
            }
        }
    }
}

async fn answer<F: Filesystem>(dispatcher: &Dispatcher<F>, message: Message, payload: &mut [u8]) -> Answer {
    let request = match Request::parse(&message) {
        Ok(request) => request,
        Err(e) => {
            tracing::debug!("{e}");
            return Reply::Error(e.errno()).into();
        }
    };
    let (unique, pid) = (message.header.unique, request.caller.pid);
    let (is_interruptible, ends_with_mount) = (request.is_interruptible(), request.ends_with_mount());
    let mut served = pin!(dispatcher.serve(request, payload));
    if changes_names(message.header.opcode) {
        return dispatcher.filesystem().for_request(unique & !UNIQUE_RESEND, served).await;
    }
    if !is_interruptible && !ends_with_mount {
        return served.await;
    }
    let nobody_waits = pin!(async {
        if is_interruptible {
            dispatcher.interrupts.caller_is_gone(unique, pid).await;
            libc::EINTR
        } else {
            dispatcher.interrupts.mount_is_gone().await;
            libc::ENOTCONN
        }
    });
    // Biased: a request that is done at once never registers for interrupts.
    tokio::select! {
        biased;
        answer = &mut served => answer,
        errno = nobody_waits => Reply::Error(errno).into(),
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Counts requests of one worker.
#[derive(Debug, Default)]
struct InFlight(Rc<Cell<usize>>);

impl InFlight {
    fn enter(&self) -> Place {
        self.0.set(self.0.get() + 1);
        Place(Rc::clone(&self.0))
    }

    fn count(&self) -> usize {
        self.0.get()
    }
}

/// One request's place in the count.
struct Place(Rc<Cell<usize>>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_until_they_are_given_up() {
        let in_flight = InFlight::default();
        let places = [in_flight.enter(), in_flight.enter()];
        assert_eq!(in_flight.count(), 2);
        drop(places);
        assert_eq!(in_flight.count(), 0);
    }

    #[test]
    fn panics_are_quoted() {
        assert_eq!(text_of(&"static"), "static");
        assert_eq!(text_of(&"owned".to_owned()), "owned");
        assert_eq!(text_of(&5), "no message");
    }
}
