//! What a device has acknowledged and may forget: the bytes that were there before, until a sync.

use std::{collections::HashMap, fs::File, io, os::unix::fs::FileExt, sync::Arc};

use super::SECTOR;

/// A write that may be taken back.
#[derive(Debug)]
struct Write {
    offset: u64,
    before: Vec<u8>,
}

#[derive(Debug)]
struct Pending {
    file: Arc<File>,
    /// Size at the last sync.
    size: u64,
    writes: Vec<Write>,
}

/// By inode number of the file below.
#[derive(Debug, Default)]
pub(super) struct Unsynced(HashMap<u64, Pending>);

impl Unsynced {
    /// To be called before a write.
    pub(super) fn note(&mut self, ino: u64, file: &Arc<File>, offset: u64, len: usize) -> io::Result<()> {
        let size = file.metadata()?.len();
        let pending = (self.0.entry(ino)).or_insert_with(|| Pending {
            file: Arc::clone(file),
            size,
            writes: Vec::new(),
        });
        let mut before = vec![0; len];
        let mut have = 0;
        while have < len {
            match file.read_at(&mut before[have..], offset + have as u64)? {
                0 => break,
                n => have += n,
            }
        }
        pending.writes.push(Write { offset, before });
        Ok(())
    }

    /// The file was synced.
    pub(super) fn synced(&mut self, ino: u64) {
        self.0.remove(&ino);
    }

    /// Restores what was there before, sector by sector, unless `keeps` says that this one had arrived. Returns how many bytes
    /// were restored.
    pub(super) fn take_back(&mut self, mut keeps: impl FnMut() -> bool) -> u64 {
        let mut taken = 0;
        for Pending { file, size, writes } in std::mem::take(&mut self.0).into_values() {
            let mut anything_kept = writes.is_empty();
            for Write { offset, before } in writes.iter().rev() {
                let mut at = 0;
                while at < before.len() {
                    // A sector ends where the next one of the device begins.
                    let rest = SECTOR - (*offset as usize + at) % SECTOR;
                    let end = before.len().min(at + rest);
                    if keeps() {
                        anything_kept = true;
                    } else {
                        file.write_all_at(&before[at..end], offset + at as u64).expect("the file below");
                        taken += (end - at) as u64;
                    }
                    at = end;
                }
            }
            // Of an appended part that never arrived the file does not know either.
            if !anything_kept {
                file.set_len(size).expect("the file below");
            }
        }
        taken
    }
}
