//! Files that are being read in order, all together.
//!
//! Each of several streams may fit into the cache and all of them may not. Then what they have passed is worth nothing: it will be gone when
//! anybody comes back to it, and until then it takes new memory where memory that is still warm could be used again.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use fjordfs_proto::InodeId;
use parking_lot::Mutex;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    /// Readers of each file, and its size when the first of them came.
    files: Mutex<BTreeMap<InodeId, (usize, u64)>>,
    /// Of `files`, for a look without the lock.
    bytes: AtomicU64,
}

impl Streams {
    /// A handle's reader turns out to be sequential.
    pub(crate) fn begin(&self, ino: InodeId, size: u64) {
        let mut files = self.files.lock();
        let (readers, _) = files.entry(ino).or_insert((0, size));
        *readers += 1;
        if *readers == 1 {
            self.bytes.fetch_add(size, Relaxed);
        }
    }

    /// It is not any more, or closes the file.
    pub(crate) fn end(&self, ino: InodeId) {
        let mut files = self.files.lock();
        let Some((readers, size)) = files.get_mut(&ino) else { return };
        *readers -= 1;
        if *readers == 0 {
            self.bytes.fetch_sub(*size, Relaxed);
            files.remove(&ino);
        }
    }

    /// Bytes of all these files.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_counts_once_until_its_last_reader_leaves() {
        let streams = Streams::default();
        streams.begin(InodeId(1), 100);
        streams.begin(InodeId(2), 50);
        // It has grown meanwhile.
        streams.begin(InodeId(1), 130);
        assert_eq!(streams.bytes(), 150);
        streams.end(InodeId(1));
        assert_eq!(streams.bytes(), 150);
        streams.end(InodeId(1));
        assert_eq!(streams.bytes(), 50);
        streams.end(InodeId(1));
        streams.end(InodeId(2));
        assert_eq!(streams.bytes(), 0);
    }
}
