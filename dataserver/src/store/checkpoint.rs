//! The index on disk, so that a start need not read every header.
//!
//! ```text
//!   | FJINDEX1 | version u32 | next volume u32 | volumes u64 | target uuid 16 |
//!   | per volume: id u32, zero u32, salt u64, size u64, position u64 |
//!   | per shard: 20 bytes (index.rs) | ... | shards u64 | zero u32 | CRC32C of everything before it u32 |
//! ```
//!
//! **Consistency.** A checkpoint holds every shard whose record lies before its volume's `position`, as of some moment
//! between beginning and end of writing it, and perhaps some that were deleted meanwhile. That is enough, because
//! recovery believes an entry only where its record is not a hole, and scans from `position` on.
//!
//! **Crash consistency.** The order is: note positions; write the entries; wait for deletions that have left the index
//! but not yet punched their hole; sync the volumes; only then make the checkpoint current. So every entry of a current
//! checkpoint is on stable storage, and every record that it leaves out is a hole there. Empty volumes are removed after
//! a checkpoint that no longer names them is current: a volume that a checkpoint names and that is missing has been lost.

use fjordfs_proto::crc32c::{crc32c, crc32c_append};
use std::io::{self, Write};

use super::{
    index::{ENTRY_LEN, Entry, decode, encode},
    volume::VolumeId,
};

const MAGIC: &[u8; 8] = b"FJINDEX1";

/// Versions of the checkpoint. 1: first.
const VERSION: u32 = 1;

const HEADER_LEN: usize = 40;
const VOLUME_LEN: usize = 32;
const TRAILER_LEN: usize = 16;

/// A volume as a checkpoint knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CheckpointVolume {
    pub(crate) id: VolumeId,
    pub(crate) salt: u64,
    pub(crate) size: u64,
    /// Where a scan must begin.
    pub(crate) position: u64,
}

/// What stands before the shards.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct CheckpointHead {
    pub(crate) uuid: [u8; 16],
    /// Lowest volume id that was never used.
    pub(crate) next_volume: u32,
    pub(crate) volumes: Vec<CheckpointVolume>,
}

/// A checkpoint being written.
pub(crate) struct CheckpointWriter<'a> {
    out: &'a mut dyn Write,
    crc: u32,
    shards: u64,
}

impl<'a> CheckpointWriter<'a> {
    pub(crate) fn begin(out: &'a mut dyn Write, head: &CheckpointHead) -> io::Result<CheckpointWriter<'a>> {
        let mut writer = CheckpointWriter { out, crc: 0, shards: 0 };
        writer.put(MAGIC)?;
        writer.put(&VERSION.to_le_bytes())?;
        writer.put(&head.next_volume.to_le_bytes())?;
        writer.put(&(head.volumes.len() as u64).to_le_bytes())?;
        writer.put(&head.uuid)?;
        for v in &head.volumes {
            writer.put(&u64::from(v.id.0).to_le_bytes())?;
            writer.put(&v.salt.to_le_bytes())?;
            writer.put(&v.size.to_le_bytes())?;
            writer.put(&v.position.to_le_bytes())?;
        }
        Ok(writer)
    }

    pub(crate) fn add(&mut self, entry: &Entry) -> io::Result<()> {
        self.shards += 1;
        self.put(&encode(entry))
    }

    pub(crate) fn end(mut self) -> io::Result<()> {
        self.put(&self.shards.to_le_bytes())?;
        self.put(&[0; 4])?;
        let crc = self.crc;
        self.out.write_all(&crc.to_le_bytes())
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.crc = crc32c_append(self.crc, bytes);
        self.out.write_all(bytes)
    }
}

/// A checkpoint that has been read and verifies.
pub(crate) struct Checkpoint<'a> {
    pub(crate) head: CheckpointHead,
    entries: &'a [[u8; ENTRY_LEN]],
}

impl Checkpoint<'_> {
    /// `None` when it is damaged, of another version or of another target.
    pub(crate) fn parse<'a>(raw: &'a [u8], uuid: &[u8; 16]) -> Option<Checkpoint<'a>> {
        let (body, crc) = raw.split_at_checked(raw.len().checked_sub(4)?)?;
        if body.len() < HEADER_LEN + TRAILER_LEN - 4 || crc != crc32c(body).to_le_bytes() {
            return None;
        }
        let u32_at = |at: usize| Some(u32::from_le_bytes(body.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(body.get(at..at + 8)?.try_into().ok()?));
        if body[0..8] != *MAGIC || u32_at(8)? != VERSION || body[24..40] != *uuid {
            return None;
        }
        let volume_count = usize::try_from(u64_at(16)?).ok()?;
        let volumes_end = volume_count.checked_mul(VOLUME_LEN)?.checked_add(HEADER_LEN)?;
        let entries = body.get(volumes_end..body.len() - (TRAILER_LEN - 4))?;
        let (entries, rest) = entries.as_chunks::<ENTRY_LEN>();
        if !rest.is_empty() || u64_at(body.len() - 12)? != entries.len() as u64 {
            return None;
        }
        let volumes = (0..volume_count)
            .map(|i| {
                let at = HEADER_LEN + i * VOLUME_LEN;
                Some(CheckpointVolume {
                    id: VolumeId(u32_at(at)?),
                    salt: u64_at(at + 8)?,
                    size: u64_at(at + 16)?,
                    position: u64_at(at + 24)?,
                })
            })
            .collect::<Option<_>>()?;
        let head = CheckpointHead { uuid: *uuid, next_volume: u32_at(12)?, volumes };
        Some(Checkpoint { head, entries })
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = Entry> {
        self.entries.iter().map(decode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fjordfs_proto::{BlockId, ShardNo};
    use proptest::prelude::*;

    fn sample(shards: u64) -> (CheckpointHead, Vec<Entry>, Vec<u8>) {
        let volume = |i: u32| CheckpointVolume {
            id: VolumeId(i),
            salt: u64::from(i) << 40,
            size: 1 << 30,
            position: u64::from(i) * 4096,
        };
        let head = CheckpointHead { uuid: [5; 16], next_volume: 9, volumes: (1..4).map(volume).collect() };
        let entries: Vec<Entry> = (0..shards)
            .map(|i| Entry {
                block: BlockId(i),
                shard: ShardNo(1),
                policy: 2,
                length: 5,
                volume: VolumeId(1),
                page: i as u32,
            })
            .collect();
        let mut raw = Vec::new();
        let mut writer = CheckpointWriter::begin(&mut raw, &head).unwrap();
        entries.iter().for_each(|e| writer.add(e).unwrap());
        writer.end().unwrap();
        (head, entries, raw)
    }

    proptest! {
        #[test]
        fn it_round_trips_and_damage_is_seen(shards in 0..50u64, at in any::<prop::sample::Index>(), bit in 0..8u8, cut in any::<prop::sample::Index>()) {
            let (head, entries, mut raw) = sample(shards);
            let read = Checkpoint::parse(&raw, &[5; 16]).unwrap();
            prop_assert_eq!(&read.head, &head);
            prop_assert_eq!(read.entries().collect::<Vec<_>>(), entries);
            prop_assert!(Checkpoint::parse(&raw, &[6; 16]).is_none());
            prop_assert!(Checkpoint::parse(&raw[..cut.index(raw.len())], &[5; 16]).is_none());
            let i = at.index(raw.len());
            raw[i] ^= 1 << bit;
            prop_assert!(Checkpoint::parse(&raw, &[5; 16]).is_none());
        }
    }
}
