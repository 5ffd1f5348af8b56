//! Page-aligned memory for bulk data, used again.
//!
//! Fresh memory has to be mapped and zeroed by the kernel first: page by page that costs more than reading into it (measured with
//! four streams into the cache: 0.95 s of CPU per GB, of which two thirds went there). So memory comes in slots of a chunk, in slabs of huge
//! pages; a slot that was let go of last is handed out first, since it is still in the CPU's caches.
//!
//! The first slab is the **arena**, which the rings have registered: the kernel need not look up and pin the pages of each read. Some
//! of its slots are left to small reads, which keep them for a moment only.
//!
//! # Bounds
//! Slots in use are bounded by those who use them (the cache, reads under way). Idle ones beyond a bound give their memory back to the
//! kernel and stay as addresses. When there are no addresses left, ordinary memory is used.

use std::{
    io,
    ptr::NonNull,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use fjordfs_proto::PAGE_SIZE;
use memmap2::{Advice, MmapMut};
use parking_lot::Mutex;

use crate::cache::CHUNK;

/// Bytes of a slot: the largest read.
const SLOT: usize = CHUNK as usize;

/// What needs less than this gets no slot that could be kept for long: it would waste more than it uses.
const LARGE: usize = SLOT / 2;

/// Slots of the arena that are left to small reads.
const FOR_SMALL: usize = 8;

/// Bytes of a slab.
const SLAB: usize = 32 << 20;

const HUGE_PAGE: usize = 2 << 20;

/// Allocated as one piece, a `Vec` of these begins on a page.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_SIZE]);

/// Where memory comes from. Clones share it.
#[derive(Clone)]
pub(super) struct Pool(Arc<Shared>);

struct Shared {
    arena_len: usize,
    /// Idle slots that keep their memory, beside those of the arena.
    warm_max: usize,
    arena: OnceLock<Option<Arc<Arena>>>,
    slots: Mutex<Slots>,
}

/// The slab that is registered.
pub(super) struct Arena(Slab);

/// A map of huge pages.
struct Slab {
    _map: MmapMut,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a slab is only an address range; its memory is used as its slots allow.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

/// Slots that nobody has.
#[derive(Default)]
struct Slots {
    slabs: Vec<Slab>,
    /// How many slabs may still be mapped.
    slabs_left: usize,
    arena: Vec<Start>,
    warm: Vec<Start>,
    /// Their memory was given back.
    cold: Vec<Start>,
}

/// The beginning of a slot.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Start(NonNull<u8>);

// SAFETY: the slot belongs to whoever has its beginning.
unsafe impl Send for Start {}
// SAFETY: as above.
unsafe impl Sync for Start {}

impl Slab {
    fn new(len: usize) -> io::Result<Slab> {
        let mut map = MmapMut::map_anon(len + HUGE_PAGE)?;
        // Without huge pages it works too.
        let _ = map.advise(Advice::HugePage);
        let unaligned = map.as_mut_ptr().align_offset(HUGE_PAGE);
        let start = map.get_mut(unaligned..).and_then(|rest| NonNull::new(rest.as_mut_ptr()));
        Ok(Slab { start: start.ok_or(io::ErrorKind::OutOfMemory)?, _map: map, len })
    }

    fn slots(&self) -> impl Iterator<Item = Start> + '_ {
        // SAFETY: within the map.
        (0..self.len / SLOT).rev().map(|index| Start(unsafe { self.start.add(index * SLOT) }))
    }
}

impl Arena {
    /// For registering it with a ring that keeps it alive.
    pub(super) fn iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.0.start.as_ptr().cast(), iov_len: self.0.len }
    }
}

impl Slots {
    /// A slot, and whether it is of the arena.
    fn take(&mut self, is_large: bool) -> Option<(Start, bool)> {
        let of_arena = |slot| (slot, true);
        if !is_large || self.arena.len() > FOR_SMALL {
            return self.arena.pop().map(of_arena);
        }
        if let Some(slot) = self.warm.pop().or_else(|| self.cold.pop()).or_else(|| self.grow()) {
            return Some((slot, false));
        }
        self.arena.pop().map(of_arena)
    }

    fn grow(&mut self) -> Option<Start> {
        self.slabs_left = self.slabs_left.checked_sub(1)?;
        let slab = Slab::new(SLAB).inspect_err(|e| tracing::info!("no memory for a slab: {e}")).ok()?;
        self.cold.extend(slab.slots());
        self.slabs.push(slab);
        self.cold.pop()
    }
}

impl Pool {
    /// Registers `arena_max` bytes, keeps as many idle beside them, and has slots for `bytes_max`.
    pub(super) fn new(arena_max: u64, bytes_max: u64) -> Pool {
        let slots = Slots { slabs_left: (bytes_max as usize).div_ceil(SLAB), ..Slots::default() };
        Pool(Arc::new(Shared {
            arena_len: arena_max as usize / HUGE_PAGE * HUGE_PAGE,
            warm_max: arena_max as usize / SLOT,
            arena: OnceLock::new(),
            slots: Mutex::new(slots),
        }))
    }

    /// The arena; `None` when there is no memory for it.
    pub(super) fn arena(&self) -> Option<&Arc<Arena>> {
        let shared = &self.0;
        let make = || {
            let arena = Slab::new(shared.arena_len)
                .inspect_err(|e| tracing::info!("no memory for a pool of {} bytes: {e}", shared.arena_len))
                .ok()?;
            shared.slots.lock().arena.extend(arena.slots());
            Some(Arc::new(Arena(arena)))
        };
        shared.arena.get_or_init(make).as_ref()
    }

    /// Memory of `len` bytes, at the beginning of a page. What is in it may be anything that was read before.
    pub(super) fn take(&self, len: usize) -> Pages {
        let slot = (len <= SLOT).then(|| self.0.slots.lock().take(len >= LARGE)).flatten();
        let memory = match slot {
            Some((start, is_registered)) => Memory::Slot { start, is_registered, home: Arc::clone(&self.0) },
            None => Memory::Own(vec![Page([0; PAGE_SIZE]); len.div_ceil(PAGE_SIZE)]),
        };
        Pages { memory, len }
    }
}

enum Memory {
    Slot { start: Start, is_registered: bool, home: Arc<Shared> },
    Own(Vec<Page>),
}

/// Memory of whole pages, of which the first bytes count.
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

    /// Whether it is part of the arena.
    pub(super) fn is_registered(&self) -> bool {
        matches!(self.memory, Memory::Slot { is_registered: true, .. })
    }

    /// For the kernel to write to: valid for as many bytes as were asked for, rounded up to pages, and as long as this is not dropped,
    /// wherever it is moved to.
    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        match &mut self.memory {
            Memory::Slot { start, .. } => start.0.as_ptr(),
            Memory::Own(pages) => pages.as_mut_ptr().cast(),
        }
    }
}

impl AsRef<[u8]> for Pages {
    fn as_ref(&self) -> &[u8] {
        let start = match &self.memory {
            Memory::Slot { start, .. } => start.0.as_ptr().cast_const(),
            Memory::Own(pages) => pages.as_ptr().cast(),
        };
        // SAFETY: `len` is at most what was asked for, which a slot and the pages have; both are initialised, and nobody else's.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

impl AsMut<[u8]> for Pages {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_ref`.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let Memory::Slot { start, is_registered, home } = self else { return };
        let mut slots = home.slots.lock();
        if *is_registered {
            slots.arena.push(*start);
        } else if slots.warm.len() < home.warm_max {
            slots.warm.push(*start);
        } else {
            drop(slots);
            // SAFETY: the slot is ours until it is pushed; what is read from it afterwards are zeros. Where the kernel refuses, the
            // memory stays.
            unsafe { libc::madvise(start.0.as_ptr().cast(), SLOT, libc::MADV_DONTNEED) };
            home.slots.lock().cold.push(*start);
        }
    }
}

/// Memory that is filled from the beginning: few bytes in a `Vec`, many in pages of the pool.
pub(super) struct Filling {
    memory: Fill,
    filled: usize,
}

enum Fill {
    Small(Vec<u8>),
    Large(Pages),
}

impl Filling {
    /// Room for `len` bytes.
    pub(super) fn new(pool: &Pool, len: usize) -> Filling {
        let memory = if len < LARGE { Fill::Small(vec![0; len]) } else { Fill::Large(pool.take(len)) };
        Filling { memory, filled: 0 }
    }

    /// What is still to be filled.
    pub(super) fn room(&mut self) -> &mut [u8] {
        let bytes = match &mut self.memory {
            Fill::Small(bytes) => bytes.as_mut_slice(),
            Fill::Large(pages) => pages.as_mut(),
        };
        bytes.get_mut(self.filled..).unwrap_or_default()
    }

    /// So many more bytes of the room are filled.
    pub(super) fn advance(&mut self, n: usize) {
        let room = self.room().len();
        self.filled += n.min(room);
    }

    /// What was filled.
    pub(super) fn freeze(self) -> Bytes {
        match self.memory {
            Fill::Small(mut bytes) => {
                bytes.truncate(self.filled);
                bytes.into()
            }
            Fill::Large(mut pages) => {
                pages.cut(self.filled);
                Bytes::from_owner(pages)
            }
        }
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
