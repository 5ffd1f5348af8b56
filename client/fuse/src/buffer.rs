//! Read buffers for /dev/fuse, recycled.
//!
//! A large WRITE is not copied: the buffer it was read into becomes the `Bytes` that travels through the client library, and
//! comes back here when the last reference to it is dropped. A fresh megabyte from the allocator would cost 256 page faults
//! a time, about as much as the copy that was saved.
//!
//! Requests are read to [`RequestBuffer::HEAD_OFFSET`], so that the data of a WRITE, 80 bytes further on, begins on a page: the
//! kernel then copies whole pages, and checksums and encoding run on aligned memory.

use std::alloc::{self, Layout};
use std::ptr::NonNull;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::abi::{InHeader, WriteIn};

const PAGE: usize = 4096;

/// Buffers of one size, shared by all workers of a mount.
#[derive(Debug)]
pub(crate) struct BufferPool {
    capacity: usize,
    idle_max: usize,
    idle: Mutex<Vec<Memory>>,
}

impl BufferPool {
    /// Buffers for requests with up to `data_max` bytes of data; at most `idle_max` are kept while not in use.
    pub(crate) fn new(data_max: usize, idle_max: usize) -> Arc<BufferPool> {
        // One page before the data for the headers, one behind it for requests with names. The kernel refuses to read
        // into less than 8 KiB (FUSE_MIN_READ_BUFFER).
        let capacity = PAGE + data_max.next_multiple_of(PAGE).max(2 * PAGE) + PAGE;
        Arc::new(BufferPool { capacity, idle_max, idle: Mutex::new(Vec::new()) })
    }

    pub(crate) fn take(self: &Arc<Self>) -> RequestBuffer {
        let memory = self.idle.lock().pop().unwrap_or_else(|| Memory::new(self.capacity));
        RequestBuffer { memory: Some(memory), pool: Arc::clone(self) }
    }

    /// A copy of a WRITE's data, page-aligned and in a recycled buffer where it is worth one.
    pub(crate) fn copy_data(self: &Arc<Self>, data: &[u8]) -> Bytes {
        const DATA: usize = RequestBuffer::HEAD_LEN;
        if data.len() < self.capacity / 2 {
            return Bytes::copy_from_slice(data);
        }
        let mut buffer = self.take();
        match buffer.request_mut().get_mut(DATA..DATA + data.len()) {
            Some(room) => room.copy_from_slice(data),
            None => return Bytes::copy_from_slice(data),
        }
        buffer.into_request(DATA + data.len()).slice(DATA..)
    }
}

/// A buffer that goes back to its pool when dropped.
#[derive(Debug)]
pub(crate) struct RequestBuffer {
    /// `None` only while being dropped.
    memory: Option<Memory>,
    pool: Arc<BufferPool>,
}

impl RequestBuffer {
    const HEAD_LEN: usize = size_of::<InHeader>() + size_of::<WriteIn>();
    const HEAD_OFFSET: usize = PAGE - Self::HEAD_LEN;

    /// Where to read the next request to.
    pub(crate) fn request_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Some(memory) => &mut memory.as_mut_slice()[Self::HEAD_OFFSET..],
            None => &mut [],
        }
    }

    /// Whether data of this length is worth giving the buffer away: less than half of it would hold memory in the client's
    /// caches that their accounting does not see, and copying it costs little.
    pub(crate) fn is_mostly(&self, len: usize) -> bool {
        len >= self.pool.capacity / 2
    }

    /// The first `len` bytes of the request, copied.
    pub(crate) fn copy_request(&mut self, len: usize) -> Bytes {
        let request = self.request_mut();
        Bytes::copy_from_slice(&request[..len.min(request.len())])
    }

    /// The first `len` bytes of the request; the buffer lives as long as they do.
    pub(crate) fn into_request(self, len: usize) -> Bytes {
        let end = (Self::HEAD_OFFSET + len).min(self.pool.capacity);
        Bytes::from_owner(self).slice(Self::HEAD_OFFSET..end)
    }
}

impl AsRef<[u8]> for RequestBuffer {
    fn as_ref(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], Memory::as_slice)
    }
}

impl Drop for RequestBuffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            let mut idle = self.pool.idle.lock();
            if idle.len() < self.pool.idle_max {
                idle.push(memory);
            }
        }
    }
}

/// Page-aligned memory.
#[derive(Debug)]
struct Memory {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: `Memory` owns its allocation exclusively, like a `Box<[u8]>`.
unsafe impl Send for Memory {}
// SAFETY: shared references only read.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(len: usize) -> Memory {
        // A length near usize::MAX is a programmer's error; sizes are checked when options are read.
        let layout =
            Layout::from_size_align(len.max(1), PAGE).unwrap_or_else(|_| Layout::new::<[u8; PAGE]>());
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc::alloc_zeroed(layout) };
        match NonNull::new(start) {
            Some(start) => Memory { start, layout },
            None => alloc::handle_alloc_error(layout),
        }
    }

    fn as_slice(&self) -> &[u8] {
        // SAFETY: the allocation is this long, initialised (zeroed), and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { alloc::dealloc(self.start.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_of_a_write_is_page_aligned_and_the_buffer_returns() {
        let pool = BufferPool::new(1 << 20, 1);
        let mut buffer = pool.take();
        buffer.request_mut()[80] = 42;
        let first = buffer.as_ref().as_ptr();
        let request = buffer.into_request(80 + (1 << 20));
        let data = request.slice(80..);
        assert_eq!(data.as_ptr().addr() % PAGE, 0);
        assert_eq!((data.len(), data[0]), (1 << 20, 42));
        drop(request);
        assert!(pool.idle.lock().is_empty());
        drop(data);
        assert_eq!(pool.take().as_ref().as_ptr(), first);
    }

    #[test]
    fn copied_data_is_page_aligned_and_whole() {
        let pool = BufferPool::new(1 << 20, 1);
        let data: Vec<u8> = (0..1usize << 20).map(|i| (i / 7) as u8).collect();
        for len in [0, 1, 5000, 1 << 19, 1 << 20] {
            assert!(pool.copy_data(&data[..len]) == data[..len], "{len}");
        }
        assert_eq!(pool.copy_data(&data).as_ptr().addr() % PAGE, 0);
        // More than a buffer has room for.
        assert_eq!(pool.copy_data(&vec![7; 3 << 20]).len(), 3 << 20);
    }

    #[test]
    fn only_a_few_idle_buffers_are_kept() {
        let pool = BufferPool::new(4096, 2);
        drop([pool.take(), pool.take(), pool.take()]);
        assert_eq!(pool.idle.lock().len(), 2);
    }
}
