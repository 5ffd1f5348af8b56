//! Extents of files that were looked up: whoever opens one next need not ask for them. Nothing else keeps them valid than the
//! version of the bytes, which the file's attributes must have.

use bytes::Bytes;
use fjordfs_proto::{InodeId, pb::meta::ExtentsReply};
use lru::LruCache;

/// Most bytes kept: thousands of files whose bytes are in their extents.
const BYTES_MAX: usize = 32 << 20;

/// What a file costs beside its bytes.
const OVERHEAD: usize = 256;

/// See the module.
#[derive(Debug)]
pub(super) struct Extents {
    by_inode: LruCache<InodeId, ExtentsReply>,
    bytes: usize,
}

impl Default for Extents {
    fn default() -> Extents {
        Extents { by_inode: LruCache::unbounded(), bytes: 0 }
    }
}

impl Extents {
    pub(super) fn get(&mut self, ino: InodeId) -> Option<ExtentsReply> {
        self.by_inode.get(&ino).cloned()
    }

    pub(super) fn put(&mut self, ino: InodeId, extents: &ExtentsReply) {
        let mut extents = extents.clone();
        for extent in &mut extents.extents {
            // A slice of the message it came in, which it must not keep alive.
            extent.data = Bytes::copy_from_slice(&extent.data);
        }
        self.bytes += cost(&extents);
        if let Some(before) = self.by_inode.put(ino, extents) {
            self.bytes -= cost(&before);
        }
        while self.bytes > BYTES_MAX
            && let Some((_, oldest)) = self.by_inode.pop_lru()
        {
            self.bytes -= cost(&oldest);
        }
    }
}

fn cost(extents: &ExtentsReply) -> usize {
    OVERHEAD + extents.extents.iter().map(|extent| extent.data.len()).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use fjordfs_proto::pb::meta::Extent;

    use super::*;

    fn inline(len: usize, data_version: u64) -> ExtentsReply {
        let data = Bytes::from(vec![7; len]);
        ExtentsReply {
            extents: vec![Extent { data, ..Extent::default() }],
            data_version,
            ..ExtentsReply::default()
        }
    }

    #[test]
    fn the_last_ones_stay_within_the_bound() {
        let mut extents = Extents::default();
        let count = 2 * BYTES_MAX as u64 / 4096;
        for i in 0..count {
            extents.put(InodeId(i), &inline(4096, i));
            extents.put(InodeId(i), &inline(4096, i));
        }
        assert!(extents.bytes <= BYTES_MAX && extents.bytes > BYTES_MAX / 2);
        assert_eq!(extents.bytes, extents.by_inode.iter().map(|(_, e)| cost(e)).sum::<usize>());
        assert!(extents.get(InodeId(0)).is_none());
        assert_eq!(extents.get(InodeId(count - 1)), Some(inline(4096, count - 1)));
    }
}
