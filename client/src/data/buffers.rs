//! Buffers that bulk data is received into, used again.
//!
//! Memory that a reader has just let go of is still in the CPU's caches; fresh memory has to be mapped and zeroed by the
//! kernel first, page by page, which on a virtual machine costs more than receiving into it.

use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::cache::CHUNK;

/// Buffers kept for later: what one streaming reader has under way.
const KEPT_MAX: usize = 32;

/// Payloads from this size on use a buffer of the pool; it wastes at most as much again.
const LARGE: usize = CHUNK as usize / 2;

/// Free buffers, each as large as a chunk.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    free: Mutex<Vec<Vec<u8>>>,
}

impl Buffers {
    /// An empty buffer with room for `len` bytes.
    pub(super) fn take(self: &Arc<Self>, len: usize) -> Filling {
        if !(LARGE..=CHUNK as usize).contains(&len) {
            return Filling { bytes: Vec::with_capacity(len), home: Weak::new() };
        }
        let free = self.free.lock().pop();
        let bytes = free.unwrap_or_else(|| Vec::with_capacity(CHUNK as usize));
        Filling { bytes, home: Arc::downgrade(self) }
    }
}

/// A buffer being filled; it goes back to its pool with the last `Bytes` that shows it.
#[derive(Debug)]
pub(super) struct Filling {
    pub(super) bytes: Vec<u8>,
    home: Weak<Buffers>,
}

impl Filling {
    pub(super) fn freeze(mut self) -> Bytes {
        match self.home.strong_count() {
            0 => Bytes::from(std::mem::take(&mut self.bytes)),
            _ => Bytes::from_owner(self),
        }
    }
}

impl AsRef<[u8]> for Filling {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        if let Some(home) = self.home.upgrade() {
            let mut bytes = std::mem::take(&mut self.bytes);
            bytes.clear();
            let mut free = home.free.lock();
            if free.len() < KEPT_MAX {
                free.push(bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_buffer_comes_back_empty_and_small_ones_do_not() {
        let buffers = Arc::new(Buffers::default());
        let mut filling = buffers.take(CHUNK as usize);
        filling.bytes.extend_from_slice(b"data");
        let memory = filling.bytes.as_ptr();
        let bytes = filling.freeze();
        let part = bytes.slice(1..3);
        drop(bytes);
        assert_eq!((&part[..], buffers.free.lock().len()), (&b"at"[..], 0), "still shown");
        drop(part);
        let again = buffers.take(LARGE);
        assert_eq!((again.bytes.as_ptr(), again.bytes.len()), (memory, 0));
        drop(buffers.take(4096));
        drop(buffers.take(2 * CHUNK as usize));
        assert_eq!(buffers.free.lock().len(), 0);
    }

    #[test]
    fn not_everything_is_kept() {
        let buffers = Arc::new(Buffers::default());
        let many: Vec<_> = (0..2 * KEPT_MAX).map(|_| buffers.take(CHUNK as usize).freeze()).collect();
        drop(many);
        assert_eq!(buffers.free.lock().len(), KEPT_MAX);
    }
}
