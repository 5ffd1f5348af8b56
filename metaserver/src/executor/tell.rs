//! A burst is committed, and tells what it has to tell when nobody can take it back any more: answers, those of earlier bursts that have
//! waited for recalls, maps, recalls, ends of sessions, signs of life.

use std::{sync::Arc, time::Instant};

use fjordfs_proto::{
    FsError, FsResult,
    pb::common::ClusterMap,
    pb::meta::{Recall, Response, response::Result as Reply},
};

use super::Executor;
use crate::{
    core::Event,
    leases::{Order, RecallId},
    service::outbox::{Outbox, Permit, Ready},
    store::{Late, Ticket},
};

/// An answer of the burst, to be sent once it is committed.
pub(super) struct Pending {
    pub(super) outbox: Arc<Outbox>,
    pub(super) response: Response,
    pub(super) permit: Permit,
    pub(super) sync: bool,
    pub(super) recalls: Vec<RecallId>,
}

/// A call's answer: told whether the burst was committed.
pub(super) struct Call {
    pub(super) sync: bool,
    pub(super) answer: Box<dyn FnOnce(FsResult<()>) + Send>,
}

/// What a committed burst tells, in this order.
pub(super) struct Told {
    committed: Ticket,
    /// When it was committed.
    pub(super) since: Instant,
    map: Option<Arc<ClusterMap>>,
    answers: Vec<(Pending, Ticket)>,
    calls: Vec<Call>,
    recalls: Vec<Order>,
    ended: Vec<Event>,
    beats: Vec<(Arc<Outbox>, u64)>,
}

impl Executor {
    /// Commits the burst and answers it.
    pub(super) fn finish(&mut self) {
        self.answer_locks();
        let wrote = self.core.writes() > 0;
        let committed = self.core.commit();
        if wrote && committed.is_ok() && self.store.late().is_none() {
            self.syncer.note();
        }
        let committed = match committed {
            Ok(ticket) => ticket,
            Err(e) if self.store.late().is_some() => {
                self.lost = Some(e);
                return;
            }
            Err(e) => return self.refuse_burst(&e),
        };
        let told = Told {
            committed,
            since: Instant::now(),
            map: self.new_map(),
            answers: self.free_answers(committed),
            calls: std::mem::take(&mut self.calls),
            recalls: self.core.take_recalls(),
            ended: self.core.take_events(),
            beats: std::mem::take(&mut self.beats),
        };
        self.untold.push_back(told);
        self.tell();
    }

    /// Says what may be said by now.
    pub(super) fn tell(&mut self) {
        let store = self.store.clone();
        let upto = match store.late().map(Late::acknowledged) {
            None => Ticket(u64::MAX),
            Some(Ok(upto)) => upto,
            Some(Err(e)) => {
                self.lost = Some(FsError::from(&e));
                return;
            }
        };
        if self.untold.front().is_none_or(|told| told.committed > upto)
            || store.late().is_some_and(|l| !l.is_owner())
        {
            return;
        }
        while let Some(told) = self.untold.pop_front_if(|told| told.committed <= upto) {
            self.tell_one(told);
        }
    }

    fn tell_one(&mut self, told: Told) {
        let Told { committed, since: _, map, answers, calls, recalls, ended, beats } = told;
        if let Some(map) = map {
            self.push_map(&map, committed);
        }
        for (outbox, beat) in beats {
            outbox.push_beat(beat);
        }
        self.answer(answers);
        for call in calls {
            if call.sync { self.after(committed, call.answer) } else { (call.answer)(Ok(())) }
        }
        self.recall(recalls);
        for Event::SessionEnded(session, why) in ended {
            if let Some(outbox) = self.streams.remove(&session) {
                outbox.close(Some(why));
            }
        }
    }

    /// Calls `then` when a committed burst survives power failure. An engine across a network has told so already.
    fn after(&self, committed: Ticket, then: impl FnOnce(FsResult<()>) + Send + 'static) {
        match self.store.late() {
            Some(_) => then(Ok(())),
            None => self.syncer.after(committed, then),
        }
    }

    /// Nothing of the burst happened: everybody in it is told.
    fn refuse_burst(&mut self, e: &FsError) {
        for Pending { outbox, mut response, permit, .. } in std::mem::take(&mut self.answers) {
            // Locks are not in the store.
            if !matches!(response.result, Some(Reply::Lock(_))) {
                let result = Some(Reply::Error(e.clone().into()));
                response = Response { id: response.id, result, ..Response::default() };
            }
            outbox.push([Ready { response, permit }]);
        }
        for call in std::mem::take(&mut self.calls) {
            (call.answer)(Err(e.clone()));
        }
    }

    /// Answers of this burst that wait for no recall, and earlier ones that do not any more.
    fn free_answers(&mut self, committed: Ticket) -> Vec<(Pending, Ticket)> {
        let mut free = Vec::with_capacity(self.answers.len());
        for mut pending in std::mem::take(&mut self.answers) {
            match std::mem::take(&mut pending.recalls) {
                recalls if recalls.is_empty() => free.push((pending, committed)),
                recalls => {
                    // Given back at once: the message with which its client obeys a recall must not wait for the room that its
                    // own answers take.
                    pending.permit = None;
                    self.held.hold((pending, committed), recalls);
                }
            }
        }
        // Behind the answers of the burst that ended the recalls: nothing waits for them any more.
        let ended = self.core.take_ended_recalls();
        free.extend(self.held.release(&ended).into_iter().map(|(_, answer)| answer));
        self.postponed.release(&ended);
        free
    }

    fn answer(&self, free: Vec<(Pending, Ticket)>) {
        // Answers of one stream stand together mostly: each run of them is one push, so one message and one wake-up.
        let mut run: Vec<Ready> = Vec::new();
        let mut owner: Option<Arc<Outbox>> = None;
        for (Pending { outbox, response, permit, sync, .. }, committed) in free {
            let ready = Ready { response, permit };
            if sync {
                self.after(committed, move |synced| outbox.push([ready.unless(synced)]));
                continue;
            }
            if let Some(before) = owner.take_if(|owner| !Arc::ptr_eq(owner, &outbox)) {
                before.push(std::mem::take(&mut run));
            }
            run.push(ready);
            owner.get_or_insert(outbox);
        }
        if let Some(owner) = owner {
            owner.push(run);
        }
    }

    /// Sends recalls, behind the answers that granted what they take back.
    fn recall(&self, recalls: Vec<Order>) {
        for Order { session, id, ino, delegated } in recalls {
            // Without a stream the holder cannot be told; its silence ends the recall.
            if let Some(outbox) = self.streams.get(&session) {
                outbox.push_recall(Recall { id: id.0, ino: ino.0, delegated });
            }
        }
    }

    /// The map, when the burst changed it.
    fn new_map(&mut self) -> Option<Arc<ClusterMap>> {
        let map = self.core.members().map();
        if map.epoch == self.epoch {
            return None;
        }
        self.epoch = map.epoch;
        Some(Arc::new(map.to_pb()))
    }

    /// A new map goes to every stream, once a power failure cannot take it back: clients place blocks by it.
    fn push_map(&self, map: &Arc<ClusterMap>, committed: Ticket) {
        let map = map.clone();
        let streams: Vec<Arc<Outbox>> = self.streams.values().cloned().collect();
        self.after(committed, move |synced| {
            if synced.is_ok() {
                streams.iter().for_each(|outbox| outbox.push_map(map.clone()));
            }
        });
    }
}
