//! What waits to be sent to one client.
//!
//! Everything that is ready leaves in one message. Memory stays bounded because every answer holds its request's
//! permit until it is sent: a client that does not read runs out of permits and is not read from, either. Of several
//! waiting maps only the newest is sent.

use std::sync::Arc;

use fjordfs_proto::{
    FsResult,
    pb::{
        common::ClusterMap,
        meta::{Recall, Response, ServerMessage, Welcome, response::Result as Reply},
    },
};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tonic::Status;

use crate::refusal::Refusal;

/// A message ends once it has this many bytes of answers; far below META_MESSAGE_MAX, above any single answer.
const MESSAGE_BYTES: usize = 1 << 20;

/// Room in the client's share of memory, given back when the answer leaves.
pub(crate) type Permit = Option<OwnedSemaphorePermit>;

/// An answer that can be sent.
pub(crate) struct Ready {
    pub(crate) response: Response,
    pub(crate) permit: Permit,
}

impl Ready {
    /// This answer, or the error that makes it untrue.
    pub(crate) fn unless(mut self, result: FsResult<()>) -> Ready {
        if let Err(e) = result {
            self.response.result = Some(Reply::Error(e.into()));
        }
        self
    }
}

#[derive(Default)]
struct State {
    welcome: Option<Welcome>,
    /// Oldest first.
    ready: std::collections::VecDeque<Ready>,
    map: Option<Arc<ClusterMap>>,
    recalls: Vec<Recall>,
    beat: u64,
    /// Nothing more will come; with the reason, unless it was the client's wish.
    closed: Option<Option<Refusal>>,
    /// The reason was given.
    ended: bool,
}

/// One stream's outgoing side.
#[derive(Default)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    changed: Notify,
    closed: Notify,
}

impl Outbox {
    /// The first message.
    pub(crate) fn welcome(&self, welcome: Welcome) {
        self.state.lock().welcome = Some(welcome);
        self.changed.notify_one();
    }

    pub(crate) fn push(&self, ready: impl IntoIterator<Item = Ready>) {
        let mut state = self.state.lock();
        if state.closed.is_none() {
            state.ready.extend(ready);
            self.changed.notify_one();
        }
    }

    pub(crate) fn push_map(&self, map: Arc<ClusterMap>) {
        let mut state = self.state.lock();
        if state.map.as_ref().is_none_or(|waiting| waiting.epoch < map.epoch) {
            state.map = Some(map);
            self.changed.notify_one();
        }
    }

    /// A recall, to be sent behind the answers that are ready.
    pub(crate) fn push_recall(&self, recall: Recall) {
        let mut state = self.state.lock();
        if state.closed.is_none() {
            state.recalls.push(recall);
            self.changed.notify_one();
        }
    }

    /// The client's last sign of life.
    pub(crate) fn push_beat(&self, beat: u64) {
        self.state.lock().beat = beat;
        self.changed.notify_one();
    }

    /// Ends the stream behind what is ready.
    pub(crate) fn close(&self, why: Option<Refusal>) {
        let mut state = self.state.lock();
        if state.closed.is_none() {
            state.closed = Some(why);
            self.changed.notify_one();
            self.closed.notify_waiters();
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.lock().closed.is_some()
    }

    /// Resolves when the stream is closed.
    pub(crate) async fn wait_closed(&self) {
        loop {
            let notified = self.closed.notified();
            if self.is_closed() {
                return;
            }
            notified.await;
        }
    }

    /// The next message, or `None` at the end. For one reader.
    pub(crate) async fn next(&self) -> Option<Result<ServerMessage, Status>> {
        loop {
            if let Some(next) = self.take() {
                return next;
            }
            self.changed.notified().await;
        }
    }

    fn take(&self) -> Option<Option<Result<ServerMessage, Status>>> {
        let mut state = self.state.lock();
        if state.ended {
            return Some(None);
        }
        if let Some(welcome) = state.welcome.take() {
            return Some(Some(Ok(ServerMessage { welcome: Some(welcome), ..ServerMessage::default() })));
        }
        let mut responses = Vec::new();
        let mut bytes = 0;
        while bytes < MESSAGE_BYTES
            && let Some(Ready { response, permit }) = state.ready.pop_front()
        {
            bytes += response.encoded_len();
            responses.push(response);
            drop(permit);
        }
        let map = state.map.take().map(|map| ClusterMap::clone(&map));
        let beat = std::mem::take(&mut state.beat);
        let recalls = if state.ready.is_empty() { std::mem::take(&mut state.recalls) } else { Vec::new() };
        let message = ServerMessage { welcome: None, responses, map, beat, recalls };
        if message != ServerMessage::default() {
            return Some(Some(Ok(message)));
        }
        let why = state.closed.take()?;
        state.closed = Some(None);
        state.ended = true;
        Some(why.map(|refusal| Err(refusal.into())))
    }
}
