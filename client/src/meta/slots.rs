//! Slots of the exactly-once protocol (as NFSv4.1, RFC 8881 section 2.10.6): one mutation in flight per slot.

/// A slot in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) index: u32,
    pub(super) sequence: u64,
}

/// Free slots and the last sequence of each.
#[derive(Debug)]
pub(super) struct Slots {
    free: Vec<u32>,
    last: Vec<u64>,
    /// Of each slot, the last mutation that was answered with success; 0 is none.
    done: Vec<u64>,
}

impl Slots {
    /// `before`: sequences up to here may have been used by another process with this session.
    pub(super) fn new(count: u32, before: u64) -> Slots {
        Slots {
            free: (0..count).rev().collect(),
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

    /// Takes a free slot for its next sequence.
    pub(super) fn take(&mut self) -> Option<Slot> {
        let index = self.free.pop()?;
        let sequence = &mut self.last[index as usize];
        *sequence += 1;
        Some(Slot { index, sequence: *sequence })
    }

    /// The slot's mutation is answered, with success if `done`.
    pub(super) fn give_back(&mut self, slot: Slot, done: bool) {
        self.free.push(slot.index);
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
        let mut slots = Slots::new(2, 0);
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
        let mut slots = Slots::new(1, 1000);
        assert_eq!(slots.take(), Some(Slot { index: 0, sequence: 1001 }));
        assert_eq!(slots.done().next(), None);
    }
}
