//! Slots of the exactly-once protocol (as NFSv4.1, RFC 8881 section 2.10.6): one mutation in flight per slot.

/// A slot in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) index: u32,
    pub(super) sequence: u64,
}

use std::collections::VecDeque;

use crate::handover::Asked;

/// Free slots and the last sequence of each.
#[derive(Debug)]
pub(super) struct Slots {
    free: VecDeque<u32>,
    /// Whether free slots are used in turn. A successor must find what a slot was last used for until its request is answered, which
    /// is a while after the server's answer; in turn, the slot is not used again before.
    in_turn: bool,
    /// In use by mutations of a former process, whose requests come again.
    left: Vec<Asked>,
    last: Vec<u64>,
    /// Of each slot, the last mutation that was answered with success; 0 is none.
    done: Vec<u64>,
}

impl Slots {
    /// `before`: sequences up to here may have been used by another process with this session, and these mutations may not be
    /// answered. `in_turn`: there may be a successor.
    pub(super) fn new(count: u32, before: u64, left: &[Asked], in_turn: bool) -> Slots {
        let left: Vec<Asked> = left.iter().filter(|asked| asked.slot < count).copied().collect();
        let is_free = |slot: &u32| left.iter().all(|asked| asked.slot != *slot);
        Slots {
            free: (0..count).filter(is_free).collect(),
            in_turn,
            left,
            last: vec![before; count as usize],
            done: vec![0; count as usize],
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.last.len()
    }

    /// How many are free.
    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// The slot of a former process's mutation, to be sent again as the same one.
    pub(super) fn take_left(&mut self, request: u64, kind: u64) -> Option<Slot> {
        let at = self.left.iter().position(|asked| (asked.request, asked.kind) == (request, kind))?;
        let Asked { slot, sequence, .. } = self.left.remove(at);
        Some(Slot { index: slot, sequence })
    }

    /// Frees the slots of requests that were answered, or do not come again.
    pub(super) fn reclaim(&mut self, is_over: impl Fn(&Asked) -> bool) {
        self.free.extend(self.left.extract_if(.., |asked| is_over(asked)).map(|asked| asked.slot));
    }

    /// Takes a free slot for its next sequence.
    pub(super) fn take(&mut self) -> Option<Slot> {
        let index = self.free.pop_front()?;
        let sequence = &mut self.last[index as usize];
        *sequence += 1;
        Some(Slot { index, sequence: *sequence })
    }

    /// The slot's mutation is answered, with success if `done`.
    pub(super) fn give_back(&mut self, slot: Slot, done: bool) {
        match self.in_turn {
            true => self.free.push_back(slot.index),
            false => self.free.push_front(slot.index),
        }
        if done {
            self.done[slot.index as usize] = slot.sequence;
        }
    }

    /// Slots with the last sequence that was answered with success. The metaserver remembers no others.
    pub(super) fn done(&self) -> impl Iterator<Item = Slot> + '_ {
        let slots = self.done.iter().zip(0..).filter(|(sequence, _)| **sequence != 0);
        slots.map(|(sequence, index)| Slot { index, sequence: *sequence })
    }

    /// That some of it is lost is known.
    pub(super) fn forget_done(&mut self) {
        self.done.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_used_once_at_a_time_with_growing_sequences() {
        let mut slots = Slots::new(2, 0, &[], false);
        let (a, b) = (slots.take().unwrap(), slots.take().unwrap());
        assert_ne!(a.index, b.index);
        assert_eq!(slots.take(), None);
        slots.give_back(b, false);
        assert_eq!(slots.done().next(), None);
        slots.give_back(a, true);
        assert_eq!(slots.done().collect::<Vec<_>>(), [a]);
        assert_eq!(slots.take(), Some(Slot { index: a.index, sequence: a.sequence + 1 }));
    }

    #[test]
    fn a_successor_uses_no_sequence_of_before() {
        let mut slots = Slots::new(1, 1000, &[], true);
        assert_eq!(slots.take(), Some(Slot { index: 0, sequence: 1001 }));
        assert_eq!(slots.done().next(), None);
    }

    #[test]
    fn what_was_left_is_sent_again_as_it_was() {
        let asked = |request, slot, sequence| Asked { request, slot, sequence, kind: 1 };
        let mut slots = Slots::new(4, 1000, &[asked(8, 1, 3), asked(10, 2, 9), asked(12, 7, 1)], true);
        assert_eq!((slots.take_left(8, 2), slots.take_left(9, 1), slots.free()), (None, None, 2));
        let again = slots.take_left(8, 1).unwrap();
        assert_eq!(again, Slot { index: 1, sequence: 3 });
        slots.give_back(again, true);
        assert_eq!(slots.take_left(8, 1), None);
        let mut taken: Vec<u32> = std::iter::from_fn(|| slots.take()).map(|slot| slot.index).collect();
        taken.sort_unstable();
        assert_eq!(taken, [0, 1, 3], "not that of one that may still come");
        slots.reclaim(|asked| asked.request != 10);
        assert_eq!(slots.free(), 0);
        slots.reclaim(|asked| asked.request == 10);
        assert_eq!((slots.take_left(10, 1), slots.free()), (None, 1));
    }
}
