//! Requests that wait for delegations, and those of the same client that must not be executed before them.
//!
//! # Order
//! What a client has decided only means what it says when it is executed in the order in which it was sent, and so does a change of a file
//! that was sent behind the commit of what had been written to it, or behind the file's making. A sync covers what was decided before it.
//! Nothing else is in order among requests that are under way
//! together, and the less waits here for another request, the less can come to wait for itself by way of other clients.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use fjordfs_proto::{
    SessionId,
    pb::meta::{Request, request::Op},
};

use super::held::Held;
use crate::{leases::RecallId, service::outbox::Outbox};

/// A request that could not be executed yet.
pub(super) struct Postponed {
    pub(super) session: SessionId,
    pub(super) outbox: Arc<Outbox>,
    pub(super) request: Request,
}

/// See the module.
#[derive(Default)]
pub(super) struct Line {
    waiting: Held<Postponed>,
    /// Of each session, those that others may have to come behind.
    ordered: HashMap<SessionId, BTreeSet<u64>>,
    /// Those that wait no longer.
    ready: Vec<Postponed>,
}

impl Line {
    /// Keeps a request until all of `recalls` have ended.
    pub(super) fn hold(&mut self, postponed: Postponed, recalls: Vec<RecallId>) {
        let (session, ordered) = (postponed.session, is_ordered(&postponed.request));
        let at = self.waiting.hold(postponed, recalls);
        if ordered {
            self.ordered.entry(session).or_default().insert(at);
        }
    }

    /// A request that has arrived: given back when it can be executed, kept here when it must come behind one that is here.
    pub(super) fn join(
        &mut self,
        session: SessionId,
        outbox: &Arc<Outbox>,
        request: Request,
    ) -> Option<Request> {
        let follows =
            |first: &Postponed| Arc::ptr_eq(&first.outbox, outbox) && comes_behind(&request, &first.request);
        let is_ready = self.ready.iter().any(follows);
        let before = self.ordered.get(&session).into_iter().flatten();
        // What has ended in this burst counts: the other is executed in the next one.
        let recalls: HashSet<RecallId> = before
            .filter_map(|at| self.waiting.get(*at))
            .filter(|(first, _)| follows(first))
            .flat_map(|(_, recalls)| recalls.iter().copied())
            .collect();
        let postponed = |request| Postponed { session, outbox: outbox.clone(), request };
        if is_ready {
            // Should it have to wait for others besides, it joins them in the next burst.
            self.ready.push(postponed(request));
        } else if recalls.is_empty() {
            return Some(request);
        } else {
            self.hold(postponed(request), recalls.into_iter().collect());
        }
        None
    }

    /// Recalls have ended: what waited for nothing else is ready.
    pub(super) fn release(&mut self, ended: &[RecallId]) {
        for (at, postponed) in self.waiting.release(ended) {
            if let Some(ordered) = self.ordered.get_mut(&postponed.session) {
                ordered.remove(&at);
                if ordered.is_empty() {
                    self.ordered.remove(&postponed.session);
                }
            }
            self.ready.push(postponed);
        }
    }

    pub(super) fn is_any_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Those that are ready, in their order.
    pub(super) fn take_ready(&mut self) -> Vec<Postponed> {
        std::mem::take(&mut self.ready)
    }
}

fn is_ordered(request: &Request) -> bool {
    request.deferred || request.op.as_ref().is_some_and(|op| !files_changed(op).is_empty())
}

/// Whether a request must be executed after one that was sent before it.
fn comes_behind(next: &Request, first: &Request) -> bool {
    if next.deferred {
        return first.deferred;
    }
    match (&next.op, &first.op) {
        (Some(Op::Sync(_)), _) => first.deferred,
        (Some(next), Some(first)) => {
            let files = files_changed(next);
            files_changed(first).iter().any(|ino| files.contains(ino))
        }
        _ => false,
    }
}

/// Files that an operation makes, or whose bytes or attributes it changes.
fn files_changed(op: &Op) -> Vec<u64> {
    match op {
        Op::Make(op) if op.ino != 0 => vec![op.ino],
        Op::Commit(op) => op.files.iter().map(|file| file.ino).collect(),
        Op::SetAttr(op) => vec![op.ino],
        Op::Allocate(op) => vec![op.ino],
        Op::CopyRange(op) => vec![op.source, op.target],
        Op::SetXattr(op) => vec![op.ino],
        Op::RemoveXattr(op) => vec![op.ino],
        _ => Vec::new(),
    }
}
