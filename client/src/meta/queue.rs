//! What is to be sent, in which order, and what is unanswered. Pure.
//!
//! # Order
//! - What was deferred is sent in order, and before everything that callers wait for: a caller's request must not reach the server
//!   before what was decided before it. The other way round does no harm, since nothing is decided about what a
//!   caller's mutation is about while that is under way.
//! - Messages about leases stand in the same line as what was deferred, so a recall is obeyed only after it.
//!
//! # Slots
//! Callers' mutations may wait for other clients' recalls at the server, and those for this client's. Decided operations wait for
//! nobody; some slots are theirs alone, so that they can always be sent, and after them what others wait for.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use fjordfs_proto::{
    operation::is_mutation,
    pb::meta::{ClientMessage, Request, SlotAnswered, request::Op},
};

use super::{
    Answer,
    slots::{Slot, Slots},
};
use crate::{
    handover::{Asked, Handover},
    leases::{Sent, Unasked},
};

/// Requests in one message; more go into the next one.
const REQUESTS_PER_MESSAGE: usize = 256;

/// The share of the slots, one in so many, that callers' mutations leave to decided ones.
const RESERVED_SHARE: usize = 4;

/// Sent, or to be sent again.
pub(super) struct Unanswered {
    pub(super) request: Request,
    pub(super) sent: Sent,
    pub(super) answer: Answer,
    slot: Option<Slot>,
    /// When it was sent for the first time.
    since: Instant,
}

enum Quiet {
    Operation(Unasked),
    Tell(ClientMessage),
}

/// See the module.
pub(super) struct Queue {
    quiet: VecDeque<Quiet>,
    waiting: VecDeque<Waiting>,
    slots: Slots,
    /// By id: the order in which they were sent.
    unanswered: BTreeMap<u64, Unanswered>,
    id_next: u64,
    handover: Option<Arc<Handover>>,
}

/// A caller's operation, and the request of the kernel that it is for, or 0.
type Waiting = (Op, Sent, Answer, u64);

impl Queue {
    /// With what a former process has left, and for a successor.
    pub(super) fn new(slots: u32, handover: Option<Arc<Handover>>) -> Queue {
        let left = handover.as_ref().and_then(|handover| handover.legacy());
        let left = left.map_or(&[][..], |left| &left.asked);
        let slots = Slots::new(slots, sequence_before(&handover), left, handover.is_some());
        Queue {
            quiet: VecDeque::new(),
            waiting: VecDeque::new(),
            slots,
            unanswered: BTreeMap::new(),
            id_next: 1,
            handover,
        }
    }

    /// A caller's operation.
    pub(super) fn submit(&mut self, op: Op, sent: Sent, answer: Answer, request: u64) {
        self.waiting.push_back((op, sent, answer, request));
    }

    /// Operations that nobody waits for.
    pub(super) fn defer(&mut self, operations: impl Iterator<Item = Unasked>) {
        self.quiet.extend(operations.map(Quiet::Operation));
    }

    /// A message that must not overtake what was deferred before.
    pub(super) fn tell(&mut self, message: ClientMessage) {
        self.quiet.push_back(Quiet::Tell(message));
    }

    /// Whether a sign of life is still in line.
    pub(super) fn holds_beat(&self) -> bool {
        self.quiet.iter().any(|quiet| matches!(quiet, Quiet::Tell(message) if message.beat != 0))
    }

    /// What was to be told on a stream that has ended means nothing, or something else, on the next.
    pub(super) fn forget_notices(&mut self) {
        self.quiet.retain(|quiet| matches!(quiet, Quiet::Operation(_)));
    }

    /// Whether callers wait for something to be sent.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Nothing is left to be sent, or answered.
    pub(super) fn is_idle(&self) -> bool {
        self.quiet.is_empty() && self.waiting.is_empty() && self.unanswered.is_empty()
    }

    /// Messages to be sent now: as much as there are slots for.
    pub(super) fn admit(&mut self) -> Vec<ClientMessage> {
        let mut messages = Messages::default();
        while let Some(next) = self.quiet.pop_front() {
            match next {
                Quiet::Tell(message) => messages.tell(message),
                Quiet::Operation(operation) => match self.slot_for(&operation.op, 0, 0) {
                    Ok(slot) => {
                        self.leave_asked(&operation.op, slot, operation.request);
                        let answer = answer_of(&operation);
                        messages.add(self.send(operation.op, slot, Sent::default(), answer));
                    }
                    Err(NoSlot) => {
                        self.quiet.push_front(Quiet::Operation(operation));
                        return messages.finish();
                    }
                },
            }
        }
        let reserved = self.slots.count() / RESERVED_SHARE;
        while let Some((op, sent, answer, request)) = self.waiting.pop_front() {
            match self.slot_for(&op, request, reserved) {
                Ok(slot) => {
                    self.leave_asked(&op, slot, request);
                    messages.add(self.send(op, slot, sent, answer));
                }
                Err(NoSlot) => {
                    self.waiting.push_front((op, sent, answer, request));
                    break;
                }
            }
        }
        messages.finish()
    }

    fn slot_for(&mut self, op: &Op, request: u64, reserved: usize) -> Result<Option<Slot>, NoSlot> {
        if !is_mutation(op) {
            return Ok(None);
        }
        if request != 0
            && let Some(slot) = self.slots.take_left(request, kind_of(op))
        {
            return Ok(Some(slot));
        }
        if self.slots.free() <= reserved
            && let Some(handover) = &self.handover
        {
            self.slots.reclaim(|asked| !handover.is_asked(asked));
        }
        if self.slots.free() <= reserved {
            return Err(NoSlot);
        }
        self.slots.take().map(Some).ok_or(NoSlot)
    }

    /// Tells a successor of a mutation that is not the same when it is executed twice.
    fn leave_asked(&self, op: &Op, slot: Option<Slot>, request: u64) {
        let kind = kind_of(op);
        if let (Some(handover), Some(Slot { index, sequence })) = (&self.handover, slot)
            && request != 0
            && kind != 0
        {
            handover.asked(Asked { request, slot: index, sequence, kind });
        }
    }

    fn send(&mut self, op: Op, slot: Option<Slot>, sent: Sent, answer: Answer) -> Request {
        let id = self.id_next;
        self.id_next += 1;
        let (index, sequence) = slot.map_or((0, 0), |s| (s.index, s.sequence));
        let deferred = matches!(answer, Answer::Decided);
        let request = Request { id, slot: index, sequence, deferred, op: Some(op) };
        let since = Instant::now();
        self.unanswered.insert(id, Unanswered { request: request.clone(), sent, answer, slot, since });
        request
    }

    /// The request that an answer is for.
    /// `done` when it was answered with success.
    pub(super) fn answered(&mut self, id: u64, done: bool) -> Option<Unanswered> {
        let unanswered = self.unanswered.remove(&id)?;
        if let Some(slot) = unanswered.slot {
            self.slots.give_back(slot, done);
        }
        Some(unanswered)
    }

    /// The oldest request that should have been answered by now, and how long ago it was sent. Locks are waited for at the server.
    pub(super) fn oldest(&self) -> Option<(&Request, Duration)> {
        let waits = |request: &Request| matches!(request.op, Some(Op::Lock(_)));
        let oldest = self.unanswered.values().find(|unanswered| !waits(&unanswered.request))?;
        Some((&oldest.request, oldest.since.elapsed()))
    }

    /// Everything unanswered once more, in order.
    pub(super) fn resend(&self) -> Vec<ClientMessage> {
        let mut messages = Messages::default();
        self.unanswered.values().for_each(|unanswered| messages.add(unanswered.request.clone()));
        messages.finish()
    }

    /// What the metaserver must know of, when it greets this session again.
    pub(super) fn done(&self) -> Vec<SlotAnswered> {
        self.slots.done().map(|Slot { index, sequence }| SlotAnswered { slot: index, sequence }).collect()
    }

    /// It does not, and that has been told.
    pub(super) fn forget_done(&mut self) {
        self.slots.forget_done();
    }

    /// A session that knows nothing of the former one's slots.
    pub(super) fn start_over(&mut self, slots: u32) {
        self.slots = Slots::new(slots, sequence_before(&self.handover), &[], self.handover.is_some());
    }

    /// Takes out everything that was or would have been sent. What would have been told is void.
    pub(super) fn take_all(&mut self) -> Vec<(Op, Sent, Answer)> {
        let sent = std::mem::take(&mut self.unanswered).into_values();
        let sent = sent.filter_map(|u| Some((u.request.op?, u.sent, u.answer)));
        let quiet = self.quiet.drain(..).filter_map(|quiet| match quiet {
            Quiet::Operation(operation) => {
                let answer = answer_of(&operation);
                Some((operation.op, Sent::default(), answer))
            }
            Quiet::Tell(_) => None,
        });
        let waiting = self.waiting.drain(..).map(|(op, sent, answer, _)| (op, sent, answer));
        sent.chain(quiet).chain(waiting).collect()
    }
}

/// Another process may have used sequences up to here.
fn sequence_before(handover: &Option<Arc<Handover>>) -> u64 {
    handover.as_ref().map_or(0, |handover| handover.first_number() - 1)
}

/// A number for each kind of mutation whose second execution would have another answer; 0 for others.
fn kind_of(op: &Op) -> u64 {
    match op {
        Op::Make(_) => 1,
        Op::Link(_) => 2,
        Op::Remove(_) => 3,
        Op::Rename(_) => 4,
        Op::SetXattr(_) => 5,
        Op::RemoveXattr(_) => 6,
        _ => 0,
    }
}

struct NoSlot;

fn answer_of(operation: &Unasked) -> Answer {
    if operation.decided { Answer::Decided } else { Answer::Nobody }
}

/// Requests and notices in as few messages as their order allows.
#[derive(Default)]
struct Messages {
    done: Vec<ClientMessage>,
    requests: Vec<Request>,
}

impl Messages {
    fn add(&mut self, request: Request) {
        self.requests.push(request);
        if self.requests.len() == REQUESTS_PER_MESSAGE {
            self.close();
        }
    }

    /// The server takes a message's notices before its requests, so they need one of their own.
    fn tell(&mut self, message: ClientMessage) {
        self.close();
        self.done.push(message);
    }

    fn close(&mut self) {
        if !self.requests.is_empty() {
            let requests = std::mem::take(&mut self.requests);
            self.done.push(ClientMessage { requests, ..ClientMessage::default() });
        }
    }

    fn finish(mut self) -> Vec<ClientMessage> {
        self.close();
        self.done
    }
}

#[cfg(test)]
mod tests {
    use fjordfs_proto::pb::meta::{Close, GetAttr, Make};

    use super::*;

    fn make(ino: u64) -> Op {
        Op::Make(Make { ino, ..Make::default() })
    }

    fn decided(ino: u64) -> Unasked {
        Unasked { op: make(ino), decided: true, request: 0 }
    }

    fn look(ino: u64) -> Op {
        Op::GetAttr(GetAttr { ino })
    }

    /// What is sent, in order: inode numbers, and notices as 1000 and their beat.
    fn sent(queue: &mut Queue) -> Vec<u64> {
        let numbers = |message: ClientMessage| {
            let notice = (message.beat != 0).then_some(1000 + message.beat);
            let requests = message.requests.into_iter().map(|request| match request.op {
                Some(Op::Make(op)) => op.ino,
                Some(Op::GetAttr(op)) => op.ino,
                Some(Op::Close(op)) => op.handle,
                other => panic!("{other:?}"),
            });
            notice.into_iter().chain(requests).collect::<Vec<_>>()
        };
        queue.admit().into_iter().flat_map(numbers).collect()
    }

    #[test]
    fn callers_never_overtake_what_was_deferred_and_notices_stand_in_line() {
        let mut queue = Queue::new(8, None);
        queue.submit(look(1), Sent::default(), Answer::Nobody, 0);
        queue.defer(
            [decided(2), Unasked { op: Op::Close(Close { handle: 3 }), decided: false, request: 0 }]
                .into_iter(),
        );
        queue.tell(ClientMessage { beat: 4, ..ClientMessage::default() });
        queue.defer([decided(5)].into_iter());
        assert_eq!(sent(&mut queue), [2, 3, 1004, 5, 1]);
        assert!(!queue.is_idle());
        let again: Vec<bool> =
            queue.resend().into_iter().flat_map(|m| m.requests).map(|r| r.deferred).collect();
        assert_eq!(again, [true, false, true, false]);
    }

    #[test]
    fn a_beat_in_line_is_known_until_it_is_sent_and_void_with_its_stream() {
        let mut queue = Queue::new(4, None);
        queue.defer((1..=6).map(decided));
        let beat = ClientMessage { beat: 4, ..ClientMessage::default() };
        queue.tell(beat.clone());
        assert_eq!(sent(&mut queue), [1, 2, 3, 4], "no more slots");
        assert!(queue.holds_beat());
        let answered: Vec<u64> = queue.unanswered.keys().copied().collect();
        answered.into_iter().for_each(|id| drop(queue.answered(id, true)));
        assert_eq!(sent(&mut queue), [5, 6, 1004]);
        assert!(!queue.holds_beat());

        queue.defer([7, 8, 9].map(decided).into_iter());
        queue.tell(ClientMessage { recalled: vec![1], ..ClientMessage::default() });
        assert_eq!(sent(&mut queue), [7, 8]);
        assert!(!queue.holds_beat(), "others are no signs of life");
        queue.tell(beat);
        queue.forget_notices();
        assert!(!queue.holds_beat());
        let answered: Vec<u64> = queue.unanswered.keys().copied().collect();
        answered.into_iter().for_each(|id| drop(queue.answered(id, true)));
        let last = queue.admit();
        assert_eq!(last.len(), 1, "what was decided is sent all the same");
        assert_eq!(last[0].requests.len(), 1);
    }

    #[test]
    fn a_successor_sends_a_request_again_as_the_same_mutation() {
        let memory = Handover::memory().unwrap();
        let take_over = || Arc::new(Handover::take_over(memory.try_clone().unwrap()).unwrap());
        let handover = take_over();
        handover.set_session(fjordfs_proto::SessionId(1), "");
        let slots = |queue: &mut Queue| -> Vec<(u32, u64)> {
            let sent = queue.admit().into_iter().flat_map(|message| message.requests);
            sent.map(|request| (request.slot, request.sequence)).collect()
        };
        let mut queue = Queue::new(8, Some(handover.clone()));
        for request in [2, 4, 6] {
            handover.began(request);
            queue.submit(make(request), Sent::default(), Answer::Nobody, request);
        }
        let before = slots(&mut queue);
        // Decided here, and sent before the kernel had its answer.
        handover.began(10);
        queue.defer([Unasked { request: 10, ..decided(10) }].into_iter());
        let decided = slots(&mut queue);
        handover.answered(4);
        let mut next = Queue::new(8, Some(take_over()));
        for request in [8, 6, 4] {
            next.submit(make(request), Sent::default(), Answer::Nobody, request);
        }
        let after = slots(&mut next);
        assert_eq!(after[1], before[2]);
        assert!(after[0].1 > 1 << 40 && after[2].1 > 1 << 40, "others are new: {after:?}");
        assert!(after.iter().all(|slot| slot.0 != before[0].0), "one may still come");
        next.submit(make(10), Sent::default(), Answer::Nobody, 10);
        assert_eq!(slots(&mut next), decided);
    }

    #[test]
    fn callers_leave_slots_to_what_was_decided() {
        let mut queue = Queue::new(8, None);
        (0..8).for_each(|ino| queue.submit(make(ino), Sent::default(), Answer::Nobody, 0));
        assert_eq!(sent(&mut queue), [0, 1, 2, 3, 4, 5]);
        queue.defer([10, 11, 12].map(decided).into_iter());
        queue.tell(ClientMessage { beat: 1, ..ClientMessage::default() });
        assert_eq!(sent(&mut queue), [10, 11]);
        let ids: Vec<u64> = queue.unanswered.keys().copied().collect();
        assert!(queue.answered(ids[0], true).is_some() && queue.answered(ids[0], true).is_none());
        assert_eq!(sent(&mut queue), [12, 1001], "the notice comes behind all of it");
        assert_eq!(queue.take_all().len(), 10);
        assert!(queue.is_idle());
    }
}
