//! Memory for parity shards, used again.
//!
//! Fresh memory has to be mapped and zeroed by the kernel page by page, which takes longer than encoding into it. What is
//! under way is bounded: whoever encodes waits until shards of others have been sent. As much again is kept for later.

use std::sync::{Arc, Weak};

use bytes::Bytes;
use fjordfs_proto::{FsError, FsResult, Layout, PAGE_SIZE, error::Errno};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Buffers in use and free.
pub(super) struct ParityBuffers {
    pages_max: u32,
    room: Arc<Semaphore>,
    free: Mutex<Vec<Vec<u8>>>,
}

/// Room for the parity shards of one block.
#[derive(Debug)]
pub(super) struct Room {
    /// `None` for copies, which have no parity.
    permit: Option<OwnedSemaphorePermit>,
    home: Weak<ParityBuffers>,
    pages_each: usize,
}

/// One parity shard; the memory goes back with the last `Bytes` that shows it.
#[derive(Debug)]
pub(super) struct Parity {
    /// At least `len` bytes.
    bytes: Vec<u8>,
    len: usize,
    home: Weak<ParityBuffers>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl ParityBuffers {
    /// For at most so many bytes under way, and as many kept.
    pub(super) fn new(bytes_max: u64) -> Arc<ParityBuffers> {
        let pages_max = (bytes_max / PAGE_SIZE as u64).clamp(1, 1 << 20) as u32;
        Arc::new(ParityBuffers {
            pages_max,
            room: Arc::new(Semaphore::new(pages_max as usize)),
            free: Mutex::default(),
        })
    }

    /// Waits for room for the parity of one block. A block that needs more than there is gets all of it.
    ///
    /// # Errors
    /// `EIO` when the client is being shut down.
    pub(super) async fn room(self: &Arc<Self>, layout: Layout) -> FsResult<Room> {
        let home = Arc::downgrade(self);
        let Layout::Ec { m, shard_pages, .. } = layout else {
            return Ok(Room { permit: None, home, pages_each: 0 });
        };
        // Of each buffer the same, and no more than there is.
        let pages_each = u32::from(shard_pages.get()).min(self.pages_max / u32::from(m.get()));
        let permit = self.room.clone().acquire_many_owned(pages_each * u32::from(m.get())).await;
        let permit = permit.map_err(|_| FsError::new(Errno::EIO, "the client was shut down"))?;
        Ok(Room { permit: Some(permit), home, pages_each: pages_each as usize })
    }

    fn take(&self, len: usize) -> Vec<u8> {
        let mut free = self.free.lock();
        // Mostly all of one size; a much larger one would be wasted.
        let fitting = free.iter().position(|buffer| (len..=2 * len).contains(&buffer.len()));
        let found = fitting.map(|at| free.swap_remove(at));
        drop(free);
        found.unwrap_or_else(|| vec![0; len])
    }

    fn give_back(&self, bytes: Vec<u8>) {
        let mut free = self.free.lock();
        free.push(bytes);
        let mut kept = free.iter().map(Vec::len).sum::<usize>();
        // The oldest go: they have not been fitting.
        while kept > self.pages_max as usize * PAGE_SIZE {
            kept -= free.remove(0).len();
        }
    }
}

impl Room {
    /// A buffer of `len` bytes, whatever is in it.
    pub(super) fn buffer(&mut self, len: usize) -> Parity {
        let home = self.home.upgrade();
        Parity {
            bytes: home.map_or_else(|| vec![0; len], |home| home.take(len)),
            len,
            home: self.home.clone(),
            _permit: self.permit.as_mut().and_then(|permit| permit.split(self.pages_each)),
        }
    }
}

impl AsMut<[u8]> for Parity {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.len]
    }
}

impl AsRef<[u8]> for Parity {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl From<Parity> for Bytes {
    fn from(parity: Parity) -> Bytes {
        Bytes::from_owner(parity)
    }
}

impl Drop for Parity {
    fn drop(&mut self) {
        if let Some(home) = self.home.upgrade() {
            home.give_back(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use fjordfs_proto::{BLOCK_SIZE_MAX, Policy};

    use super::*;

    fn layout(k: u8, m: u8) -> Layout {
        Layout::of(Policy::ec(k, m).unwrap(), BLOCK_SIZE_MAX)
    }

    #[tokio::test]
    async fn memory_comes_back_and_bounds_what_is_under_way() {
        let buffers = ParityBuffers::new(16 << 20);
        let mut room = buffers.room(layout(2, 1)).await.unwrap();
        let parity = room.buffer(8 << 20);
        let memory = parity.bytes.as_ptr();
        let shown = Bytes::from(parity);
        let second = buffers.room(layout(2, 1)).await.unwrap();
        let third = buffers.room(layout(2, 1));
        let mut third = std::pin::pin!(third);
        assert!(futures_util::poll!(&mut third).is_pending(), "two are all");
        drop((room, shown));
        let mut third = third.await.unwrap();
        let again = third.buffer(8 << 20);
        assert_eq!(again.bytes.as_ptr(), memory);
        drop((second, again));
        assert_eq!(buffers.free.lock().len(), 1);
    }

    #[tokio::test]
    async fn a_block_with_more_parity_than_fits_has_its_turn() {
        let buffers = ParityBuffers::new(8 << 20);
        for _ in 0..3 {
            let mut room = buffers.room(layout(2, 6)).await.unwrap();
            let parity: Vec<Parity> = (0..6).map(|_| room.buffer(8 << 20)).collect();
            assert!(parity.iter().all(|parity| parity.as_ref().len() == 8 << 20));
        }
        assert_eq!(buffers.room.available_permits(), buffers.pages_max as usize);
        assert!(buffers.free.lock().iter().map(Vec::len).sum::<usize>() <= 8 << 20);
        assert!(buffers.room(Layout::of(Policy::replica(2).unwrap(), 1)).await.unwrap().permit.is_none());
    }
}
