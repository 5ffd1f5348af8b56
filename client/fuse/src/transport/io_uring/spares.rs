//! Entries beyond a queue's depth, in place of those whose requests wait for a lock.
//!
//! A request that waits for a lock keeps its ring entry until somebody gives the lock up, for which that one needs an entry, too.
//! So whenever more such requests are under way than a queue has spares, it gets one more; the kernel takes entries at any
//! time. They stay for the next time. Their memory is touched only when so many requests are in flight at once, since the
//! kernel takes the entry that was used last.
//!
//! What remains: when more requests for locks than the queue has entries come in the time that a thread needs to take them in,
//! a request behind them stays in the kernel until the next one of that CPU.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;

use memmap2::MmapMut;

use super::memory::{self, EntryBuffers};

/// Most spares of one queue. They are little more than addresses.
const SPARES_MAX: usize = 4096;

/// What there is in the place of an entry that is kept for long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A spare that is free.
    Free,
    /// A new one of this number, to be registered.
    New(usize),
    /// Nothing: an entry less is left.
    Nothing,
}

/// One more entry.
struct Spare {
    queue: u16,
    buffers: EntryBuffers,
    /// What REGISTER points to, so it must not move.
    iovecs: Box<[libc::iovec; 2]>,
    _memory: MmapMut,
}

#[derive(Clone, Copy, Default)]
struct Count {
    waiting: usize,
    spares: usize,
}

/// The spares of one ring.
pub(super) struct Spares {
    size_max: usize,
    spares: RefCell<Vec<Spare>>,
    counts: RefCell<HashMap<u16, Count>>,
    out_of_memory: Cell<bool>,
}

impl Spares {
    pub(super) fn new(size_max: usize) -> Spares {
        let (spares, counts) = (RefCell::default(), RefCell::default());
        Spares { size_max, spares, counts, out_of_memory: Cell::new(false) }
    }

    /// An entry of this queue will be kept for long.
    pub(super) fn keep(&self, queue: u16) -> Place {
        let mut counts = self.counts.borrow_mut();
        let count = counts.entry(queue).or_default();
        count.waiting += 1;
        if count.waiting <= count.spares {
            return Place::Free;
        }
        let made = if count.spares < SPARES_MAX { self.make(queue) } else { None };
        let Some(spare) = made else { return Place::Nothing };
        count.spares += 1;
        let mut spares = self.spares.borrow_mut();
        spares.push(spare);
        Place::New(spares.len() - 1)
    }

    /// Such an entry is back.
    pub(super) fn back(&self, queue: u16) {
        if let Some(count) = self.counts.borrow_mut().get_mut(&queue) {
            count.waiting = count.waiting.saturating_sub(1);
        }
    }

    fn make(&self, queue: u16) -> Option<Spare> {
        let made = memory::map(1, self.size_max).and_then(|(memory, buffers)| {
            let buffers = *buffers.first().ok_or(io::ErrorKind::OutOfMemory)?;
            Ok(Spare { queue, buffers, iovecs: Box::new(buffers.iovecs()), _memory: memory })
        });
        match made {
            Ok(spare) => Some(spare),
            Err(e) => {
                if !self.out_of_memory.replace(true) {
                    tracing::warn!("no memory for requests beside those that wait for locks: {e}");
                }
                None
            }
        }
    }

    /// Queue and buffers of a spare.
    pub(super) fn get(&self, number: usize) -> Option<(u16, EntryBuffers)> {
        self.spares.borrow().get(number).map(|spare| (spare.queue, spare.buffers))
    }

    /// What registers a spare; valid as long as these are.
    pub(super) fn iovecs(&self, number: usize) -> Option<*const [libc::iovec; 2]> {
        self.spares.borrow().get(number).map(|spare| &raw const *spare.iovecs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_as_many_as_are_kept_at_once() {
        let spares = Spares::new(4096);
        let new = Place::New;
        assert_eq!((spares.keep(3), spares.keep(3), spares.keep(5)), (new(0), new(1), new(2)));
        spares.back(3);
        assert_eq!((spares.keep(3), spares.keep(3)), (Place::Free, new(3)));
        assert_eq!(spares.get(2).map(|(queue, _)| queue), Some(5));
        assert!(spares.iovecs(3).is_some() && spares.iovecs(4).is_none());
        for _ in 0..2 * SPARES_MAX {
            spares.keep(3);
        }
        assert_eq!(spares.spares.borrow().len(), SPARES_MAX + 1);
        assert_eq!((spares.keep(3), spares.keep(5)), (Place::Nothing, new(SPARES_MAX + 1)));
    }
}
