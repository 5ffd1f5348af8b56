//! Page-aligned memory for direct I/O. Chunks are used again, for the reasons that [`super::super::buffers`] gives.

use std::sync::{Arc, Weak};

use fjordfs_proto::PAGE_SIZE;
use parking_lot::Mutex;

use crate::cache::CHUNK;

/// Chunks kept for later: what one streaming reader has under way.
const KEPT_MAX: usize = 32;

const CHUNK_PAGES: usize = CHUNK as usize / PAGE_SIZE;

/// Allocated as one piece, a `Vec` of these begins on a page.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_SIZE]);

/// Where the memory of chunks comes from and goes back to.
#[derive(Default)]
pub(super) struct Pool {
    free: Mutex<Vec<Vec<Page>>>,
}

impl Pool {
    /// Memory of at least `len` bytes, of whole pages. What is in it may be anything that was read before.
    pub(super) fn take(self: &Arc<Self>, len: usize) -> Pages {
        let count = len.div_ceil(PAGE_SIZE);
        let is_large = (CHUNK_PAGES / 2 + 1..=CHUNK_PAGES).contains(&count);
        let home = if is_large { Arc::downgrade(self) } else { Weak::new() };
        let kept = if is_large { self.free.lock().pop() } else { None };
        let count = if is_large { CHUNK_PAGES } else { count };
        Pages { pages: kept.unwrap_or_else(|| vec![Page([0; PAGE_SIZE]); count]), len, home }
    }
}

/// Memory of whole pages, of which the first `len` bytes count.
pub(super) struct Pages {
    pages: Vec<Page>,
    len: usize,
    home: Weak<Pool>,
}

impl Pages {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn cut(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// For the kernel to write to: valid for as many bytes as were asked for, rounded up to pages, and as long as this is not dropped,
    /// wherever it is moved to.
    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.pages.as_mut_ptr().cast()
    }
}

impl AsRef<[u8]> for Pages {
    fn as_ref(&self) -> &[u8] {
        &self.pages.as_flattened_bytes()[..self.len]
    }
}

trait AsFlattenedBytes {
    fn as_flattened_bytes(&self) -> &[u8];
}

impl AsFlattenedBytes for [Page] {
    fn as_flattened_bytes(&self) -> &[u8] {
        // SAFETY: a page is its bytes, without padding: its size is a multiple of its alignment.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), size_of_val(self)) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if let Some(home) = self.home.upgrade() {
            let mut free = home.free.lock();
            if free.len() < KEPT_MAX {
                free.push(std::mem::take(&mut self.pages));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_begins_on_a_page_and_chunks_come_back() {
        let pool = Arc::new(Pool::default());
        for len in [1, PAGE_SIZE, 3 * PAGE_SIZE + 1, CHUNK as usize] {
            let mut pages = pool.take(len);
            assert_eq!((pages.as_mut_ptr() as usize % PAGE_SIZE, pages.as_ref().len()), (0, len));
        }
        assert_eq!(pool.free.lock().len(), 1, "the small ones are not kept");
        let mut again = pool.take(CHUNK as usize - 5);
        assert!(pool.free.lock().is_empty());
        again.cut(7);
        assert_eq!((again.len(), again.as_ref().len()), (7, 7));
        let many: Vec<_> = (0..2 * KEPT_MAX).map(|_| pool.take(CHUNK as usize)).collect();
        drop(many);
        assert_eq!(pool.free.lock().len(), KEPT_MAX);
    }
}
