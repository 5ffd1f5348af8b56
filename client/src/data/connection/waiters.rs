//! Requests that wait for their answers.

use std::{collections::BTreeMap, task::Waker};

use bytes::Bytes;
use fjordfs_proto::{FsError, FsResult};
use parking_lot::Mutex;

/// An answer: body and payload.
#[derive(Debug)]
pub(in crate::data) struct Answer {
    pub(in crate::data) body: Bytes,
    /// Bytes of the payload that are in the caller's memory already, from its start on.
    pub(in crate::data) direct: usize,
    /// The rest of the payload.
    pub(in crate::data) payload: Bytes,
}

struct Waiter {
    /// Bytes of memory that the caller has for the payload, if it has any.
    room: Option<usize>,
    waker: Option<Waker>,
    answer: Option<FsResult<Answer>>,
}

/// By id: the first one has waited longest.
#[derive(Default)]
pub(super) struct Waiters {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    by_id: BTreeMap<u64, Waiter>,
    next: u64,
    /// Why nobody will be answered any more.
    failed: Option<FsError>,
}

impl Waiters {
    /// A new request's id.
    ///
    /// # Errors
    /// When the connection has failed.
    pub(super) fn enter(&self, room: Option<usize>) -> FsResult<u64> {
        let mut state = self.state.lock();
        if let Some(e) = &state.failed {
            return Err(e.clone());
        }
        state.next += 1;
        let id = state.next;
        state.by_id.insert(id, Waiter { room, waker: None, answer: None });
        Ok(id)
    }

    /// The caller has gone, answered or not.
    pub(super) fn leave(&self, id: u64) {
        self.state.lock().by_id.remove(&id);
    }

    /// Whether somebody waits for `id`, and what room it has.
    pub(super) fn room(&self, id: u64) -> Option<Option<usize>> {
        self.state.lock().by_id.get(&id).map(|waiter| waiter.room)
    }

    /// The answer if it is there; else `waker` will be woken.
    pub(super) fn take(&self, id: u64, waker: &Waker) -> Option<FsResult<Answer>> {
        let mut state = self.state.lock();
        let waiter = state.by_id.get_mut(&id)?;
        if waiter.answer.is_none() && !waiter.waker.as_ref().is_some_and(|w| w.will_wake(waker)) {
            waiter.waker = Some(waker.clone());
        }
        waiter.answer.take()
    }

    /// Answers a request, if somebody waits for it, and wakes its caller.
    pub(super) fn finish(&self, id: u64, answer: FsResult<Answer>) {
        let waker = self.state.lock().by_id.get_mut(&id).and_then(|waiter| {
            waiter.answer = Some(answer);
            waiter.waker.take()
        });
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Wakes the caller of `turn`; without one, of the request that has waited longest.
    pub(super) fn wake(&self, turn: Option<u64>) {
        let waker = {
            let state = self.state.lock();
            let turn = turn.and_then(|id| state.by_id.get(&id));
            let next = || state.by_id.values().find(|waiter| waiter.answer.is_none());
            turn.or_else(next).and_then(|waiter| waiter.waker.clone())
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Answers everyone, now and later. False when that was done before.
    pub(super) fn fail(&self, error: &FsError) -> bool {
        let mut wakers = Vec::new();
        {
            let mut state = self.state.lock();
            if state.failed.is_some() {
                return false;
            }
            state.failed = Some(error.clone());
            for waiter in state.by_id.values_mut().filter(|waiter| waiter.answer.is_none()) {
                waiter.answer = Some(Err(error.clone()));
                wakers.extend(waiter.waker.take());
            }
        }
        wakers.into_iter().for_each(Waker::wake);
        true
    }
}
