//! Where files use certain blocks, and which files lie in many pieces.

use std::collections::HashSet;

use fjordfs_proto::{
    InodeId,
    interval::Run,
    pb::meta::{BlockUse, UsesRequest},
};

use super::{Report, Source, each_record};
use crate::{
    keys,
    records::ExtentRecord,
    store::{Reading, StoreError},
};

/// One of the answers.
pub(crate) enum Found {
    Use(BlockUse),
    /// A file of many small extents.
    Scattered(InodeId),
}

/// Extents of the file that is being looked at.
#[derive(Default)]
struct File {
    ino: u64,
    extents: u64,
    bytes: u64,
}

impl File {
    fn is_scattered(&self, asked: &UsesRequest) -> bool {
        let min = u64::from(asked.extents_min);
        min > 0 && self.extents >= min && self.bytes / self.extents <= asked.extent_bytes_max
    }
}

/// Goes through all extents. Records that make no sense are left out: a check says more of those.
pub(crate) fn read(
    store: &dyn Reading,
    asked: &UsesRequest,
    mut found: impl FnMut(Found),
) -> Result<(), StoreError> {
    let source = &Source { store, tell: &|_| {}, read: Default::default() };
    let blocks: HashSet<u64> = asked.blocks.iter().copied().collect();
    let mut file = File::default();
    each_record(source, keys::EXTENT, &mut Report::default(), |report, ino, key, record: ExtentRecord| {
        let offset = keys::second_id(key).unwrap_or(u64::MAX);
        let extent = match record.extent(InodeId(ino), offset) {
            Ok(extent) => extent,
            Err(e) => return report.problem(e.message),
        };
        if file.ino != ino {
            let before = std::mem::replace(&mut file, File { ino, ..File::default() });
            if before.is_scattered(asked) {
                found(Found::Scattered(InodeId(before.ino)));
            }
        }
        (file.extents, file.bytes) = (file.extents + 1, file.bytes + extent.len());
        for piece in extent.pieces().filter(|piece| blocks.contains(&piece.block.0)) {
            found(Found::Use(BlockUse {
                ino,
                offset: offset + piece.from,
                block: piece.block.0,
                block_offset: piece.offset,
                length: piece.length,
            }));
        }
    })?;
    if file.is_scattered(asked) {
        found(Found::Scattered(InodeId(file.ino)));
    }
    Ok(())
}
