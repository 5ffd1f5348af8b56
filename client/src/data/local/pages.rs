//! Page-aligned memory for direct I/O.
//!
//! Most reads are done in a fixed arena of huge pages, which the rings have registered: the kernel then needs not look up and pin
//! each page of each read (a tenth of the CPU time of a stream), and memory that was just let go of is still in the CPU's
//! caches. When the arena is in use, by readers that keep what they read, ordinary memory does.

use std::{
    io,
    ptr::NonNull,
    sync::{Arc, OnceLock},
};

use fjordfs_proto::PAGE_SIZE;
use memmap2::{Advice, MmapMut};
use parking_lot::Mutex;

use crate::cache::CHUNK;

/// Bytes of a slot of the arena: the largest read.
const SLOT: usize = CHUNK as usize;

const HUGE_PAGE: usize = 2 << 20;

/// Allocated as one piece, a `Vec` of these begins on a page.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_SIZE]);

/// Where memory comes from.
pub(super) struct Pool {
    arena_len: usize,
    arena: OnceLock<Option<Arc<Arena>>>,
}

/// Memory in slots.
pub(super) struct Arena {
    _map: MmapMut,
    start: NonNull<u8>,
    len: usize,
    /// Slots that nobody has, by number.
    free: Mutex<Vec<usize>>,
}

// SAFETY: a slot is used by whom it was taken out of `free` for; the rest does not change.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    fn new(len: usize) -> io::Result<Arena> {
        let mut map = MmapMut::map_anon(len + HUGE_PAGE)?;
        // Without huge pages it works too.
        let _ = map.advise(Advice::HugePage);
        let unaligned = map.as_mut_ptr().align_offset(HUGE_PAGE);
        let start = map.get_mut(unaligned..).and_then(|rest| NonNull::new(rest.as_mut_ptr()));
        let start = start.ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Arena { _map: map, start, len, free: Mutex::new((0..len / SLOT).rev().collect()) })
    }

    /// For registering it with a ring that keeps it alive.
    pub(super) fn iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.start.as_ptr().cast(), iov_len: self.len }
    }

    fn slot(&self, index: usize) -> *mut u8 {
        self.start.as_ptr().wrapping_add(index * SLOT)
    }
}

impl Pool {
    /// Uses so many bytes for its arena.
    pub(super) fn new(arena_max: u64) -> Pool {
        Pool { arena_len: arena_max as usize / HUGE_PAGE * HUGE_PAGE, arena: OnceLock::new() }
    }

    /// The arena; `None` when there is no memory for it.
    pub(super) fn arena(&self) -> Option<&Arc<Arena>> {
        let make = || {
            Arena::new(self.arena_len)
                .inspect_err(|e| tracing::info!("no memory for a pool of {} bytes: {e}", self.arena_len))
                .ok()
                .map(Arc::new)
        };
        self.arena.get_or_init(make).as_ref()
    }

    /// Memory of at least `len` bytes, of whole pages. What is in it may be anything that was read before.
    pub(super) fn take(&self, len: usize) -> Pages {
        let slot = self.arena().filter(|_| len <= SLOT).and_then(|arena| {
            let index = arena.free.lock().pop()?;
            Some(Memory::Slot { arena: Arc::clone(arena), index })
        });
        let own = || Memory::Own(vec![Page([0; PAGE_SIZE]); len.div_ceil(PAGE_SIZE)]);
        Pages { memory: slot.unwrap_or_else(own), len }
    }
}

enum Memory {
    Slot { arena: Arc<Arena>, index: usize },
    Own(Vec<Page>),
}

/// Memory of whole pages, of which the first `len` bytes count.
pub(super) struct Pages {
    memory: Memory,
    len: usize,
}

impl Pages {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn cut(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Whether it is part of the pool's arena.
    pub(super) fn is_registered(&self) -> bool {
        matches!(self.memory, Memory::Slot { .. })
    }

    /// For the kernel to write to: valid for as many bytes as were asked for, rounded up to pages, and as long as this is not dropped,
    /// wherever it is moved to.
    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        match &mut self.memory {
            Memory::Slot { arena, index } => arena.slot(*index),
            Memory::Own(pages) => pages.as_mut_ptr().cast(),
        }
    }
}

impl AsRef<[u8]> for Pages {
    fn as_ref(&self) -> &[u8] {
        let start = match &self.memory {
            Memory::Slot { arena, index } => arena.slot(*index).cast_const(),
            Memory::Own(pages) => pages.as_ptr().cast(),
        };
        // SAFETY: `len` is at most what was asked for, which a slot and the pages have; both are initialised, and nobody else's.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Memory::Slot { arena, index } = self {
            arena.free.lock().push(*index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_begins_on_a_page_and_slots_come_back() {
        let pool = Pool::new(5 << 20);
        let free = || pool.arena().unwrap().free.lock().len();
        assert_eq!((free(), pool.arena().unwrap().iovec().iov_len), (4, 4 << 20), "whole huge pages");
        for len in [1, PAGE_SIZE, 3 * PAGE_SIZE + 1, SLOT, SLOT + 1] {
            let mut pages = pool.take(len);
            assert_eq!((pages.as_mut_ptr() as usize % PAGE_SIZE, pages.as_ref().len()), (0, len));
            assert_eq!(pages.is_registered(), len <= SLOT);
        }
        assert_eq!(free(), 4);
        let mut many: Vec<Pages> = (0..6).map(|_| pool.take(SLOT)).collect();
        assert_eq!((free(), many.iter().filter(|pages| pages.is_registered()).count()), (0, 4));
        for (i, pages) in many.iter_mut().enumerate() {
            // SAFETY: as long as was asked for.
            unsafe { pages.as_mut_ptr().write_bytes(i as u8, SLOT) };
        }
        assert!(many.iter().enumerate().all(|(i, pages)| pages.as_ref().iter().all(|byte| *byte == i as u8)));
        many[0].cut(7);
        assert_eq!((many[0].len(), many[0].as_ref().len()), (7, 7));
        drop(many);
        assert_eq!(free(), 4);
        assert!(!Pool::new(1000).take(1).is_registered(), "too little for an arena");
    }
}
