//! Page-aligned buffers for O_DIRECT, from a pool with a hard cap.
//!
//! PERFORMANCE-CRITICAL: every byte that a client reads or writes lies in one of these. Do not clear buffers on
//! reuse: whoever sends or writes one sends only bytes it has put there, and pads what must be padded.
//!
//! **Bound.** The pages of all buffers in use are permits of one semaphore; who finds none waits in line, so a
//! large request is not starved by small ones. A request takes everything it needs in one go ([`Pool::take`] with
//! several sizes), so that two requests never wait for each other. Freed buffers are kept for reuse, because
//! mapping and faulting in 16 MiB costs more than filling it; what is kept is bounded too.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    ops::{Deref, DerefMut},
    ptr::NonNull,
    sync::Arc,
};

use fjordfs_proto::PAGE_SIZE;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Capacities that buffers come in, pages. The larger ones leave room for a header and an integrity table beside a
/// power of two of data; the largest holds the record of a whole block.
const CLASSES: [u32; 8] = [4, 16, 64, 272, 528, 1040, 2064, 4112];

/// Memory under one allocation.
struct Raw(NonNull<u8>);

// SAFETY: a `Raw` is the only owner of its allocation.
unsafe impl Send for Raw {}

/// Where buffers come from and go back to.
pub(crate) struct Pool {
    permits: Arc<Semaphore>,
    pages_max: u32,
    idle: Mutex<Idle>,
}

struct Idle {
    by_class: [Vec<Raw>; CLASSES.len()],
    pages: usize,
    pages_max: usize,
}

impl Pool {
    /// A pool of which at most `bytes_max` are in use and another quarter of it is kept for reuse.
    pub(crate) fn new(bytes_max: usize) -> Arc<Pool> {
        let pages_max = (bytes_max / PAGE_SIZE).clamp(4 * 4112, u32::MAX as usize / 2) as u32;
        let idle = Idle { by_class: Default::default(), pages: 0, pages_max: pages_max as usize / 4 };
        Arc::new(Pool {
            permits: Arc::new(Semaphore::new(pages_max as usize)),
            pages_max,
            idle: Mutex::new(idle),
        })
    }

    /// One buffer for each number of pages in `sizes`; waits until there is room for all of them at once.
    ///
    /// `None` when one is larger than a record or all together are larger than the pool.
    pub(crate) async fn take(self: &Arc<Pool>, sizes: &[usize]) -> Option<Vec<PageBuf>> {
        let classes: Vec<usize> = sizes.iter().map(|pages| class_of(*pages)).collect::<Option<_>>()?;
        let total = classes.iter().try_fold(0u32, |sum, c| sum.checked_add(CLASSES[*c]))?;
        if total > self.pages_max {
            return None;
        }
        let mut permit = self.permits.clone().acquire_many_owned(total).await.ok()?;
        let mut out = Vec::with_capacity(classes.len());
        for class in classes {
            let share = permit.split(CLASSES[class] as usize)?;
            let kept = {
                let mut idle = self.idle.lock();
                let kept = idle.by_class[class].pop();
                idle.pages -= kept.as_ref().map_or(0, |_| CLASSES[class] as usize);
                kept
            };
            let raw = kept.unwrap_or_else(|| allocate(CLASSES[class] as usize));
            out.push(PageBuf {
                raw: raw.0,
                pages: CLASSES[class] as usize,
                home: Some((self.clone(), class, share)),
            });
        }
        Some(out)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (class, raws) in self.idle.get_mut().by_class.iter_mut().enumerate() {
            for raw in raws.drain(..) {
                release(raw, CLASSES[class] as usize);
            }
        }
    }
}

fn class_of(pages: usize) -> Option<usize> {
    CLASSES.iter().position(|class| *class as usize >= pages)
}

fn layout(pages: usize) -> Layout {
    // SAFETY: the alignment is a power of two, and the size (at most some MiB here) does not overflow.
    unsafe { Layout::from_size_align_unchecked(pages.max(1) * PAGE_SIZE, PAGE_SIZE) }
}

fn allocate(pages: usize) -> Raw {
    // SAFETY: the layout's size is not zero.
    let raw = unsafe { alloc_zeroed(layout(pages)) };
    Raw(NonNull::new(raw).unwrap_or_else(|| handle_alloc_error(layout(pages))))
}

fn release(raw: Raw, pages: usize) {
    // SAFETY: allocated with this layout by `allocate`, and `raw` is its only owner.
    unsafe { dealloc(raw.0.as_ptr(), layout(pages)) };
}

/// A page-aligned buffer of whole pages. Its bytes are always initialised, but may be left over from earlier use.
pub(crate) struct PageBuf {
    raw: NonNull<u8>,
    pages: usize,
    home: Option<(Arc<Pool>, usize, OwnedSemaphorePermit)>,
}

// SAFETY: a `PageBuf` is the only owner of its memory.
unsafe impl Send for PageBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for PageBuf {}

impl PageBuf {
    /// A zeroed buffer outside any pool: start-up, volume labels, tests.
    pub(crate) fn unpooled(pages: usize) -> PageBuf {
        PageBuf { raw: allocate(pages).0, pages, home: None }
    }
}

impl Deref for PageBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `pages` pages from `raw` on are allocated, initialised and owned by `self`.
        unsafe { std::slice::from_raw_parts(self.raw.as_ptr(), self.pages * PAGE_SIZE) }
    }
}

impl DerefMut for PageBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.raw.as_ptr(), self.pages * PAGE_SIZE) }
    }
}

impl Drop for PageBuf {
    fn drop(&mut self) {
        let raw = Raw(self.raw);
        if let Some((pool, class, _permit)) = &self.home {
            let mut idle = pool.idle.lock();
            if idle.pages + self.pages <= idle.pages_max {
                idle.pages += self.pages;
                idle.by_class[*class].push(raw);
                return;
            }
        }
        release(raw, self.pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_pool_makes_callers_wait_and_an_impossible_request_fails() {
        let pool = Pool::new(0);
        let all = pool.take(&[4112, 4112, 4112, 4112]).await.unwrap();
        assert!(
            all.iter()
                .all(|b| (b.as_ptr() as usize).is_multiple_of(PAGE_SIZE) && b.len() == 4112 * PAGE_SIZE)
        );
        let waiting = pool.take(&[1]);
        tokio::pin!(waiting);
        assert!(futures_util::poll!(waiting.as_mut()).is_pending());
        drop(all);
        assert_eq!(waiting.await.unwrap()[0].len(), 4 * PAGE_SIZE);
        assert!(pool.take(&[4113]).await.is_none());
        assert!(pool.take(&[4112; 5]).await.is_none());
        assert_eq!(pool.permits.available_permits(), 4 * 4112);
        assert!(pool.idle.lock().pages <= 4112);
    }
}
